"""`data trace`: where one picture is, and what is known of it."""

import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.files import storage
from datasets.formats import shards
from datasets.planning import plan, plan_files, urls
from datasets.reading import captions
from datasets.sources.table import known_as
from pipeline.errors import UsageError
from pipeline.plan.wanted import finished, wanted
from pipeline.settings.config import Config
from pipeline.store.artifacts import Artifact
from pipeline.store.deleting import BY_SHARD
from pipeline.store.removal_list import names_of, requests
from pipeline.terminal import out, print_json, printable


def trace(config: Config, root: str, key: str, as_json: bool) -> None:
    """Everything that is known of one picture: its row of the plan, how the download ended, what was made of it.

    Raises:
        UsageError: this is no key, or none of this conf's.
    """
    if not re.fullmatch("[0-9a-f]{32}", key):
        raise UsageError(f"'{key}' is no key; keys have 32 hex digits and name the files in samples/generated")
    planned = _planned(wanted(config, root, ["metadata"])["metadata"], key)
    if planned is None:
        raise UsageError(f"{key} is not in the plan of this conf; `data funnel` says what was rejected and why")
    found = finished(config, root)
    told: dict[str, Any] = {"key": key, "picture": known_as(planned["url"]), "planned": planned}
    if images := found.get("images"):
        told["download"] = _row(images.read(shards.index_name(planned["shard"])), key)
    asked = names_of(request for request in requests(root) if request.done)
    dates = {urls.equal(name): when for name, when in asked.items()}
    names = [urls.equal(planned[name]) for name in plan.NAMES if planned.get(name)]
    if when := next((dates[name] for name in names if name in dates), None):
        told["forgotten"] = when
    if images and told["download"]["status"] == "ok":
        if written := _captions(found, key, planned["shard"]):
            told["captions"] = written
        if scores := found.get("aesthetic"):
            told["scored"] = _row(scores.read(shards.tensor_name(planned["shard"])), key)
        told["files"] = [
            storage.join(artifact.path, name)
            for artifact in found.values()
            for name in artifact.files
            if _holds(artifact.name, name, planned["shard"]) or key in name
        ]
    if as_json:
        print_json(told)
        return
    if told["picture"] != planned["url"]:
        print(printable(f"picture   {told['picture']}"))
    for section in ("planned", "download", "captions", "scored"):
        for name, value in told.get(section, {}).items():
            print(printable(f"{section:9} {name:11} {value}"))  # as it is: a URL is told with its query
    if when:
        out.print(f"forgotten on {when}: nothing of it is stored any more but its row of the plan, above")
    for path in told.get("files", ()):
        out.print(f"in        {path}")


def _captions(found: dict[str, Artifact], key: str, shard: int) -> dict[str, list[str]]:
    """Captions of a picture beside the source's own, by name."""
    tables = {name.removeprefix("captions_"): it for name, it in found.items() if name.startswith("captions_")}
    read = {name: captions.by_key(table.read(shards.tensor_name(shard))) for name, table in tables.items()}
    return {name: of[key] for name, of in sorted(read.items()) if key in of}


def _planned(metadata: Artifact, key: str) -> dict[str, Any] | None:
    rows = (_row(metadata.read(name), key) for name in plan_files.parts(metadata.files))
    return next((row for row in rows if row), None)


def _row(content: bytes, key: str) -> dict[str, Any] | None:
    """The row of a key in a Parquet table."""
    table = pq.read_table(pa.BufferReader(content))
    found: list[dict[str, Any]] = table.filter(pc.field("key") == key).to_pylist()
    return found[0] if found else None


def _holds(artifact: str, name: str, shard: int) -> bool:
    """Whether a file of an artifact is the shard's: its pictures, or its tensors of any size."""
    file = name.rpartition("/")[2]
    if artifact == "images":
        return file == shards.image_name(shard)
    return artifact.startswith(BY_SHARD) and file == shards.tensor_name(shard)
