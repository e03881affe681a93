"""What a plan says of costs and of memory: from the config, by what holds it, and the keys that help."""

import re
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import UsageError
from pipeline.plan import cost, obstacles
from pipeline.plan.cost import Estimate
from pipeline.plan.wanted import planned_steps
from pipeline.settings.config import Config
from pipeline.settings.selection import Selection
from pipeline.store.artifacts import Look
from stages.anatomy import flops
from stages.settings.models import CompressorConfig
from tests.pipeline.settings.loading import load


def costs(tmp_path: Path, loaded: Config) -> dict[str, Estimate]:
    planned = planned_steps(loaded, Look(str(tmp_path)), Selection())
    return {item.step.name: found for item, found in zip(planned, cost.estimates(planned, loaded), strict=True)}


def test_costs_of_the_paper_come_from_the_config_and_say_so(tmp_path):
    found = costs(tmp_path, load("data.limit=1000000", scale="paper"))
    assert {estimate.basis for estimate in found.values()} == {"config"}
    assert all("(from config)" in estimate.text for estimate in found.values())
    images = 864_000 * 1536 + 4_000 * 768 + 50_000 * 384
    assert found["train_c"].work == images
    assert found["train_c"].device_seconds == images / 16
    assert found["download"].work == 1_000_000
    assert found["sample"].work == 64


def test_of_the_held_out_as_many_are_drawn_as_there_are(tmp_path):
    loaded = load("data.limit=60", "data.holdout=0.1", "data.held_out_captions=[a blue square]")
    planned = planned_steps(loaded, Look(str(tmp_path)), Selection())
    work = {item.step.output: found.work for item, found in zip(planned, cost.estimates(planned, loaded), strict=True)}
    assert (work["samples"], work["samples_held_out"]) == (min(loaded.sample.limit, 53), min(loaded.sample.limit, 7))


def test_rows_that_only_the_metadata_knows_are_no_number(tmp_path):
    found = costs(tmp_path, load(scale="paper"))
    assert found["download"].work is None
    assert found["download"].text == "rows unknown before fetch"
    assert found["train_b"].work == 457_000 * 512 + 300_000 * 128


def test_rows_of_a_folder_are_those_that_its_listing_has_counted(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        Image.new("L", (200, 200), 20 * number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("" if number == 4 else f"one\nand {number}")
    words = ("data.limit=null", f"data.folder.path={folder}", "data.folder.max_left_out=0.5")
    for more, captions in (((), 4), (("data.folder.caption_lines=each", "data.captions={alt: 1}"), 8)):
        loaded = load(*words, *more, "data=folder")
        planned = planned_steps(loaded, Look(str(tmp_path)), Selection())
        counts = obstacles.ahead(loaded, planned)
        listed = cost.estimates(planned, loaded, counts)
        found = {item.step.name: one for item, one in zip(planned, listed, strict=True)}
        assert found["download"].text.startswith("4 rows, at most ")
        assert found["download"].basis == "source"
        assert found["encode_text"].work == captions
        assert found["encode_text"].bytes
    mixed = load("data.sources=[{source: folder, folder: {path: x}}, {source: openmoji}]", "data=mixture")
    assert cost.most_rows([], mixed, counts)[1] == "config"  # they are of one of two sources


def test_what_a_plan_would_store_is_told_beside_encoding_online(tmp_path):
    found = costs(tmp_path, load("data.metadata=x.parquet", "data.limit=1000000", scale="paper"))
    shards = -(-1_000_000 // 2048)
    assert found["encode_text"].bytes == 1_000_000 * 77 * 1024 * 2
    assert found["encode_text"].objects == 2 * shards
    assert found["encode_a"].bytes == 1_000_000 * 4 * (128**2 + 256**2) * 2  # of 512 and 1024 px
    assert found["encode_c"].bytes == 1_000_000 * 16 * (12**2 + 24**2 + 24**2) * 2  # 1024 px also in other aspects
    assert found["encode_c"].objects == 6 * shards
    assert found["train_c"].bytes is None
    seen = {512: 500_000 * 1536, 1024: 364_000 * 1536 + 4_000 * 768 + 50_000 * 384}
    small, large = (flops.encode_c(CompressorConfig(), side) for side in (384, 768))
    assert found["encode_c"].cached_flops == 1_000_000 * (small + 2 * large)
    assert found["encode_c"].online_flops == seen[512] * small + seen[1024] * large
    told = re.search(r"; by its FLOPs (\S+) A100-hours, online (\S+) A100-hours and no bytes$", found["encode_c"].text)
    assert told
    ratio = found["encode_c"].online_flops / found["encode_c"].cached_flops
    assert float(told[2]) / float(told[1]) == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize(
    ("targets", "step", "more"),
    [
        ("[stage_c,previewer]", "encode_c", "previewer"),
        ("[stage_c,baseline]", "encode_a", "baseline"),
        ("[stage_c,baseline]", "encode_text", "baseline"),
    ],
)
def test_online_counts_every_training_that_would_encode(targets, step, more, tmp_path):
    words = ("data.metadata=x.parquet", "data.limit=1000")
    alone = costs(tmp_path, load(*words, "targets=[stage_c]", scale="paper"))[step]
    found = costs(tmp_path, load(*words, f"targets={targets}", scale="paper"))[step]
    loaded = load(*words, scale="paper")
    seen = {phase.size: phase.steps * phase.batch_size for phase in getattr(loaded, more).train.phases}
    flops_of = {
        "encode_c": lambda size: flops.encode_c(CompressorConfig(), size * 3 // 4),
        "encode_a": lambda size: flops.encode_a(loaded.stage_a.model, size, size),
        "encode_text": lambda size: flops.encode_text(24, 1024, 77),
    }[step]
    assert found.online_flops - alone.online_flops == sum(n * flops_of(size) for size, n in seen.items())


def test_a_rate_of_no_step_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"rates\.trian_c: there is no such step.*train_c"):
        costs(tmp_path, load("rates.trian_c=1"))
    assert costs(tmp_path, load("rates.train_c=2"))["train_c"].device_seconds == 16


def test_memory_is_told_for_the_trainings_by_what_holds_it(tmp_path):
    loaded = load("data.metadata=x.parquet", "workers=64", scale="paper")
    found = costs(tmp_path, loaded)
    assert {step for step, estimate in found.items() if estimate.memory} == {"train_a", "train_b", "train_c"}
    memory = found["train_c"].document()["memory"]
    assert memory["gradients"] == memory["average"] == 4 * 993_243_680
    assert memory["weights"] == 6 * 993_243_680  # fp32, and bf16 for the backward pass
    assert memory["moments"] == 8 * 993_243_680
    assert memory["total"] == sum(value for part, value in memory.items() if part != "total")
    assert memory["total"] < 80 * 2**30  # of the paper's A100
