"""Layers against torch's own modules, Pillow, and formulas in fp64."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from stages.models.layers import (
    Attention,
    GlobalResponseNorm,
    Patchify,
    Unpatchify,
    fused_norm,
    norm_before_product,
    plain_norm,
    resized,
    timestep_embedding,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attention(dropout: float = 0.0) -> Attention:
    layer = Attention(12, heads=3, dropout=dropout)
    nn.init.normal_(layer.in_proj_bias)
    nn.init.normal_(layer.out_proj.bias)
    return layer


@pytest.mark.parametrize("more", [0, 5])
def test_attention_is_torchs_multihead_attention(more: int) -> None:
    """To a context as well: to the tokens themselves, followed by the context."""
    ours, theirs = attention(), nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    tokens, context = torch.randn(2, 7, 12), torch.randn(2, more, 12)
    seen = torch.cat([tokens, context], dim=1)
    expected, _ = theirs(tokens, seen, seen)
    torch.testing.assert_close(ours(tokens, context if more else None), expected, rtol=1e-5, atol=1e-6)


def test_attention_drops_probabilities_and_not_its_output() -> None:
    """As in the authors' code: with all probabilities gone, the output's bias is left."""
    layer, tokens = attention(dropout=1.0).train(), torch.randn(2, 7, 12)
    assert torch.equal(layer(tokens, None), layer.out_proj.bias.expand(2, 7, 12))
    assert not torch.equal(layer.eval()(tokens, None), layer.out_proj.bias.expand(2, 7, 12))


def response_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """ConvNeXt V2, Algorithm 1, in fp64."""
    norm = x.double().pow(2).sum(dim=(1, 2), keepdim=True).sqrt()
    return gamma.double() * (x.double() * norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)) + beta.double() + x.double()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-9)]
)
def test_global_response_norm_in_every_precision(dtype: torch.dtype, tolerance: float) -> None:
    """Squares of 300 and their sum over a map are beyond fp16, and the result keeps the input's type."""
    layer = GlobalResponseNorm(6)
    nn.init.normal_(layer.gamma)
    nn.init.normal_(layer.beta)
    x = (torch.randn(2, 24, 20, 6) * torch.tensor([300.0, 1, 0.1, 30, 3, 100])).to(dtype)
    ours = layer(x)
    assert ours.dtype == dtype
    expected = response_norm(x, layer.gamma, layer.beta)
    scale = expected.abs().amax(dim=(0, 1, 2))  # of each channel
    assert ((ours.double() - expected).abs().amax(dim=(0, 1, 2)) / scale).max() <= tolerance


def test_global_response_norm_has_a_gradient_of_zero_at_zero() -> None:
    x = torch.zeros(1, 3, 3, 4, requires_grad=True)
    GlobalResponseNorm(4)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_timesteps_in_half_precision_are_refused() -> None:
    with pytest.raises(AssertionError):
        timestep_embedding(torch.rand(3).bfloat16(), 16)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_are_torchs_pixel_shuffles(patch: int) -> None:
    x = torch.randn(2, 3, 8, 12)
    patches = Patchify(patch)(x)
    assert torch.equal(patches.permute(0, 3, 1, 2), nn.PixelUnshuffle(patch)(x))
    assert torch.equal(Unpatchify(patch)(patches), x)


def test_resized_pictures_are_pillows_bilinear() -> None:
    pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    ours = resized(pictures, 24)
    for picture, small in zip(pictures, ours, strict=True):
        theirs = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((24, 24), Image.Resampling.BILINEAR)
        difference = small.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs).astype(int)
        assert np.abs(difference).max() <= 1
    assert resized(pictures, 64) is pictures


# ------------------------------------------------------------------------------- norms of half-precision features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_other_devices_is_that_of_cpus(dtype: torch.dtype) -> None:
    """To rounding in fp32, which is to the bit in what a bf16 model makes of it; and in the gradient, 0 at 0."""
    x = torch.randn(2, 12, 12, 32).to(dtype)
    x[:, :, :, 0] = 0
    outputs, gradients = [], []
    for norm in (plain_norm, fused_norm):
        given = x.clone().requires_grad_()
        found = norm(given)
        (found / (found.mean(dim=-1, keepdim=True) + 1e-6)).square().sum().backward()
        assert given.grad is not None
        outputs.append(found.detach())
        gradients.append(given.grad)
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert not gradients[1][..., 0].any()
    if dtype == torch.bfloat16:
        assert torch.equal(*((1 + output).to(dtype) for output in outputs))  # what the layer multiplies by


def test_a_norm_before_a_product_rounds_as_a_cast_after_it() -> None:
    x, norm = torch.randn(4, 8, 8, 64).bfloat16(), norm_before_product(64)
    torch.testing.assert_close(norm(x), norm(x.float()).bfloat16(), rtol=2**-7, atol=1e-6)
    exact = torch.nn.functional.layer_norm(x.double(), (64,), eps=1e-6)
    assert (norm(x).double() - exact).abs().mean() <= 1.01 * (norm(x.float()).bfloat16().double() - exact).abs().mean()
    assert torch.equal(norm(x.float()), torch.nn.functional.layer_norm(x.float(), (64,), eps=1e-6))
