"""The removal list: pictures that a root has been asked to forget, and when; never who asked.

    <root>/forgotten/<id>.json        a request: keys and URLs; never changed
    <root>/forgotten/done/<id>.json   says that `pipeline.verbs.forgetting` has carried it out to the end

From the moment of the request no download asks for these pictures any more, whatever its config; `data.removed` keeps
pictures out of a plan, and is part of that plan's identity.
"""

import json
import re
import uuid
from collections.abc import Iterable, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from datasets.files import json_files, storage
from datasets.files.storage import CorruptFile
from datasets.formats import shards
from datasets.planning import plan
from pipeline.errors import UsageError

FOLDER = "forgotten"
NAME = r"[^./][^/]*\.json"
OURS = r"\d{4}-\d\d-\d\dT\d{6}\+0000-[0-9a-f]{6}\.json"  # as `add` calls them


@dataclass(frozen=True)
class Request:
    """Keys and URLs that shall be forgotten, when that was asked, and whether it is done."""

    id: str
    when: str
    keys: tuple[str, ...]
    urls: tuple[str, ...]
    done: bool


def requests(root: str) -> list[Request]:
    """All requests of a root, oldest first."""
    folder = storage.join(root, FOLDER)
    done = {name.removeprefix("done/") for name in storage.listing(folder) if name.startswith("done/")}
    told = json_files.read_each(folder, NAME, _request, also="done/.*")
    found = [Request(name.removesuffix(".json"), *request, name in done) for name, request in told.items()]
    return sorted(found, key=lambda request: request.when)


def _request(told: dict[str, Any]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    json_files.require(told, str, "when")
    json_files.require(told, list[str], "keys", "urls")
    return told["when"], tuple(told["keys"]), tuple(told["urls"])


def add(root: str, names: Set[str]) -> None:
    """Put keys and normalised URLs on the list, those that are not there yet."""
    new = sorted(names - names_of(requests(root)).keys())
    if not new:
        return
    when = datetime.now(UTC).isoformat(timespec="seconds")
    keys = [name for name in new if shards.KEY.fullmatch(name)]
    told = {"when": when, "keys": keys, "urls": sorted(set(new) - set(keys))}
    name = f"{when.replace(':', '')}-{uuid.uuid4().hex[:6]}.json"
    storage.publish(json.dumps(told, indent=1).encode(), storage.join(root, FOLDER, name))


def close(root: str, request: Request) -> None:
    """Say that a request has been carried out."""
    storage.publish(b"{}", storage.join(root, FOLDER, "done", f"{request.id}.json"))


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
            found.add(plan.normalised_url(url))
        except ValueError as error:
            raise UsageError(f"urls={url}: {error}") from None
    return frozenset(found)
