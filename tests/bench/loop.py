"""`python -m tests.bench.loop`: the training loop against plain ones; part of `make bench`.

Needs torch, torchvision, pydantic, PyYAML and this checkout, so that it runs on any GPU image. Rivals take turns: ours
trains without a break, and each time that it logs, the other's steps are made and timed inside that call.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from stages.anatomy import flops, parameters
from stages.draws import Draws
from stages.models.compressor import Compressor
from stages.models.stage_b import StageB, StageBObjective
from stages.models.stage_c import StageC, StageCObjective
from stages.settings.base import Precision
from stages.settings.losses import StageBLoss, StageCLoss
from stages.settings.models import CompressorConfig, StageBConfig, StageCConfig
from stages.settings.training import Phase, TrainingConfig
from stages.state_dicts import Serialized
from stages.training import loop
from stages.training.callbacks import Callbacks
from tests.bench.figures import Line, at_most
from tests.bench.models import TOKENS, WuerstchenPrior, text_encoder

PAIRS, STEPS, WARM_UP = 40, 10, 2  # pairs of so many steps; pairs that do not count
WIDTH = 1024  # of the text
BAR = 1.05
CPU = torch.device("cpu")
TIMED = StageCConfig(width=128, depth=2, heads=4, text_width=WIDTH, dropout=0.0)
SAVED = StageCConfig(width=768, depth=24, heads=12, text_width=WIDTH)  # 0.2 billion parameters
PRIOR = StageCConfig(width=512, depth=8, heads=8, text_width=WIDTH)
FULL_SIZES = {"stage_c": {512: 64, 1024: 32}, "stage_b": {512: 8, 1024: 2}}  # px and images a step
A100 = flops.PEAKS["NVIDIA A100-SXM4-80GB"]
Read = Callable[[int], dict[str, np.ndarray]]


def main() -> None:
    """Print all figures of this machine."""
    for line in lines():
        print(f"{line.what:<58} {line.figure}", flush=True)


def lines() -> Iterator[Line]:
    """What was measured and its figure, as they come."""
    if torch.cuda.is_available():
        yield from full_size(torch.device("cuda"), steps=30)
    else:
        yield from against_plain(TIMED, side=24, batch=4, pairs=PAIRS)
        yield from saving(SAVED)
        yield from against_diffusers(PRIOR, text_encoder(WIDTH, CPU), size=1024, batch=2, pairs=3)


def against_plain(model: StageCConfig, side: int, batch: int, pairs: int) -> Iterator[Line]:
    """Our loop over the same model, batches and optimiser in a plain PyTorch loop."""
    read = batches(model, side, batch)
    rival = plain_steps(objective_c(model), read, batch)
    ratios, ours = in_turns(objective_c(model), read, batch, lambda: rival(STEPS), STEPS, pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    figure = f"quartiles {low:.3f} {middle:.3f} {high:.3f} ({pairs} pairs of {STEPS} steps, {ours:.2f} s each)"
    yield at_most("training loop, seconds over a plain PyTorch loop's", figure, middle, BAR)


def against_diffusers(
    model: StageCConfig, encode: Callable[[list[str]], Any] | None, size: int, batch: int, pairs: int
) -> Iterator[Line]:
    """The prior's training step as diffusers' example makes it, encoders inside, over ours on stored codes and text."""
    what = "diffusers' prior training with its encoders / ours"
    if WuerstchenPrior is None or encode is None:
        yield Line(what, "diffusers or open_clip is not installed: no comparison")
        return
    from stages.weights import convert

    compressor, prior = Compressor(CompressorConfig()).eval(), WuerstchenPrior(**convert.arguments(model))
    side = size * 3 // 128
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-4)
    pictures, captions = torch.rand(batch, 3, size, size), ["a bear in a forest"] * batch

    def step() -> None:
        with torch.no_grad():
            (text, _), code = encode(captions), compressor(pictures)
        draws = Draws(0, 0, 0, batch, batch)
        noise, t = draws.normal(*code.shape[1:]), draws.uniform()
        loss = (prior(code + noise, t, text) - noise).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    ratios, ours = in_turns(objective_c(model), batches(model, side, batch), batch, step, 1, pairs)
    ratio = statistics.median(1 / ratio for ratio in ratios)
    yield Line(what, f"{ratio:.1f} (median of {pairs} pairs; {size} px, batch {batch}; ours {ours:.2f} s a step)")


def saving(model: StageCConfig) -> Iterator[Line]:
    """How long a checkpoint holds up the training: what the loop waits for, and by what the steps beside it are slower.

    The memory that it is copied to is new for the first one; the second is measured.
    """
    kept = Kept()
    training = recipe(steps=12, batch=1, log_every=1).model_copy(update={"checkpoint_every": 4})
    loop.train(objective_c(model), batches(model, side=3, batch=1), training, kept, seed=0, device=CPU)
    seconds = {step: 1 / found["speed/images_per_second"] for step, found in kept.logged.items()}  # one image a step
    waited = kept.logged[9]["speed/saving"] * seconds[9]
    beside = sum(seconds[step] for step in range(9, 13)) - 4 * min(seconds.values()) - waited
    gigabytes, billions = kept.sizes[0] / 1e9, parameters.stage_c(model) / 1e9
    figure = f"{waited / gigabytes:.2f} s a GB ({gigabytes:.1f} GB, {billions:.2f}B parameters)"
    yield Line("a checkpoint's stall, what the loop waits", figure)
    yield Line("  by what the steps beside its writing are slower", f"{beside / gigabytes:.2f} s a GB")


def full_size(device: torch.device, steps: int) -> Iterator[Line]:
    """Stage C and B of the paper through our loop, and what its schedule would take on A100s at that utilisation."""
    b, c, compressor = StageBConfig(), StageCConfig(), CompressorConfig()

    def flops_c(size: int) -> int:
        return 3 * flops.stage_c(c, size * 3 // 128, size * 3 // 128, TOKENS)

    def flops_b(size: int) -> int:
        return 3 * (flops.stage_b(b, size // 4, size // 4, TOKENS) + flops.encode_c(compressor, size * 3 // 4))

    def make_c(size: int, batch: int) -> tuple[nn.Module, Read]:
        return objective_c(c), batches(c, size * 3 // 128, batch)

    def make_b(size: int, batch: int) -> tuple[nn.Module, Read]:
        return objective_b(b, compressor), batches_b(b, size, batch)

    for name, make, flops_of in (("stage_c", make_c, flops_c), ("stage_b", make_b, flops_b)):
        used: dict[int, float] = {}
        for size, batch in FULL_SIZES[name].items():
            found = trained(*make(size, batch), batch, flops_of(size), device, steps)
            peak = flops.PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
            figure = f"{found['speed/images_per_second']:,.1f} images/s, {found['speed/tflops']:,.1f} TFLOP/s"
            if peak:
                used[size] = found["speed/tflops"] * 1e12 / peak
                figure += f", MFU {used[size]:.1%}"
            wait, memory = found["speed/waiting_for_data"], found["speed/memory_gib"]
            figure += f", waits {wait:.1%} for data, {memory:.1f} GiB"
            yield Line(f"{name} at {size} px, batch {batch}", figure)
        if used:
            hours = sum(images * flops_of(size) / (used[size] * A100) / 3600 for size, images in schedule(name))
            yield Line(f"{name}: projection of the paper's schedule", f"{hours:,.0f} A100-hours at this MFU")


def schedule(name: str) -> list[tuple[int, int]]:
    """Size in px, and images, of each phase of the paper's training."""
    text = (Path(__file__).parents[2] / "conf" / "scale" / "paper.yaml").read_text()
    return [
        (phase["size"], phase["steps"] * phase["batch_size"]) for phase in yaml.safe_load(text)[name]["train"]["phases"]
    ]


def trained(
    objective: nn.Module, read: Read, batch: int, flops_of_image: int, device: torch.device, steps: int
) -> dict[str, float]:
    """What our loop logs of the middle of a short training."""
    kept, training = Kept(flops_of_image), recipe(steps, batch, log_every=steps // 3, precision="bf16")
    loop.train(objective, read, training, kept, seed=0, device=device)
    return kept.logged[2 * (steps // 3)]


class Kept(Callbacks):
    """What a training logs, and the sizes of its checkpoints, which are written to a file that goes at once."""

    def __init__(self, flops_of_image: int = 0) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}
        self.sizes: list[int] = []
        self._flops = flops_of_image

    def save_state(self, step: int, data: Serialized) -> None:
        with tempfile.TemporaryFile() as file:
            file.writelines(data)
            os.fsync(file.fileno())
        self.sizes.append(len(data))

    def log(self, step: int, values: dict[str, float]) -> None:
        self.logged[step] = values

    def flops_of(self, phase: Phase) -> float:
        return self._flops


def in_turns(
    objective: nn.Module, read: Read, batch: int, rival: Callable[[], None], steps: int, pairs: int
) -> tuple[list[float], float]:
    """Seconds of so many steps of our loop over those of the rival, pair by pair, sorted; and the median of ours."""
    turns, training = Turns(rival), recipe((WARM_UP + pairs) * steps, batch, log_every=steps)
    loop.train(objective, read, training, turns, seed=0, device=CPU)
    counted = turns.times[WARM_UP:]
    return sorted(ours / theirs for ours, theirs in counted), statistics.median(ours for ours, _ in counted)


class Turns(Callbacks):
    """Has the rival make its steps inside each log entry of ours, and times both."""

    def __init__(self, rival: Callable[[], None]) -> None:
        super().__init__()
        self.times: list[tuple[float, float]] = []
        self._rival, self._ours_began = rival, time.perf_counter()

    def log(self, step: int, values: dict[str, float]) -> None:
        ours = time.perf_counter() - self._ours_began
        began = time.perf_counter()
        self._rival()
        self._ours_began = time.perf_counter()
        self.times.append((ours, self._ours_began - began))


def plain_steps(objective: nn.Module, read: Read, batch: int) -> Callable[[int], None]:
    """A training as one would write it, by hand, that goes on for so many steps at a time."""
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4, fused=True)

    def go_on(steps: int) -> None:
        for step in range(steps):
            rows = {name: torch.from_numpy(values) for name, values in read(step).items()}
            loss, _ = objective(rows, Draws(0, step, 0, batch, batch))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
            optimizer.step()

    return go_on


def recipe(steps: int, batch: int, log_every: int, precision: Precision = "fp32") -> TrainingConfig:
    """A training that saves at its end, and where log_every is 1 at each step."""
    return TrainingConfig(
        phases=(Phase(steps=steps, batch_size=batch, size=1024),),
        learning_rate=1e-4,
        warmup_steps=0,
        precision=precision,
        log_every=log_every,
        checkpoint_every=1 if log_every == 1 else steps,
    )


def objective_c(model: StageCConfig) -> StageCObjective:
    """Stage C from a fixed seed."""
    torch.manual_seed(0)
    return StageCObjective(StageC(model), StageCLoss(), torch.zeros(TOKENS, model.text_width))


def objective_b(model: StageBConfig, compressor: CompressorConfig) -> StageBObjective:
    """Stage B with its compressor."""
    torch.manual_seed(0)
    null = torch.zeros(TOKENS, model.text_width)
    return StageBObjective(StageB(model), Compressor(compressor), StageBLoss(), null)


def batches(model: StageCConfig, side: int, batch: int) -> Read:
    """Codes and text, as they come from a reader: in fp16."""
    text = (TOKENS, model.text_width)
    return constant({"latents_c": normal(batch, model.latent_channels, side, side), "text": normal(batch, *text)})


def batches_b(model: StageBConfig, size: int, batch: int) -> Read:
    """Pictures, their latents, and text."""
    image = np.random.default_rng(0).integers(0, 256, (batch, 3, size, size), np.uint8)
    latents = normal(batch, model.latent_channels, size // 4, size // 4)
    return constant({"image": image, "latents_a": latents, "text": normal(batch, TOKENS, model.text_width)})


def normal(*shape: int) -> np.ndarray:
    """Normal numbers of a fixed seed, fp16."""
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)


def constant(batch: dict[str, np.ndarray]) -> Read:
    """The same batch, copied for each step."""
    return lambda _: {name: values.copy() for name, values in batch.items()}


if __name__ == "__main__":
    main()
