"""Whole CLIP models of open_clip: read from a file, and what they make of pictures and texts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from stages.models.text import Tokenizer
from stages.settings.base import Precision
from stages.state_dicts import read, require_finite
from stages.weight_files import BadWeights


def load(weights: Path, architecture: str) -> CLIP:
    """A CLIP from a file: safetensors or torch's, with the tensors' names of open_clip or of transformers.

    Raises:
        BadWeights: open_clip knows no such architecture, or the file is damaged or does not hold it.
    """
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise BadWeights(f"open_clip knows no model {architecture}")
    state = read(weights)
    require_finite(state, weights)
    with torch.device("meta"):  # the largest take minutes to make, so what the file holds is looked at first
        wanted = {name: tensor.shape for name, tensor in CLIP(**config).state_dict().items()}
    try:
        found = to_open_clip(state) if "visual_projection.weight" in state else state
    except (RuntimeError, KeyError) as error:
        raise BadWeights(f"{weights} does not hold the tensors of a CLIP {architecture}") from error
    if {name: tensor.shape for name, tensor in found.items()} != wanted:
        raise BadWeights(f"{weights} does not hold the tensors of a CLIP {architecture}")
    model = CLIP(**config)
    model.load_state_dict(found)
    return model


class Clip:
    """A CLIP with its own preprocessing: pictures and texts become embeddings of length 1, in float32.

    Args:
        model: any CLIP of open_clip; moved to `device`.
        device: torch device, such as "cpu" or "cuda".
        precision: of the two towers; normalisation, and whatever is made of the embeddings, is float32 in any case:
            scores lie near 21, where bfloat16 has steps of 0.125.
    """

    def __init__(self, model: CLIP, device: str = "cpu", precision: Precision = "fp32") -> None:
        self._model = model.float().to(device).eval()
        self._device = torch.device(device)
        self._half = precision == "bf16"
        # As CLIP's own processor does it: short side to the input size (bicubic), centre crop, normalise.
        self._preprocess = open_clip.image_transform(model.visual.image_size, is_train=False)
        # As transformers' processor does it, with which these models are published; open_clip's repairs texts first.
        self._tokenize = Tokenizer(model.context_length)
        self.width: int = model.visual.output_dim  # D
        self.scale = float(model.logit_scale.detach().exp())

    def pictures(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Embeddings fp32 (N, D) of pictures uint8 RGB (H, W, 3) each; sizes may differ; one forward pass."""
        inputs = torch.stack([self._preprocess(Image.fromarray(picture)) for picture in pictures])
        return self._embedded(self._model.encode_image, inputs)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings fp32 (N, D) of texts; what exceeds the context (77 tokens) is cut off."""
        return self._embedded(self._model.encode_text, self._tokenize(texts).ids)

    def is_truncated(self, text: str) -> bool:
        """Whether the model sees only the beginning of a text."""
        return self._tokenize([text]).truncated > 0

    @torch.inference_mode()
    def _embedded(self, tower: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        with (
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),  # TF32 would cut 13 bits off
            torch.autocast(self._device.type, torch.bfloat16, enabled=self._half),
        ):
            found = tower(inputs.to(self._device))
        return F.normalize(found.float(), dim=-1)


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a transformers `CLIPModel` the names and layout of open_clip's CLIP.

    open_clip stacks q, k and v in one matrix and keeps the two output projections transposed; the rest is
    names. Raises KeyError where k or v of a layer is missing.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith((".position_ids", *_STACKED_WITH_Q)):
            continue  # an index buffer of older versions; taken together with q
        if name.endswith((".q_proj.weight", ".q_proj.bias")):
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            renamed[_rename(name)] = torch.cat(parts)
        elif name in ("visual_projection.weight", "text_projection.weight"):
            renamed[_rename(name)] = tensor.T.contiguous()
        else:
            renamed[_rename(name)] = tensor
    return renamed


_STACKED_WITH_Q = (".k_proj.weight", ".k_proj.bias", ".v_proj.weight", ".v_proj.bias")

_NAMES = {  # part of a tensor's name in transformers -> in open_clip
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "vision_model.post_layernorm": "visual.ln_post",
    "self_attn.q_proj.": "attn.in_proj_",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _rename(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name
