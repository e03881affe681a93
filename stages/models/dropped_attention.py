"""Attention on CPUs whose probabilities are dropped in part, with a backward pass of its own.

Written as one product after the other, it passes over all probabilities of a batch a dozen times, through memory. Head
by head they stay in a core's cache: a third less time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.models.layers import kept


def dropped_attention(query: Tensor, key: Tensor, value: Tensor, share: float) -> Tensor:
    """(softmax(q k^T / sqrt(D)) with a `share` of its elements dropped, the rest scaled up) v; all fp32 on the CPU.

    query: (B, heads, N, D); key, value: (B, heads, M, D). Returns (B, heads, N, D).
    """
    heads = (tensor.flatten(0, 1) for tensor in (query * query.shape[-1] ** -0.5, key, value / (1 - share)))
    attended: Tensor = _Dropped.apply(*heads, share)
    return attended.view(query.shape)


class _Dropped(torch.autograd.Function):
    """(softmax(q k^T) where kept, else 0) v for each of P heads: (P, N, D), (P, M, D), (P, M, D) -> (P, N, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, share: float) -> Tensor:
        shape = (*query.shape[:2], key.shape[1])
        stays, probabilities, attended = kept(shape, share), torch.empty(shape), torch.empty_like(query)
        some = torch.empty(shape[1:])
        for head, found in enumerate(probabilities):
            torch.mm(query[head], key[head].t(), out=found)
            torch.softmax(found, -1, out=found)
            torch.mul(found, stays[head], out=some)
            torch.mm(some, value[head], out=attended[head])
        ctx.save_for_backward(query, key, value, probabilities, stays)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, probabilities, stays = ctx.saved_tensors
        of_query, of_key, of_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        some = torch.empty(probabilities.shape[1:])
        for head, gradient in enumerate(gradients[0].contiguous()):
            torch.mul(probabilities[head], stays[head], out=some)
            torch.mm(some.t(), gradient, out=of_value[head])
            torch.mm(gradient, value[head].t(), out=some)
            some *= stays[head]
            of_scores = torch._softmax_backward_data(some, probabilities[head], -1, torch.float32)
            torch.mm(of_scores, key[head], out=of_query[head])
            torch.mm(of_scores.t(), query[head], out=of_key[head])
        return of_query, of_key, of_value, None
