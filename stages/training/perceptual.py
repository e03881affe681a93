"""Perceptual distance of two images: LPIPS (Zhang et al., arXiv 1801.03924) on torchvision's VGG16."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import vgg16

from stages.models.compressor import IMAGENET_MEAN, IMAGENET_STD
from stages.state_dicts import require_finite
from stages.weight_files import BadWeights

TAPPED = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # relu1_2, 2_2, 3_3, 4_3, 5_3 of `vgg16().features`: channels


class Perceptual:
    """Frozen VGG16 features, and how far apart those of two images are.

    Not an `nn.Module`, and meant so: an objective that holds one gets no parameter, buffer or checkpoint entry by it.

    vgg: state dict of torchvision's VGG16 (keys `features.*`; others are not looked at).
    heads: the `lpips` package's `weights/v0.1/vgg.pth` (keys `lin<n>.model.1.weight`), which makes this LPIPS itself;
    None makes it the plain distance of unit-normalised features.

    Raises BadWeights, naming the first key that is missing, of another shape or not all finite.
    """

    def __init__(
        self, vgg: Mapping[str, Tensor], heads: Mapping[str, Tensor] | None, device: torch.device | str = "cpu"
    ) -> None:
        with torch.device("meta"):  # most of VGG16 is its classifier, half a gigabyte that nobody needs here
            self.features = vgg16().features[: max(TAPPED) + 1]
        wanted = {f"features.{key}": value.shape for key, value in self.features.state_dict().items()}
        state = _chosen(vgg, wanted, "stage_a.loss.perceptual_weights", device)
        state = {key.removeprefix("features."): value for key, value in state.items()}
        self.features.load_state_dict(state, assign=True)
        self.features.requires_grad_(False)
        self.heads: list[Tensor] | None = None
        if heads is not None:
            sizes = {f"lin{n}.model.1.weight": torch.Size([1, size, 1, 1]) for n, size in enumerate(TAPPED.values())}
            self.heads = list(_chosen(heads, sizes, "stage_a.loss.perceptual_heads", device).values())
        self.mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
        self.std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)

    def __call__(self, image: Tensor, reference: Tensor) -> Tensor:
        """Distance of each pair of images (B, 3, H, W) in [0, 1], sides 16 px or more: (B,) fp32.

        With d the squared difference of two layers' features, each position scaled to unit length over its channels:
        LPIPS (eq. 1) is the sum over layers of the mean over positions of the heads' weighted sum of d over channels.
        Without heads it is the mean over layers, and all channels count alike: in [0, 2], as features are not negative.

        The gradient goes to `image` only.
        """
        with torch.no_grad():
            targets = self._unit_features(reference)
        distances = []
        for number, (found, target) in enumerate(zip(self._unit_features(image), targets, strict=True)):
            d = (found - target).square()
            distances.append((d if self.heads is None else d * self.heads[number]).sum(dim=1).mean(dim=(1, 2)))
        stacked = torch.stack(distances)
        return stacked.mean(dim=0) if self.heads is None else stacked.sum(dim=0)

    def _unit_features(self, image: Tensor) -> list[Tensor]:
        x = (image.float() - self.mean) / self.std
        found = []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in TAPPED:
                found.append(F.normalize(x.float(), dim=1, eps=1e-10))  # with a gradient of 0 where all are 0
        return found


def _chosen(
    state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], what: str, device: torch.device | str
) -> dict[str, Tensor]:
    """The wanted tensors of a state dict, in fp32 on the device; `what` is the config key that named it."""
    for key, shape in wanted.items():
        found = list(state[key].shape) if key in state else "not there"
        if found != list(shape):
            raise BadWeights(f"{what}: {key} must be {list(shape)} but is {found}; is this another file?")
    chosen = {key: state[key] for key in wanted}
    require_finite(chosen, what)
    return {key: value.to(device, torch.float32) for key, value in chosen.items()}
