"""One training state as one byte string: weights, optimiser moments, moving average, step.

The bytes are a safetensors file, so loading runs no code, and the same state always gives the same bytes.
Everything else about a training is a pure function of the step (see `stages.loop`), hence no random state is
kept.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what torch's AdamW keeps for one parameter


class CheckpointMismatch(ValueError):
    """The bytes are no checkpoint of this training: damaged, or of another model or recipe."""


@dataclass(frozen=True)
class Checkpoint:
    """A training after `step` steps.

    `recipe` says which training this is, as flat JSON values by name; `tensors` are named `model.<key>`,
    `optimizer.<parameter>.<moment>` and, where a moving average is kept, `average.<key>`.
    """

    step: int
    recipe: Mapping[str, object]
    tensors: Mapping[str, Tensor]


def dump(checkpoint: Checkpoint) -> bytes:
    """Return the checkpoint as a safetensors byte string, equal bytes for equal states."""
    # A single metadata entry: the order of several is not fixed by the format's writer.
    about = json.dumps({"step": checkpoint.step, "recipe": checkpoint.recipe}, sort_keys=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in checkpoint.tensors.items()}
    return safetensors.torch.save(tensors, metadata={"checkpoint": about})


def load(data: bytes) -> Checkpoint:
    """Read what `dump` wrote; tensors lie on the CPU. Raises `CheckpointMismatch` for any other bytes."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"]["checkpoint"])
    except (SafetensorError, KeyError) as error:
        raise CheckpointMismatch(f"the checkpoint cannot be read ({error}): remove it to start again") from error
    return Checkpoint(about["step"], about["recipe"], tensors)


def require_recipe(checkpoint: Checkpoint, recipe: Mapping[str, object]) -> None:
    """Raise `CheckpointMismatch`, naming the first entry that differs, unless the recipes are equal."""
    for key in sorted(checkpoint.recipe.keys() | recipe.keys()):
        was, now = checkpoint.recipe.get(key), recipe.get(key)
        if was != now:
            raise CheckpointMismatch(f"the checkpoint was trained with {key} = {was}, this training has {now}")


def snapshot(model: nn.Module, optimizer: torch.optim.AdamW, average: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Name every tensor that a training must remember; they are references, not copies."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for name, parameter in _trained(model):
        moments = optimizer.state[parameter]
        assert moments, f"{name} requires a gradient but has never had one"
        tensors |= {f"optimizer.{name}.{moment}": moments[moment] for moment in _MOMENTS}
    return tensors | {f"average.{key}": value for key, value in (average or {}).items()}


def restore(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    average: Mapping[str, Tensor] | None,
) -> None:
    """Put what `snapshot` named back in place.

    Raises `CheckpointMismatch`, before anything is changed, naming the first tensor that is missing, unknown
    or of another shape or dtype.
    """
    _require_layout(tensors, _layout(model, average))
    for key, value in model.state_dict().items():
        value.copy_(tensors[f"model.{key}"])
    for name, parameter in _trained(model):
        optimizer.state[parameter] = {
            moment: tensors[f"optimizer.{name}.{moment}"].to(parameter.device, copy=True) for moment in _MOMENTS
        }
    for key, value in (average or {}).items():
        value.copy_(tensors[f"average.{key}"])


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _layout(model: nn.Module, average: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Tensors (of which only shape and dtype count) that a checkpoint of this training holds."""
    expected = {f"model.{key}": value for key, value in model.state_dict().items()}
    for name, parameter in _trained(model):
        expected |= {f"optimizer.{name}.{moment}": parameter for moment in ("exp_avg", "exp_avg_sq")}
        expected[f"optimizer.{name}.step"] = torch.empty((), dtype=torch.float32)
    return expected | {f"average.{key}": value for key, value in (average or {}).items()}


def _require_layout(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for key in sorted(found.keys() | expected.keys()):
        if key not in found:
            raise CheckpointMismatch(f"the checkpoint lacks {key}, which this model has")
        if key not in expected:
            raise CheckpointMismatch(f"the checkpoint holds {key}, which this model has not")
        was, now = found[key], expected[key]
        if (was.shape, was.dtype) != (now.shape, now.dtype):
            raise CheckpointMismatch(
                f"{key} is {list(was.shape)} {was.dtype} in the checkpoint, "
                f"but {list(now.shape)} {now.dtype} in this model"
            )
