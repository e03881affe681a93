"""Views: what a training phase sees of the stored pictures, in which order, and what a change of a view makes stale."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from datasets.config import ViewConfig
from datasets.files import storage
from datasets.files.storage import CorruptFile
from datasets.formats import shards
from datasets.formats.shard_table import Shards
from datasets.formats.shards import INDEX, Clock, ImageRow
from datasets.planning import plan
from datasets.reading import views
from datasets.reading.batches import Batches, Source
from pipeline.errors import UsageError
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.settings import compose

PER_SHARD = 8


def key(shard: int, row: int) -> str:
    return f"{shard * 16 + row:032x}"


def planned(shard: int) -> pa.Table:
    """Rows whose aesthetic score is their row number; row 5 has none."""
    rows = [
        {"key": key(shard, row), "shard": shard, "row": row, "aesthetic": None if row == 5 else float(row)}
        for row in range(PER_SHARD)
    ]
    return pa.Table.from_pylist(rows, schema=plan.SCHEMA)


def index(shard: int) -> bytes:
    """What became of them: row 1, and row 6 of shard 1, are lost."""
    lost = {1} | ({6} if shard == 1 else set())
    rows = [{"key": key(shard, row), "row": row, "status": "gone" if row in lost else "ok"} for row in range(PER_SHARD)]
    return shards.table_bytes(rows, INDEX)


def make(duplicates: dict[int, pa.Array] | None = None, **bounds: Any) -> tuple[views.View, int, dict[str, int]]:
    stored = (views.Planned(shard, planned(shard), index(shard)) for shard in range(3))
    content, rows, left_out = views.make(stored, ViewConfig(**bounds), duplicates or {})
    return views.read(content), rows, dict(left_out)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Tensors of the stored pictures, whose value is the last byte of the key."""
    for shard in range(3):
        keys = views.stored_keys(index(shard)).to_pylist()
        rows = [ImageRow(0, stored, "", "", "png", b"") for stored in keys]
        values = np.array([[int(stored, 16)] for stored in keys], np.float16)
        name = shards.tensor_name(shard)
        content = shards.write_tensors(rows, "text", values)
        files = {name: storage.publish(content, storage.join(str(tmp_path), name))}
        shards.publish_receipt(str(tmp_path), shard, rows_in=len(keys), rows_out=len(keys), files=files, clock=Clock())
    return Source("text", Shards.gathered(str(tmp_path)))


def test_a_view_holds_the_stored_pictures_within_the_bounds_and_counts_the_others():
    view, rows, left_out = make(min_aesthetic=4.0)
    assert [view.places(shard).tolist() for shard in range(3)] == [[3, 5, 6], [3, 5], [3, 5, 6]]  # rows 4, 6 and 7
    assert rows == 8
    assert left_out == {"min_aesthetic": 7 + 6 + 7 - 8}


def test_a_view_leaves_duplicates_out_and_counts_them():
    view, rows, left_out = make({1: pa.array([key(1, 3), key(1, 4)])}, min_aesthetic=4.0)
    assert [view.places(shard).tolist() for shard in range(3)] == [[3, 5, 6], [5], [3, 5, 6]]
    assert (rows, left_out["duplicate"]) == (7, 1)  # row 3 is below the bound, and counted there


def test_batches_of_a_view_hold_its_pictures_once_an_epoch_with_their_own_values(source):
    view, rows, _ = make(min_aesthetic=4.0)
    data = Batches([source], seed=0, view=view)
    assert data.rows == rows
    wanted = {16 * shard + row for shard in range(3) for row in (4, 6, 7)} - {16 + 6}
    for epoch in range(3):
        batch = data.read(epoch * rows, rows)
        assert set(batch["key"][:, -1].tolist()) == wanted
        np.testing.assert_array_equal(batch["text"][:, 0], batch["key"][:, -1])


def test_the_order_within_a_view_depends_on_seed_and_position_alone(source):
    view, rows, _ = make(min_aesthetic=3.0)
    straight = Batches([source], seed=1, view=view).read(0, rows)["key"].tolist()
    for world in (2, 3):
        ranks = [Batches([source], seed=1, view=view) for _ in range(world)]
        share = rows // world
        read = [row for rank, data in enumerate(ranks) for row in data.read(rank * share, share)["key"].tolist()]
        assert read == straight[: world * share]
    assert Batches([source], seed=2, view=view).read(0, rows)["key"].tolist() != straight


def test_a_view_of_other_pictures_is_refused(source):
    view, _, _ = make()
    pictures, bits = view.shards[1]
    with pytest.raises(CorruptFile, match=f"shard 1 holds {pictures} pictures, but the view knows 4"):
        Batches([source], seed=0, view=views.View({**view.shards, 1: (4, bits)}))


OURS = {0: [True, True, False], 1: [False, True]}


def test_views_of_the_same_shards_are_joined_picture_by_picture():
    one, other = views.View.of(OURS), views.View.of({0: [True, False, True], 1: [True, True]})
    assert one & other == views.View.of({0: [True, False, False], 1: [False, True]})
    assert one & ~other == views.View.of({0: [False, True, False], 1: [False, False]})


@pytest.mark.parametrize(
    "theirs", [{0: [True] * 3}, {**OURS, 2: [True]}, {**OURS, 1: [True]}], ids=["less", "more", "others"]
)
def test_views_of_other_shards_are_not_joined(theirs):
    one, other = views.View.of(OURS), views.View.of(theirs)
    for left, right in ((one, other), (other, one)):
        with pytest.raises(CorruptFile, match="but the view knows"):
            _ = left & right


# ------------------------------------------------------------------------------------------------ config and DAG

PHASES = "stage_c.train.phases=[{steps: 4, batch_size: 8, size: 128}, {steps: 4, batch_size: 4, size: 128, view: fine}]"


def changed(before: list[str], after: list[str]) -> set[str]:
    """Artifacts whose fingerprints differ between two configs."""
    prints = []
    for words in (before, after):
        config = compose.load("stage_c", ["scale=micro", *words])
        prints.append(fingerprints(order(table(config), config.targets), config.lookup))
    first, second = prints
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


AFTER_C = {"stage_c", "samples", "scores", "release"}


def test_a_changed_view_makes_the_trainings_that_use_it_stale_and_nothing_before():
    fine, finer = (f"data.views={{fine: {{min_aesthetic: {score}}}}}" for score in (5.0, 6.0))
    assert changed([fine, PHASES], [finer, PHASES]) == {"view_fine", *AFTER_C}
    assert changed([], [fine]) == set()
    assert changed([fine], [fine, PHASES]) == {"view_fine", *AFTER_C}


def test_only_a_view_that_drops_duplicates_looks_for_them():
    keep, drop = (f"data.views={{fine: {{duplicates: {what}}}}}" for what in ("keep", "drop"))
    assert changed([keep, PHASES], [drop, PHASES]) == {"duplicates", "view_fine", *AFTER_C}


def test_a_view_that_does_not_exist_is_refused_by_name():
    with pytest.raises(UsageError, match=r"stage_c.train.phases.1.view=fine: data.views has no views; give data.views"):
        compose.load("stage_c", ["scale=micro", PHASES])


def test_the_paper_trains_its_last_phase_on_an_aesthetic_view():
    config = compose.load("stage_c", ["scale=paper", "data.metadata=rows.parquet"])
    assert config.stage_c.train.phases[-1].view == "aesthetic"
    assert "view_aesthetic" in {step.output for step in order(table(config), config.targets)}
