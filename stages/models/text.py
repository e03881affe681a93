"""Text towers: captions become the hidden states of all token positions.

open_clip's text transformer and byte-pair encoding, used so that the result equals
`transformers.CLIPTextModel(input_ids, attention_mask).last_hidden_state`: padding is <|endoftext|> and is
masked out, where open_clip pads with 0 and masks nothing. The states of padded positions matter, since Stage
B and C attend to them.
"""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import regex  # type: ignore[import-untyped]
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor

from stages.settings.models import ClipTextConfig, SeededTextConfig
from stages.state_dicts import require_finite
from stages.weight_files import BadWeights

START, END = 49406, 49407  # END is the padding too
VOCABULARY = 49408


@dataclass(frozen=True)
class Tokens:
    """Token ids (B, N) int64, and how many captions lost their end to fit."""

    ids: Tensor
    truncated: int


class Tokenizer:
    """CLIP's byte-pair encoding with the normalisation of transformers' `CLIPTokenizer`: NFC and lower case.

    open_clip's own would repair and unescape captions first, which the tokenizer of a released pipeline does
    not.
    """

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self.bpe = SimpleTokenizer()
        self.bpe.clean_fn = _normalised
        # without open_clip's special tokens: a caption cannot spell one
        self.bpe.pat = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")

    def __call__(self, texts: Sequence[str]) -> Tokens:
        room = self.context_length - 2
        captions = [self.bpe.encode(text) for text in texts]
        rows = [[START, *ids[:room], *[END] * (self.context_length - 1 - len(ids[:room]))] for ids in captions]
        ids = torch.tensor(rows, dtype=torch.int64).view(len(rows), self.context_length)
        return Tokens(ids, truncated=sum(len(ids) > room for ids in captions))


def _normalised(text: str) -> str:
    """Lower case by character: a final sigma stays what it is, as in the stock tokenizer."""
    return "".join(map(str.lower, unicodedata.normalize("NFC", text)))


class BadTextWeights(BadWeights):
    """A checkpoint does not hold the weights of the text tower asked for."""


class TextTower(TextTransformer):
    """A CLIP text transformer under open_clip's key names that returns the hidden states of all positions."""

    def __init__(self, width: int, layers: int, heads: int, context_length: int) -> None:
        super().__init__(context_length, VOCABULARY, width, heads, layers, output_dim=None)
        self.tokenizer = Tokenizer(context_length)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, N) -> hidden states after the last LayerNorm, (B, N, width)."""
        end = (ids == END).int()
        padded = end.cumsum(dim=1) > end  # all after the first end
        mask = self.attn_mask + torch.zeros_like(padded, dtype=torch.float32).masked_fill(padded, -torch.inf)[:, None]
        x = self.token_embedding(ids) + self.positional_embedding
        return self.ln_final(self.transformer(x, attn_mask=mask.repeat_interleave(self.heads, dim=0)))

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, int]:
        """Captions -> (hidden states (B, N, width) fp32, number of captions that were truncated)."""
        tokens = self.tokenizer(texts)
        return self(tokens.ids.to(self.positional_embedding.device)), tokens.truncated

    def load_open_clip(self, checkpoint: dict[str, Tensor], source: object = "the checkpoint") -> None:
        """Take the text weights out of a whole CLIP's state dict, under open_clip's names or transformers'; errors name
        it by `source`.

        Raises BadTextWeights where it is another model's, BadWeights where they are not all finite.
        """
        checkpoint = _under_our_names(checkpoint, source)
        own = self.state_dict()
        for key, value in own.items():
            if key not in checkpoint or checkpoint[key].shape != value.shape:
                found = tuple(checkpoint[key].shape) if key in checkpoint else "nothing"
                raise BadTextWeights(
                    f"{source} holds {found} for {key}, not {tuple(value.shape)}: "
                    "give the checkpoint of the CLIP that the config names, by open_clip or transformers"
                )
        state = {key: checkpoint[key] for key in own}
        require_finite(state, source)
        self.load_state_dict(state)

    @torch.no_grad()
    def centre(self, mean: Tensor) -> None:
        """Subtract `mean` (width,) from all hidden states from now on, by way of the last LayerNorm's bias.

        Random weights give hidden states that are mostly the same for all captions; centred, their
        differences show.
        """
        self.ln_final.bias -= mean


def clip_tower(config: ClipTextConfig, checkpoint: dict[str, Tensor]) -> TextTower:
    """The pretrained tower of the config, from the open_clip model's state dict."""
    tower = TextTower(config.width, config.layers, config.heads, config.context_length)
    tower.load_open_clip(checkpoint, config.weights)
    return tower.eval().requires_grad_(False)


def seeded_tower(config: SeededTextConfig) -> TextTower:
    """A small tower of random weights, all from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        tower = TextTower(config.width, config.layers, config.heads, config.context_length)
    return tower.eval().requires_grad_(False)


def to_transformers(tower: TextTower) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The tower as transformers' CLIPTextModel: content of its `config.json`, and its state dict."""
    width = tower.width
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": tower.heads,
        "max_position_embeddings": tower.context_length,
        "hidden_act": "gelu",
        "layer_norm_eps": tower.ln_final.eps,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": END,
        "torch_dtype": "float32",
    }
    state = {
        "embeddings.token_embedding.weight": tower.token_embedding.weight,
        "embeddings.position_embedding.weight": tower.positional_embedding,
        "final_layer_norm.weight": tower.ln_final.weight,
        "final_layer_norm.bias": tower.ln_final.bias,
    }
    for i, block in enumerate(tower.transformer.resblocks):
        layer = f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            packed = getattr(block.attn, f"in_proj_{kind}")
            for name, part in zip("qkv", packed.chunk(3), strict=True):
                state[f"{layer}.self_attn.{name}_proj.{kind}"] = part
            state[f"{layer}.self_attn.out_proj.{kind}"] = getattr(block.attn.out_proj, kind)
            state[f"{layer}.layer_norm1.{kind}"] = getattr(block.ln_1, kind)
            state[f"{layer}.layer_norm2.{kind}"] = getattr(block.ln_2, kind)
            state[f"{layer}.mlp.fc1.{kind}"] = getattr(block.mlp.c_fc, kind)
            state[f"{layer}.mlp.fc2.{kind}"] = getattr(block.mlp.c_proj, kind)
    return config, {f"text_model.{key}": value.detach().clone() for key, value in state.items()}


def _under_our_names(checkpoint: dict[str, Tensor], source: object) -> dict[str, Tensor]:
    """A CLIP's or a text model's state dict; of transformers' names, those of the text tower are converted."""
    mark = "embeddings.token_embedding.weight"
    before = next((key.removesuffix(mark) for key in checkpoint if key.endswith(mark)), None)
    if before is None:
        return checkpoint
    own = {key.removeprefix(before): value for key, value in checkpoint.items() if key.startswith(before)}
    try:
        return from_transformers(own)
    except KeyError as error:
        raise BadTextWeights(f"{source} lacks {before}{error.args[0]}") from error


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPTextModel's state dict under `TextTower`'s names: the inverse of `to_transformers`."""
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    converted = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    names = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    layers = sum(key.endswith(".layer_norm1.bias") for key in state)
    for i, kind in product(range(layers), ("weight", "bias")):
        layer, block = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        converted[f"{block}.attn.in_proj_{kind}"] = torch.cat(
            [state[f"{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
        )
        for ours, theirs in names.items():
            converted[f"{block}.{ours}.{kind}"] = state[f"{layer}.{theirs}.{kind}"]
    return converted


def tokenizer_files(context_length: int) -> dict[str, str]:
    """Files of a folder for transformers' `CLIPTokenizer`, by name: it gives the same ids as `Tokenizer`."""
    bpe = SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {token: i for token, i in bpe.encoder.items() if i < START} | {start: START, end: END}
    merges = sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.__getitem__)
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    settings = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "do_lower_case": True,
    }
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "special_tokens_map.json": json.dumps(special, indent=2),
    }
