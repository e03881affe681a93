"""The verb `data`: what became of the pictures, whether the bytes are still theirs, and where one of them is."""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from datasets import left_out
from datasets.fetching.download import losses
from datasets.files import storage
from datasets.files.storage import CorruptFile
from datasets.formats import shards
from datasets.outcomes import PASSING
from datasets.planning import plan, plan_files
from datasets.reading import captions
from datasets.sources import laion
from datasets.sources.table import known_as
from pipeline.errors import UsageError
from pipeline.plan.dag import Planned, order
from pipeline.plan.table import table
from pipeline.plan.wanted import planned_steps, prints_of, wanted
from pipeline.repair import damage, repairing
from pipeline.repair.damage import Damage
from pipeline.results import data as results
from pipeline.run import invocation
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.selection import Selection
from pipeline.settings.words import Words
from pipeline.store.artifacts import Artifact, Look, Store
from pipeline.store.removal_list import check_carried_out, listed, names_of, requests
from pipeline.terminal import console, out, print_json, print_table, printable
from pipeline.verbs import forgetting
from pipeline.verbs.configured import command, configured, configured_run

Row = tuple[str, str, str, str]
BUILDING = (["repair"], ["retry"], ["dedup"])  # what ends in a run


def handle(words: Words) -> None:
    if words.rest == ["forget"]:  # concerns all that lies under the root, whatever its config
        if words.conf or words.overrides:
            raise UsageError("data forget takes keys=, urls=, from=FILE and root=; it concerns every conf's pictures")
        forget(storage.absolute(words.root), words.own, words.json)
        return
    if words.own.keys() & {"keys", "urls", "from"}:
        raise UsageError("keys=, urls= and from= go with `data forget`")
    loaded, root = (configured_run if words.rest in BUILDING else configured)(words)
    match words.rest:
        case ["funnel"]:
            funnel(loaded, root, words.json)
        case ["verify"]:
            verify(loaded, root, words)
        case ["repair"]:
            repair(loaded, root, words, command())
        case ["lost"]:
            lost(loaded, root, words.json)
        case ["retry"]:
            retry(loaded, root, words, command())
        case ["dedup"]:
            dedup(loaded, root, words, command())
        case ["trace", key]:
            trace(loaded, root, key, words.json)
        case _:
            raise UsageError("data needs one of: funnel, lost, verify, repair, trace KEY, retry, dedup, forget")


def funnel(config: Config, root: str, as_json: bool) -> None:
    """From the rows of the source to the encoded pictures: how many are left after each step, and why not the others.

    Raises:
        UsageError: nothing is planned yet.
        CorruptFile: the counts of a step do not add up.
    """
    metadata = wanted(config, root, ["metadata"])["metadata"]
    steps = results.funnel(metadata, _finished(config, root))
    taken = metadata.manifest["notes"].get("columns", {})
    if not taken.keys() <= set(laion.COLUMNS.values()):  # earlier versions told only of what is spelled otherwise
        taken = {}
    if as_json:
        print_json({"root": root, "funnel": steps, "columns": taken})
        return
    lines = Table("pictures", "rows", "share", "lost to", box=None, pad_edge=False)
    for step in steps:
        causes = ", ".join(f"{cause} {count:,}" for cause, count in step["lost"].items())
        lines.add_row(step["level"], f"{step['rows']:,}", f"{step['rows'] / max(1, steps[0]['rows']):.1%}", causes)
    print_table(lines)
    if taken:
        out.print(laion.told(taken))


def lost(config: Config, root: str, as_json: bool) -> None:
    """Every row that the plan or the download has left out: source, place (a file or URL), cause, and a sentence.

    A download that has lost too much, and so is not finished, is told of too.

    Raises:
        UsageError: nothing is planned yet.
    """
    metadata = wanted(config, root, ["metadata"])["metadata"]
    print_ = prints_of(config, Look(root), order(table(config), ["images"]))["images"]
    rows = chain(_left_out(metadata), _not_stored(metadata, Store(root).path("images", print_.digest)))
    if as_json:
        names = ("source", "place", "cause", "sentence")
        print_json({"root": root, "rows": [dict(zip(names, row, strict=True)) for row in rows]})
        return
    for row in rows:  # as they are found: they may be millions
        print("\t".join(left_out.one_line(printable(field)) for field in row))


def _left_out(metadata: Artifact) -> Iterator[Row]:
    """What the plan has left out: row by row where it has kept a list of them, else how many they are."""
    listed: list[Row] = []
    if left_out.FILE in metadata.files:
        kept = pq.read_table(pa.BufferReader(metadata.read(left_out.FILE)))
        listed = [(row["source"], known_as(row["place"]), row["cause"], row["sentence"]) for row in kept.to_pylist()]
    yield from listed
    known = {cause for _, _, cause, _ in listed}
    for cause, count in metadata.manifest["notes"]["rejected"].items():
        if count and cause not in known:
            yield "plan", "", cause, f"{count:,} rows, of which only the number is kept"


def _not_stored(metadata: Artifact, folder: str) -> Iterator[Row]:
    """What a download has lost, of the shards that are done."""
    done = {shard: receipt for shard, receipt in shards.finished(folder).items() if receipt.dropped}
    for shard, rows in plan_files.all_shards(metadata.read, metadata.files if done else ()):
        if shard in done:
            name = shards.index_name(shard)
            index = storage.read(storage.join(folder, name), expect=done[shard].files[name])
            for source, key, cause, told in losses(rows, index):
                yield f"download of {source}" if source else "download", key, cause, told


def verify(config: Config, root: str, words: Words) -> None:
    """Read every file of this config's finished artifacts again and compare it with its manifest.

    Raises:
        CorruptFile: some are missing or hold other bytes; the first of them are named. Or manifests are damaged, or a
            repair has not ended.
    """
    found, waiting = _examined(config, root)
    count = sum(len(artifact.files) for artifact in found.artifacts.values())
    if words.json:
        print_json({"root": root, "files": count, "damaged": found.paths})
    told = [sentence for marks in found.marks.values() for sentence in marks.values()]
    if found.files:
        first = f"{len(found.files)} of {count} files are missing or damaged: {damage.shown(found.files)}"
        told.insert(0, f"{first}; mend them: python -m pipeline data repair {words.same}")
    if waiting:
        told.append(
            f"the repair of {', '.join(waiting)} has not come to its end; go on with it: "
            f"python -m pipeline data repair {words.same}"
        )
    if told:
        raise CorruptFile("; ".join(told))
    if not words.json:
        out.print(f"all {count} files hold the bytes that their manifests name")


def repair(config: Config, root: str, words: Words, command: str) -> None:
    """Make the damaged shards of this config's artifacts anew, with what was made from them shard by shard.

    Raises:
        CorruptFile: manifests are damaged, or other files that belong to no shard; says what to do about them, and what
            waits for that.
    """
    check_carried_out(root)
    found, _ = _examined(config, root)
    done = repairing.repair(config, words.required_conf(), root, command, found)
    shards_of = {it.artifact.name: sorted({shard.number for shard in it.shards}) for it in done.opened}
    if words.json:
        left = found.left(done.made)
        told = {"repaired": done.made, "shards": shards_of, "others": done.others, "left": left, "waiting": done.wait}
        print_json({"root": root, **told})
    else:
        for name in done.made:
            out.print(f"{name} is whole again{_numbered(shards_of.get(name, []))}")
        if done.others:
            paths = ", ".join(done.others)
            out.print(f"made from the same pictures by another conf, whose next run mends them: {paths}")
        if not (done.made or found.paths):
            out.print("nothing to repair: all files hold the bytes that their manifests name")
    remedies = list(found.remedies(words.same, done.made))
    if done.wait:
        again = f"python -m pipeline data repair {words.same}"
        remedies.append(f"{'then ' if remedies else ''}go on with {', '.join(done.wait)}, which had to wait: {again}")
    if remedies:
        raise CorruptFile("; ".join(remedies))


def _numbered(shards: list[int]) -> str:
    """Which shards were made anew, the first of many, in words."""
    named = ", ".join(map(str, shards[:10]))
    return f": shards {named}{', ...' if len(shards) > 10 else ''} were made anew" if shards else ""


def _examined(config: Config, root: str) -> tuple[Damage, list[str]]:
    """What is damaged of a config's artifacts, and names of those whose repair has begun and not come to its end."""
    store, steps = Store(root), order(table(config), config.targets)
    prints = prints_of(config, Look(root), steps)
    found = damage.examine(store, prints)
    waiting = [name for name, print_ in prints.items() if repairing.is_open(store, name, print_.digest)]
    if not (found.artifacts or found.marks or waiting):
        raise UsageError(f"root={root} has no finished artifact of this conf yet")
    return found, waiting


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
    found = _finished(config, root)
    told: dict[str, Any] = {"key": key, "picture": known_as(planned["url"]), "planned": planned}
    if images := found.get("images"):
        told["download"] = _row(images.read(shards.index_name(planned["shard"])), key)
    dates = names_of(request for request in requests(root) if request.done)
    if when := next((dates[planned[name]] for name in plan.NAMES if planned.get(name) in dates), None):
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


def retry(config: Config, root: str, words: Words, command: str) -> None:
    """Download once more what was lost for a passing reason, as the next attempt, which takes over all the others.

    A download that was given up for its losses is gone on with instead: that asks again for them.

    Raises:
        UsageError: nothing is downloaded yet.
        CorruptFile: it is finished, but what says so is damaged.
    """
    look = Look(root)
    planned = planned_steps(config, look, Selection(until="download"))
    download = next(item for item in planned if item.step.output == "images")
    given_up = download.state == "resume"
    if given_up:
        damage.check_marks(Store(root).path("images", download.fingerprint.digest))
    lost, before = _downloaded(root, download) if given_up else _images(config, root)
    passing = {cause: count for cause, count in lost.items() if cause in PASSING}
    attempt, again, rows = config.data.attempt, config, before
    if passing and not given_up:
        attempt += 1
        again = compose.load(words.required_conf(), [*words.overrides, f"data.attempt={attempt}"])
        planned = planned_steps(again, look, Selection(until="download"))
    if passing or given_up:
        asked = ", ".join(f"{cause} {count:,}" for cause, count in sorted(passing.items(), key=lambda item: -item[1]))
        console.print(
            f"asking again for {sum(passing.values()):,} pictures ({asked}) with data.attempt={attempt}", markup=False
        )
        if any(item.state != "done" for item in planned):
            invocation.run(again, words.required_conf(), look, planned, command)
        _, rows = _images(again, root)
    if words.json:
        told = {"asked": passing, "gained": rows - before, "rows": rows, "attempt": attempt}
        print_json({"root": root, **told})
    elif passing or given_up:
        later = "" if given_up else f"; give data.attempt={attempt} from now on"
        out.print(f"{rows - before:,} pictures gained, {rows:,} in all{later}")
    else:
        out.print("nothing to retry: no picture was lost for a reason that may pass")


def _images(config: Config, root: str) -> tuple[dict[str, int], int]:
    """Pictures lost by cause, and how many are stored, of a finished download."""
    images = wanted(config, root, ["images"])["images"].manifest
    return images["notes"]["lost"], images["rows"]


def _downloaded(root: str, download: Planned) -> tuple[dict[str, int], int]:
    """The same of one that is not finished."""
    done = shards.finished(Store(root).path("images", download.fingerprint.digest)).values()
    lost: Counter[str] = Counter()
    for receipt in done:
        lost.update(receipt.dropped)
    return lost, sum(receipt.rows_out for receipt in done)


def dedup(config: Config, root: str, words: Words, command: str) -> None:
    """Find duplicates among the stored pictures; a view with `duplicates: drop` leaves them out."""
    alone = config.model_copy(update={"targets": ("duplicates",)})
    look = Look(root)
    planned = planned_steps(alone, look, Selection())
    if any(item.state != "done" for item in planned):
        invocation.run(alone, words.required_conf(), look, planned, command)
    found = wanted(config, root, ["images", "duplicates"])
    pictures, duplicates = found["images"].manifest["rows"], found["duplicates"]
    counts = duplicates.manifest["notes"]["duplicates"]
    sheet = next((storage.join(duplicates.path, name) for name in duplicates.files if name.endswith(".png")), None)
    if words.json:
        print_json({"root": root, "pictures": pictures, "duplicates": counts, "sheet": sheet})
        return
    told = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    out.print(f"duplicates among {pictures:,} pictures: {told}")
    if sheet:
        out.print(f"look at some: {sheet}")
    out.print("to train without them: data.views='{unique: {duplicates: drop}}', and view: unique in a phase")


def forget(root: str, words: dict[str, str], as_json: bool) -> None:
    """Remove pictures for ever: from what is stored, and from every later download.

    Raises:
        UsageError: none is named, and no earlier removal waits to be gone on with.
    """
    names = listed(words.get("keys", ""), words.get("urls", ""), words.get("from", ""))
    if not names and all(request.done for request in requests(root)):
        raise UsageError("data forget needs keys=KEY,KEY or urls='URL URL' or from=FILE with a key or URL a line")
    done = forgetting.forget(root, names)
    if as_json:
        told: dict[str, Any] = {
            name: sorted(getattr(done, name)) for name in ("pictures", "alike", "trained", "unplanned")
        }
        told["files"] = dict(done.files)
        print_json({"root": root, **told})
        return
    out.print(
        f"stored rows forgotten: {len(done.pictures)}, with every caption and copy of the pictures that are named"
    )
    if done.unplanned:
        out.print(
            f"in no plan here: {', '.join(sorted(done.unplanned))}; only these very captions are kept out of later "
            "downloads, so give urls= too"
        )
    if done.alike:
        out.print(f"what looks like them, and stays: {', '.join(sorted(done.alike))}; forget them by keys= too")
    out.print(", ".join(f"{count} files {how}" for how, count in sorted((+done.files).items())) or "no file changed")
    if done.pictures or +done.files:
        out.print("not reached from here: cluster.cache.folder of nodes, MLflow at a tracking.uri, copies of a release")
    if done.trained:
        out.print(f"trained with them, and left as they are: {', '.join(sorted(done.trained))} (run --force STEP)")


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
    return artifact.startswith(("text_", "latents_", "captions_", "aesthetic")) and file == shards.tensor_name(shard)


def _finished(config: Config, root: str) -> dict[str, Artifact]:
    """The finished artifacts of this config by name."""
    store, steps = Look(root), order(table(config), config.targets)
    prints = prints_of(config, store, steps)
    found = {step.output: store.find(step.output, prints[step.output].digest) for step in steps}
    return {name: artifact for name, artifact in found.items() if artifact}
