"""Panels: some pictures, and what a model under training makes of them, side by side as a PNG.

The pictures are held-out ones, where there are any, else the first of those that are trained on. They go through the
models one at a time, in fp32: what a panel takes beside the training does not grow with their number, and
`stages.anatomy.memory_estimate` counts it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

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
Sample = Mapping[str, Tensor]  # a batch of one, on the model's device; numbers other than pictures in fp32
Columns = tuple[Tensor, ...]  # uint8 (1, H, W, 3) each


def stage_a_panel(stage_a: StageA, data: TrainingData) -> bytes:
    """PNG of some pictures, and what Stage A makes of them with and without its codebook."""

    def columns(number: int, sample: Sample) -> Columns:
        picture = sample["image"]
        quantised = reconstruct_a(stage_a, picture, quantised=True)
        return _shown(picture), reconstruct_a(stage_a, picture), quantised

    return _panel(("original", "Stage A", "by the codebook"), data, columns, stage_a)


def stage_b_panel(stage_a: StageA, stage_b: StageB, compressor: "Compressor", data: TrainingData) -> bytes:
    """PNG of some pictures, what Stage A makes of them, and what Stage B makes of their compressor codes."""

    def columns(number: int, sample: Sample) -> Columns:
        picture = sample["image"]
        drawn = reconstruct_b(stage_a, stage_b, compressor, picture, sample["text"], [number], STEPS)
        return _shown(picture), reconstruct_a(stage_a, picture), drawn

    return _panel(("original", "Stage A alone", "Stages B + A"), data, columns, stage_b, compressor)


def stage_c_panel(stage_c: StageC, data: TrainingData) -> bytes:
    """PNG of some codes, and of those that Stage C draws from their captions: three of the channels, as colours.

    What a code shows, Stage B and A would have to decode; they are not there while Stage C trains.
    """
    colours = torch.from_numpy(data.shown["latents_c"][:, :3]).float()
    low, high = colours.amin((0, 2, 3), keepdim=True), colours.amax((0, 2, 3), keepdim=True)

    def columns(number: int, sample: Sample) -> Columns:
        code, text = sample["latents_c"], sample["text"]
        height, width = (side * 128 // 3 for side in code.shape[-2:])  # px of a code's picture
        noise = Noise([number], code.device)
        drawn = sample_code(stage_c, text, text, noise, width, height, Steps(sampling_times(STEPS)))
        shown = ((each[:, :3].cpu() - low) / (high - low).clamp(min=1e-6) for each in (code, drawn))
        return tuple(map(to_pixels, shown))

    return _panel(("code's channels 1-3", "drawn from the caption"), data, columns, stage_c)


def previewer_panel(previewer: Previewer, data: TrainingData) -> bytes:
    """PNG of some pictures, what the previewer is to make of them, and what it makes of their codes."""

    def columns(number: int, sample: Sample) -> Columns:
        picture = sample["image"].cpu()
        seen = preview(previewer, sample["latents_c"])
        return _shown(picture), _shown(resized(picture, tuple(seen.shape[1:3]))), seen

    return _panel(("original", "made smaller", "preview"), data, columns, previewer)


def baseline_panel(stage_a: StageA, baseline: Baseline, data: TrainingData) -> bytes:
    """PNG of some pictures as Stage A keeps them, and what the baseline draws from their captions."""

    def columns(number: int, sample: Sample) -> Columns:
        latents, text = sample["latents_a"], sample["text"]
        height, width = (stage_a.side_ratio * side for side in latents.shape[-2:])
        drawn = generate_baseline(
            stage_a,
            baseline,
            text,
            text,
            [number],
            width=width,
            height=height,
            steps=STEPS,
            guidance=1.0,
        )
        return to_pixels(stage_a.decode(latents)), drawn

    return _panel(("Stage A alone", "from the caption"), data, columns, baseline)


@torch.inference_mode()
def _panel(
    titles: tuple[str, ...], data: TrainingData, columns: Callable[[int, Sample], Columns], *models: nn.Module
) -> bytes:
    """The PNG: a row of columns for each sample, made with the models in evaluation mode."""
    for model in models:
        model.eval()
    device = next(models[0].parameters()).device
    rows = [
        ("", [pixels[0].numpy() for pixels in columns(number, sample)])
        for number, sample in enumerate(_samples(data.shown, device))
    ]
    return grid(titles, rows, blocks=4)


def _samples(shown: Mapping[str, np.ndarray], device: torch.device) -> Iterator[Sample]:
    """The samples, one at a time."""
    for row in range(len(shown["key"])):
        one = {name: torch.from_numpy(values[row : row + 1]).to(device) for name, values in shown.items()}
        yield {name: value.float() if value.is_floating_point() else value for name, value in one.items()}


def _shown(picture: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H, W, 3), on the CPU."""
    return picture.permute(0, 2, 3, 1).cpu()
