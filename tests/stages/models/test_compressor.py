"""The semantic compressor: sides, scale, precision, resize filter, BatchNorm."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from stages.draws import Draws
from stages.models.compressor import IMAGENET_MEAN, IMAGENET_STD, Compressor, CompressorWarmup
from stages.models.geometry import BadImageSize, code_side, denormalise, normalise
from stages.settings.losses import CompressorWarmupLoss
from stages.settings.models import CompressorConfig, EfficientNetStages

BACKBONE = EfficientNetStages.model_validate(
    {
        "stem": 8,
        "stages": [
            {"block": "fused", "expand": 1, "stride": 1, "channels": 8, "layers": 1},
            {"block": "fused", "expand": 4, "stride": 2, "channels": 16, "layers": 1},
            {"block": "fused", "expand": 4, "stride": 2, "channels": 24, "layers": 1},
            {"block": "mb", "expand": 4, "stride": 2, "channels": 32, "layers": 1},
            {"block": "mb", "expand": 4, "stride": 2, "channels": 40, "layers": 1},
        ],
        "last": 64,
    }
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny(**changes: object) -> Compressor:
    return Compressor(CompressorConfig.model_validate({"backbone": BACKBONE, **changes}))


@pytest.mark.parametrize(
    ("config", "backbone", "keys"),
    [
        (CompressorConfig(), 20_177_488, 786),
        (CompressorConfig(backbone="efficientnet_v2_l"), 117_234_272, 1552),
        (CompressorConfig(batch_norm="plain"), 20_177_488, 784),
    ],
    ids=["S", "L", "cascade"],
)
def test_full_size(config: CompressorConfig, backbone: int, keys: int) -> None:
    with torch.device("meta"):
        compressor = Compressor(config)
    assert sum(parameter.numel() for parameter in compressor.backbone.parameters()) == backbone
    assert len(compressor.state_dict()) == keys


def test_sides_and_scale() -> None:
    compressor = tiny(batch_norm="fixed").train()
    code = compressor(torch.rand(8, 3, 128, 256))
    assert code.shape == (8, 16, 3, 6)
    latents = normalise(code)
    assert latents.std(dim=(0, 2, 3)).mean().item() == pytest.approx(1, abs=0.02)
    assert latents.mean().item() == pytest.approx(0, abs=0.02)
    torch.testing.assert_close(denormalise(latents), code)
    trained = [name for name, parameter in compressor.mapper.named_parameters() if parameter.requires_grad]
    assert trained == ["0.weight"]


def test_the_plain_norm_gives_the_code_itself_unit_variance() -> None:
    compressor = tiny(batch_norm="plain").train()
    code = compressor(torch.rand(8, 3, 128, 256))
    torch.testing.assert_close(code.mean(dim=(0, 2, 3)), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(code.std(dim=(0, 2, 3)), torch.ones(16), rtol=0, atol=0.02)
    assert compressor.code_std == 1


def test_other_sides_are_refused() -> None:
    with pytest.raises(BadImageSize, match="100 px"):
        tiny()(torch.rand(1, 3, 100, 128))


def backbone_input(compressor: Compressor, image: Tensor) -> Tensor:
    seen: list[Tensor] = []
    compressor.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        compressor.eval()(image)
    return seen[0]


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_the_backbone_sees_pillows_resize_normalised(name: str) -> None:
    """Pillow's filters widen when they shrink, which torch calls antialiasing."""
    image = torch.rand(1, 3, 128, 256)
    ours = backbone_input(tiny(resize=name), image)
    for channel, mean, std in zip(range(3), IMAGENET_MEAN, IMAGENET_STD, strict=True):
        picture = Image.fromarray(image[0, channel].numpy(), mode="F")
        small = np.asarray(picture.resize((192, 96), Image.Resampling[name.upper()]))
        np.testing.assert_allclose(ours[0, channel].numpy(), (small - mean) / std, rtol=0, atol=1e-4)


def test_at_1024_px_the_backbone_sees_768() -> None:
    assert backbone_input(tiny(), torch.rand(1, 3, 1024, 128)).shape[-2:] == (768, 96)
    assert code_side(1024) == 768 / 32


def test_autocast_is_ignored() -> None:
    compressor, image = tiny().eval(), torch.rand(1, 3, 128, 128)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = compressor(image)
    with torch.no_grad():
        torch.testing.assert_close(inside, compressor(image), rtol=0, atol=0)


def test_a_code_depends_on_its_batch_in_training_only() -> None:
    compressor, images = tiny(), torch.rand(3, 3, 128, 128)
    with torch.no_grad():
        for _ in range(30):
            compressor.train()(images)  # running statistics near these pictures' own
        together, alone = (compressor.train()(images[:rows])[:1] for rows in (3, 2))
        assert (together - alone).abs().max() > 0.01
        together, alone = (compressor.eval()(images[:rows])[:1] for rows in (3, 2))
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["efficientnet_v2_s", "efficientnet_v2_l", BACKBONE], ids=["S", "L", "tiny"])
def test_batch_norm_has_the_released_constants(backbone: object) -> None:
    with torch.device("meta"):
        compressor = Compressor(CompressorConfig.model_validate({"backbone": backbone}))

    def constants(module: nn.Module) -> set[tuple[float, float | None]]:
        return {(norm.eps, norm.momentum) for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)}

    assert constants(compressor.backbone) == {(1e-3, 0.1)}
    assert constants(compressor.mapper) == {(1e-5, 0.1)}


def test_the_backbone_starts_from_a_classifier() -> None:
    source, target = tiny(), tiny()
    classifier = {f"features.{key}": value for key, value in source.backbone.state_dict().items()}
    target.load_imagenet(classifier | {"classifier.1.weight": torch.zeros(1000, 64)})
    assert torch.equal(target.backbone[0][0].weight, source.backbone[0][0].weight)


@pytest.mark.parametrize("predicts", ["latents_a", "colours"])
def test_the_warm_up_predicts_what_is_asked_for(predicts: str) -> None:
    """A decoder that knows it has no loss; one of other channels could not be taken for it."""
    loss = CompressorWarmupLoss.model_validate({"predicts": predicts, "width": 24})
    warmup = CompressorWarmup(tiny(batch_norm="fixed"), 16, 4, loss)
    image = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    latents = torch.randn(2, 4, 32, 32)
    colours = image.view(2, 3, 32, 4, 32, 4).float().mean(dim=(3, 5)) / 255
    known = {"latents_a": latents, "colours": colours}[predicts]
    folded = torch.nn.functional.pixel_unshuffle(known, 2)
    assert warmup.decoder(torch.zeros(2, 16, 4, 4)).shape == folded.shape
    warmup.decoder = Known(folded)
    found, _ = warmup({"image": image, "latents_a": latents}, Draws(0, 0, 0, 2, 2))
    assert found.item() == pytest.approx(0, abs=1e-10)


class Known(nn.Module):
    """Answers the same, whatever it is asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, _: Tensor) -> Tensor:
        return self.answer
