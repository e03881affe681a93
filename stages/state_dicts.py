"""State dicts in files, safetensors or torch's, whatever model they are of; nothing in a file is ever executed."""

import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.weight_files import SAFE, BadWeights

State = Mapping[str, Tensor]

_PIECE = 8 << 20  # bytes
_NAMES = {  # of the format, in the order in which files hold them, the last first
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}


class Serialized:
    """A state dict as a safetensors file in memory: byte for byte what `safetensors.torch.save` makes of it.

    That holds the interpreter meanwhile, and takes the memory twice. Here tensors are copied to their places in the
    file, and the file is gone through in pieces, any number of times.

    layout: tensors of the shapes and dtypes that are to be held. pinned: whether the memory is page-locked, so that a
    GPU copies to it at full speed.
    """

    def __init__(self, layout: State, pinned: bool = False) -> None:
        order = [*_NAMES]
        self._header: dict[str, object] = {}
        ends, end = {}, 0
        for key in sorted(layout, key=lambda key: (-order.index(layout[key].dtype), key)):
            start, end = end, end + layout[key].nbytes
            ends[key] = slice(start, end)
            shape = list(layout[key].shape)
            self._header[key] = {"dtype": _NAMES[layout[key].dtype], "shape": shape, "data_offsets": [start, end]}
        self._body = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        self._places = {
            key: self._body[place].view(layout[key].dtype).view(layout[key].shape) for key, place in ends.items()
        }
        self.header = b""
        """The bytes that come before those of the tensors, once they are filled in."""

    def fill(self, tensors: State, metadata: Mapping[str, str] | None = None) -> "Serialized":
        """Copy tensors in, those of a GPU all at once; returns itself.

        metadata: one entry at most: the order of several is not fixed by the format's writer.
        """
        assert tensors.keys() == self._places.keys()
        assert len(metadata or {}) <= 1
        for key, place in self._places.items():
            place.copy_(tensors[key].detach(), non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        header = ({"__metadata__": metadata} if metadata is not None else {}) | self._header
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        return self

    def __len__(self) -> int:
        return len(self.header) + len(self._body)

    def __iter__(self) -> Iterator[memoryview]:
        yield memoryview(self.header)
        for piece in self._body.split(_PIECE) if len(self._body) else ():
            yield memoryview(piece.numpy())

    def __bytes__(self) -> bytes:
        return b"".join(self)


def serialized(tensors: State) -> Serialized:
    """A state dict as a safetensors file in memory."""
    return Serialized(tensors).fill(tensors)


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
