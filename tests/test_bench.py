"""The benches run through all their parts at a tiny size, those for CUDA on the CPU."""

from pathlib import Path

import pytest
import torch

from stages.config import StageAConfig, StageBConfig, StageCConfig
from tests.bench import data, loop, models, plan_memory

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


def test_ratios() -> None:
    found = dict(models.ratios(CASES, CPU, torch.float32, pairs=2))
    assert "quartiles" in found["Stage C 3x3, batch 2: diffusers / ours"]
    assert "quartiles" in found["Stage B 32x32, batch 1: diffusers / ours"]


def test_trainings() -> None:
    found = dict(models.trainings(CASES, CPU, torch.bfloat16, pairs=1))
    for owner in ("ours", "diffusers"):
        for how in ("eager", "compiled"):
            assert "images/s" in found[f"Stage B 32x32, batch 1: {owner}, {how}"]


def test_pictures() -> None:
    (line,) = models.pictures(TINY_A, TINY_B, TINY_C, CPU, 128, (2,), (2, 1))
    assert line[0] == "seconds a picture of 128 px, batch 2"
    assert [part.split()[0] for part in line[1].split(", ")] == ["text", "C", "B", "A"]


def test_diffusers_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "WuerstchenPrior", None)
    assert dict(models.ratios(CASES, CPU, torch.float32, pairs=1)) == {"diffusers": "not installed: no comparison"}
    assert not any("diffusers" in what for what, _ in models.trainings(CASES[:1], CPU, torch.float32, pairs=1))


def test_the_activations_that_count_are_those_that_are_kept() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    # the input of each Linear, the second of which is also the output that tanh keeps
    assert models.activations(model, [torch.randn(3, 4)]) == 4 * (3 * 4 + 3 * 8)


def test_reader() -> None:
    figures = dict(data.reader(rows=2, num_shards=3, pairs=2))
    assert "webdataset" in figures["reader, samples a CPU-second (text 77x1024, codes 16x24x24)"]
    assert len(figures) == 4


def test_encoding() -> None:
    ((_, figure),) = data.encoding(torch.nn.AvgPool2d(32), size=64, rows=1, num_shards=2, pairs=2)
    assert "ms a batch" in figure


def test_downloading() -> None:
    figures = dict(data.downloading(count=3, side=64, size=32, pairs=2))
    assert "pictures/s" in figures["download / plain img2dataset, 64 -> 32 px"]
    assert [part.split()[0] for part in figures["  of which"].split(", ")] == ["fetch", "decode", "resize", "encode"]


def test_planning(tmp_path: Path) -> None:
    assert plan_memory.measured(tmp_path, 500)["planned"] == 500


def test_the_loop_against_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STEPS", 2)
    ((what, figure),) = loop.against_plain(TINY_C, side=3, batch=2, pairs=2)
    assert "1.05 or less" in what
    assert "2 pairs of 2 steps" in figure
    encode = models.text_encoder(64, CPU)
    ((_, figure),) = loop.against_diffusers(TINY_C, encode, size=128, batch=1, pairs=1)
    assert float(figure.split()[0]) > 0


def test_saving() -> None:
    ((_, figure),) = loop.saving(TINY_C)
    assert "s a GB" in figure


def test_full_size_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "StageCConfig", lambda: TINY_C)
    monkeypatch.setattr(loop, "StageBConfig", lambda: TINY_B)
    monkeypatch.setattr(loop, "FULL_SIZES", {"stage_c": {128: 2}, "stage_b": {128: 1}})
    figures = dict(loop.full_size(CPU, steps=3))
    assert list(figures) == ["stage_c at 128 px, batch 2", "stage_b at 128 px, batch 1"]
    assert all("images/s" in figure and "waits" in figure for figure in figures.values())


def test_the_projections_schedule_is_that_of_the_config() -> None:
    assert loop.schedule("stage_c")[:2] == [(512, 500_000 * 1536), (1024, 364_000 * 1536)]
