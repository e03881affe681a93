"""The benches run through all their parts at a tiny size, those for CUDA on the CPU."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from pipeline.cluster import board
from pipeline.models import scorers
from pipeline.steps import sample
from stages.models.layers import Conv2d
from stages.settings.models import StageAConfig, StageBConfig, StageCConfig
from tests.bench import data, drawing, figures, gpu, large_root, loop, many_prompts, models, plan_memory, storage
from tests.faulty_store import FaultyStore

CPU = torch.device("cpu")
TINY_A = StageAConfig(bottleneck_blocks=1, hidden=16, codebook_size=32)
TINY_B = StageBConfig(
    widths=(8, 16),
    blocks=(1, 1),
    patterns=("CT", "CTA"),
    heads=(0, 2),
    inject_code=(False, True),
    cond_width=24,
    text_width=64,
)
TINY_C = StageCConfig(width=32, depth=1, heads=4, text_width=64)
CASES = [models.Case(TINY_C, 3, 2), models.Case(TINY_B, 32, 1)]


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "WARM_UP", 1)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)


def by_name(lines: Iterable[figures.Line]) -> dict[str, str]:
    """Figures by what they tell of."""
    return {line.what: line.figure for line in lines}


def test_ratios() -> None:
    found = by_name(models.ratios(CASES, CPU, torch.float32, pairs=2))
    assert "quartiles" in found["Stage C 3x3, batch 2: diffusers / ours, lower quartile"]
    assert "quartiles" in found["Stage B 32x32, batch 1: diffusers / ours, lower quartile"]


def test_trainings() -> None:
    found = by_name(models.trainings(CASES, CPU, torch.bfloat16, pairs=1))
    for owner in ("ours", "diffusers"):
        for how in ("eager", "compiled"):
            assert "images/s" in found[f"Stage B 32x32, batch 1: {owner}, {how}"]


def test_pictures() -> None:
    (line,) = models.pictures(TINY_A, TINY_B, TINY_C, CPU, 128, (2,), (2, 1))
    assert line[0] == "seconds a picture of 128 px, batch 2"
    assert [part.split()[0] for part in line[1].split(", ")] == ["text", "C", "B", "A"]


def test_diffusers_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "WuerstchenPrior", None)
    assert by_name(models.ratios(CASES, CPU, torch.float32, pairs=1)) == {"diffusers": "not installed: no comparison"}
    assert not any("diffusers" in what for what in by_name(models.trainings(CASES[:1], CPU, torch.float32, pairs=1)))


def test_the_activations_that_count_are_those_that_are_kept() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    # the input of each Linear, the second of which is also the output that tanh keeps
    assert models.activations(model, [torch.randn(3, 4)]) == 4 * (3 * 4 + 3 * 8)


def test_reader() -> None:
    found = {line.what.strip(): line for line in data.reader(rows=2, num_shards=3, pairs=2)}
    assert "webdataset" in found["reader, samples a CPU-second (text 77x1024, codes 16x24x24)"].figure
    assert [line.bar for line in found.values()] == ["", "at least 2,000", "at least 1.0", "at least 3.0", ""]


def test_encoding() -> None:
    (line,) = data.encoding(torch.nn.AvgPool2d(32), size=64, rows=1, num_shards=2, pairs=2)
    assert "ms a batch" in line.figure
    assert line.met is not None


def test_downloading() -> None:
    first, cpu, parts = data.downloading(count=3, side=64, size=32, pairs=2)
    assert first.what == "download / plain img2dataset, 64 -> 32 px"
    assert first.met is not None
    assert "ms a picture" in cpu.figure
    assert [part.split()[0] for part in parts.figure.split(", ")] == ["fetch", "decode", "resize", "encode"]


def test_planning(tmp_path: Path) -> None:
    found = plan_memory.measured(tmp_path, 500)
    assert found["planned"] == 500
    assert found["cpu_seconds"] > 0


def test_very_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_root, "VERBS", (("plan", *large_root.WORDS),))
    found = by_name(large_root.lines(tmp_path, 3))
    assert float(found["plan: CPU seconds"]) > 0
    assert found["  taken up by a rank"].endswith("for 3,000 rows")


def test_a_bar_is_met_or_missed_by_the_median() -> None:
    seconds = [1.0, 2.0, 4.0]
    assert figures.ratio("x", seconds, [1.0, 4.0, 16.0], bar=2.0) == (
        "x",
        "quartiles 1.00 2.00 4.00 (3 pairs)",
        "at least 2.0",
        True,
    )
    assert figures.ratio("x", seconds, seconds, bar=1.01).met is False
    assert figures.ratio("x", seconds, seconds).met is None
    assert figures.at_most("x", "5", 5, 4) == ("x", "5", "at most 4", False)


def test_the_loop_against_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STEPS", 2)
    (line,) = loop.against_plain(TINY_C, side=3, batch=2, pairs=2)
    assert line.bar == "at most 1.05"
    assert "2 pairs of 2 steps" in line.figure
    encode = models.text_encoder(64, CPU)
    (line,) = loop.against_diffusers(TINY_C, encode, size=128, batch=1, pairs=1)
    assert float(line.figure.split()[0]) > 0


def test_saving() -> None:
    for line in loop.saving(TINY_C):
        assert "s a GB" in line.figure


def test_full_size_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "StageCConfig", lambda: TINY_C)
    monkeypatch.setattr(loop, "StageBConfig", lambda: TINY_B)
    monkeypatch.setattr(loop, "FULL_SIZES", {"stage_c": {128: 2}, "stage_b": {128: 1}})
    lines = list(loop.full_size(CPU, steps=3))
    assert [line.what for line in lines] == ["stage_c at 128 px, batch 2", "stage_b at 128 px, batch 1"]
    assert all("images/s" in line.figure and "waits" in line.figure for line in lines)


def test_the_projections_schedule_is_that_of_the_config() -> None:
    assert loop.schedule("stage_c")[:2] == [(512, 500_000 * 1536), (1024, 364_000 * 1536)]


def test_object_store(s3: FaultyStore) -> None:
    found = {line.what: line for line in storage.objects({}, "pictures", large=1 << 20, small=4, pairs=2)}
    encoding = storage.encoding({}, "pictures", 0.001, rows=2, num_shards=2, pairs=2)
    assert encoding.bar == "at least 0.95"
    reading = storage.reading({}, "pictures", rows=2, num_shards=3, pairs=2)
    assert reading.bar == "at least 1.0"
    assert "samples/s" in reading.figure
    assert len(found) == 4
    assert all(line.bar == "at least 0.8" and "; ours " in line.figure for line in found.values())


def test_many_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What one of its processes does; what it replaces is brought back."""
    for owner, name in ((board, "BoardClient"), (sample, "drawn"), (scorers, "load")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    many_prompts.work(tmp_path, 3)
    said = (tmp_path / many_prompts.LOG).read_text("utf-8").splitlines()
    for doing in ("drawn", "scored"):
        many = [line for line in said if line.startswith(f"{doing} many things")]
        assert len(many) == len(set(many)) == 3
    assert len(list(tmp_path.glob("artifacts/scores/*/scores.parquet"))) == 1
    many_prompts.work(tmp_path, 3)  # all of it is finished
    assert len((tmp_path / many_prompts.LOG).read_text("utf-8").splitlines()) == len(said)


def test_the_script_for_a_card(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    lines = gpu.main(["--device", "cpu", "--tiny", "--out", str(out)])
    found = by_name(lines)
    assert all(line.met is not False for line in lines)
    assert found["Stage C: fp32, eager, loss off the CPU's"] == "0.0e+00"
    assert "images/s" in found["Stage B: eager"]
    assert "seconds a picture of 128 px, batch 1" in found
    assert len(json.loads(out.read_text())["figures"]) == len(lines)


def test_shifted_multiply_adds_are_the_convolution() -> None:
    layer, x = Conv2d(8, 8, 3, padding=1, groups=8), torch.randn(2, 5, 7, 8)
    torch.testing.assert_close(gpu.shifted(x, layer), layer(x), rtol=1e-5, atol=1e-6)


def test_drawing_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    small = drawing.SETTINGS.model_copy(update={"width": 128, "height": 128, "steps_c": 2, "steps_b": 1})
    monkeypatch.setattr(drawing, "SETTINGS", small)
    start, line = drawing.lines(pairs=1, batches=(2,))
    assert "diffusers" in start.figure
    assert line.bar == "at most 0.7"
