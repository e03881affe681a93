"""State dicts in files, safetensors or torch's, whatever model they are of; nothing in a file is ever executed."""

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.weight_files import SAFE, BadWeights

State = Mapping[str, Tensor]


def file_sha256(file: Path) -> str:
    """sha256 of a file's content in hex, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors or torch file, whatever model it is, memory-mapped where the format allows.

    Raises:
        BadWeights: it is truncated, of another format, or holds anything but tensors and plain values.
    """
    return {key: value for key, value in content(path).items() if isinstance(value, Tensor)}


def content(file: Path) -> dict[str, Any]:
    """All that stands in a file, values that are no tensors too; empty where it is no mapping.

    Raises:
        BadWeights: as `read`.
    """
    try:
        if file.suffix == SAFE:
            return dict(load_file(file))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what it cannot read, it refuses
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise BadWeights(
            f"{file} is truncated or holds more than tensors; nothing in it was executed: get it anew from its source"
        ) from error
    except Exception as error:  # damaged pickles raise anything; it costs no more than this file
        kind = file.suffix or "torch"
        raise BadWeights(f"{file} is truncated or no {kind} file: get it anew from its source") from error
    return found if isinstance(found, dict) else {}


def require_finite(tensors: State, source: object) -> None:
    """Raise BadWeights, naming the source and the first of its tensors that holds a NaN or an infinity."""
    for key, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise BadWeights(f"{source} is damaged: its {key} holds values that are no finite numbers")
