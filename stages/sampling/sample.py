"""Sampling: text -> Stage C -> Stage B -> Stage A's decoder -> pixels; and the same ways from a given picture.

Each sample's noise comes from its own seed and is drawn in the order of diffusers' Würstchen pipelines, so
that the stock pipeline with a CPU generator of that seed makes the same one from an export. A picture depends
on its batch by rounding alone: kernels add up in another order. The demo's models on a CPU, batch 4 against 1:
at most 1 of 255 levels, in at most 8e-5 of the values. Batch 1 always gives the same bytes.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from stages import diffusion
from stages.models.baseline import Baseline
from stages.models.geometry import BadImageSize, check_size, code_side, latent_side, nearest_size, normalise
from stages.models.layers import to_unit_range
from stages.models.previewer import Previewer
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.sampling.denoising import Noise, Steps, denoise, guided, sample_code, sample_latents
from stages.settings.sampling import SamplingConfig

if TYPE_CHECKING:  # these need torchvision and open_clip, which not every process has to load
    from stages.models.compressor import Compressor
    from stages.models.text import TextTower

M = TypeVar("M", bound=nn.Module)
MAGENTA = (1.0, 0.0, 1.0)  # of what is no colour


class NoPicture(ValueError):
    """A model gives numbers that are not finite, of which there is no picture."""


@dataclass(frozen=True)
class Models:
    """All that turns text into pixels, in evaluation mode. Stage B and C may share one text tower."""

    stage_a: StageA
    stage_b: StageB
    stage_c: StageC
    text_b: "TextTower | None"
    """None where Stage B was trained without text."""
    text_c: "TextTower"
    compressor: "Compressor | None" = None
    """What sees a given picture; None where none is ever given."""
    previewer: Previewer | None = None
    """What shows a code without Stage B and A; None where that is never asked for."""
    settings: SamplingConfig = field(default_factory=SamplingConfig)
    """How `draw` draws unless told otherwise."""
    negatives: dict[tuple[int, str, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Hidden states of what was kept away from last, by the tower's id, for the pictures that follow."""

    def compile(self, backend: str = "inductor") -> None:
        """Compile Stage B and C, in place: their next call at each size and batch takes about a minute more."""
        for stage in (self.stage_b, self.stage_c):
            stage.compile(backend=backend, dynamic=False)


@overload
def draw(
    models: Models,
    prompt: str = "",
    *,
    seed: int = 0,
    image: Image.Image | str | Path | None = None,
    strength: float | None = None,
    **changes: Any,
) -> Image.Image: ...


@overload
def draw(
    models: Models,
    prompt: list[str],
    *,
    seed: int = 0,
    image: Image.Image | str | Path | None = None,
    strength: float | None = None,
    **changes: Any,
) -> list[Image.Image]: ...


def draw(
    models: Models,
    prompt: str | list[str] = "",
    *,
    seed: int = 0,
    image: Image.Image | str | Path | None = None,
    strength: float | None = None,
    **changes: Any,
) -> Image.Image | list[Image.Image]:
    """One picture with the models' own settings; `changes` are other values of `SamplingConfig`.

    prompt: a list gives a list of pictures, drawn together as one batch; their seeds count up from `seed`. Of a prompt
    that is longer than a text tower's context the end is cut off, with a warning.

    image: a picture, or the path of one, to reconstruct, or with `strength` in (0, 1] to start from, as in `generate`;
    it is taken upright, on white and in 8-bit RGB, its centre cropped to the aspect of `width` x `height`, or, with
    neither given, of the nearest size of its own. Colour profiles are left out of account.

    Raises ValueError (pydantic's, for settings) for a setting that does not exist or is out of its range, a strength
    without a picture, a prompt that is missing, or a picture where the models have no compressor; OSError for a path
    at which there is no picture.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not (prompts and all(prompts)) and (image is None or strength is not None):
        raise ValueError("draw needs a prompt; without one, an image alone is reconstructed")
    if strength is not None and image is None:
        raise ValueError(f"strength={strength}: how far to go from an image; give image= too")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength={strength}: must be above 0 and at most 1")
    given = picture = None
    if image is not None:
        if models.compressor is None:
            raise ValueError("an image needs the compressor, which these models were loaded without")
        picture = _upright(image)
        if not {"width", "height"} & changes.keys():
            own = models.settings
            changes["width"], changes["height"] = nearest_size(*picture.size, own.width * own.height)
    settings = SamplingConfig.model_validate(models.settings.model_dump() | changes)
    if picture is not None:
        fitted = ImageOps.fit(picture, (settings.width, settings.height), Image.Resampling.BICUBIC)
        given = torch.from_numpy(np.array(fitted)).permute(2, 0, 1).expand(len(prompts), -1, -1, -1)
    for text in (*prompts, settings.negative):
        if length := cut_off(models, text):
            warnings.warn(f"longer than {length} tokens, its end is cut off: {text[:60]}...", stacklevel=2)
    seeds = range(seed, seed + len(prompts))
    drawn = generate(models, prompts, seeds, settings, image=given, strength=strength)
    pictures = [Image.fromarray(pixels) for pixels in drawn.numpy()]
    return pictures[0] if isinstance(prompt, str) else pictures


def cut_off(models: Models, text: str) -> int | None:
    """How many tokens a text tower sees of a text that is longer, the fewest of two; None where both see all of it."""
    towers = [tower for tower in (models.text_c, models.text_b) if tower is not None]
    return min((tower.context_length for tower in towers if tower.tokenizer([text]).truncated), default=None)


def _upright(image: Image.Image | str | Path) -> Image.Image:
    """Upright and in RGB; what shines through becomes white, as in the pictures of the trainings."""
    if not isinstance(image, Image.Image):
        with Image.open(image) as file:
            return _upright(file)
    picture = ImageOps.exif_transpose(image)
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        picture = Image.fromarray((np.asarray(picture, np.uint32) // 257).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


@torch.inference_mode()
def generate(
    models: Models,
    texts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingConfig,
    *,
    image: Tensor | None = None,
    strength: float | None = None,
    preview: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Draw one picture for each caption: (B, H, W, 3) uint8 on the CPU. Stage C writes a code, B latents, A pixels.

    image: (B, 3, height, width) uint8. Alone it is reconstructed: its code goes straight to Stage B, and the
    captions are Stage B's. With `strength` in (0, 1] (image-to-image) its code is diffused to t = strength,
    and Stage C takes it from there with the steps that remain (`diffusion.times_from`), as SDEdit does (arXiv
    2108.01073); at 1 nothing of it is left, and the picture is that of text to image.

    preview: what the previewer sees in the code, (B, 8 h, 8 w, 3) for a code of h x w, in place of what Stage B and A
    make of it. The same seed gives the same code.

    device: where to compute; None is where Stage C lies. Models that lie elsewhere move there for their turn
    and back, so that a small device holds one at a time.

    Raises BadImageSize for sides that are no multiples of 128 px, and for a picture of another size, and NoPicture
    where a model gives numbers that are not finite.
    """
    assert len(texts) == len(seeds)
    assert strength is None or (image is not None and 0 < strength <= 1)
    width, height = settings.width, settings.height
    check_size(width, height)
    if image is not None and image.shape[-2:] != (height, width):
        raise BadImageSize(f"the picture has {image.shape[-1]}x{image.shape[-2]} px, not {width}x{height} px")
    device = device or models.stage_c.projection.weight.device
    noise, captions = Noise(seeds, device), Captions(models, texts, settings.negative, device)

    code = None if image is None or strength == 1 else _compressed(models, image, device)
    if image is None or strength is not None:
        code = draw_code(models, captions, settings, noise, start=code, strength=strength or 1.0)
    assert code is not None
    if preview:
        return _previewed(models, code, device)
    return decode(models, draw_latents(models, code, captions, settings, noise), device, code)


class Captions:
    """The texts of pictures, and what to keep away from: their hidden states by each tower, encoded once a drawing."""

    def __init__(self, models: Models, texts: Sequence[str], negative: str, device: torch.device) -> None:
        self.models, self.texts, self.negative, self.device = models, texts, negative, device
        self._states: dict[int, tuple[Tensor, Tensor]] = {}

    def by(self, tower: "TextTower") -> tuple[Tensor, Tensor]:
        """Hidden states (B, N, D) of the texts, and as many of what to keep away from; Stage B and C may share them."""
        if id(tower) not in self._states:
            self._states[id(tower)] = _encoded(self.models, tower, self.texts, self.negative, self.device)
        return self._states[id(tower)]


def draw_code(
    models: Models,
    captions: Captions,
    settings: SamplingConfig,
    noise: Noise,
    start: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Stage C's part of `generate`, captions included: raw codes (B, 16, h, w); `start` are codes to start from."""
    text, negative = captions.by(models.text_c)
    steps = Steps.of_c(settings, strength)
    with on(captions.device, models.stage_c) as stage_c:
        return sample_code(stage_c, text, negative, noise, settings.width, settings.height, steps, start=start)


def draw_latents(models: Models, code: Tensor, captions: Captions, settings: SamplingConfig, noise: Noise) -> Tensor:
    """Stage B's part, captions included: Stage A's latents of raw codes."""
    text = negative = None
    if models.text_b is not None:
        text, negative = captions.by(models.text_b)
    with on(captions.device, models.stage_b) as stage_b:
        return sample_latents(stage_b, code, text, negative, noise, Steps.of_b(settings))


def decode(models: Models, latents: Tensor, device: torch.device, code: Tensor | None = None) -> Tensor:
    """Stage A's part: pictures (B, H, W, 3) uint8 on the CPU, of latents that were drawn of `code`.

    Raises:
        NoPicture: what a model gives are no finite numbers.
    """
    made = {"the codes that Stage B is given": code, "Stage B's latents": latents}
    with on(device, models.stage_a) as stage_a:
        return _pictures(stage_a.decode(latents), made, "Stage A's pixels")


def _compressed(models: Models, image: Tensor, device: torch.device) -> Tensor:
    """The raw codes of pictures."""
    assert models.compressor is not None, "a picture needs the compressor"
    with on(device, models.compressor) as compressor:
        return compressor(to_unit_range(image.to(device)))


def _encoded(
    models: Models, tower: "TextTower", texts: Sequence[str], negative: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Hidden states (B, N, D) of the captions, and as many of what to keep away from; each text is encoded once."""
    different, key = list(dict.fromkeys(texts)), (id(tower), negative, device)
    with on(device, tower):
        states = tower.encode(different)[0]
        if key not in models.negatives:
            if len(models.negatives) > 1:  # one a tower
                models.negatives.clear()
            models.negatives[key] = tower.encode([negative])[0]
    rows = torch.tensor([different.index(text) for text in texts], device=device)
    return states[rows], models.negatives[key].expand(len(texts), -1, -1)


def _previewed(models: Models, code: Tensor, device: torch.device) -> Tensor:
    assert models.previewer is not None, "a preview needs the previewer"
    with on(device, models.previewer) as previewer:
        made = {"the codes that the previewer is given": code}
        return _pictures(previewer(normalise(code)), made, "the previewer's pixels")


@contextmanager
def on(device: torch.device, module: M) -> Iterator[M]:
    """The module on a device, and afterwards back where it was; where that is the same, nothing moves."""
    home = next(module.parameters()).device
    with torch.inference_mode(False):  # its weights stay ordinary tensors
        module.to(device)
    try:
        yield module
    finally:
        with torch.inference_mode(False):
            module.to(home)


@torch.inference_mode()
def generate_baseline(
    stage_a: StageA,
    baseline: Baseline,
    text: Tensor,
    negative: Tensor,
    seeds: Sequence[int],
    *,
    width: int,
    height: int,
    steps: int,
    guidance: float,
) -> Tensor:
    """Draw pictures with the baseline and Stage A's decoder: (B, H, W, 3) uint8 on the CPU.

    text, negative: hidden states (B, N, D); the latter are used where guidance is above 1. width, height: pixels,
    multiples of 128, else BadImageSize is raised. steps: model calls.
    """
    check_size(width, height)
    noise = Noise(seeds, text.device)
    start = noise(baseline.latent_channels, latent_side(code_side(height)), latent_side(code_side(width)))
    predict = guided(baseline, text, negative, guidance)
    latents = denoise(predict, start, noise, Steps(diffusion.sampling_times(steps), guidance))
    return _pictures(stage_a.decode(latents), {"the baseline's latents": latents}, "Stage A's pixels")


@torch.inference_mode()
def preview(previewer: Previewer, code: Tensor) -> Tensor:
    """What the previewer sees in raw codes (B, 16, h, w): (B, 8 h, 8 w, 3) uint8 on the CPU."""
    return to_pixels(previewer(normalise(code)))


@torch.inference_mode()
def reconstruct_a(stage_a: StageA, image: Tensor, *, quantised: bool = False) -> Tensor:
    """Pictures (B, 3, H, W) uint8 through Stage A and back: (B, H, W, 3) uint8 on the CPU."""
    latents = stage_a.encode(to_unit_range(image))
    return to_pixels(stage_a.decode_quantised(latents) if quantised else stage_a.decode(latents))


@torch.inference_mode()
def reconstruct_b(
    stage_a: StageA,
    stage_b: StageB,
    compressor: "Compressor",
    image: Tensor,
    text: Tensor | None,
    seeds: Sequence[int],
    steps: int,
) -> Tensor:
    """Pictures (B, 3, H, W) uint8 through compressor, Stage B and Stage A's decoder: (B, H, W, 3) uint8."""
    code = compressor(to_unit_range(image))
    noise, unguided = Noise(seeds, image.device), Steps(diffusion.sampling_times(steps))
    return to_pixels(stage_a.decode(sample_latents(stage_b, code, text, None, noise, unguided)))


def _pictures(image: Tensor, made_of: Mapping[str, Tensor | None], name: str) -> Tensor:
    """`to_pixels` of an image that was drawn, whose numbers are finite.

    That costs a batch one question to its device. Where they are not, the first of what it was made of that is not
    finite is told; weights may be finite, and still give no such numbers.
    """
    if bool(image.isfinite().all()):
        return to_pixels(image)
    for whose, values in {**made_of, name: image}.items():
        if values is not None and (bad := int((~values.isfinite()).flatten(1).any(dim=1).sum())):
            raise NoPicture(
                f"{whose} are no finite numbers in {bad} of {len(values)} pictures: the training of the model that "
                "makes them went wrong; look at its losses, and train it anew with a lower learning_rate"
            )
    raise AssertionError("the image is one of them")


def to_pixels(image: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1], clamped here -> (B, H, W, 3) uint8 on the CPU; magenta where it is no finite number."""
    drawn = image.isfinite().all(dim=1, keepdim=True)
    seen = torch.where(drawn, image, image.new_tensor(MAGENTA)[:, None, None])
    return (seen.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
