"""`python -m tests.bench.gpu`: is all of it right on this card, and how fast; at most eight minutes, one script.

Needs torch, torchvision, pydantic, PyYAML and this checkout. First correctness: four steps of A, B and C here against
the CPU, in fp32 and bf16, as they are, compiled, and as CUDA graphs; then utilisation and memory of full-size steps,
beside what `plan` says of their memory; seconds a picture; the longest kernels. A table on the screen, and all of it as
JSON in `--out`. `--device cpu --tiny` does the same with small models, so that one knows that the script works.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from stages.anatomy import flops
from stages.anatomy.memory_estimate import GIB
from stages.models.layers import Conv2d
from stages.settings.models import CompressorConfig, StageAConfig, StageBConfig, StageCConfig
from stages.training.activity import Activity
from stages.training.trainer import Trainer
from tests.bench import fake_step, models
from tests.bench.fake_step import EMA, HALF, Case
from tests.bench.figures import Line, at_most
from tests.bench.models import seconds

STEPS, PAIRS, LONGEST = 4, 10, 10  # graphs: one warms up, one records, one plays back, and one shows what that did
COMPILED: dict[str, bool | str] = {"eager": False, "compiled": True, "graphs": "graphs"}
LIMIT_S = 8 * 60
SHORT = {"backbone": {"stem": 8, "last": 32, "stages": [
    {"block": "fused", "expand": 1, "stride": 2, "channels": 8, "layers": 1},
    {"block": "fused", "expand": 2, "stride": 2, "channels": 16, "layers": 1},
    {"block": "mb", "expand": 2, "stride": 2, "channels": 16, "layers": 1},
    {"block": "mb", "expand": 2, "stride": 2, "channels": 16, "layers": 1},
]}}  # fmt: skip
SMALL_A = StageAConfig(bottleneck_blocks=1, hidden=16, codebook_size=32)
SMALL_B = StageBConfig(widths=(16, 32), blocks=(1, 1), patterns=("CT", "CTA"), heads=(0, 2), inject_code=(False, True),
                       cond_width=32, text_width=32, dropout=0.0)  # fmt: skip
SMALL_C = StageCConfig(width=64, depth=2, heads=4, text_width=32, dropout=0.0)
FP32: dict[str, Any] = {"precision": "fp32"}
TOLERANCE = {"fp32": 2e-2, "bf16": 1e-1}  # of each step's loss: TF32, and the optimiser's first steps magnify
SMALL_COMPRESSOR = CompressorConfig.model_validate({**SHORT, "batch_norm": "fixed"})
EXACT = [
    Case("Stage A", SMALL_A, 128, 2, {}),
    Case("Stage B", SMALL_B, 128, 4, {}, compressor=SMALL_COMPRESSOR),
    Case("Stage C", SMALL_C, 512, 4, {}),
]
TIMED = [
    Case("Stage C 12x12, 64 rows", StageCConfig(), 512, 64, HALF | EMA),
    Case("Stage C 24x24, 24 rows", StageCConfig(), 1024, 24, HALF | EMA),
    Case("Stage B 128x128, 8 rows", StageBConfig(), 512, 8, HALF),
    Case("Stage B 256x256, 2 rows", StageBConfig(), 1024, 2, HALF),
    Case("Stage A 128 px, 32 rows", StageAConfig(), 256, 32, FP32),
]


def main(words: Sequence[str] | None = None) -> list[Line]:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small models: to see that this script works")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    given = parser.parse_args(words)
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("tests.bench.gpu: torch sees no CUDA device here; --device cpu --tiny shows that the script works")
    device, began, found = torch.device(given.device), time.monotonic(), list[Line]()
    torch.set_float32_matmul_precision("high")
    for line in lines(device, given.tiny):
        found.append(line)
        verdict = "" if line.met is None else "  met" if line.met else "  MISSED"
        print(f"{line.what:<56} {line.figure}{verdict}", flush=True)
        if time.monotonic() - began > LIMIT_S:
            print(f"stopped after {LIMIT_S} s", flush=True)
            break
    about = {"device": name_of(device), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "words": words}
    given.out.write_text(json.dumps({**about, "figures": [line._asdict() for line in found]}, indent=1) + "\n")
    return found


def lines(device: torch.device, tiny: bool) -> Iterator[Line]:
    """All figures, as they come."""
    yield Line("device", f"{name_of(device)}, torch {torch.__version__}")
    ways = {"eager": False} if tiny else COMPILED
    yield from correctness(device, ways)
    timed = EXACT if tiny else TIMED
    for case in timed:
        yield from pace(case, device, ways, steps=2 if tiny else PAIRS)
    yield from depthwise(device, width=32 if tiny else 1536, side=24, batch=2 if tiny else 24)
    a, b, c = (SMALL_A, SMALL_B, SMALL_C) if tiny else (StageAConfig(), StageBConfig(), StageCConfig())
    size, batches, model_calls = (128, (1,), (2, 2)) if tiny else (1024, (1, 4), (60, 12))
    yield from models.pictures(a, b, c, device, size, batches, model_calls)
    yield from longest(timed[-1] if tiny else TIMED[1], device)
    if not tiny:
        yield from models.ratios(models.CUDA_CASES, device, torch.bfloat16, PAIRS)


def name_of(device: torch.device) -> str:
    """What torch calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def correctness(device: torch.device, ways: Mapping[str, bool | str]) -> Iterator[Line]:
    """The losses of some steps on the device against those on the CPU in fp32; the same noise in both."""
    for case in EXACT:
        expected = losses(case, torch.device("cpu"), "fp32", compiled=False)
        for precision, tolerance in TOLERANCE.items():
            for name, compiled in ways.items():
                found = losses(case, device, precision, compiled)
                worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
                yield at_most(f"{case.name}: {precision}, {name}, loss off the CPU's", f"{worst:.1e}", worst, tolerance)


def losses(case: Case, device: torch.device, precision: str, compiled: bool | str) -> list[float]:
    """Of some steps. All noise is drawn on the CPU, so that it is the same everywhere."""
    torch.manual_seed(0)
    trainer = trainer_of(case.changed({"precision": precision, "compile": compiled}), device)
    batch, found = filled(case.batch(), device), []
    with fake_step.drawn_on_cpu():
        for _ in range(STEPS):
            found.append(float(trainer.advance(batch, Activity())["loss"]))
    torch._dynamo.reset()
    return found


def trainer_of(case: Case, device: torch.device) -> Trainer:
    """With weights that all have an effect: at their start, heads are zero."""
    objective, generator = case.objective(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    return Trainer(objective, case.training, 0, device, 0, 1)


def filled(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Random pictures and features in place of none."""
    generator = torch.Generator().manual_seed(0)
    whole = {
        key: torch.randint(0, 256, value.shape, dtype=torch.uint8, generator=generator)
        if value.dtype == torch.uint8
        else torch.randn(value.shape, generator=generator)
        for key, value in batch.items()
    }
    return {key: value.to(device, batch[key].dtype) for key, value in whole.items()}


def pace(case: Case, device: torch.device, ways: Mapping[str, bool | str], steps: int) -> Iterator[Line]:
    """Seconds a step, MFU, and the peak of memory beside `plan`'s; as it is, compiled, and as graphs."""
    peak = flops.PEAKS.get(name_of(device))
    for name, compiled in ways.items():
        trainer = trainer_of(case.changed({"compile": compiled}), device)
        batch = filled(case.batch(), device)

        def step(trainer: Trainer = trainer, batch: dict[str, Tensor] = batch) -> None:
            trainer.advance(batch, Activity())

        for _ in range(min(models.WARM_UP, steps)):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took = statistics.median(seconds(step, device) for _ in range(steps))
        figure = f"{1e3 * took:,.1f} ms a step, {case.rows / took:,.1f} images/s, "
        figure += f"{case.model_flops / took / 1e12:,.2f} TFLOP/s"
        figure += f", MFU {case.model_flops / took / peak:.1%}" if peak else ", no MFU: the card's peak is not known"
        if device.type == "cuda":
            figure += f", {torch.cuda.max_memory_allocated() / GIB:.1f} GiB (plan {case.planned / GIB:.1f})"
        yield Line(f"{case.name}: {name}", figure)
        del step, trainer, batch
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def shifted(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """A depthwise 3x3 convolution of (B, H, W, C) as nine shifted multiply-adds, which a compiler fuses."""
    height, width = x.shape[1:3]
    assert convolution.bias is not None
    weight, padded = convolution.weight, torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    total = convolution.bias.to(x.dtype).expand_as(x)
    for row in range(3):
        for column in range(3):
            part = padded[:, row : row + height, column : column + width]
            total = torch.addcmul(total, part, weight[:, 0, row, column].to(x.dtype))
    return total


def depthwise(device: torch.device, width: int, side: int, batch: int) -> Iterator[Line]:
    """Forward and backward of the blocks' depthwise convolution, by the library and by shifted multiply-adds."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = Conv2d(width, width, 3, padding=1, groups=width).to(device, dtype)
    x = torch.randn(batch, side, side, width, device=device, dtype=dtype, requires_grad=True)
    fused = torch.compile(shifted, dynamic=False) if device.type == "cuda" else shifted

    def by_library() -> None:
        layer(x).sum().backward()

    def by_shifts() -> None:
        fused(x, layer).sum().backward()

    error = (layer(x) - fused(x, layer)).abs().max().item()
    times = {}
    for name, work in {"library": by_library, "shifts": by_shifts}.items():
        for _ in range(models.WARM_UP):
            work()
        times[name] = statistics.median(seconds(work, device) for _ in range(PAIRS))
    figure = ", ".join(f"{name} {1e3 * took:.2f} ms" for name, took in times.items())
    yield Line(f"depthwise 3x3 of {width} channels", f"{figure}; largest difference {error:.1e}")


def longest(case: Case, device: torch.device) -> Iterator[Line]:
    """The kernels, or on a CPU the operators, that a step spends most time in."""
    trainer, batch = trainer_of(case, device), filled(case.batch(), device)
    trainer.advance(batch, Activity())
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as profiled:
        trainer.advance(batch, Activity())

    def own(entry: Any) -> float:
        return float(entry.self_device_time_total if device.type == "cuda" else entry.self_cpu_time_total)

    entries = sorted(profiled.key_averages(), key=own, reverse=True)
    total = sum(map(own, entries)) or 1.0
    for entry in entries[:LONGEST]:
        figure = f"{own(entry) / 1e3:,.2f} ms, {own(entry) / total:.1%}, {entry.count} times"
        yield Line(f"{case.name}: {entry.key[:40]}", figure)


if __name__ == "__main__":
    main()
