"""Captioners: pictures become captions.

Whatever has `Captioner`'s one method can write captions of pictures. The only one so far takes image-to-text models as
`transformers` has them, from a local folder, without any code of the model's own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from datasets.caption_settings import CaptionerConfig
from pipeline.models import loading
from stages.weight_files import BadWeights

AS_IT_LIES = {"local_files_only": True, "trust_remote_code": False}


class Captioner(Protocol):
    """Writes captions of pictures."""

    def captions(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """A caption of each picture, uint8 (H, W, 3), RGB; blank where it has nothing to say."""


def load(config: CaptionerConfig, where: torch.device, key: str) -> Captioner:
    """The captioner of a config on a device.

    Raises:
        BadWeights: the folder has no image-to-text model that we can run; names `key`.
    """
    import transformers

    kind = torch.bfloat16 if config.precision == "bf16" else torch.float32
    with _opened(config, key) as folder:
        processor = transformers.AutoProcessor.from_pretrained(folder, **AS_IT_LIES)
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, use_safetensors=True, dtype=kind, **AS_IT_LIES
        )
    return _ImageToText(processor, model.to(where).eval(), config, where, kind)


def check(config: CaptionerConfig, key: str) -> None:
    """Refuse a folder of another kind of model; its weights, which may not fit into this machine, are not read.

    Raises:
        BadWeights: as `load`.
    """
    import transformers

    with _opened(config, key) as folder, torch.device("meta"):
        transformers.AutoProcessor.from_pretrained(folder, **AS_IT_LIES)
        described = transformers.AutoConfig.from_pretrained(folder, **AS_IT_LIES)
        transformers.AutoModelForImageTextToText.from_config(described)


@contextmanager
def _opened(config: CaptionerConfig, key: str) -> Iterator[str]:
    """The folder of a captioner; what transformers says of it in there becomes a sentence of ours."""
    try:
        yield str(loading.local(config.weights))
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadWeights(
            f"{key}.weights: {config.weights} is no image-to-text model in transformers' layout ({reason}); give a "
            "local folder with config.json, safetensors, tokenizer and image processor"
        ) from error


class _ImageToText:
    """An image-to-text model, decoded greedily: the same pictures give the same captions on a machine."""

    def __init__(self, processor: Any, model: Any, config: CaptionerConfig, where: torch.device, kind: torch.dtype):
        self._processor, self._model, self._config = processor, model, config
        self._where, self._kind = where, kind

    def captions(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """As of `Captioner`."""
        if not pictures:
            return []
        prompt = self._config.prompt
        asked = {"text": [prompt] * len(pictures)} if prompt else {}
        inputs = self._processor(images=list(pictures), return_tensors="pt", padding=True, **asked)
        inputs = inputs.to(self._where, self._kind)
        asked_of = self._words(inputs["input_ids"]) if prompt else [""] * len(pictures)
        with torch.inference_mode():
            tokens = self._model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=self._config.max_tokens
            )
        return [text.removeprefix(words) for text, words in zip(self._words(tokens), asked_of, strict=True)]

    def _words(self, tokens: Any) -> list[str]:
        return [text.strip() for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]
