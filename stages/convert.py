"""State dicts and configs between dome272/Wuerstchen's names, which are ours, and diffusers' names.

The rules of diffusers' `scripts/convert_wuerstchen.py`, and their inverse; one pair of functions serves Stage
A, B and C.
"""

import re
from typing import Any

import torch
from torch import Tensor

from stages.config import StageAConfig, StageBConfig, StageCConfig

CODEBOOK = ("vquantizer.codebook.weight", "vquantizer.embedding.weight")
PACKED = re.compile(r"(.*\.attention)\.attn\.in_proj_(weight|bias)")
SPLIT = re.compile(r"(.*\.attention)\.to_([qkv])\.(weight|bias)")


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stage A's, B's or C's state dict as PaellaVQModel, WuerstchenDiffNeXt or WuerstchenPrior name it."""
    converted = {}
    for key, value in state.items():
        if match := PACKED.fullmatch(key):
            block, kind = match.groups()
            for name, part in zip("qkv", value.chunk(3), strict=True):
                converted[f"{block}.to_{name}.{kind}"] = part.clone()
        else:
            converted[key.replace(".attention.attn.out_proj.", ".attention.to_out.0.").replace(*CODEBOOK)] = value
    return converted


def from_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`."""
    converted = {}
    for key, value in state.items():
        if match := SPLIT.fullmatch(key):
            block, name, kind = match.groups()
            if name == "q":
                parts = [state[f"{block}.to_{part}.{kind}"] for part in "qkv"]
                converted[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
        else:
            old, new = CODEBOOK
            converted[key.replace(".attention.to_out.0.", ".attention.attn.out_proj.").replace(new, old)] = value
    return converted


def vqgan_config(config: StageAConfig) -> dict[str, Any]:
    """Arguments of diffusers' PaellaVQModel."""
    return {
        "levels": config.levels,
        "bottleneck_blocks": config.bottleneck_blocks,
        "embed_dim": config.hidden,
        "latent_channels": config.latent_channels,
        "num_vq_embeddings": config.codebook_size,
        "scale_factor": config.scale,
    }


def decoder_config(config: StageBConfig) -> dict[str, Any]:
    """Arguments of diffusers' WuerstchenDiffNeXt."""
    return {
        "c_in": config.latent_channels,
        "c_out": config.latent_channels,
        "c_r": config.timestep_channels,
        "patch_size": config.patch,
        "c_cond": config.cond_width,
        "c_hidden": list(config.widths),
        "nhead": [heads or -1 for heads in config.heads],
        "blocks": list(config.blocks),
        "level_config": list(config.patterns),
        "inject_effnet": list(config.inject_code),
        "effnet_embd": config.code_channels,
        "clip_embd": config.text_width,
        "dropout": config.dropout,
    }


def prior_config(config: StageCConfig) -> dict[str, Any]:
    """Arguments of diffusers' WuerstchenPrior."""
    return {
        "c_in": config.latent_channels,
        "c": config.width,
        "c_cond": config.text_width,
        "c_r": config.timestep_channels,
        "depth": config.depth,
        "nhead": config.heads,
        "dropout": config.dropout,
    }
