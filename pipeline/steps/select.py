"""select: a view, which of the stored pictures the phases of a training see; hold_out: those that none sees."""

import os
from collections.abc import Sequence, Set
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.config import NO_SCORES, DataError, ViewConfig
from datasets.files import storage
from datasets.files.storage import FileEntry
from datasets.formats import shards
from datasets.planning import grouping, plan_files
from datasets.reading import duplicates, holdout, views
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact


def select(build: Build) -> Facts:
    """metadata, images, and what the view wants of duplicates, aesthetic -> view_<name>: a bit for each picture."""
    name, found = build.step.output.removeprefix("view_"), build.inputs
    view = build.config.data.views[name]
    inputs = (found["metadata"], found["images"], found.get("duplicates"), found.get("aesthetic"))
    entry, rows, left_out, unscored, pid = build.call(_select, view, inputs, build.path)
    if unscored:
        raise DataError(f"data.views.{name}.min_aesthetic: {NO_SCORES}")
    if not rows:
        reasons = ", ".join(f"{rule} leaves out {count}" for rule, count in left_out.items() if count)
        stored = build.inputs["images"].manifest["rows"]
        raise DataError(f"data.views.{name} chooses none of {stored} pictures: {reasons}; loosen these")
    return Facts(
        files={views.FILE: entry}, rows=rows, call="pyarrow.Table.filter", workers=[pid], notes={"left_out": left_out}
    )


def _select(
    view: ViewConfig, inputs: tuple[Artifact, Artifact, Artifact | None, Artifact | None], path: str
) -> tuple[FileEntry, int, dict[str, int], bool, int]:
    content, rows, left_out = make(view, *inputs)
    metadata, *_, scores = inputs
    unscored = not rows and view.scored and scores is None and not _any_score(metadata)
    return storage.publish(content, storage.join(path, views.FILE)), rows, left_out, unscored, os.getpid()


def _any_score(metadata: Artifact) -> bool:
    """Whether the plan has an aesthetic score of any picture."""
    planned = plan_files.all_shards(metadata.read, metadata.files)
    return any(rows["aesthetic"].null_count < rows.num_rows for _, rows in planned)


def hold_out(build: Build) -> Facts:
    """metadata, images, and duplicates where some view wants them -> held_out: a view of what no training sees."""
    data, found = build.config.data, build.inputs
    inputs = (found["metadata"], found["images"], found.get("duplicates"))
    entry, rows, unknown, pid = build.call(_hold_out, data.holdout, data.held_out_captions, inputs, build.path)
    stored = found["images"].manifest["rows"]
    asked = f"data.holdout={data.holdout}"
    if data.held_out_captions:
        asked += f" with {len(data.held_out_captions)} captions"
    if rows == stored:
        raise DataError(f"{asked} holds out all of {stored} pictures: lower it, or set it to 0")
    if not rows:
        build.report.warning(f"{asked} holds out none of {stored} pictures: no training is validated")
    if unknown:
        build.report.warning(f"data.held_out_captions: no picture has {', '.join(map(repr, unknown))}")
    return Facts(files={views.FILE: entry}, rows=rows, call="datasets.reading.holdout.hold_out", workers=[pid])


def _hold_out(
    share: float, captions: Sequence[str], inputs: tuple[Artifact, Artifact, Artifact | None], path: str
) -> tuple[FileEntry, int, list[str], int]:
    found = {caption for _, caption in _captioned(captions, inputs[0])}
    view = held_out(share, captions, *inputs)
    unknown = [caption for caption in captions if caption not in found]
    return storage.publish(views.dump(view), storage.join(path, views.FILE)), view.rows, unknown, os.getpid()


def held_out(
    share: float,
    captions: Sequence[str],
    metadata: Artifact,
    images: Artifact,
    repeated: Artifact | None,
    named: Set[str] = frozenset(),
) -> views.View:
    """A view of what is held out at a share, or has one of the captions or a key that is named, and of all copies."""
    stored = images.shards()

    def rows_of(shard: int, planned: pa.Table) -> tuple[int, holdout.Rows]:
        return shard, holdout.rows_of(planned, stored[shard].read(shards.index_name(shard)))

    rows = (partial(rows_of, *one) for one in plan_files.all_shards(metadata.read, metadata.files) if one[0] in stored)
    alike = duplicates.stand_ins(repeated.read(duplicates.FILE)) if repeated else None
    keys = {key for key, _ in _captioned(captions, metadata)}
    return holdout.hold_out(storage.ahead(rows), share, keys | named, alike)


def _captioned(captions: Sequence[str], metadata: Artifact) -> set[tuple[str, str]]:
    """Keys of the planned pictures that have one of these captions, each with that."""
    named, found = pa.array(captions, pa.string()), set[tuple[str, str]]()
    for part in plan_files.parts(metadata.files if captions else ()):
        rows = grouping.a_row_each(pq.read_table(pa.BufferReader(metadata.read(part))))
        meant = rows.filter(pc.is_in(rows["caption"], named))
        found.update(zip(meant["key"].to_pylist(), meant["caption"].to_pylist(), strict=True))
    return found


def make(
    view: ViewConfig, metadata: Artifact, images: Artifact, repeated: Artifact | None, scores: Artifact | None = None
) -> tuple[bytes, int, dict[str, int]]:
    """A view's file, how many of the pictures it chooses, and how many others it leaves out by rule."""
    unwanted = duplicates.by_shard(repeated.read(duplicates.FILE)) if repeated else {}

    stored, scored = images.shards(), scores.shards() if scores else {}

    def shard_of(number: int, planned: pa.Table) -> views.Planned:
        index = stored[number].read(shards.index_name(number))
        return views.Planned(
            number, planned, index, scored[number].read(shards.tensor_name(number)) if scored else None
        )

    planned = storage.ahead(partial(shard_of, *one) for one in plan_files.all_shards(metadata.read, metadata.files))
    content, rows, left_out = views.make(planned, view, unwanted)
    return content, rows, dict(left_out)
