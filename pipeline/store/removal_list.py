"""The removal list: pictures that a root has been asked to forget, and when; never who asked.

    <root>/forgotten/<id>.json        a request: keys and URLs, sha256 of pictures' bodies; never changed
    <root>/forgotten/done/<id>.json   says that `pipeline.verbs.data.forgetting` has carried it out to the end

From the moment of the request no download asks for these pictures any more, whatever its config, nor keeps a body of
these bytes, wherever it comes from; `data.removed` keeps pictures out of a plan, and is part of that plan's identity.
The hash of a picture is on the list before the picture goes, for only what is stored tells it.
"""

import json
import re
import uuid
from collections.abc import Iterable, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pyarrow as pa

from datasets.files import json_files, notices, storage
from datasets.files.storage import CorruptFile
from datasets.formats import removal, shards
from datasets.planning import plan
from datasets.planning.urls import normalised_url
from pipeline.errors import UsageError
from pipeline.store.artifacts import Store

FOLDER = "forgotten"
NAME = r"[^./][^/]*\.json"
INDEX = re.compile(r"\d{5,}\.parquet")  # as `shards.index_name` has it
OURS = r"\d{4}-\d\d-\d\dT\d{6}\+0000-[0-9a-f]{6}\.json"  # as `add` calls them


@dataclass(frozen=True)
class Request:
    """Keys, URLs and sha256 of bodies that shall be forgotten, when that was asked, and whether it is done."""

    id: str
    when: str
    keys: tuple[str, ...]
    urls: tuple[str, ...]
    bodies: tuple[str, ...]
    done: bool


def requests(root: str) -> list[Request]:
    """All requests of a root, oldest first."""
    folder = storage.join(root, FOLDER)
    done = {name.removeprefix("done/") for name in storage.listing(folder) if name.startswith("done/")}
    told = json_files.read_each(folder, NAME, _request, also="done/.*")
    found = [Request(name.removesuffix(".json"), *request, name in done) for name, request in told.items()]
    return sorted(found, key=lambda request: request.when)


def _request(told: dict[str, Any]) -> tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    told.setdefault("sha256", [])  # requests from before have none
    json_files.require(told, str, "when")
    json_files.require(told, list[str], "keys", "urls", "sha256")
    return told["when"], tuple(told["keys"]), tuple(told["urls"]), tuple(told["sha256"])


def add(root: str, names: Set[str]) -> None:
    """Put keys, normalised URLs and sha256 of bodies on the list, those that are not there yet."""
    new = names - refused(root)
    if not new:
        return
    when = datetime.now(UTC).isoformat(timespec="seconds")
    keys, bodies = ({name for name in new if kind.fullmatch(name)} for kind in (shards.KEY, shards.BODY))
    told = {"when": when, "keys": sorted(keys), "urls": sorted(new - keys - bodies), "sha256": sorted(bodies)}
    name = f"{when.replace(':', '')}-{uuid.uuid4().hex[:6]}.json"
    storage.publish(json.dumps(told, indent=1).encode(), storage.join(root, FOLDER, name))


def close(root: str, request: Request) -> None:
    """Say that a request has been carried out."""
    storage.publish(b"{}", storage.join(root, FOLDER, "done", f"{request.id}.json"))


def refused(root: str) -> frozenset[str]:
    """All that no download of a root keeps any more: keys, URLs, and sha256 of bodies."""
    found = requests(root)
    return frozenset(names_of(found)).union(*(request.bodies for request in found))


def copies(store: Store, keys: Set[str]) -> tuple[set[str], set[str]]:
    """The sha256 of the bodies of some pictures, as far as these are stored, and the keys of all that have the same.

    Of all images, also of those that are not finished.
    """
    bodies = _told(store, "key", keys, "sha256")
    return bodies, _told(store, "sha256", bodies, "key")


def _told(store: Store, column: str, values: Set[str], wanted: str) -> set[str]:
    """What the tables beside all tars of pictures tell, as of `removal.told`.

    A damaged one is passed over: its shard has to be made anew, which keeps nothing that is on the list.
    """
    found: set[str] = set()
    paths = [
        storage.join(folder, name)
        for folder in (store.folders("images") if values else ())
        for name in storage.children(folder)[0]
        if INDEX.fullmatch(name)
    ]
    for path, content in zip(paths, storage.ahead(partial(storage.read, path) for path in paths), strict=True):
        try:
            found |= removal.told(content, column, values, wanted)
        except (pa.ArrowException, OSError) as error:
            notices.tell(notices.PassedOver(path, f"it is damaged: {error}"))
    return found


def names_of(found: Iterable[Request]) -> dict[str, str]:
    """Every key and URL of some requests, and when it was first asked for."""
    dates: dict[str, str] = {}
    for request in found:
        for name in (*request.keys, *request.urls):
            dates.setdefault(name, request.when)
    return dates


def check_carried_out(root: str) -> None:
    """Refuse to go on while a removal that was killed has left pictures behind, or nobody knows what was asked.

    Raises:
        UsageError: says what to do.
    """
    try:
        json_files.read_every(storage.join(root, FOLDER), OURS, _request, also=".*")
    except CorruptFile as error:
        raise UsageError(
            f"{error}; it names pictures that must not be downloaded again: put it back from a copy, or delete it if "
            "there is none"
        ) from None
    waiting = [request for request in requests(root) if not request.done]
    if waiting:
        raise UsageError(
            f"root={root}: forgetting {len(names_of(waiting))} pictures, asked for on {waiting[0].when}, has not come "
            "to its end; go on with it: python -m pipeline data forget"
        )


def listed(keys: str, urls: str, file: str) -> frozenset[str]:
    """Keys and normalised URLs from `keys=` and `urls=` (separated by commas or spaces) and from the file of `from=`.

    Raises:
        UsageError: a word is neither.
        DataError: a line of the file is neither, or there is no such file.
    """
    found = set(plan.removals(file or None, "from"))
    for key in re.split(r"[,\s]+", keys.strip()) if keys.strip() else ():
        if not shards.KEY.fullmatch(key):
            raise UsageError(f"keys={key}: a key has 32 hex digits; `data trace` and the names of pictures tell it")
        found.add(key)
    for url in urls.split():
        try:
            found.add(normalised_url(url))
        except ValueError as error:
            raise UsageError(f"urls={url}: {error}") from None
    return frozenset(found)
