"""The semantic compressor: from an image to the code that Stage C learns to write, with 1/42.67 of the side.

After `EfficientNetEncoder` of dome272/Wuerstchen: torchvision's EfficientNetV2, a 1x1 convolution, BatchNorm;
key names `backbone.*` and `mapper.*`. It is trained together with Stage B.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import efficientnet_v2_l, efficientnet_v2_s
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.ops.misc import SqueezeExcitation

from stages.draws import Draws
from stages.models.geometry import CODE_SCALE, CODE_SHIFT, BadImageSize
from stages.models.layers import in_fp32, to_unit_range
from stages.settings.losses import CompressorWarmupLoss
from stages.settings.models import CompressorConfig, EfficientNetStages

STRIDE = 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Compressor(nn.Module):
    """EfficientNetV2 features -> 1x1 convolution -> BatchNorm, always in fp32, also under autocast.

    `code_std` is the standard deviation that the code is meant to have: 42 where the last BatchNorm is fixed,
    else 1.
    """

    def __init__(self, config: CompressorConfig) -> None:
        super().__init__()
        self.input_ratio = config.input_ratio
        self.resize = config.resize
        self.code_std = CODE_SCALE if config.batch_norm == "fixed" else 1.0
        features, width = _backbone(config.backbone)
        self.backbone = _lightened(features)
        norm = nn.BatchNorm2d(config.latent_channels, affine=config.batch_norm != "plain")
        if config.batch_norm == "fixed":
            nn.init.constant_(norm.weight, CODE_SCALE).requires_grad_(False)
            nn.init.constant_(norm.bias, -CODE_SHIFT).requires_grad_(False)
        self.mapper = nn.Sequential(nn.Conv2d(width, config.latent_channels, 1, bias=False), norm)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] -> code (B, C, H', W') fp32, H' = 0.75 H / 32; sides divisible by 128.

        Raises BadImageSize if 0.75 x a side (`input_ratio`) is not a multiple of 32.
        """
        sides = [side * self.input_ratio for side in image.shape[-2:]]
        if any(side % STRIDE for side in sides):
            raise BadImageSize(
                f"image of {image.shape[-1]}x{image.shape[-2]} px: {self.input_ratio} x each side must be a "
                f"multiple of {STRIDE} px; with the usual 0.75, use sides that are multiples of 128 px"
            )
        return in_fp32(self._code, self._resized(image, [int(side) for side in sides]))

    def load_imagenet(self, state: dict[str, Tensor]) -> None:
        """Start the backbone from a torchvision EfficientNetV2 classifier's state dict."""
        prefix = "features."
        self.backbone.load_state_dict(
            {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        )

    def _resized(self, image: Tensor, size: list[int]) -> Tensor:
        resized = F.interpolate(image.float(), size, mode=self.resize, antialias=True, align_corners=False)
        return resized.contiguous(memory_format=torch.channels_last)  # the backbone is a quarter faster so

    def _code(self, image: Tensor) -> Tensor:
        return self.mapper(self.backbone((image - self.mean) / self.std))


class Mean(nn.Module):
    """Mean over a map, (B, C, H, W) -> (B, C, 1, 1); torch's pooling takes three operations more for the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3), keepdim=True)


def _lightened(features: nn.Module) -> nn.Module:
    """The same network in fewer operations of a training: SiLUs in place copy what the backward pass needs first."""
    for module in features.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = False
        elif isinstance(module, SqueezeExcitation):
            module.avgpool = Mean()
    return features


def _backbone(kind: str | EfficientNetStages) -> tuple[nn.Module, int]:
    """Convolutional features of stride 32, and their number of channels."""
    if kind == "efficientnet_v2_s":
        return efficientnet_v2_s().features, 1280
    if kind == "efficientnet_v2_l":
        return efficientnet_v2_l().features, 1280
    assert isinstance(kind, EfficientNetStages)
    rows, channels = [], kind.stem
    for stage in kind.stages:
        row = FusedMBConvConfig if stage.block == "fused" else MBConvConfig
        rows.append(row(stage.expand, 3, stage.stride, channels, stage.channels, stage.layers))
        channels = stage.channels
    network = EfficientNet(
        rows,
        dropout=0.0,
        stochastic_depth_prob=kind.stochastic_depth,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
        last_channel=kind.last,
    )
    return network.features, kind.last


class CompressorWarmup(nn.Module):
    """A start for the compressor without ImageNet weights.

    A small decoder, thrown away afterwards, predicts Stage A's latents, or the picture in a quarter of its side, from
    the slightly noised code.

    Batch: `image` (B, 3, H, W) uint8, `latents_a` (B, C, H/4, W/4).
    """

    def __init__(
        self, compressor: Compressor, code_channels: int, latent_channels: int, loss: CompressorWarmupLoss
    ) -> None:
        super().__init__()
        self.compressor = compressor
        self.loss = loss
        width = loss.width
        self.decoder = nn.Sequential(
            nn.Conv2d(code_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(width, width * 2 // 3, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(width * 2 // 3, width // 3, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 3, 4 * loss.channels(latent_channels), 3, padding=1),
        )

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        image = to_unit_range(batch["image"])
        target = F.avg_pool2d(image, 4) if self.loss.predicts == "colours" else batch["latents_a"].float()
        target = F.pixel_unshuffle(target, 2)
        code = self.compressor(image) / self.compressor.code_std
        code = code + self.loss.noise * draws.normal(*code.shape[1:])
        size = [side // 4 for side in target.shape[-2:]]
        predicted = self.decoder(F.interpolate(code, size, mode="bilinear", align_corners=False))
        loss = F.mse_loss(predicted.float(), target)
        return loss, {"mse": loss.detach()}
