"""Settings of the models.

The defaults are the sizes of the paper; the authors' own names are given where they differ from ours.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from settings import FILES, WEIGHTS, Settings, Share, Text
from stages.settings.base import Channels, Heads, Layers

CODE_STRIDE = 32  # px that the compressor's backbone turns into one position
LATENT_SIDE_MULTIPLE = 32  # sides of Stage A's latents: pictures come in steps of 128 px
ChannelsBy8 = Annotated[int, Field(ge=8, le=2**16, multiple_of=8)]  # torchvision rounds others
Even = Annotated[int, Field(ge=4, le=2**16, multiple_of=2)]  # channels of which half are sines, half cosines
LevelHeads = Annotated[int, Field(ge=0, le=1024)]  # of a level, also none
Patch = Annotated[int, Field(ge=1, le=LATENT_SIDE_MULTIPLE)]
Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]


class StageAConfig(Settings):
    """Stage A, the VQGAN with a side ratio of 4 (`VQModel` of dome272/Wuerstchen; 18,406,894 parameters)."""

    levels: Annotated[int, Field(ge=1, le=8)] = 2
    """Resolutions inside; each level after the first halves the side. Stage B takes 2: latents of a quarter."""
    bottleneck_blocks: Layers = 12
    """Residual blocks of the decoder at the lowest resolution."""
    hidden: Channels = 384
    """Channels at the lowest resolution (c_hidden); each level above has half as many."""
    latent_channels: Channels = 4
    """Channels of the latents (c_latent)."""
    codebook_size: Annotated[int, Field(ge=1, le=2**20)] = 8192
    """Vectors in the codebook."""
    codebook_init: Literal["uniform", "normal"] = "uniform"
    """Start of the codebook: uniform, the authors' U(-1/k, 1/k), or normal, N(0, 1), which suits a small one."""
    scale: float = Field(0.3764, gt=0.0, le=1000.0)
    """What latents are divided by when they are stored, so that Stage B sees unit variance (scale_factor)."""

    @model_validator(mode="after")
    def _hidden_divides(self) -> Self:
        if self.hidden % 2 ** (self.levels - 1):
            raise ValueError(f"hidden ({self.hidden}) must be divisible by 2^(levels - 1); change hidden or levels")
        return self


class EfficientNetStage(Settings):
    """One row of an EfficientNetV2 table (arXiv 2104.00298, Table 4)."""

    block: Literal["fused", "mb"]
    """Kind of the blocks: Fused-MBConv or MBConv."""
    expand: Annotated[int, Field(ge=1, le=64)]
    """Expansion ratio."""
    stride: Literal[1, 2]
    """Stride of the first block."""
    channels: ChannelsBy8
    """Output channels."""
    layers: Layers
    """Blocks in the stage."""


class EfficientNetStages(Settings):
    """A short EfficientNetV2 for small runs, built by torchvision from this table."""

    stem: ChannelsBy8
    """Channels after the first convolution, which has stride 2."""
    stages: tuple[EfficientNetStage, ...] = Field(min_length=1, max_length=64)
    """The stages in order; the strides, stem included, multiply to 32."""
    last: Channels
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
    """EfficientNetV2 that looks at the picture: the paper's S, the L of the first version, or a short table."""
    latent_channels: Channels = 16
    """Channels of the code."""
    batch_norm: Literal["affine", "plain", "fixed"] = "affine"
    """Last BatchNorm: affine (the public weights), plain (no gamma and beta; Stable Cascade), or fixed (42 and -1).

    With gamma fixed at 42 and beta at -1, the range into which the released one drifted, Stage C sees unit variance
    through the released (x + 1) / 42."""
    input_ratio: float = Field(0.75, gt=0.0, le=1.0)
    """Side of what the backbone sees, as a share of the image's side (768 of 1024)."""
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter of the resize to what the backbone sees, antialiased: bilinear in the code, bicubic in the paper."""

    def seen_side(self, side: int) -> int:
        """Side in px of what the backbone sees of a picture with a side of so many px."""
        return int(side * self.input_ratio)

    def code_side(self, side: int) -> int:
        """Side of the code of a picture with a side of so many px."""
        return self.seen_side(side) // CODE_STRIDE


class StageBConfig(Settings):
    """Stage B, the latent diffusion model (`DiffNeXt`; 1,055,365,280 parameters)."""

    latent_channels: Channels = 4
    """Channels of Stage A's latents (c_in, c_out)."""
    patch: Patch = 2
    """Side of the latents' patches that become the channels of the first level."""
    widths: tuple[Channels, ...] = Field((320, 640, 1280, 1280), min_length=1, max_length=6)
    """Channels of each level (c_hidden); each level after the first halves the side."""
    blocks: tuple[Layers, ...] = (4, 4, 14, 4)
    """Repeats of the level's pattern, on the way down and again on the way up."""
    patterns: tuple[Annotated[str, Field(pattern="^C[CTA]*$", max_length=16)], ...] = ("CT", "CTA", "CTA", "CTA")
    """Blocks of one repeat (level_config): C convolution, T timestep, A attention."""
    heads: tuple[LevelHeads, ...] = (0, 10, 20, 20)
    """Attention heads of each level; 0 where the pattern has no A."""
    inject_code: tuple[bool, ...] = (False, True, True, True)
    """Whether the convolution blocks of each level see the compressor's code (inject_effnet)."""
    cond_width: Channels = 1024
    """Channels of the mapped text and of the mapped code (c_cond)."""
    text_width: Channels = 1024
    """Channels of the text hidden states (clip_embd)."""
    code_channels: Channels = 16
    """Channels of the compressor's code (effnet_embd)."""
    timestep_channels: Even = 64
    """Channels of the timestep embedding (c_r)."""
    dropout: Dropout = 0.1
    """Share of dropped activations in convolution and attention blocks."""
    code_mapper_std: float = Field(0.02, gt=0.0, le=10.0)
    """Standard deviation at which the 1x1 maps of the code start: 0.02, over 42 where `batch_norm` is fixed."""

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

    latent_channels: Channels = 16
    """Channels of the compressor's code (c_in)."""
    width: Channels = 1536
    """Channels inside (c)."""
    depth: Layers = 32
    """Repeats of convolution, timestep, attention block."""
    heads: Heads = 24
    """Attention heads, a divisor of `width`."""
    text_width: Channels = 1024
    """Channels of the text hidden states (c_cond): 1024 for CLIP-H, 1280 for bigG."""
    timestep_channels: Even = 64
    """Channels of the timestep embedding (c_r)."""
    dropout: Dropout = 0.1
    """Share of dropped activations in convolution and attention blocks."""
    scaled_codes: bool = True
    """Whether it works on (code + 1) / 42, as released, or on the code itself, for `batch_norm: plain`.

    A plain one gives codes of unit variance."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


class PreviewerConfig(Settings):
    """Previewer, codes to small pictures (`Previewer` of Stability-AI/StableCascade; 3,979,651 parameters)."""

    latent_channels: Channels = 16
    """Channels of the compressor's code (c_in)."""
    width: int = Field(512, ge=4, le=2**16, multiple_of=4)
    """Channels at the code's side (c_hidden); half of them at twice the side, a quarter above."""


class BaselineConfig(Settings):
    """Baseline, a latent diffusion U-Net of Stable Diffusion 2's blocks (994,517,456 parameters).

    Stable Diffusion 2's own shape is `patch` 1 and `middle_depth` 1 (865,910,724 parameters, `UNet2DConditionModel`
    of diffusers); four more transformer blocks in the middle make it as large as Stage C, as the paper's baseline is.
    """

    latent_channels: Channels = 4
    """Channels of Stage A's latents."""
    patch: Patch = 2
    """Side of the latents' patches that become channels.

    2 gives Stage A's latents, a quarter of the picture's side, the eighth that Stable Diffusion's have."""
    widths: tuple[Channels, ...] = Field((320, 640, 1280, 1280), min_length=1, max_length=6)
    """Channels of each level; each level after the first halves the side."""
    blocks: Layers = 2
    """Residual blocks of each level on the way down; one more on the way up."""
    heads: tuple[LevelHeads, ...] = (5, 10, 20, 0)
    """Attention heads of each level; 0 where the level has no transformers."""
    middle_heads: Heads = 20
    """Attention heads at the smallest side, between the ways down and up."""
    middle_depth: Layers = 5
    """Transformer blocks at the smallest side, 1 in Stable Diffusion 2; elsewhere one follows each residual block."""
    groups: Channels = 32
    """Groups of GroupNorm, a divisor of every width."""
    text_width: Channels = 1024
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
    """open_clip's name of the model: ViT-H-14 (width 1024), or ViT-bigG-14 (width 1280), that of the public Stage C."""
    weights: Annotated[Text, FILES, WEIGHTS]
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
    """Always `seeded`: random weights, no meaning of their own."""
    width: Channels = 128
    """Channels of the hidden states."""
    layers: Layers = 4
    """Transformer layers."""
    heads: Heads = 4
    """Attention heads, a divisor of `width`."""
    context_length: int = Field(16, ge=3, le=77)
    """Tokens of one caption, both ends included."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


TextConfig = Annotated[ClipTextConfig | SeededTextConfig, Field(discriminator="model")]
