"""Settings of models, losses and training, checked when they are built. Imports no torch: `plan` stays quick.

The defaults are the sizes of the paper; the authors' own names are given where they differ from ours.
"""

import math
from bisect import bisect_right
from itertools import accumulate
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
ChannelsBy8 = Annotated[int, Field(ge=8, multiple_of=8)]  # torchvision rounds others
CODE_STRIDE = 32  # px that the compressor's backbone turns into one position
LATENT_SIDE_MULTIPLE = 32  # sides of Stage A's latents: pictures come in steps of 128 px
FixedWeight = Literal["p2", "p2_paper", "p2_snr", "none"]
LossWeight = Literal[FixedWeight, "adaptive"]
TimeSampling = Literal["released", "uniform"]
Sampler = Literal["ddpm", "ddim"]
Precision = Literal["fp32", "bf16"]

EXECUTION = frozenset(
    {
        "log_every",
        "checkpoint_every",
        "checkpointing",
        "compile",
        "device",
        "micro_batch",
        "shard",
        "panel_every",
        "bad_steps",
    }
)
"""Fields of a training that decide how it is run and what is seen of it, not what comes out.

`bad_steps` is one of them although it decides after an accident: a training that ended there can go on with another.
"""


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused, the text under a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


# ---------------------------------------------------------------------------------------------------- models


class StageAConfig(Settings):
    """Stage A, the VQGAN with a side ratio of 4 (`VQModel` of dome272/Wuerstchen; 18,406,894 parameters)."""

    levels: Count = 2
    """Resolutions inside; each level after the first halves the side."""
    bottleneck_blocks: Count = 12
    """Residual blocks of the decoder at the lowest resolution."""
    hidden: Count = 384
    """Channels at the lowest resolution (c_hidden); each level above has half as many."""
    latent_channels: Count = 4
    """Channels of the latents (c_latent)."""
    codebook_size: Count = 8192
    """Vectors in the codebook."""
    codebook_init: Literal["uniform", "normal"] = "uniform"
    """Start of the codebook: the authors' U(-1/k, 1/k), or N(0, 1), which suits a small codebook."""
    scale: float = Field(0.3764, gt=0.0)
    """What encoder outputs are divided by, so that Stage B sees unit variance (scale_factor)."""

    @model_validator(mode="after")
    def _hidden_divides(self) -> Self:
        if self.hidden % 2 ** (self.levels - 1):
            raise ValueError(f"hidden ({self.hidden}) must be divisible by 2^(levels - 1); change hidden or levels")
        return self


class EfficientNetStage(Settings):
    """One row of an EfficientNetV2 table (arXiv 2104.00298, Table 4)."""

    block: Literal["fused", "mb"]
    """Fused-MBConv or MBConv."""
    expand: Count
    """Expansion ratio."""
    stride: Literal[1, 2]
    """Stride of the first block."""
    channels: ChannelsBy8
    """Output channels."""
    layers: Count
    """Blocks in the stage."""


class EfficientNetStages(Settings):
    """A short EfficientNetV2 for small runs, built by torchvision from this table."""

    stem: ChannelsBy8
    """Channels after the first convolution, which has stride 2."""
    stages: tuple[EfficientNetStage, ...] = Field(min_length=1)
    """The stages in order; the strides, stem included, multiply to 32."""
    last: Count
    """Channels after the last 1x1 convolution (1280 in the full models)."""
    stochastic_depth: Share = 0.0
    """Highest probability that a block is skipped in training (0.2 in the full models)."""

    @model_validator(mode="after")
    def _stride_is_32(self) -> Self:
        stride = 2 * math.prod(stage.stride for stage in self.stages)
        if stride != 32:
            raise ValueError(f"stages have a total stride of {stride}, stem included; the compressor needs 32")
        return self


class CompressorConfig(Settings):
    """Semantic compressor: EfficientNetV2 features, a 1x1 convolution, BatchNorm (`EfficientNetEncoder`)."""

    backbone: Literal["efficientnet_v2_s", "efficientnet_v2_l"] | EfficientNetStages = "efficientnet_v2_s"
    """The paper's S, the L of the first version, or a short table."""
    latent_channels: Count = 16
    """Channels of the code."""
    batch_norm: Literal["affine", "plain", "fixed"] = "affine"
    """Last BatchNorm: affine (the public weights), plain (no gamma and beta; Stable Cascade), or fixed at
    gamma 42 and beta -1, which gives Stage C unit variance through the released (x + 1) / 42."""
    input_ratio: float = Field(0.75, gt=0.0, le=1.0)
    """Side of what the backbone sees, as a share of the image's side (768 of 1024)."""
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter of that resize, always antialiased: bilinear in the code, bicubic in the paper."""

    def seen_side(self, side: int) -> int:
        """Side in px of what the backbone sees of a picture with a side of so many px."""
        return int(side * self.input_ratio)

    def code_side(self, side: int) -> int:
        """Side of the code of a picture with a side of so many px."""
        return self.seen_side(side) // CODE_STRIDE


class StageBConfig(Settings):
    """Stage B, the latent diffusion model (`DiffNeXt`; 1,055,365,280 parameters)."""

    latent_channels: Count = 4
    """Channels of Stage A's latents (c_in, c_out)."""
    patch: Count = 2
    """Side of the patches that become the channels of the first level."""
    widths: tuple[Count, ...] = Field((320, 640, 1280, 1280), min_length=1)
    """Channels of each level (c_hidden); each level after the first halves the side."""
    blocks: tuple[Count, ...] = (4, 4, 14, 4)
    """Repeats of the level's pattern, on the way down and again on the way up."""
    patterns: tuple[Annotated[str, Field(pattern="^C[CTA]*$")], ...] = ("CT", "CTA", "CTA", "CTA")
    """Blocks of one repeat (level_config): C convolution, T timestep, A attention."""
    heads: tuple[Annotated[int, Field(ge=0)], ...] = (0, 10, 20, 20)
    """Attention heads of each level; 0 where the pattern has no A."""
    inject_code: tuple[bool, ...] = (False, True, True, True)
    """Levels whose convolution blocks see the compressor's code (inject_effnet)."""
    cond_width: Count = 1024
    """Channels of the mapped text and of the mapped code (c_cond)."""
    text_width: Count = 1024
    """Channels of the text hidden states (clip_embd)."""
    code_channels: Count = 16
    """Channels of the compressor's code (effnet_embd)."""
    timestep_channels: int = Field(64, ge=4, multiple_of=2)
    """Channels of the timestep embedding (c_r)."""
    dropout: Share = 0.1
    """Dropout in convolution and attention blocks."""
    code_mapper_std: float = Field(0.02, gt=0.0)
    """Start of the 1x1 maps of the code; 0.02 / 42 for a compressor whose BatchNorm is `fixed`."""

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        levels = len(self.widths)
        for name in ("blocks", "patterns", "heads", "inject_code"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} needs one entry for each of the {levels} widths")
        if LATENT_SIDE_MULTIPLE % (self.patch * 2 ** (levels - 1)):
            raise ValueError(
                f"patch ({self.patch}) x 2^({levels} levels - 1) must divide {LATENT_SIDE_MULTIPLE}, "
                "the latents' side for 128 px"
            )
        for width, pattern, heads in zip(self.widths, self.patterns, self.heads, strict=True):
            if "A" in pattern and (heads == 0 or width % heads):
                raise ValueError(f"heads ({heads}) must divide the width ({width}) of a level with attention")
        return self


class StageCConfig(Settings):
    """Stage C, the text-conditional prior (`Prior`; 993,243,680 parameters, 993,636,896 with bigG's text)."""

    latent_channels: Count = 16
    """Channels of the compressor's code (c_in)."""
    width: Count = 1536
    """Channels inside (c)."""
    depth: Count = 32
    """Repeats of convolution, timestep, attention block."""
    heads: Count = 24
    """Attention heads."""
    text_width: Count = 1024
    """Channels of the text hidden states (c_cond): 1024 for CLIP-H, 1280 for bigG."""
    timestep_channels: int = Field(64, ge=4, multiple_of=2)
    """Channels of the timestep embedding (c_r)."""
    dropout: Share = 0.1
    """Dropout in convolution and attention blocks."""
    scaled_codes: bool = True
    """Whether it works on (code + 1) / 42, as released, or on the code itself, for a compressor whose code has
    unit variance (`batch_norm: plain`)."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


class PreviewerConfig(Settings):
    """Previewer, codes to small pictures (`Previewer` of Stability-AI/StableCascade; 3,979,651 parameters)."""

    latent_channels: Count = 16
    """Channels of the compressor's code (c_in)."""
    width: int = Field(512, ge=4, multiple_of=4)
    """Channels at the code's side (c_hidden); half of them at twice the side, a quarter above."""


class BaselineConfig(Settings):
    """Baseline, a latent diffusion U-Net of Stable Diffusion 2's blocks (994,517,456 parameters).

    Stable Diffusion 2's own shape is `patch` 1 and `middle_depth` 1 (865,910,724 parameters, `UNet2DConditionModel`
    of diffusers); four more transformer blocks in the middle make it as large as Stage C, as the paper's baseline is.
    """

    latent_channels: Count = 4
    """Channels of Stage A's latents."""
    patch: Count = 2
    """Side of the latents' patches that become channels: 2 gives Stage A's latents, a quarter of the picture's side,
    the eighth that Stable Diffusion's have."""
    widths: tuple[Count, ...] = Field((320, 640, 1280, 1280), min_length=1)
    """Channels of each level; each level after the first halves the side."""
    blocks: Count = 2
    """Residual blocks of each level on the way down; one more on the way up."""
    heads: tuple[Annotated[int, Field(ge=0)], ...] = (5, 10, 20, 0)
    """Attention heads of each level; 0 where the level has no transformers."""
    middle_heads: Count = 20
    """Attention heads at the smallest side, between the ways down and up."""
    middle_depth: Count = 5
    """Transformer blocks there; elsewhere a residual block is followed by one."""
    groups: Count = 32
    """Groups of GroupNorm."""
    text_width: Count = 1024
    """Channels of the text hidden states."""

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        if len(self.heads) != len(self.widths):
            raise ValueError(f"heads needs one entry for each of the {len(self.widths)} widths")
        for width, heads in (*zip(self.widths, self.heads, strict=True), (self.widths[-1], self.middle_heads)):
            if width % self.groups:
                raise ValueError(f"groups ({self.groups}) must divide every width, also {width}")
            if heads and width % heads:
                raise ValueError(f"heads and middle_heads ({heads}) must divide the width of their level ({width})")
        if LATENT_SIDE_MULTIPLE % (self.patch * 2 ** (len(self.widths) - 1)):
            raise ValueError(
                f"patch x 2^(number of widths - 1) must divide {LATENT_SIDE_MULTIPLE}, the latents' side for 128 px"
            )
        if self.widths[0] % 2 or self.widths[0] < 4:
            raise ValueError(f"the first width ({self.widths[0]}) must be even, 4 or more: it embeds the timestep too")
        return self


class ClipTextConfig(Settings):
    """A pretrained text tower of open_clip."""

    model: Literal["ViT-H-14", "ViT-bigG-14"]
    """open_clip's name of the model."""
    weights: str
    """Path or URI of its open_clip weights (safetensors)."""

    @property
    def width(self) -> int:
        """Channels of the hidden states."""
        return {"ViT-H-14": 1024, "ViT-bigG-14": 1280}[self.model]

    @property
    def layers(self) -> int:
        """Transformer layers."""
        return {"ViT-H-14": 24, "ViT-bigG-14": 32}[self.model]

    @property
    def heads(self) -> int:
        """Attention heads."""
        return {"ViT-H-14": 16, "ViT-bigG-14": 20}[self.model]

    @property
    def context_length(self) -> int:
        """Tokens of one caption, both ends included."""
        return 77


class SeededTextConfig(Settings):
    """A small text tower of random weights that come from the seed: for runs without pretrained weights."""

    model: Literal["seeded"] = "seeded"
    """Always `seeded`."""
    width: Count = 128
    """Channels of the hidden states."""
    layers: Count = 4
    """Transformer layers."""
    heads: Count = 4
    """Attention heads."""
    context_length: int = Field(16, ge=3, le=77)
    """Tokens of one caption, both ends included."""
    seed: int = Field(0, ge=0)
    """Seed of the weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


TextConfig = Annotated[ClipTextConfig | SeededTextConfig, Field(discriminator="model")]


# ---------------------------------------------------------------------------------------------------- losses


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
    """Probability of decoding through the codebook (the paper drops the quantisation in 10 %)."""
    coin: Literal["sample", "step"] = "sample"
    """Whether that is drawn for each sample or once a step."""
    crop: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    """Side of random crops in pixels (128 in the paper); null trains on whole pictures."""
    perceptual: Weight = 0.0
    """Weight of the perceptual distance; the term is off without perceptual_weights."""
    perceptual_weights: str | None = None
    """Path or URI of torchvision's VGG16 weights (safetensors or a state dict of torch's)."""
    perceptual_heads: str | None = None
    """Path or URI of LPIPS's linear heads for VGG16, a file of the lpips package; null takes the plain mean distance
    of the unit-normalised features."""
    adversarial: Weight = 0.0
    """Weight of the adversarial loss; 0 trains without a discriminator."""
    adversarial_start: int = Field(0, ge=0)
    """Steps during which that weight is 0 still, while the discriminator learns."""

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
    width: Count = 192
    """Channels of the throwaway decoder's first layer."""


class DiffusionLoss(Settings):
    """What Stage B and C have in common: the weighted error of the predicted noise."""

    weight: LossWeight = "p2"
    """Weight of a sample by its noise level: p2 is 1 - abar, as in the authors' code; p2_paper is
    (1 - abar) / (1 + abar), as printed; p2_snr is (1 - abar) / max(abar, 0.05), which minds high noise, where
    a picture's identity is decided, and suits short trainings; none is 1; adaptive is 1 / the running loss of
    samples with about as much noise, so that all noise levels count alike (Stable Cascade)."""
    timesteps: TimeSampling = "released"
    """How t is drawn: 1.08 (1 - U) + 0.001, clamped, as released, or U(0, 1)."""
    text_drop: Share = 0.05
    """Share of samples whose caption is replaced by the empty one, for guidance."""


class StageBLoss(DiffusionLoss):
    """Objective of Stage B."""

    code_drop: Share = 0.05
    """Share of samples whose code is zeroed, for guidance."""
    code_noise: Share = 0.285
    """Share of samples whose code is diffused, for robustness against Stage C's errors."""
    code_noise_t: Share = 0.5
    """Highest diffusion time of such a code."""

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.code_drop + self.code_noise > 1:
            raise ValueError("code_drop + code_noise must not exceed 1")
        return self


class StageCLoss(DiffusionLoss):
    """Objective of Stage C."""

    consistency: Weight = 0.0
    """Weight of the squared distance between the noise found in a sample and in a less noisy version of it (0.1 in
    the authors' own later script)."""


class BaselineLoss(DiffusionLoss):
    """Objective of the baseline."""


class PreviewerLoss(Settings):
    """Objective of the previewer."""

    l1: Weight = 1.0
    """Weight of the mean absolute error."""
    mse: Weight = 1.0
    """Weight of the mean squared error."""


# ----------------------------------------------------------------------------------------------------
# training


class Phase(Settings):
    """A stretch of a training with one batch size and one image size."""

    steps: Count
    """Steps of the optimiser."""
    batch_size: Count
    """Images a step, over all workers."""
    size: int = Field(ge=8, multiple_of=8)
    """Side of the images in pixels, or of the square of about their area."""
    # Squares leave no trace in a fingerprint.
    max_aspect: float = Field(1.0, ge=1.0, exclude_if=lambda ratio: ratio == 1)
    """Largest ratio of the longer to the shorter side. 1: squares; above it, each batch comes from one aspect-ratio
    bucket, in steps of 128 px."""
    view: str | None = Field(None, exclude_if=lambda view: view is None)
    """Which of the pictures it sees, by the name of a view of the data; None: all of them."""
    freeze_norm: bool = False
    """Whether BatchNorm works with its running statistics instead of the batch's."""


class EmaConfig(Settings):
    """Moving average of weights and buffers, which replaces them after the last step."""

    decay: float = Field(gt=0.0, lt=1.0)
    """Share of the old average kept at each update."""
    every: Count
    """Steps between updates."""
    start: int = Field(ge=0)
    """Steps during which the average is a plain copy."""
    device: Literal["model", "cpu"] = "model"
    """Where it is kept: beside the model, or in the host's memory, which spares the device 4 bytes a weight."""


class BadStepsConfig(Settings):
    """What becomes of steps whose loss or gradient is not finite, or whose loss jumps."""

    then: Literal["raise", "skip", "rewind"] = "raise"
    """raise: end the training before the bad update; skip: leave it out, and go on; rewind: go back to the weights of
    the newest checkpoint, and go on behind the bad step, without what lies between (PaLM, arXiv 2204.02311, section
    5.1)."""
    at_most: Count = 3
    """Bad steps that a training gets over; one more ends it."""
    jump: float | None = Field(None, gt=1.0)
    """How many times the usual loss, a running mean, counts as bad too; needs rewind, for a jump is seen only after
    its update. None: never."""

    @model_validator(mode="after")
    def _jump_rewinds(self) -> Self:
        if self.jump and self.then != "rewind":
            raise ValueError("jump needs then=rewind: a jump is seen only after its update")
        return self


class ValidationConfig(Settings):
    """How a training is measured on samples that it never sees."""

    every: Count
    """Steps between validations, a multiple of log_every; the last step is validated too."""
    samples: Count = 1024
    """Held-out samples that each of them looks at, at most; always the same."""
    keep: Literal["last", "best"] = "last"
    """Which weights come out: those after the last step, or those with the least validation loss, of the average where
    there is one. For `best`, `every` is a multiple of checkpoint_every."""


class TrainingConfig(Settings):
    """How a model is trained: all that `stages.training.loop` needs to know."""

    phases: tuple[Phase, ...] = Field(min_length=1)
    """Run one after the other."""
    learning_rate: float = Field(gt=0.0)
    """Peak of the schedule."""
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (
        0.9,
        0.999,
    )
    """Decay of AdamW's two moments."""
    weight_decay: Weight = 0.01
    """Decoupled weight decay of AdamW."""
    warmup_steps: int = Field(ge=0)
    """Steps of linear warm-up of the learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine that ends at 1 % of the peak."""
    gradient_clip: float = Field(1.0, gt=0.0)
    """Largest norm of the whole gradient."""
    precision: Precision = "bf16"
    """Autocast of the forward pass; weights, moments and losses are fp32 in both."""
    checkpointing: bool = False
    """Whether the blocks of Stage A, B, C and the baseline recompute their activations in the backward pass instead
    of keeping them: a third more computation for a fraction of the memory, and the same result."""
    compile: bool = False
    """Whether torch.compile makes kernels for the models' blocks, once per kind and image size; the results agree up
    to rounding and the numbers drawn for dropout."""
    micro_batch: Count | None = None
    """Most rows that a rank takes through the model at a time, adding up their gradients; None = all of its rows. What
    looks at a whole batch, BatchNorm and adaptive weights, then looks at a piece."""
    shard: Count = 1
    """Ranks over which a copy of weights, gradients, moments and average is spread (FSDP2); 1 = a copy each (DDP)."""
    reduce: Precision = "fp32"
    """In what ranks exchange gradients."""
    ema: EmaConfig | None = None
    """Moving average of the weights, if any."""
    bad_steps: BadStepsConfig = BadStepsConfig()
    """What becomes of steps that go wrong."""
    log_every: Count
    """Steps between log entries; a stop request is seen with each, and in between every few seconds."""
    checkpoint_every: Count
    """Steps between saved states, which are saved at the end of each phase too; a multiple of log_every."""
    validation: ValidationConfig | None = None
    """Loss on held-out samples, where there are any."""
    panel_every: Count | None = None
    """Steps between panels, pictures that show how far the training is; a multiple of log_every; None = no panels."""

    @model_validator(mode="after")
    def _moments_agree(self) -> Self:
        moments = {"panel_every": self.panel_every, "validation.every": self.validation and self.validation.every}
        for name, every in moments.items():
            if every and every % self.log_every:
                raise ValueError(f"{name} ({every}) must be a multiple of log_every ({self.log_every})")
        validation = self.validation
        if validation and self.keeps_best and validation.every % self.checkpoint_every:
            raise ValueError(
                f"validation.every ({validation.every}) must be a multiple of checkpoint_every "
                f"({self.checkpoint_every}) where validation.keep is best: the best weights are those of a saved state"
            )
        if self.panel_every and self.shard > 1:
            raise ValueError(
                f"panel_every must be null where shard is {self.shard}: no rank has whole weights to draw with"
            )
        return self

    @model_validator(mode="after")
    def _steps_agree(self) -> Self:
        if self.checkpoint_every % self.log_every:
            raise ValueError(f"checkpoint_every ({self.checkpoint_every}) must be a multiple of log_every")
        if self.warmup_steps >= self.num_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be below the {self.num_steps} steps of all phases"
            )
        if self.ema and self.ema.start + self.ema.every > self.num_steps:
            raise ValueError(
                f"ema.start + ema.every ({self.ema.start + self.ema.every}) must not exceed the {self.num_steps} steps "
                "of all phases: the average, which replaces the weights, would never have moved"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    @property
    def phase_ends(self) -> tuple[int, ...]:
        """Steps done at the end of each phase."""
        return tuple(accumulate(phase.steps for phase in self.phases))

    def phase_at(self, step: int) -> Phase:
        """The phase of the step with this number, counted from 0."""
        return self.phases[bisect_right(self.phase_ends, step)]

    def images_after(self, steps: int) -> int:
        """Images seen by all workers in the first `steps` steps."""
        starts = accumulate((phase.steps for phase in self.phases), initial=0)
        return sum(
            phase.batch_size * min(max(steps - start, 0), phase.steps)
            for phase, start in zip(self.phases, starts, strict=False)
        )

    def divides(self, world: int) -> bool:
        """Whether `require_divisible` accepts so many workers."""
        try:
            self.require_divisible(world)
        except ValueError:
            return False
        return True

    def require_divisible(self, world: int) -> None:
        """Raise ValueError unless every phase's batch divides among `world` workers, and into micro-batches there."""
        if world % self.shard:
            raise ValueError(f"shard={self.shard} does not divide workers={world}")
        for number, phase in enumerate(self.phases):
            if phase.batch_size % world:
                raise ValueError(f"phases.{number}.batch_size={phase.batch_size} does not divide among workers={world}")
            rows = phase.batch_size // world
            if self.micro_batch and rows > self.micro_batch and rows % self.micro_batch:
                raise ValueError(
                    f"micro_batch={self.micro_batch} does not divide the {rows} rows that each of {world} workers has "
                    f"of phases.{number}.batch_size={phase.batch_size}"
                )

    @property
    def keeps_best(self) -> bool:
        """Whether validation decides which weights come out."""
        return self.validation is not None and self.validation.keep == "best"

    def recipe(self, seed: int) -> dict[str, object]:
        """What decides the trained weights, as JSON values: all but `EXECUTION`, and validation that only watches."""
        left_out = EXECUTION if self.keeps_best else EXECUTION | {"validation"}
        settings = self.model_dump(mode="json", exclude={**dict.fromkeys(left_out, True), "ema": {"device"}})
        return {"seed": seed, **settings}


# ---------------------------------------------------------------------------------------------------- sampling


class SamplingConfig(Settings):
    """How a picture is drawn: all that decides it beside models, caption and seed."""

    width: int = Field(1024, ge=128, le=8192, multiple_of=128)
    """Px."""
    height: int = Field(1024, ge=128, le=8192, multiple_of=128)
    """Px."""
    steps_c: Count = 60
    """Model calls of Stage C, where `timesteps` is uniform."""
    steps_b: Count = 12
    """Model calls of Stage B."""
    guidance_c: float = Field(4.0, ge=0.0)
    """Guidance of Stage C in Imagen's convention; 1 or less is off."""
    guidance_b: float = Field(4.0, ge=0.0)
    """Guidance of Stage B: 4 in the paper, off in the released pipeline."""
    negative: str = ""
    """Caption to keep away from, where guidance is on."""
    sampler: Sampler = "ddpm"
    """Steps of both stages: DDPM adds noise at each, DDIM draws it once."""
    timesteps: TimeSampling = "uniform"
    """Times of Stage C's calls: `steps_c` even ones, or the 29 of the released pipeline's list."""
    precision: Precision = "fp32"
    """Stage B and C in fp32, or under bf16 autocast; heads and schedule are fp32 in both."""
