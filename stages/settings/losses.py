"""Settings of the losses: what each training minimises."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from settings import FILES, WEIGHTS, Settings, Share, Text
from stages.settings.base import Channels, Steps, TimeSampling, Weight

FixedWeight = Literal["p2", "p2_paper", "p2_snr", "none"]
LossWeight = Literal[FixedWeight, "adaptive"]


class StageALoss(Settings):
    """Objective of Stage A."""

    l1: Weight = 0.0
    """Weight of the mean absolute error."""
    mse: Weight = 1.0
    """Weight of the mean squared error."""
    colour: Weight = 0.0
    """Weight of the mean absolute error of 4x4 averages, which keeps flat areas in their colour."""
    vq: Weight = 1.0
    """Weight of the codebook loss plus 0.25 x the commitment loss."""
    quantised: Share = 0.9
    """Share of samples that are decoded through the codebook (the paper drops the quantisation in 10 %)."""
    coin: Literal["sample", "step"] = "sample"
    """Whether decoding through the codebook is drawn for each sample, or once a step."""
    crop: Annotated[int, Field(ge=8, le=8192, multiple_of=8)] | None = None
    """Side of random crops, px (128 in the paper); null trains on whole pictures."""
    perceptual: Weight = 0.0
    """Weight of the perceptual distance (0.1 in the paper, second-hand); 0 without perceptual_weights."""
    perceptual_weights: Annotated[Text | None, FILES, WEIGHTS] = None
    """Path or URI of torchvision's VGG16 weights (safetensors or a state dict of torch's); null: no perceptual loss."""
    perceptual_heads: Annotated[Text | None, FILES, WEIGHTS] = None
    """Path or URI of LPIPS's linear heads for VGG16, a file of the lpips package; null: the plain distance.

    The plain one is the mean distance of the unit-normalised features."""
    adversarial: Weight = 0.0
    """Weight of the adversarial loss (0.01 in the paper, second-hand); 0 trains without a discriminator."""
    adversarial_start: Steps = 0
    """Steps during which the adversarial weight is 0 still, while the discriminator learns."""

    @property
    def smallest_side(self) -> int:
        """Least side in pixels of what these losses can judge: VGG16 halves it four times, the discriminator six."""
        return 65 if self.adversarial else 16 if self.perceptual else 8

    @model_validator(mode="after")
    def _heads_have_features(self) -> Self:
        if self.perceptual_heads and not self.perceptual_weights:
            raise ValueError("perceptual_heads needs perceptual_weights, VGG16's own; give both or neither")
        return self


class CompressorWarmupLoss(Settings):
    """Objective of the compressor's warm-up, which stands in for ImageNet weights."""

    noise: Weight = 0.1
    """Standard deviation of the noise on the code, relative to the code's own."""
    width: Channels = 192
    """Channels of the throwaway decoder's first layer."""
    predicts: Literal["latents_a", "colours"] = Field("latents_a", exclude_if=lambda what: what == "latents_a")
    """What is predicted from the code: Stage A's latents, or the averages of 4x4 pixels.

    Colours give codes that nearly add up, a colour's part and a shape's: what few pictures teach of either holds for
    compositions that are not among them."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of a batch that it takes."""
        return ("image",) if self.predicts == "colours" else ("image", "latents_a")

    def channels(self, latent_channels: int) -> int:
        """Channels of what is predicted, for latents of so many."""
        return 3 if self.predicts == "colours" else latent_channels


class DiffusionLoss(Settings):
    """What Stage B and C have in common: the weighted error of the predicted noise."""

    weight: LossWeight = "p2"
    """Weight of a sample by its noise: p2 (as released), p2_paper (as printed), p2_snr, none, or adaptive.

    p2 is 1 - abar, as in the authors' code; p2_paper is (1 - abar) / (1 + abar), as printed; p2_snr is
    (1 - abar) / max(abar, 0.05), which minds high noise, where a picture's identity is decided, and suits short
    trainings; none is 1; adaptive is 1 / the running loss of samples with about as much noise, so that all noise levels
    count alike (Stable Cascade)."""
    timesteps: TimeSampling = "released"
    """How the diffusion time t is drawn: released is 1.08 (1 - U) + 0.001, clamped; uniform is U(0, 1)."""
    text_drop: Share = 0.05
    """Share of samples whose caption is replaced by the empty one, without which guidance suffers."""


class StageBLoss(DiffusionLoss):
    """Objective of Stage B."""

    code_drop: Share = 0.05
    """Share of samples whose code is zeroed, for guidance."""
    code_noise: Share = 0.285
    """Share of samples whose code is diffused, for robustness against Stage C's errors."""
    code_noise_t: Share = 0.5
    """Highest diffusion time of a diffused code."""

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.code_drop + self.code_noise > 1:
            raise ValueError("code_drop + code_noise must not exceed 1")
        return self


class StageCLoss(DiffusionLoss):
    """Objective of Stage C."""

    consistency: Weight = 0.0
    """Weight of a second error, against a less noisy version of the sample (0.1 in the authors' later script).

    It is the squared distance between the noise that is found in both."""
    mixup: Share = Field(0.0, exclude_if=lambda share: share == 0)
    """Share of samples that are mixed with the other one of their pair, codes and texts by the same uniform weight.

    As in arXiv 1710.09412; of few pictures it then learns what their captions have in common, and not each by heart.
    Every two samples of a batch are a pair; held-out ones are not mixed."""


class BaselineLoss(DiffusionLoss):
    """Objective of the baseline."""


class PreviewerLoss(Settings):
    """Objective of the previewer."""

    l1: Weight = 1.0
    """Weight of the mean absolute error."""
    mse: Weight = 1.0
    """Weight of the mean squared error."""
