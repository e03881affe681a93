"""The discriminator that judges Stage A's reconstructions while it trains, and the two losses around it.

After `Discriminator` of dome272/Wuerstchen's `vqgan.py`. It ends in a sigmoid there; here it ends in logits, and both
losses are written with softplus, the same cross-entropies without the logarithm of a number that rounds to 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from stages.models.layers import in_fp32


class Discriminator(nn.Module):
    """Patch discriminator with spectral norm (arXiv 1802.05957); 6,271,105 parameters with the released sizes.

    `depth` convolutions of stride 2, whose channels double, at most three times, up to `hidden`. Sides of the input
    must be above 2^depth px: InstanceNorm cannot normalise a single position.
    """

    def __init__(self, hidden: int = 512, depth: int = 6) -> None:
        super().__init__()
        halvings = min(3, depth - 1)
        widths = [3, *(hidden >> max(halvings - level, 0) for level in range(depth))]
        layers: list[nn.Module] = []
        for level in range(depth):
            layers.append(spectral_norm(nn.Conv2d(widths[level], widths[level + 1], 3, stride=2, padding=1)))
            if level:
                layers.append(nn.InstanceNorm2d(widths[level + 1]))
            layers.append(nn.LeakyReLU(0.2))
        self.encoder = nn.Sequential(*layers)
        self.head = nn.Conv2d(hidden, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> logits of being original, (B, 1, H', W') fp32, H' = ceil(H / 2^depth).

        Always in fp32, also under autocast: the power iteration of the spectral norm loses its direction in bf16.
        """
        return in_fp32(lambda x: self.head(self.encoder(x)), image)


def discriminator_loss(discriminator: Discriminator, original: Tensor, reconstruction: Tensor) -> Tensor:
    """Cross-entropy of telling originals from reconstructions (GAN, arXiv 1406.2661, eq. 1), halved, so ln 2 at first.

    The reconstruction is detached: only the discriminator's parameters get a gradient. Images as in its `forward`.
    """
    real, fake = discriminator(torch.cat([original, reconstruction.detach()])).chunk(2)
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def adversarial_loss(discriminator: Discriminator, reconstruction: Tensor) -> Tensor:
    """-log of the probability that reconstructions are originals (the non-saturating form, arXiv 1406.2661, section 3).

    The discriminator's parameters are detached: only the reconstruction gets a gradient.
    """
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    return F.softplus(-torch.func.functional_call(discriminator, frozen, (reconstruction,))).mean()
