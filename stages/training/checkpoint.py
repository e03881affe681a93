"""One training state as safetensors files: weights, optimiser moments, moving average, step.

So loading runs no code, and the same state always gives the same bytes. Each rank of a training writes a part, some of
the rows; any number of ranks can read them again. Everything else about a training is a pure function of the step (see
`stages.training.loop`), hence no random state is kept.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from stages.state_dicts import Serialized
from stages.training.optimizer import ADAMW, MUON, Optimizer

_MOMENTS = (*ADAMW, *MUON, "step")  # what the optimiser may keep of a parameter, in the order of a file


class CheckpointMismatch(ValueError):
    """The bytes are no checkpoint of this training: damaged, or of another model or recipe."""


@dataclass(frozen=True)
class Rows:
    """Which rows of a whole tensor (its first dimension) a part of it holds."""

    start: int
    total: int


@dataclass(frozen=True)
class Best:
    """The step after which the weights had the least validation loss so far."""

    step: int
    loss: float


@dataclass(frozen=True)
class Checkpoint:
    """A training after `step` steps, or a part of it.

    `recipe` says which training this is, as flat JSON values by name; `tensors` are named `model.<key>`,
    `optimizer.<parameter>.<moment>` and, where a moving average is kept, `average.<key>`; those in `rows` are a part.
    `notes` are further JSON values that the training goes on from.
    """

    step: int
    recipe: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    rows: Mapping[str, Rows] = field(default_factory=dict)
    notes: Mapping[str, object] = field(default_factory=dict)
    best: Best | None = None  # None: never validated


def dump(checkpoint: Checkpoint, place: Serialized | None = None) -> Serialized:
    """Return a copy of the checkpoint as a safetensors file, equal bytes for equal states.

    place: where to put it; what it held, an earlier state of the same training, is overwritten.
    """
    # A single metadata entry: the order of several is not fixed by the format's writer.
    rows = {key: [part.start, part.total] for key, part in checkpoint.rows.items()}
    about = {"step": checkpoint.step, "recipe": checkpoint.recipe, "rows": rows, "notes": checkpoint.notes}
    if checkpoint.best:
        about["best"] = vars(checkpoint.best)
    metadata = {"checkpoint": json.dumps(about, sort_keys=True)}
    return (place or Serialized(checkpoint.tensors)).fill(checkpoint.tensors, metadata)


def load(data: bytes) -> Checkpoint:
    """Read the bytes that `dump` made; tensors lie on the CPU. Raises `CheckpointMismatch` for any others."""
    try:
        tensors = safetensors.torch.load(data)
        about = _about(data)
    except (SafetensorError, KeyError) as error:
        raise CheckpointMismatch(f"the checkpoint cannot be read ({error}): remove it to start again") from error
    rows = {key: Rows(*part) for key, part in about["rows"].items()}
    return Checkpoint(about["step"], about["recipe"], tensors, rows, about["notes"], _best(about))


def best(data: bytes) -> Best | None:
    """The best step that a checkpoint tells of, of which the header is enough."""
    return _best(_about(data))


def _about(data: bytes) -> dict[str, Any]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about: dict[str, Any] = json.loads(header["__metadata__"]["checkpoint"])
    return about


def _best(about: dict[str, Any]) -> Best | None:
    return Best(**about["best"]) if "best" in about else None


def final_weights(parts: Iterable[Checkpoint]) -> dict[str, Tensor]:
    """Whole weights and buffers by name, as the training would give them if it ended here, from all parts of a state.

    They are the moving average where the state has one.
    """
    pieces: defaultdict[str, list[Tensor]] = defaultdict(list)
    for number, part in enumerate(parts):  # which come in the order of their rows
        kind = "average." if any(key.startswith("average.") for key in part.tensors) else "model."
        for key, tensor in part.tensors.items():
            if key.startswith(kind) and (number == 0 or key in part.rows):
                pieces[key.removeprefix(kind)].append(tensor)
    return {key: torch.cat(found) if len(found) > 1 else found[0] for key, found in pieces.items()}


def require_recipe(saved: Mapping[str, object], recipe: Mapping[str, object]) -> None:
    """Raise `CheckpointMismatch`, naming the first entry that differs, unless the recipes are equal."""
    for key in sorted(saved.keys() | recipe.keys()):
        was, now = saved.get(key), recipe.get(key)
        if was != now:
            raise CheckpointMismatch(f"the checkpoint was trained with {key} = {was}, this training has {now}")


@dataclass(frozen=True)
class State:
    """The live tensors of a training, as far as this rank keeps them: by name, and which rows those are."""

    model: Mapping[str, Tensor]
    trained: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    average: Mapping[str, Tensor] | None
    rows: Mapping[str, Rows] = field(default_factory=dict)  # of parameters in `model` and `average`; none = whole

    def snapshot(self) -> dict[str, Tensor]:
        """Name every tensor that a training must remember; they are references, not copies."""
        tensors = {f"model.{key}": value for key, value in self.model.items()}
        for name, parameter in self.trained.items():
            moments = self.optimizer.state.get(parameter)
            assert moments, f"{name} requires a gradient but has never had one"
            kept = {moment: moments[moment] for moment in _MOMENTS if moment in moments}
            tensors |= {f"optimizer.{name}.{moment}": value for moment, value in kept.items()}
        return tensors | {f"average.{key}": value for key, value in (self.average or {}).items()}

    def parts(self) -> dict[str, Rows]:
        """Rows of those tensors of `snapshot` that are a part."""
        found = {f"model.{key}": part for key, part in self.rows.items()}
        found |= {f"average.{key}": part for key, part in self.rows.items() if self.average}
        for key in self.rows.keys() & self.trained:
            moments = self.optimizer.state[self.trained[key]].keys() & {*ADAMW, *MUON}
            found |= {f"optimizer.{key}.{moment}": self.rows[key] for moment in moments}
        return found

    def share(self, number: int, of: int) -> tuple[dict[str, Tensor], dict[str, Rows]]:
        """What one of several ranks that keep the same is to save: its share of all rows, and which these are.

        What is no parameter may differ from rank to rank, and is in all shares.
        """
        tensors, rows = self.snapshot(), {}
        for key, part in self.parts().items():
            held = len(tensors[key])
            start, stop = (min(place * -(-held // of), held) for place in (number, number + 1))
            tensors[key], rows[key] = tensors[key][start:stop], Rows(part.start + start, part.total)
        return tensors, rows

    def restore(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Put what `snapshot` named back in place, from all parts of a checkpoint, whatever rows each has.

        Raises `CheckpointMismatch`, naming the first tensor that is missing, unknown or of another shape or dtype;
        nothing can be trained from what is in place then.
        """
        for parameter in self.trained.values():
            self.optimizer.begin(parameter)
        targets, mine = self.snapshot(), self.parts()
        missing = {key: len(tensor) if tensor.dim() else 0 for key, tensor in targets.items()}
        for number, checkpoint in enumerate(checkpoints):
            _require_layout(checkpoint, targets, mine)
            for key, found in checkpoint.tensors.items():
                if number == 0 or key in checkpoint.rows:  # what is not spread is the first rank's, as in a training
                    missing[key] -= _copy_rows(found, checkpoint.rows.get(key), targets[key], mine.get(key))
        assert all(rows <= 0 for rows in missing.values()), "a part of the checkpoint is missing"


def _copy_rows(found: Tensor, there: Rows | None, target: Tensor, here: Rows | None) -> int:
    """Copy the rows that both have; returns how many."""
    if target.dim() == 0:
        target.copy_(found)
        return 0
    first, start = (here.start if here else 0), (there.start if there else 0)
    low, high = max(first, start), min(first + len(target), start + len(found))
    if low < high:
        target[low - first : high - first].copy_(found[low - start : high - start])
    return max(0, high - low)


def _require_layout(checkpoint: Checkpoint, targets: Mapping[str, Tensor], mine: Mapping[str, Rows]) -> None:
    for key in sorted(checkpoint.tensors.keys() | targets.keys()):
        if key not in checkpoint.tensors:
            raise CheckpointMismatch(f"the checkpoint lacks {key}, which this model has")
        if key not in targets:
            raise CheckpointMismatch(f"the checkpoint holds {key}, which this model has not")
        found, target = checkpoint.tensors[key], targets[key]
        was, now = _whole_shape(found, checkpoint.rows.get(key)), _whole_shape(target, mine.get(key))
        if (was, found.dtype) != (now, target.dtype):
            raise CheckpointMismatch(
                f"{key} is {was} {found.dtype} in the checkpoint, but {now} {target.dtype} in this model"
            )


def _whole_shape(tensor: Tensor, part: Rows | None) -> list[int]:
    return [part.total, *tensor.shape[1:]] if part else list(tensor.shape)
