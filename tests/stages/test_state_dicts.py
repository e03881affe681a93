"""State dicts as safetensors files in memory, the library's own bytes in half its memory; files larger than memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from stages.state_dicts import Serialized, read, serialized

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.float64,
    torch.int64,
)


def drawn(generator: np.random.Generator) -> dict[str, Tensor]:
    """A state dict of any dtypes, shapes and names."""
    names = ['a"quoted"\\name', "ä.weight", "tab\there", "x/y", "0", "", "Z", "\x7f\u2028"]
    tensors = {}
    for number in range(generator.integers(0, 12)):
        shape = generator.integers(0, 5, generator.integers(0, 4)).tolist()
        dtype = DTYPES[generator.integers(len(DTYPES))]
        tensors[f"{names[generator.integers(len(names))]}{number}"] = torch.randint(0, 2, shape).to(dtype)
    return tensors


@pytest.mark.parametrize("seed", range(40))
def test_the_bytes_are_those_of_safetensors(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tensors = drawn(generator)
    metadata = [None, {"checkpoint": json.dumps({"step": seed, "ä": '"'})}][seed % 2]
    ours = Serialized(tensors).fill(tensors, metadata)
    theirs = safetensors.torch.save(tensors, metadata)
    assert bytes(ours) == theirs
    assert len(ours) == len(theirs)
    assert bytes(ours) == theirs  # again: what is tried again is written from its beginning


def test_what_does_not_lie_in_one_piece_is_laid_out() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "turned": whole.mT,
        "rows": whole[1:3],
        "image": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    theirs = safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()})
    assert bytes(serialized(tensors)) == theirs


def test_the_same_memory_is_filled_again() -> None:
    first, second = ({"a": torch.full((3, 3), value)} for value in (1.0, 2.0))
    place = Serialized(first)
    one, other = (bytes(place.fill(state, {"step": str(step)})) for step, state in ((1, first), (10, second)))
    assert one == safetensors.torch.save(first, {"step": "1"})
    assert other == safetensors.torch.save(second, {"step": "10"})


def test_no_piece_is_large() -> None:
    pieces = [len(piece) for piece in serialized({"a": torch.zeros(5, 1 << 20), "b": torch.zeros(0)})]
    assert max(pieces) == 8 << 20  # other threads go on after each
    assert sum(pieces[1:]) == 20 << 20


MEMORY = """
import hashlib, resource, sys, tempfile, torch
from stages.state_dicts import Serialized
from datasets.files import storage

state = {str(number): torch.full((1 << 20,), float(number)) for number in range(64)}  # 256 MiB
place = Serialized(state)
place.fill(state)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with tempfile.TemporaryDirectory() as folder:
    storage.publish(place.fill(state), f"{folder}/state.safetensors")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_saving_takes_no_memory_beside_the_copy() -> None:
    grown = int(subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True).stdout)
    assert grown < 40  # MiB, of a state of 256


def test_tensors_of_a_large_file_are_not_read_before_they_are_used(tmp_path: Path) -> None:
    """A file of holes, 8 GB by its header: whoever reads it whole runs out of memory or time."""
    size = 2 * 10**9
    entry = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
    header = json.dumps({"projection.weight": entry}).encode()
    with (tmp_path / "large.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + 4 * size)
    assert read(tmp_path / "large.safetensors")["projection.weight"].shape == (size,)
