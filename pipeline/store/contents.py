"""What lies at a path, as fingerprints know it: its content, wherever it lies and whatever it is called.

A local file is read once: its sha256 is kept in the user's cache folder for as long as its size and times stay the
same, so that a plan need not read gigabytes each time. Of a file at a URI, size and time stand for the content.
"""

import hashlib
import json
import os
import time
from functools import cache
from pathlib import Path

from datasets.files import storage
from pipeline.terminal import console

SHA256, VERSION = "sha256", "version"  # what an identity is: of the bytes, or of a URI with its sizes and times
LARGE = 1 << 30  # bytes: reading them takes seconds, so it is said
SETTLED_NS = 2 * 10**9  # file systems' clocks are coarse: a younger file may change again and keep its time

Seen = tuple[int, int, int, str]  # size in bytes, time of the last change of content and of anything, sha256 in hex


def identity(path: str) -> str:
    """`sha256 <hex>` of a file, or of a folder's visible files by name and content; `version <hex>` of a URI.

    A URI whose store tells no times is read. Where there is nothing, the path stands for itself: `nothing at <path>`.

    Raises:
        OSError: it cannot be read, or the store cannot be reached.
    """
    if not storage.exists(path):
        return f"nothing at {path}"
    if storage.is_remote(path):
        return _remote(path)
    place = Path(storage.absolute(path))
    if place.is_file():
        return f"{SHA256} {_sums([place])[place]}"
    visible = [name for name in storage.listing(str(place)) if not any(part[0] == "." for part in name.split("/"))]
    sums = _sums([place / name for name in visible])
    return f"{SHA256} {_joint({name: sums[place / name] for name in visible})}"


def _remote(path: str) -> str:
    files = storage.stamps(path)
    if None not in files.values():
        return f"{VERSION} {_joint({f'{path}/{name}': str(stamp) for name, stamp in files.items()})}"
    if list(files) == [""]:
        return f"{SHA256} {storage.sha256(path)}"
    return f"{SHA256} {_joint({name: storage.sha256(storage.join(path, name)) for name in files})}"


def _joint(facts: dict[str, str]) -> str:
    lines = "".join(f"{fact}  {name}\n" for name, fact in sorted(facts.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sums(files: list[Path]) -> dict[Path, str]:
    """sha256 of local files, by what was kept where they have not changed since."""
    kept = _kept(_cache())
    sums, new = {}, {}
    for file in files:
        stamp = _stamp(file)
        *before, sums[file] = kept.get(str(file), (None, ""))
        if before == list(stamp):
            continue
        if stamp[0] >= LARGE:
            console.print(f"reading {file} ({stamp[0] / LARGE:.1f} GiB), once", markup=False)
        sums[file] = storage.sha256(str(file))
        if _stamp(file) == stamp and time.time_ns() - stamp[1] > SETTLED_NS:
            new[str(file)] = (*stamp, sums[file])
    if new:
        _keep(_cache(), new)
    return sums


def _stamp(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _cache() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "wuerstchen-pipeline" / "sha256.json"


@cache
def _kept(file: Path) -> dict[str, Seen]:
    """What the cache holds, read once in a process; a damaged one is begun anew."""
    try:
        return {path: tuple(seen) for path, seen in json.loads(file.read_bytes()).items() if len(seen) == 4}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _keep(file: Path, new: dict[str, Seen]) -> None:
    """Add to the cache what is known now, drop what is gone. Of two processes at once, one may have to read again."""
    kept = _kept(file)
    kept.update(new)
    there = {path: seen for path, seen in kept.items() if os.path.exists(path)}
    try:
        storage.publish(json.dumps(there, indent=0).encode(), str(file))
    except OSError as error:
        console.print(
            f"{file} cannot be written ({error.strerror or error}): weights will be read again each time", markup=False
        )
