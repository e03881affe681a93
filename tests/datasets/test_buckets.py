"""Aspect-ratio buckets: their sizes, the plan, the stored pictures, and batches of one bucket each."""

import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from datasets import pictures
from datasets.buckets import STEP, Frame, Size, aspect_sizes, kept
from datasets.config import DataConfig, DataError, ImageConfig
from datasets.fetching.download import download_shard
from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shard_table import Shards
from datasets.formats.shards import Clock, ImageRow, Receipt
from datasets.outcomes import Lost, Outcome
from datasets.planning import layout, plan, plan_files
from datasets.reading.batches import Batches, Source
from datasets.reading.bucket_batches import BucketBatches, Schedule, Span
from datasets.sources import folder
from pipeline.errors import UsageError
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.steps.encode import _pictures
from stages.models import geometry
from stages.models.compressor import Compressor
from stages.models.layers import to_unit_range
from stages.models.stage_c import StageC, StageCObjective
from stages.training import loop
from stages.training.callbacks import Callbacks

CONF = Path(__file__).parents[2] / "conf" / "data"
SIZE, MAX_ASPECT = 384, 2.0
FRAME = Frame(SIZE, MAX_ASPECT)  # 256x512, 384x384, 512x256
TALL, SQUARE, WIDE = (str(size) for size in FRAME.sizes)

# ------------------------------------------------------------------------------------------------------- sizes


def test_aspect_sizes_hold_the_papers_three() -> None:
    assert {(768, 1280), (1280, 768)} <= set(aspect_sizes(768 * 1280, ratio=5 / 3))
    assert aspect_sizes(768 * 768, ratio=1) == [(768, 768)]


@pytest.mark.parametrize(("pixels", "ratio"), [(1024 * 1024, 2.25), (512 * 512, 3.0), (1_000_000, 1.7), (128 * 128, 4)])
def test_aspect_sizes_are_near_the_area_within_the_ratio_and_come_in_pairs(pixels: int, ratio: float) -> None:
    sizes = aspect_sizes(pixels, ratio)
    assert sizes == sorted(set(sizes), key=lambda size: size[0] / size[1])
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in sizes:
        assert width % 128 == height % 128 == 0
        long, short = max(width, height), min(width, height)
        assert long <= ratio * short
        others = [side for side in range(short, 8192, 128) if abs(side * short - pixels) < abs(long * short - pixels)]
        assert others == []
    # no short side is left out that has a long one within the ratio
    shorts = {min(size) for size in sizes}
    for short in range(128, math.isqrt(pixels) + 1, 128):
        nearest = min(range(short, 8192, 128), key=lambda side: abs(side * short - pixels))
        assert (short in shorts) == (nearest <= ratio * short)


def test_plans_and_models_agree_on_the_steps_of_sizes() -> None:
    assert STEP == geometry.SIDE_MULTIPLE
    for size in Frame(1024, 4.0).sizes:
        geometry.check_size(*size)


sides = st.integers(300, 4000)


@given(width=sides, height=sides, size=st.integers(2, 12), max_aspect=st.floats(1.0, 4.0))
def test_the_nearest_size_keeps_most_of_a_picture(width, height, size, max_aspect):
    frame = Frame(size * STEP, max_aspect)
    most = max(kept(width, height, one) for one in frame.sizes)
    assert kept(width, height, frame.nearest(width, height)) == pytest.approx(most)
    assert frame.suits(width, height, frame.nearest(width, height))


@given(
    ratio=st.floats(0.2, 5.0),
    stored=st.integers(2, 12),
    trained=st.integers(1, 12),
    max_aspect=st.floats(1.0, 4.0),
    narrower=st.floats(0.0, 1.0),
)
def test_no_size_enlarges_a_stored_picture(ratio, stored, trained, max_aspect, narrower):
    bucket = Frame(stored * STEP, max_aspect).nearest(ratio, 1)
    width, height = (stored * STEP * min(side, max_aspect) for side in (max(ratio, 1), max(1 / ratio, 1)))
    size = Frame(min(trained, stored) * STEP, 1 + narrower * (max_aspect - 1)).nearest(*bucket)
    assert size.width <= width * 1.001
    assert size.height <= height * 1.001


# -------------------------------------------------------------------------------------------------------- plan


def data_config(**changes: Any) -> DataConfig:
    """A folder source with buckets."""
    tree = OmegaConf.create({"data": OmegaConf.load(CONF / "folder.yaml")})
    values = {"folder.path": "/", "image.size": SIZE, "image.max_aspect": MAX_ASPECT, "shard_rows": 4}
    for key, value in (values | changes).items():
        OmegaConf.update(tree, f"data.{key}", value)
    return DataConfig.model_validate(OmegaConf.to_container(tree, resolve=True)["data"])


def metadata(path: Path, sizes: list[tuple[float | None, float | None]]) -> str:
    rows = [
        {"URL": f"https://example.org/{number}.jpg", "TEXT": f"number {number}", "WIDTH": width, "HEIGHT": height}
        for number, (width, height) in enumerate(sizes)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path / "part.parquet")
    return str(path / "part.parquet")


def make(config: DataConfig) -> tuple[list[pa.Table], plan.Counts]:
    parts: list[pa.Table] = []
    return parts, plan.make(config, 0, parts.append)


def test_every_shard_of_a_plan_has_one_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SHARDS_PER_PART", 3)
    generator = np.random.default_rng(0)
    sizes = [(int(width), int(height)) for width, height in generator.integers(400, 800, (99, 2))]
    parts, counts = make(data_config(metadata=metadata(tmp_path, sizes), limit=90))
    assert counts.planned == 90
    assert counts.rejected["limit"] == 9
    assert sum(counts.buckets.values()) == 90
    assert set(counts.buckets) == {TALL, SQUARE, WIDE}
    rows = pa.concat_tables(parts).to_pylist()
    for row in rows:
        assert row["bucket"] == str(FRAME.nearest(row["width"], row["height"]))
    found = [shard for part in parts for shard in plan_files.shards(plan_files.parquet_bytes(part, 4))]
    assert [number for number, _ in found] == list(range(sum(-(-count // 4) for count in counts.buckets.values())))
    for _, shard in found:
        assert len(set(shard["bucket"].to_pylist())) == 1
        assert shard["row"].to_pylist() == list(range(shard.num_rows))


def test_rows_without_a_size_are_counted(tmp_path):
    sizes: list[tuple[float | None, float | None]] = [(400, 400), (None, 400), (400, math.nan), (0, 400)]
    changes = {"filters.min_side": None, "filters.max_aspect": None}
    _, counts = make(data_config(metadata=metadata(tmp_path, sizes), **changes))
    assert (counts.planned, counts.rejected["no_size"]) == (1, 3)


def test_squares_are_planned_as_if_there_were_no_buckets(tmp_path):
    path = metadata(tmp_path, [(400, 400), (400, 700)])
    parts, counts = make(data_config(**{"metadata": path, "image.max_aspect": 1.0}))
    assert parts[0].schema == plan.SCHEMA
    assert counts.buckets == {}


# ---------------------------------------------------------------------------------------------------- pictures

IMAGE = ImageConfig(size=SIZE, max_aspect=MAX_ASPECT, format="png")


def body(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "stored"),
    [((500, 800), (384, 614)), ((800, 500), (614, 384)), ((384, 384), (384, 384)), ((2000, 500), (768, 384))],
    ids=["tall", "wide", "square", "panorama"],
)
def test_pictures_keep_their_aspect_up_to_the_largest(size, stored):
    content = pictures.stored(body(*size), IMAGE, FRAME.nearest(*size)).content
    assert pictures.pixels(content).shape == (stored[1], stored[0], 3)
    for wanted in (*FRAME.sizes, Size(256, 256)):
        assert pictures.pixels(content, wanted).shape == (wanted.height, wanted.width, 3)


def test_a_picture_in_a_wrong_bucket_is_lost_and_one_at_the_border_is_not():
    with pytest.raises(Lost, match="500 x 800 px, planned as 512x256") as lost:
        pictures.stored(body(500, 800), IMAGE, Size(512, 256))
    assert lost.value.outcome is Outcome.WRONG_ASPECT
    border = round(400 * FRAME.borders[1])
    for width in (border - 8, border + 8):  # as metadata that was rounded otherwise would have it
        assert pictures.stored(body(width, 400), IMAGE, Size(384, 384)).content
        assert pictures.stored(body(width, 400), IMAGE, Size(512, 256)).content


# ----------------------------------------------------------------------------------------------------- batches

COUNTS = [(TALL, 5), (SQUARE, 4), (SQUARE, 3), (WIDE, 2), (SQUARE, 4), (TALL, 0)]  # shards: bucket, rows
ROWS = {TALL: 5, SQUARE: 11, WIDE: 2}


def publish(path: Path, field: str, shard: int, content: bytes, rows: int, bucket: str | None) -> None:
    name = shards.image_name(shard) if field == "image" else shards.tensor_name(shard)
    files = {name: storage.publish(content, storage.join(str(path), name))}
    shards.publish_receipt(str(path), shard, rows_in=rows, rows_out=rows, files=files, clock=Clock(), bucket=bucket)


def source(path: Path, field: str) -> Source:
    receipts = shards.finished(str(path)).values()
    return Source(field, Shards.told(str(path), receipts))


@pytest.fixture
def sources(tmp_path) -> list[Source]:
    """Images in the aspects of their buckets, and tensors; keys are 16 * shard + row."""
    for shard, (bucket, count) in enumerate(COUNTS):
        content = body(*(side + 40 for side in Size.parse(bucket)))
        rows = [
            ImageRow(row, f"{16 * shard + row:032x}", "http://x.invalid/", "", "png", content) for row in range(count)
        ]
        publish(tmp_path / "images", "image", shard, shards.write_images(rows), count, bucket)
        values = np.zeros((count, 2), np.float16)
        publish(tmp_path / "text", "text", shard, shards.write_tensors(rows, "text", values), count, bucket)
    return [source(tmp_path / "images", "image"), source(tmp_path / "text", "text")]


def keys(batch: dict[str, np.ndarray]) -> list[int]:
    found: list[int] = batch["key"][:, -1].tolist()
    return found


def bucket_of(sample: int) -> str:
    return COUNTS[sample // 16][0]


def read_all(data: BucketBatches, span: Span) -> list[list[int]]:
    """The keys of every batch of a span."""
    return [keys(data.read(start, span.batch_size)) for start in range(span.start, span.stop, span.batch_size)]


def test_a_batch_has_one_bucket_and_its_shape(sources):
    span = Span(0, 40, 2)
    data = BucketBatches(sources, FRAME, 0, [span])
    seen = Counter()
    for start in range(0, 40, 2):
        batch = data.read(start, 2)
        (bucket,) = {bucket_of(sample) for sample in keys(batch)}
        size = Size.parse(bucket)
        assert batch["image"].shape == (2, 3, size.height, size.width)
        seen[bucket] += 1
    assert set(seen) == {TALL, SQUARE, WIDE}
    assert data.rows == 18
    assert data.bucket_rows == ROWS
    assert keys(data.first(99)) == keys(data.first(11))


def test_every_picture_comes_once_in_each_epoch_of_its_bucket_across_phases(sources):
    """5, 11 and 2 rows in batches of 2, then 3: what does not fill a batch is carried over."""
    spans = [Span(0, 60, 2), Span(100, 190, 3)]  # a phase of squares lies between
    data = BucketBatches(sources[1:], FRAME, 1, spans)
    samples: dict[str, list[int]] = {bucket: [] for bucket in ROWS}
    for batch in read_all(data, spans[0]) + read_all(data, spans[1]):
        samples[bucket_of(batch[0])] += batch
    for bucket, rows in ROWS.items():
        everything = {
            16 * shard + row for shard, (one, count) in enumerate(COUNTS) for row in range(count) if one == bucket
        }
        found = samples[bucket]
        epochs = [found[start : start + rows] for start in range(0, len(found), rows)]
        assert len(epochs) > 4
        assert all(sorted(epoch) == sorted(everything) for epoch in epochs[:-1])
        assert set(epochs[-1]) <= everything
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert abs(len(found) - 150 * rows / 18) <= 2 * 3  # in proportion


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_depend_neither_on_ranks_nor_on_where_reading_starts(sources, world):
    span = Span(8, 88, 4)
    straight = read_all(BucketBatches(sources[1:], FRAME, 2, [span]), span)
    share = 4 // world
    for number in (*range(20), 19, 3):
        fresh = BucketBatches(sources[1:], FRAME, 2, [span])
        starts = range(8 + 4 * number, 12 + 4 * number, share)
        assert [sample for start in starts for sample in keys(fresh.read(start, share))] == straight[number]
    other = read_all(BucketBatches(sources[1:], FRAME, 3, [span]), span)
    assert other != straight


@settings(max_examples=60)
@given(rows=st.lists(st.integers(1, 40), min_size=1, max_size=6), batch_size=st.integers(1, 30))
def test_a_schedule_carries_over_what_fills_no_batch(rows, batch_size):
    counts = {str(number): count for number, count in enumerate(rows)}
    schedule, number, passes = Schedule(counts, batch_size, 0), 0, 5
    before: Counter[str] = Counter()
    for done in range(1, passes + 1):
        for _ in range(sum(count * done // batch_size for count in rows) - before.total()):
            assert schedule.taken(number) == +before
            bucket, turn = schedule.batch(number)
            assert turn == before[bucket]
            before[bucket] += 1
            number += 1
        assert before == Counter({bucket: count * done // batch_size for bucket, count in counts.items()})


def test_a_bucket_smaller_than_a_batch_repeats_its_pictures_in_it(sources):
    span = Span(0, 48 * 4, 4)
    batches = read_all(BucketBatches(sources[1:], FRAME, 0, [span]), span)
    wide = [batch for batch in batches if bucket_of(batch[0]) == WIDE]
    assert len(wide) in (5, 6)  # 2 rows in 18, of 48 batches
    assert all(sorted(batch) == [48, 48, 49, 49] for batch in wide)


def test_squares_of_the_same_pictures_come_in_one_sequence(sources):
    squares = [Source("image", sources[0].shards, Size(256, 256)), sources[1]]
    batch = Batches(squares, seed=0).read(0, 18)
    assert batch["image"].shape == (18, 3, 256, 256)
    assert len(set(keys(batch))) == 18


def test_pictures_stored_as_squares_have_no_buckets(tmp_path):
    row = ImageRow(0, "0" * 32, "http://x.invalid/", "", "png", body(8, 8))
    publish(tmp_path, "image", 0, shards.write_images([row]), 1, None)
    with pytest.raises(DataError, match=r"data\.image\.max_aspect"):
        BucketBatches([source(tmp_path, "image")], FRAME, 0, [Span(0, 8, 1)])


# ------------------------------------------------------------------------------------------------------ config


def load(*words: str) -> Any:
    return compose.load("stage_c", ["scale=micro", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["data.image.max_aspect=2"],
            "data.image: in steps of 128 px there is no other size than the square of 128 px",
        ),
        (["stage_c.train.phases=[{steps: 4, batch_size: 8, size: 128, max_aspect: 2}]"], "more than what is stored"),
        (["data.image.max_aspect=0.5"], "data.image.max_aspect"),
        (
            [
                "data.image.size=512",
                "data.image.max_aspect=2",
                "stage_c.train.phases=[{steps: 4, batch_size: 8, size: 256, max_aspect: 2}]",
            ],
            "stage_c.train.phases.0: in steps of 128 px",
        ),
    ],
)
def test_aspects_that_cannot_be_had_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        load(*words)


def test_squares_leave_no_trace_of_aspects_in_fingerprints_and_buckets_change_the_plan():
    def prints(*words: str) -> Any:
        config = load("data.image.size=512", *words)
        return fingerprints(order(table(config), config.targets), config.lookup)

    squares, buckets = prints(), prints("data.image.max_aspect=2")
    assert "max_aspect" not in squares["images"].settings["data.image"]
    assert "max_aspect" not in str(squares["stage_c"].settings)
    assert squares["metadata"].digest != buckets["metadata"].digest
    assert squares == prints("data.image.max_aspect=1")


# ---------------------------------------------------------------------------------------------------- together


def download(path: Path, out: Path) -> list[Receipt]:
    data = data_config(**{"folder.path": str(path)})
    assert data.folder
    (rows,), _ = make(data)
    with folder.serve(data.folder.path, folder.KEY) as address:
        return [
            download_shard(
                rows,
                shard=shard,
                folder=str(out),
                image=data.image,
                download=data.download,
                hosts={folder.HOST: address},
            )
            for shard, rows in plan_files.shards(plan_files.parquet_bytes(rows, data.shard_rows))
        ]


def test_from_a_folder_of_many_aspects_to_a_training_of_stage_c(tmp_path):
    """Plan, download through HTTP, the compressor, and Stage C; no Ray."""
    config = load()
    for number, size in enumerate([(400, 800), (400, 600), (400, 400), (420, 400), (700, 400), (780, 400)] * 2):
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / f"{number}.png").write_bytes(body(*size))
        (tmp_path / "own" / f"{number}.txt").write_text(f"a picture, number {number}")
    receipts = download(tmp_path / "own", tmp_path / "images")
    assert Counter({bucket: 4 for bucket in (TALL, SQUARE, WIDE)}) == Counter(
        bucket for receipt in receipts for bucket in [receipt.bucket] * receipt.rows_out
    )
    compressor, read = Compressor(config.compressor.model).eval(), _pictures(FRAME)
    for receipt in receipts:
        content = storage.read(storage.join(str(tmp_path / "images"), shards.image_name(receipt.shard)))
        rows = shards.read_images(content)
        image, _ = read(rows, receipt.bucket)
        with torch.inference_mode():
            codes = compressor(to_unit_range(torch.from_numpy(image)))
        tensors = {"latents_c": codes.half().numpy(), "text": np.ones((len(rows), 3, 32), np.float16)}
        for field, values in tensors.items():
            encoded = shards.write_tensors(rows, field, values)
            publish(tmp_path / field, field, receipt.shard, encoded, len(rows), receipt.bucket)
    train = config.stage_c.train.model_copy(
        update={"phases": (config.stage_c.train.phases[0].model_copy(update={"steps": 9, "batch_size": 4}),)}
    )
    data = BucketBatches([source(tmp_path / field, field) for field in tensors], FRAME, 0, [Span(0, 36, 4)])
    shapes: list[tuple[int, ...]] = []

    def read(step: int) -> dict[str, np.ndarray]:
        batch = data.read(4 * step, 4)
        shapes.append(batch["latents_c"].shape[-2:])
        return batch

    losses: list[float] = []

    class Logged(Callbacks):
        def log(self, step: int, values: dict[str, float]) -> None:
            losses.append(values["loss"])

    loop.train(
        StageCObjective(StageC(config.stage_c.model), config.stage_c.loss, torch.zeros(3, 32)),
        read,
        train,
        Logged(),
        seed=0,
        device=torch.device("cpu"),
    )
    assert Counter(shapes) == {(12, 6): 3, (9, 9): 3, (6, 12): 3}  # height, width
    assert len(losses) == 9
    assert np.isfinite(losses).all()
