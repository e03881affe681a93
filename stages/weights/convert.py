"""State dicts and configs between dome272/Wuerstchen's names, which are ours, and diffusers' names.

The rules of diffusers' `scripts/convert_wuerstchen.py`, and their inverse: one pair of functions for the tensors
of Stage A, B and C, and one for their settings.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from stages.settings.models import StageAConfig, StageBConfig, StageCConfig

CODEBOOK = ("vquantizer.codebook.weight", "vquantizer.embedding.weight")
PACKED = re.compile(r"(.*\.attention)\.attn\.in_proj_(weight|bias)")
SPLIT = re.compile(r"(.*\.attention)\.to_([qkv])\.(weight|bias)")

C = TypeVar("C", StageAConfig, StageBConfig, StageCConfig)

# diffusers' arguments that shape a model, and the settings that they are
ARGUMENTS: Mapping[type, Mapping[str, str]] = {
    StageAConfig: {
        "levels": "levels",
        "bottleneck_blocks": "bottleneck_blocks",
        "embed_dim": "hidden",
        "latent_channels": "latent_channels",
        "num_vq_embeddings": "codebook_size",
        "scale_factor": "scale",
    },
    StageBConfig: {
        "c_in": "latent_channels",
        "c_out": "latent_channels",
        "c_r": "timestep_channels",
        "patch_size": "patch",
        "c_cond": "cond_width",
        "c_hidden": "widths",
        "nhead": "heads",
        "blocks": "blocks",
        "level_config": "patterns",
        "inject_effnet": "inject_code",
        "effnet_embd": "code_channels",
        "clip_embd": "text_width",
        "dropout": "dropout",
    },
    StageCConfig: {
        "c_in": "latent_channels",
        "c": "width",
        "c_cond": "text_width",
        "c_r": "timestep_channels",
        "depth": "depth",
        "nhead": "heads",
        "dropout": "dropout",
    },
}
WITHOUT_ATTENTION = -1  # diffusers' heads of such a level of Stage B; ours are 0


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


def arguments(config: StageAConfig | StageBConfig | StageCConfig) -> dict[str, Any]:
    """What makes diffusers' PaellaVQModel, WuerstchenDiffNeXt or WuerstchenPrior of the same shape, in JSON's types."""
    settings = config.model_dump(mode="json")
    if isinstance(config, StageBConfig):
        settings["heads"] = [heads or WITHOUT_ATTENTION for heads in config.heads]
    return {theirs: settings[ours] for theirs, ours in ARGUMENTS[type(config)].items()}


def config_of(kind: type[C], arguments: Mapping[str, Any]) -> C:
    """The inverse of `arguments`; what only a training reads keeps its default."""
    settings = {ours: arguments[theirs] for theirs, ours in ARGUMENTS[kind].items()}
    if kind is StageBConfig:
        settings["heads"] = [max(heads, 0) for heads in settings["heads"]]
    return kind(**settings)
