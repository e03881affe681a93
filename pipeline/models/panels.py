"""Panels: some pictures, and what a model under training makes of them, side by side as a PNG.

The pictures are held-out ones, where there are any, then some of those that are trained on, each below its caption.
They go through the models one at a time, in fp32: what a panel takes beside the training does not grow with their
number, and `stages.anatomy.memory_estimate` counts it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models.showing import Shower
from pipeline.models.training_data import Shown, TrainingData
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
BLOCKS = 4  # of rows, side by side
Sample = Mapping[str, Tensor]  # a batch of one, on the model's device; numbers other than pictures in fp32
Columns = tuple[Tensor, ...]  # uint8 (1, H, W, 3) each
Pictures = Sequence[np.ndarray]  # uint8 (H, W, 3) each, one a row


@dataclass(frozen=True)
class Panel:
    """Columns of pictures by title: those that are `given`, whatever the weights are, and what the models have `drawn`;
    `captions` has a text for each row."""

    captions: Sequence[str]
    given: Mapping[str, Pictures]
    drawn: Mapping[str, Pictures]

    def png(self) -> bytes:
        """The panel as a PNG."""
        return _png(self.captions, {**self.given, **self.drawn})


def beside(panels: Mapping[str, Panel]) -> bytes:
    """PNG of the panels of one model with several weights, by what these are called: what each has drawn, side by
    side."""
    first = next(iter(panels.values()))
    if len(panels) == 1:
        return first.png()
    drawn = {f"{title}, {name}": panel.drawn[title] for title in first.drawn for name, panel in panels.items()}
    return _png(first.captions, {**first.given, **drawn})


def _png(captions: Sequence[str], columns: Mapping[str, Pictures]) -> bytes:
    rows = [(caption, [pictures[row] for pictures in columns.values()]) for row, caption in enumerate(captions)]
    return grid(tuple(columns), rows, blocks=max(1, min(BLOCKS, 12 // len(columns))))


def stage_a_panel(stage_a: StageA, data: TrainingData) -> Panel:
    """Some pictures, and what Stage A makes of them with and without its codebook."""

    def columns(number: int, sample: Sample) -> Columns:
        picture = sample["image"]
        quantised = reconstruct_a(stage_a, picture, quantised=True)
        return _shown(picture), reconstruct_a(stage_a, picture), quantised

    return _panel(("original",), ("Stage A", "by the codebook"), data.shown, columns, stage_a)


def stage_b_panel(stage_a: StageA, stage_b: StageB, compressor: "Compressor", data: TrainingData) -> Panel:
    """Some pictures, what Stage A makes of them, and what Stage B makes of their compressor codes."""

    def columns(number: int, sample: Sample) -> Columns:
        picture = sample["image"]
        drawn = reconstruct_b(stage_a, stage_b, compressor, picture, sample["text"], [number], STEPS)
        return _shown(picture), reconstruct_a(stage_a, picture), drawn

    return _panel(("original", "Stage A alone"), ("Stages B + A",), data.shown, columns, stage_b, compressor)


@torch.inference_mode()
def stage_c_panel(stage_c: StageC, shower: Shower, data: TrainingData) -> Panel:
    """What is to be seen in the codes of some pictures, and in those that Stage C draws from their captions; and from
    prompts that come from elsewhere."""
    stage_c.eval()
    samples = list(_samples(data.shown, next(stage_c.parameters()).device))
    own, texts = [sample["latents_c"] for sample in samples], [sample["text"] for sample in samples]
    every = [*texts, *shower.texts(own[0].device)]
    height, width = (side * 128 // 3 for side in own[0].shape[-2:])  # px of a code's picture
    unguided = Steps(sampling_times(STEPS))
    codes = [
        sample_code(stage_c, text, text, Noise([number], text.device), width, height, unguided)
        for number, text in enumerate(every)
    ]
    given = shower.given(own, texts, STEPS)
    drawn = shower.pictures(codes, every, STEPS)
    return Panel([*data.shown.captions, *shower.captions], {f"its code, {shower.by}": given}, {"drawn": drawn})


def previewer_panel(previewer: Previewer, data: TrainingData) -> Panel:
    """Some pictures, what the previewer is to make of them, and what it makes of their codes."""

    def columns(number: int, sample: Sample) -> Columns:
        picture = sample["image"].cpu()
        seen = preview(previewer, sample["latents_c"])
        return _shown(picture), _shown(resized(picture, tuple(seen.shape[1:3]))), seen

    return _panel(("original", "made smaller"), ("preview",), data.shown, columns, previewer)


def baseline_panel(stage_a: StageA, baseline: Baseline, data: TrainingData) -> Panel:
    """Some pictures as Stage A keeps them, and what the baseline draws from their captions."""

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

    return _panel(("Stage A alone",), ("from the caption",), data.shown, columns, baseline)


@torch.inference_mode()
def _panel(
    given: tuple[str, ...],
    drawn: tuple[str, ...],
    shown: Shown,
    columns: Callable[[int, Sample], Columns],
    *models: nn.Module,
) -> Panel:
    """The panel: a row of columns for each sample, made with the models in evaluation mode."""
    for model in models:
        model.eval()
    device = next(models[0].parameters()).device
    rows = [
        [pixels[0].numpy() for pixels in columns(number, sample)]
        for number, sample in enumerate(_samples(shown, device))
    ]
    found = dict(zip((*given, *drawn), zip(*rows, strict=True), strict=True))
    return Panel(shown.captions, {title: found[title] for title in given}, {title: found[title] for title in drawn})


def _samples(shown: Shown, device: torch.device) -> Iterator[Sample]:
    """The samples, one at a time."""
    for row in range(len(shown.captions)):
        one = {name: torch.from_numpy(values[row : row + 1]).to(device) for name, values in shown.fields.items()}
        yield {name: value.float() if value.is_floating_point() else value for name, value in one.items()}


def _shown(picture: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H, W, 3), on the CPU."""
    return picture.permute(0, 2, 3, 1).cpu()
