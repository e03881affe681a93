"""Attention with dropped probabilities on CPUs: the plain formula's numbers and gradients, in less memory."""

import pytest
import torch
from torch import Tensor

from stages.models.dropped_attention import dropped_attention
from stages.models.layers import kept


def plain(query: Tensor, key: Tensor, value: Tensor, share: float) -> Tensor:
    """One product after the other."""
    probabilities = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
    stays = kept((query.shape[0] * query.shape[1], query.shape[2], key.shape[2]), share).view(probabilities.shape)
    return torch.where(stays, probabilities / (1 - share), 0) @ value


def heads(rows: int) -> Tensor:
    """(2, 3, rows, 5), laid out as attention's, heads last; wants a gradient."""
    return torch.randn(2, rows, 3, 5).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_it_is_the_plain_formula_with_its_gradients(share: float) -> None:
    torch.manual_seed(0)
    given, weight = (heads(7), heads(11), heads(11)), torch.randn(2, 3, 7, 5)
    found = []
    for attend in (plain, dropped_attention):
        torch.manual_seed(1)
        attended = attend(*given, share)
        found.append((attended, *torch.autograd.grad((attended * weight).sum(), given)))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_it_drops_as_many_as_it_says_and_others_each_time() -> None:
    torch.manual_seed(0)
    query, key = torch.zeros(1, 1, 500, 4), torch.zeros(1, 1, 500, 4)
    value = torch.ones(1, 1, 500, 4)  # what is attended is the sum of the probabilities that are left
    first, second = (dropped_attention(query, key, value, 0.25)[..., 0] for _ in range(2))
    assert abs(first.mean().item() - 1) < 0.01
    assert abs(first.var().item() - 1 / 3 / 500) < 0.0002
    assert not torch.equal(first, second)


def test_it_keeps_one_map_of_probabilities_for_the_backward_pass() -> None:
    kept_bytes: list[int] = []

    def note(saved: Tensor) -> Tensor:
        kept_bytes.append(saved.nbytes)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        dropped_attention(heads(40), heads(50), heads(50), 0.1)
    maps = 2 * 3 * 40 * 50
    assert sum(kept_bytes) < 5 * maps + 8 * 2 * 3 * 140 * 5  # four bytes and one of the mask; queries, keys and values
