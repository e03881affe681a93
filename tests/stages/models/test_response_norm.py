"""Global response normalisation against its formula in fp64, and the derivative against torch's of that formula."""

import pytest
import torch
from torch import Tensor, nn

from stages.models.response_norm import GlobalResponseNorm, fused_norm, plain_norm


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


def noisy(channels: int) -> GlobalResponseNorm:
    layer = GlobalResponseNorm(channels)
    nn.init.normal_(layer.gamma)
    nn.init.normal_(layer.beta)
    return layer


def gradients(made: Tensor, wanted: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [found.double() for found in torch.autograd.grad(made, inputs, wanted.to(made.dtype))]


def written_out(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """The layer by operators whose derivatives are torch's, with the layer's roundings."""
    norm = fused_norm(x)
    factor = (1 + gamma * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6))).to(x.dtype)
    return torch.addcmul(beta.to(x.dtype), x, factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_derivative_is_as_near_to_the_formulas_as_torchs(dtype: torch.dtype) -> None:
    layer, scales = noisy(6), torch.tensor([300.0, 1, 0.1, 30, 3, 100])
    errors: list[list[float]] = []
    for _ in range(20):
        x = (torch.randn(4, 12, 10, 6) * scales).to(dtype).requires_grad_()
        wanted, given = torch.randn(4, 12, 10, 6).to(dtype), (x, layer.gamma, layer.beta)
        exact = gradients(response_norm(*given), wanted, *given)
        for layers in (layer(x), written_out(*given)):
            found = zip(gradients(layers, wanted, *given), exact, strict=True)
            errors.append([((own - right).abs() / right.abs().amax()).mean().item() for own, right in found])
    ours, torchs = (torch.tensor(errors[first::2]).mean(dim=0) for first in (0, 1))
    assert (ours <= 1.02 * torchs + 1e-8).all()


@pytest.mark.parametrize("scale", [1.0, 1e10])
def test_a_dead_channel_has_no_part_in_the_norms_derivative(scale: float) -> None:
    """Nobody knows which way its norm would grow, and a large loss makes no NaN of it."""
    layer, x = noisy(6), torch.randn(2, 5, 4, 6)
    x[..., 2] = 0
    x.requires_grad_()
    wanted = scale * torch.randn(2, 5, 4, 6)
    (found,) = torch.autograd.grad(layer(x), x, wanted)
    assert found.isfinite().all()
    torch.testing.assert_close(found[..., 2], wanted[..., 2])  # of all that makes it up, the plain part is left


def test_its_derivative_has_none() -> None:
    """It would be that of the operators in the backward pass, which takes norms for constants."""
    layer, x = noisy(6), torch.randn(2, 5, 4, 6).requires_grad_()
    (found,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found.square().sum().backward()


def test_without_a_gradient_it_gives_the_same() -> None:
    layer, x = noisy(6), torch.randn(2, 5, 4, 6)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.clone().requires_grad_()))
    assert torch.equal(layer(x).detach(), layer(x.requires_grad_()).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_other_devices_is_that_of_cpus(dtype: torch.dtype) -> None:
    """To rounding in fp32, which is to the bit in what a bf16 model makes of it."""
    x = torch.randn(2, 12, 12, 32).to(dtype)
    x[:, :, :, 0] = 0
    norms = [plain_norm(x), fused_norm(x)]
    torch.testing.assert_close(*norms, rtol=1e-6, atol=1e-6)
    if dtype == torch.bfloat16:
        factors = [(1 + norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)).to(dtype) for norm in norms]
        assert torch.equal(*factors)  # what the layer multiplies by
