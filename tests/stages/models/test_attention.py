"""Attention against torch's own."""

import pytest
import torch
from torch import nn

from stages.models.attention import Attention, AttnBlock


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


def test_what_was_seen_of_a_text_stands_for_it() -> None:
    """Keys and values, made once, give what the text itself gives."""
    block, x, text = AttnBlock(12, 7, 3).eval(), torch.randn(2, 3, 4, 12), torch.randn(2, 5, 7)
    nn.init.normal_(block.attention["attn"].in_proj_bias)
    seen = block.see(text)
    assert seen.shape == (2, 5, 24)
    torch.testing.assert_close(block(x, None, seen), block(x, text))
    assert not torch.allclose(block(x, None), block(x, text))
