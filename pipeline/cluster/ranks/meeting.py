"""Where ranks meet: at the addresses that their nodes have in Ray.

Gloo would listen at what a machine's own name stands for. That is loopback on Debian's machines, and nothing at all
where no name server knows it: ranks of other nodes would then connect to themselves, in vain.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

GLOO = "GLOO_SOCKET_IFNAME"  # who sets it has a reason


class Backend(_TorchBackend):
    """Ray's, whose ranks first look where to listen."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(listen_where_ray_does)
        super().on_start(worker_group, backend_config)


class Meeting(TorchConfig):
    """How the ranks of a training become one process group."""

    @property
    def backend_cls(self) -> type[Backend]:
        return Backend


def listen_where_ray_does() -> None:
    """Have Gloo listen on the interface with this node's address in Ray, if that is on one."""
    cards = {name: [address.address for address in addresses] for name, addresses in psutil.net_if_addrs().items()}
    if card := interface(cards, ray.util.get_node_ip_address()):
        os.environ.setdefault(GLOO, card)


def interface(cards: Mapping[str, Sequence[str]], address: str) -> str | None:
    """The interface whose first address it is, which Gloo takes; a node behind a translated address has it on none."""
    return next((name for name, addresses in cards.items() if addresses and addresses[0] == address), None)
