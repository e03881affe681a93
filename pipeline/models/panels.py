"""Panels: some pictures, and what a model under training makes of them, side by side as a PNG.

The pictures are held-out ones, where there are any, else the first of those that are trained on.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.models.training_data import TrainingData
from stages.diffusion import sampling_times
from stages.models.baseline import Baseline
from stages.models.layers import resized
from stages.models.previewer import Previewer
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.sampling.denoising import Noise, Steps, sample_code
from stages.sampling.grid import grid
from stages.sampling.sample import generate_baseline, preview, reconstruct_a, reconstruct_b, to_pixels

if TYPE_CHECKING:  # it needs torchvision, which not every training has to load
    from stages.models.compressor import Compressor

STEPS = 12  # model calls of Stage B, Stage C, or the baseline


def stage_a_panel(stage_a: StageA, data: TrainingData) -> bytes:
    """PNG of some pictures, and what Stage A makes of them with and without its codebook."""
    pictures = _samples(data)["image"].to(next(stage_a.parameters()).device)
    stage_a.eval()
    columns = [
        pictures.permute(0, 2, 3, 1).cpu().numpy(),
        reconstruct_a(stage_a, pictures).numpy(),
        reconstruct_a(stage_a, pictures, quantised=True).numpy(),
    ]
    return grid(("original", "Stage A", "by the codebook"), [("", row) for row in zip(*columns, strict=True)], blocks=4)


def stage_b_panel(stage_a: StageA, stage_b: StageB, compressor: "Compressor", data: TrainingData) -> bytes:
    """PNG of some pictures, what Stage A makes of them, and what Stage B makes of their compressor codes."""
    batch = _samples(data)
    stage_b.eval()
    compressor.eval()
    device = next(stage_b.parameters()).device
    pictures, text = batch["image"].to(device), batch["text"].float().to(device)
    seeds = range(len(pictures))
    columns = [
        batch["image"].permute(0, 2, 3, 1).numpy(),
        reconstruct_a(stage_a, pictures).numpy(),
        reconstruct_b(stage_a, stage_b, compressor, pictures, text, seeds, STEPS).numpy(),
    ]
    return grid(
        ("original", "Stage A alone", "Stages B + A"),
        [("", row) for row in zip(*columns, strict=True)],
        blocks=4,
    )


def stage_c_panel(stage_c: StageC, data: TrainingData) -> bytes:
    """PNG of some codes, and of those that Stage C draws from their captions: three of the channels, as colours.

    What a code shows, Stage B and A would have to decode; they are not there while Stage C trains.
    """
    batch = _samples(data)
    stage_c.eval()
    device = next(stage_c.parameters()).device
    codes, text = batch["latents_c"].float(), batch["text"].float().to(device)
    height, width = (side * 128 // 3 for side in codes.shape[-2:])  # px of a code's picture
    with torch.inference_mode():
        noise = Noise(range(len(codes)), device)
        drawn = sample_code(stage_c, text, text, noise, width, height, Steps(sampling_times(STEPS))).cpu()
    low, high = (codes[:, :3].amin((0, 2, 3), keepdim=True), codes[:, :3].amax((0, 2, 3), keepdim=True))
    columns = [to_pixels((code[:, :3] - low) / (high - low).clamp(min=1e-6)).numpy() for code in (codes, drawn)]
    titles = ("code's channels 1-3", "drawn from the caption")
    return grid(titles, [("", row) for row in zip(*columns, strict=True)], blocks=4)


def previewer_panel(previewer: Previewer, data: TrainingData) -> bytes:
    """PNG of some pictures, what the previewer is to make of them, and what it makes of their codes."""
    batch = _samples(data)
    previewer.eval()
    previews = preview(previewer, batch["latents_c"].float().to(next(previewer.parameters()).device))
    columns = [
        batch["image"].permute(0, 2, 3, 1).numpy(),
        resized(batch["image"], tuple(previews.shape[1:3])).permute(0, 2, 3, 1).numpy(),
        previews.numpy(),
    ]
    return grid(("original", "made smaller", "preview"), [("", row) for row in zip(*columns, strict=True)], blocks=4)


def baseline_panel(stage_a: StageA, baseline: Baseline, data: TrainingData) -> bytes:
    """PNG of some pictures as Stage A keeps them, and what the baseline draws from their captions."""
    batch = _samples(data)
    baseline.eval()
    device = next(baseline.parameters()).device
    latents, text = batch["latents_a"].float().to(device), batch["text"].float().to(device)
    height, width = (stage_a.side_ratio * side for side in latents.shape[-2:])
    drawn = generate_baseline(
        stage_a,
        baseline,
        text,
        text,
        range(len(text)),
        width=width,
        height=height,
        steps=STEPS,
        guidance=1.0,
    )
    columns = [to_pixels(stage_a.decode(latents)).numpy(), drawn.numpy()]
    return grid(("Stage A alone", "from the caption"), [("", row) for row in zip(*columns, strict=True)], blocks=4)


def _samples(data: TrainingData) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in data.shown.items()}
