"""Settings of the models.

The defaults are the sizes of the paper; the authors' own names are given where they differ from ours.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.settings.base import Count, Settings, Share

ChannelsBy8 = Annotated[int, Field(ge=8, multiple_of=8)]  # torchvision rounds others
CODE_STRIDE = 32  # px that the compressor's backbone turns into one position
LATENT_SIDE_MULTIPLE = 32  # sides of Stage A's latents: pictures come in steps of 128 px


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
