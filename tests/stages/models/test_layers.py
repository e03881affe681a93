"""Layers against torch's own modules, Pillow, and formulas in fp64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stages.models.attention import AttnBlock
from stages.models.layers import (
    Conv2d,
    Patchify,
    ResBlock,
    TimestepBlock,
    Unpatchify,
    norm_before_product,
    resized,
    timestep_embedding,
)
from stages.models.stage_a import MixingBlock


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


def test_a_norm_before_a_product_rounds_as_a_cast_after_it() -> None:
    x, norm = torch.randn(4, 8, 8, 64).bfloat16(), norm_before_product(64)
    torch.testing.assert_close(norm(x), norm(x.float()).bfloat16(), rtol=2**-7, atol=1e-6)
    exact = torch.nn.functional.layer_norm(x.double(), (64,), eps=1e-6)
    assert (norm(x).double() - exact).abs().mean() <= 1.01 * (norm(x.float()).bfloat16().double() - exact).abs().mean()
    assert torch.equal(norm(x.float()), torch.nn.functional.layer_norm(x.float(), (64,), eps=1e-6))


# ------------------------------------------------------------------------------- own derivatives, own memory


def test_a_modulations_derivative_is_that_of_its_formula() -> None:
    block = TimestepBlock(6, 4).double()
    x, timestep = torch.randn(2, 3, 5, 6).double().requires_grad_(), torch.randn(2, 4).double()
    weights, wanted = [x, *block.parameters()], torch.randn(2, 3, 5, 6).double()
    scale, shift = block.mapper(timestep)[:, None, None, :].chunk(2, dim=-1)
    expected = torch.autograd.grad(x * (1 + scale) + shift, weights, wanted)
    for ours, theirs in zip(torch.autograd.grad(block(x, timestep), weights, wanted), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_modulations_derivative_has_none() -> None:
    block, x = TimestepBlock(6, 4), torch.randn(2, 3, 5, 6).requires_grad_()
    (found,) = torch.autograd.grad(block(x, torch.randn(2, 4)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found.square().sum().backward()


@pytest.mark.parametrize("make", [lambda: ResBlock(8), lambda: AttnBlock(8, 8, 2), lambda: MixingBlock(8)])
def test_without_gradients_a_block_leaves_its_input_alone_and_gives_the_same(make: Callable[[], nn.Module]) -> None:
    block, x = make().eval(), torch.randn(2, 6, 6, 8)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    inputs = (x, torch.randn(2, 3, 8)) if isinstance(block, AttnBlock) else (x,)
    before, expected = x.clone(), block(*inputs).detach()
    with torch.no_grad():
        torch.testing.assert_close(block(*inputs), expected)
    assert torch.equal(x, before)


def test_one_timestep_does_for_all_samples() -> None:
    block, x, timestep = TimestepBlock(6, 4), torch.randn(3, 2, 2, 6), torch.randn(1, 4)
    expected = block(x, timestep.expand(3, 4))
    torch.testing.assert_close(block(x, timestep), expected)
    with torch.no_grad():
        torch.testing.assert_close(block(x, timestep), expected)


def test_a_mapped_code_is_what_the_map_would_give() -> None:
    """As the authors have it: the map's channels are concatenated with the others."""
    block, mapper = ResBlock(8, 2 + 5), nn.Conv2d(3, 5, 1)
    x, skip, code = torch.randn(2, 4, 4, 8), torch.randn(2, 4, 4, 2), torch.randn(2, 4, 4, 3)
    mapped = mapper(code.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    joined = torch.cat([mapper.weight.flatten(1), mapper.bias[:, None]], dim=1)
    torch.testing.assert_close(block(x, skip, code, joined), block(x, torch.cat([skip, mapped], dim=-1)))


def test_a_convolution_of_1x1_is_torchs() -> None:
    ours, x = Conv2d(3, 5, 1), torch.randn(2, 4, 6, 3)
    theirs = nn.functional.conv2d(x.permute(0, 3, 1, 2), ours.weight, ours.bias)
    torch.testing.assert_close(ours(x).permute(0, 3, 1, 2), theirs)
