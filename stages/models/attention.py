"""Block A: attention of a map's positions to all of them and to a text."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.dropped_attention import dropped_attention
from stages.models.layers import Block, norm_before_product, plus

SeenText = tuple[Tensor, ...]
"""What the attention blocks of a model make of a text, in their order: keys and values (B, N, 2 C) each."""


class Attention(nn.Module):
    """Attention of tokens to themselves and a context, with the key names of `nn.MultiheadAttention`."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, tokens: Tensor, context: Tensor | None, seen: Tensor | None = None) -> Tensor:
        """Return (B, N, C) for tokens (B, N, C) and a context (B, M, C), or what `see` made of it."""
        if seen is not None:
            mapped = F.linear(tokens, self.in_proj_weight, self.in_proj_bias)
            query, own = mapped.split(self._sizes, dim=-1)
            pairs = torch.cat([own, seen], dim=1)
        else:
            (query_weight, weight), (query_bias, bias) = self._parts(tokens.dtype)
            query = F.linear(tokens, query_weight, query_bias)
            # One product for all keys and values: autocast casts each weight once, and its gradient is summed in fp32.
            joined = tokens if context is None else torch.cat([tokens, context.to(tokens.dtype)], dim=1)
            pairs = F.linear(joined, weight, bias)
        key, value = pairs.chunk(2, dim=-1)
        heads = (self._split(query), self._split(key), self._split(value))
        attended = scaled_dot_product_attention(*heads, self.dropout if self.training else 0.0)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def see(self, context: Tensor) -> Tensor:
        """Keys and values of a context: (B, M, C) -> (B, M, 2 C)."""
        (_, weight), (_, bias) = self._parts(context.dtype)
        return F.linear(context, weight, bias)

    @property
    def _sizes(self) -> list[int]:
        """Rows of the weight for queries, and for keys with values."""
        channels = self.in_proj_weight.shape[1]
        return [channels, 2 * channels]

    def _parts(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Weights and biases of queries, and of keys with values."""
        weight, bias = self.in_proj_weight.to(dtype), self.in_proj_bias.to(dtype)
        return weight.split(self._sizes), bias.split(self._sizes)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class AttnBlock(Block):
    """Block A: attention of each position to all positions and to the text.

    Its first layer on the text, a SiLU, is the same in all blocks of a model, which applies it once (`activated`).
    """

    def __init__(self, channels: int, cond_width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = norm_before_product(channels)
        self.attention = nn.ModuleDict({"attn": Attention(channels, heads, dropout)})  # the authors' key names
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, channels))

    def forward(self, x: Tensor, text: Tensor | None, seen: Tensor | None = None) -> Tensor:
        """Return (B, H, W, channels); text: (B, N, cond_width) as of `activated`, or what `see` made of it."""
        tokens = self.norm(x).flatten(1, 2)
        context = None if text is None else self.kv_mapper[1](text)
        return plus(x, self.attention["attn"](tokens, context, seen).view_as(x))

    def see(self, text: Tensor) -> Tensor:
        """Keys and values (B, N, 2 channels) of a text as of `activated`: the same whatever x is."""
        attention = self.attention["attn"]
        assert isinstance(attention, Attention)
        return attention.see(self.kv_mapper[1](text))


def activated(text: Tensor) -> Tensor:
    """What all attention blocks of a model see of its text: after their SiLU."""
    return F.silu(text)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, drop: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for (B, heads, N, D), with a share `drop` of the probabilities dropped.

    torch's kernel, but on CPUs in fp32, since its backward pass there is six to twelve times slower in bf16; our own
    where probabilities are dropped, which none of its fast ones for CPUs can do, unless it is compiled.
    """
    if query.device.type != "cpu" or (drop == 0 and query.dtype == torch.float32):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=drop)
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.float(), key.float(), value.float()
        if not 0 < drop < 1 or torch.compiler.is_compiling():
            return F.scaled_dot_product_attention(query, key, value, dropout_p=drop)
        return dropped_attention(query, key, value, drop)
