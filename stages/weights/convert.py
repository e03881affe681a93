"""State dicts and configs between dome272/Wuerstchen's names, which are ours, and diffusers' names.

The rules of diffusers' `scripts/convert_wuerstchen.py`, and their inverse; one pair of functions serves Stage
A, B and C.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stages.settings.models import StageAConfig, StageBConfig, StageCConfig

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


def stage_a_config(arguments: Mapping[str, Any]) -> StageAConfig:
    """The inverse of `vqgan_config`; what only a training reads keeps its default, here and below."""
    return StageAConfig(
        levels=arguments["levels"],
        bottleneck_blocks=arguments["bottleneck_blocks"],
        hidden=arguments["embed_dim"],
        latent_channels=arguments["latent_channels"],
        codebook_size=arguments["num_vq_embeddings"],
        scale=arguments["scale_factor"],
    )


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


def stage_b_config(arguments: Mapping[str, Any]) -> StageBConfig:
    """The inverse of `decoder_config`."""
    return StageBConfig(
        latent_channels=arguments["c_in"],
        timestep_channels=arguments["c_r"],
        patch=arguments["patch_size"],
        cond_width=arguments["c_cond"],
        widths=arguments["c_hidden"],
        heads=tuple(max(heads, 0) for heads in arguments["nhead"]),
        blocks=arguments["blocks"],
        patterns=arguments["level_config"],
        inject_code=arguments["inject_effnet"],
        code_channels=arguments["effnet_embd"],
        text_width=arguments["clip_embd"],
        dropout=arguments["dropout"],
    )


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


def stage_c_config(arguments: Mapping[str, Any]) -> StageCConfig:
    """The inverse of `prior_config`."""
    return StageCConfig(
        latent_channels=arguments["c_in"],
        width=arguments["c"],
        text_width=arguments["c_cond"],
        timestep_channels=arguments["c_r"],
        depth=arguments["depth"],
        heads=arguments["nhead"],
        dropout=arguments["dropout"],
    )
