"""Which network addresses may be asked: those of the public internet, and what a config allows beside them.

Addresses at which clouds give out their machines' keys, and all others of the own link, are never asked: whoever makes
a list of URLs could otherwise read them.
"""

import ipaddress
import re
from collections.abc import Iterable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # RFC 4291, 2.4: nothing else of IPv6 is out there
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last four bytes are an IPv4 address
PROTOCOL = ipaddress.ip_network("192.0.0.0/24")  # RFC 6890: for protocols; Python takes parts of it for global
NEVER = [
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8", "::/128",  # this host
        "169.254.0.0/16", "fe80::/10",  # of the link; 169.254.169.254 and its like tell machines' keys
        "224.0.0.0/4", "255.255.255.255/32", "ff00::/8",  # many at once
        "fd00:ec2::/32", "fd20:ce::/64",  # metadata at AWS and Google, IPv6
        "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32",  # metadata at Alibaba, Azure, Oracle
    )
]  # fmt: skip
_CARRIERS = [  # of an IPv4 address in the last four bytes
    ipaddress.ip_network(network)
    for network in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
]
_NAME = re.compile(r"(?!.*\.\.)(?=.*[a-z])[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


def is_public(address: str) -> bool:
    """Whether an IP address, and every IPv4 address that is packed into it, belongs to the public internet."""
    ip = _parsed(address)
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast and ip not in PROTOCOL and not _is_refused(ip)
    if ip.ipv4_mapped or ip in NAT64:
        return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    packed = (inner for inner in (ip.sixtofour, *(ip.teredo or ())) if inner)
    return ip in GLOBAL_UNICAST and ip.is_global and all(is_public(str(inner)) for inner in packed)


class Allowed:
    """Hosts and networks that may be asked though their addresses are not public.

    Args:
        entries: host names, addresses, and networks such as 10.0.0.0/8.
        private: all of them may.

    Raises:
        ValueError: an entry is none of these, or lies where nobody may be asked.
    """

    def __init__(self, entries: Iterable[str] = (), private: bool = False):
        self._names: set[str] = set()
        self._networks: list[Network] = []
        self._private = private
        for entry in entries:
            try:
                network = ipaddress.ip_network(entry.strip().strip("[]"), strict=False)
            except ValueError:
                self._names.add(_name(entry))
                continue
            if any(network.version == never.version and network.subnet_of(never) for never in NEVER):  # type: ignore[arg-type]
                raise ValueError(f"{entry!r} is never asked (link-local, metadata, multicast, this host); leave it out")
            self._networks.append(network)

    def admits(self, host: str, address: str) -> bool:
        """Whether `host` may be asked at an IP address that it has."""
        if is_public(address):
            return True
        ip = _parsed(address)
        if any(_is_refused(one) for one in _with_packed(ip)):
            return False
        listed = any(one in network for one in _with_packed(ip) for network in self._networks)
        return self._private or listed or host.lower().rstrip(".") in self._names


def _parsed(address: str) -> Address:
    return ipaddress.ip_address(address.partition("%")[0])  # without the link of an IPv6 address


def _with_packed(ip: Address) -> list[Address]:
    """An address, and all IPv4 addresses that it may stand for."""
    if isinstance(ip, ipaddress.IPv4Address):
        return [ip]
    last = int(ip) > 1 and any(ip in network for network in _CARRIERS)
    packed = (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if last else None, ip.sixtofour, *(ip.teredo or ()))
    return [ip, *(one for one in packed if one)]


def _is_refused(ip: Address) -> bool:
    return any(ip in network for network in NEVER)


def _name(entry: str) -> str:
    """A host's name as URLs and resolvers have it."""
    try:
        name = entry.strip().rstrip(".").encode("idna").decode().lower()
    except UnicodeError:
        name = ""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{entry!r} is neither a host's name nor an address nor a network such as 10.0.0.0/8")
    return name
