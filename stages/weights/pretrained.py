"""Existing weights of Stage A, B, C and the compressor: who wrote them, which model they are, whether it is ours.

    a file     safetensors or torch's format: a state dict, or entries that hold some, at any depth: dome272's
               (`state_dict`, `ema_state_dict`, `effnet_state_dict`), `model`, `ema`, Lightning's
    a folder   such files in it or up to two folders below: diffusers' models and pipelines, sharded ones too, our
               artifacts and releases

Which model it is, the keys tell. Tensors stay on the disk (memory-mapped) until they are used. Nothing in a file is
ever executed: it is safetensors, or it is read with `weights_only=True`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.models.geometry import CODE_SCALE, CODE_SHIFT
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.settings.models import CompressorConfig, StageAConfig, StageBConfig, StageCConfig
from stages.state_dicts import content, file_sha256, require_finite
from stages.weight_files import (
    DEEPEST,
    NAMES,
    NO_MODEL,
    VARIANT,
    BadWeights,
    Model,
    ModelConfig,
    as_words,
    models_in,
    other_of,
    other_sizes,
    places,
    section,
)
from stages.weights import convert

State = Mapping[str, Tensor]

ENTRIES = ("ema_state_dict", "state_dict", "effnet_state_dict")  # dome272's
GAMMA, BETA = "mapper.1.weight", "mapper.1.bias"  # of the compressor's last BatchNorm
UNSEEN = {"dropout", "codebook_init", "code_mapper_std"}  # settings of training alone
ASSUMED: dict[Model, tuple[str, ...]] = {  # no shape shows them
    "stage_a": ("scale",),
    "stage_b": ("heads",),
    "stage_c": ("heads", "scaled_codes"),
    "compressor": ("input_ratio", "resize"),
}


class OtherModel(BadWeights):
    """A file can be read, but holds none of our models."""


@dataclass(frozen=True)
class Found:
    """One model's weights: `tensors` as they stand in `files`, `settings` as the config beside them states them."""

    model: Model
    layout: str
    files: tuple[Path, ...]
    tensors: State = field(repr=False)
    settings: Mapping[str, Any] = field(repr=False)

    @property
    def section(self) -> str:
        """The config's section of this model."""
        return section(self.model)

    @property
    def assumed(self) -> tuple[str, ...]:
        """Settings that neither tensors nor a config beside them tell, so that the run's own are taken."""
        return () if self.settings else ASSUMED.get(self.model, ())

    def state(self) -> dict[str, Tensor]:
        """State dict under our names, which are dome272's."""
        return _ours(self.tensors, self.files[0])

    def sha256(self) -> dict[str, str]:
        """sha256 of each file, in hex, by its name; reads them whole."""
        return {file.name: file_sha256(file) for file in self.files}


def find(path: Path) -> dict[Model, Found]:
    """Every model that a file or folder holds; of two in a folder, the one nearer to its top.

    Raises:
        BadWeights: there is none, a file cannot be read, or two files of one depth hold the same model.
    """
    found, skipped = look(path)
    for error in skipped:
        if not isinstance(error, OtherModel):
            raise error
    return found


def look(path: Path) -> tuple[dict[Model, Found], list[BadWeights]]:
    """As `find`, but files that cannot be read are passed over like those of other models; also what was said of them.

    Raises:
        BadWeights: no file holds one of our models, or two files of one depth hold the same one.
    """
    if not path.exists():
        raise BadWeights(f"there is nothing at {path}")
    every = places(path)
    found: dict[Model, Found] = {}
    skipped: list[BadWeights] = []
    for _, level in groupby(every, key=lambda files: len(files[0].parts)):
        here: dict[Model, Found] = {}
        for files in level:
            try:
                models = _models(files)
            except BadWeights as error:
                skipped.append(error)
                continue
            for item in models:
                if item.model in here and item.model not in found:
                    both = " and ".join(str(other.files[0].relative_to(path)) for other in (here[item.model], item))
                    raise BadWeights(f"{path} holds {NAMES[item.model]} twice, as {both}; name one of them")
                here[item.model] = item
        found = {**here, **found}
    if found:
        return found, skipped
    if len(every) == 1:
        raise skipped[0]
    if all(isinstance(error, OtherModel) for error in skipped):
        raise OtherModel(f"{path} {NO_MODEL}")
    raise BadWeights(f"{path} {NO_MODEL}: {'; '.join(map(str, skipped[:3]))}{'; ...' * (len(skipped) > 3)}")


def _models(files: tuple[Path, ...]) -> list[Found]:
    """The models in one file, or in the shards of one.

    Raises:
        OtherModel: there are none.
        BadWeights: a file cannot be read, or a shard is missing.
    """
    ends = VARIANT.search(files[0].stem)
    wanted = int(ends[2]) if ends and ends[2] else 1
    if len(files) != wanted:
        name = VARIANT.sub("", files[0].stem, count=1)
        raise BadWeights(f"{files[0].parent} has {len(files)} of the {wanted} shards of {name}")
    entries: dict[str, Any] = {}
    for file in files:
        entries |= content(file)
    settings = _settings(files[0])
    tensors = dict(_tensors(entries))
    found = [
        Found(model, _layout(before, inside, settings), files, inside, _of_model(settings, model))
        for model, (before, inside) in models_in(tensors).items()
    ]
    if not found:
        other = other_of(tensors)
        told = f"holds {other}, which is of another architecture: give Würstchen's" if other else NO_MODEL
        raise OtherModel(f"{files[0]} {told}")
    return found


def _tensors(entries: Mapping[str, Any], before: str = "", deepest: int = DEEPEST) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file by their names, those of entries in entries too."""
    for key, value in entries.items():
        if isinstance(value, Tensor):
            yield f"{before}{key}", value
        elif isinstance(value, dict) and deepest:
            yield from _tensors(value, f"{before}{key}.", deepest - 1)


def _layout(before: str, tensors: State, settings: Mapping[str, Any]) -> str:
    if before.rstrip(".") in ENTRIES:
        return f"dome272 {before.rstrip('.')}"
    renamed = any(".attention.to_" in key or key.startswith("vquantizer.embedding") for key in tensors)
    names = "diffusers" if renamed or "_class_name" in settings else "dome272 names"
    return f"{names} below {before.rstrip('.')}" if before else names


def _settings(file: Path) -> dict[str, Any]:
    """What the folder's config.json (diffusers, our compressor) or manifest.json (our artifacts) says of its model."""
    for name in ("config.json", "manifest.json"):
        beside = file.with_name(name)
        if beside.is_file():
            try:
                stated = json.loads(beside.read_text("utf-8"))
            except (ValueError, RecursionError) as error:
                raise BadWeights(f"{beside} is not readable as JSON ({error})") from error
            return dict(stated) if isinstance(stated, dict) else {}
    return {}


def _of_model(settings: Mapping[str, Any], model: Model) -> Mapping[str, Any]:
    """Of an artifact's manifest, the model's own part; a config.json is all its model's."""
    tree = settings.get("settings")
    if not isinstance(tree, dict):
        return settings
    section = tree.get(f"{model}.model") or tree.get(model, {}).get("model")
    return section or {}


# ------------------------------------------------------------------------------------------------ does it fit


def require_fit(found: Found, config: ModelConfig) -> None:
    """Raise BadWeights, naming the first difference, unless these are weights of the configured model."""
    given = _ours({key: value.to("meta") for key, value in found.tensors.items()}, found.files[0])
    if found.model == "imagenet":
        given = {key: value for key, value in given.items() if key.startswith("features.")}
    expected = _expected(found.model, config)
    difference = (
        _first_difference(given, expected) or _stated_difference(found, config) or _shifted_code(found.tensors, config)
    )
    if any(value.layout != torch.strided for value in given.values()):
        difference = "it holds sparse tensors"
    if difference:
        sizes = other_sizes(found.model, {key: tuple(value.shape) for key, value in given.items()}, config)
        fits = sizes and _fits(found, given, config, sizes)
        hint = f"; it is a model of {as_words(found.model, sizes)}" if fits else ""
        raise BadWeights(f"{found.files[0]} is not {NAMES[found.model]} of this config: {difference}{hint}")


def _fits(found: Found, given: State, config: ModelConfig, sizes: Mapping[str, Any]) -> bool:
    """Whether these are weights of the configured model in other sizes."""
    try:
        other = type(config).model_validate(config.model_dump() | dict(sizes))
    except ValueError:  # sizes that no model has
        return False
    return _first_difference(given, _expected(found.model, other)) is None


def _expected(model: Model, config: ModelConfig) -> State:
    """What weights of the configured model have, without memory for them; ImageNet's have the backbone's."""
    blank = _blank(config)
    if model != "imagenet":
        return blank.state_dict()
    return {f"features.{key}": value for key, value in blank.get_submodule("backbone").state_dict().items()}


def fill(module: nn.Module, found: Found, config: ModelConfig) -> None:
    """Put weights into a module of the configured model; ImageNet's go into the compressor's backbone.

    Raises:
        BadWeights: they are another model's, or not all finite.
    """
    require_fit(found, config)
    require_finite(found.tensors, found.files[0])
    if found.model == "imagenet":
        module.load_imagenet(dict(found.tensors))  # type: ignore[operator]
    else:
        module.load_state_dict(found.state())


def _ours(tensors: State, file: Path) -> dict[str, Tensor]:
    try:
        return convert.from_diffusers(dict(tensors))
    except KeyError as error:
        raise BadWeights(f"{file} lacks {error.args[0]}") from error


def _blank(config: ModelConfig) -> nn.Module:
    """The configured model without memory for its weights."""
    with torch.device("meta"):
        match config:
            case StageAConfig():
                return StageA(config)
            case StageBConfig():
                return StageB(config)
            case StageCConfig():
                return StageC(config)
            case CompressorConfig():
                from stages.models.compressor import Compressor  # imports torchvision, which takes seconds

                return Compressor(config)


def _first_difference(given: State, expected: State) -> str | None:
    for key, value in expected.items():
        if key not in given:
            return f"it has no {key}"
        there, here = given[key], value
        if there.shape != here.shape:
            return f"its {key} is {list(there.shape)}, not {list(here.shape)}"
        if there.is_floating_point() != here.is_floating_point():
            return f"its {key} is {there.dtype}, not {here.dtype}"
    extra = next((key for key in given if key not in expected), None)
    return f"it has {extra}, which the configured model has not" if extra else None


def _shifted_code(tensors: State, config: ModelConfig) -> str | None:
    """That the last BatchNorm's values say otherwise than `batch_norm` whether they are fixed: Stage B's noise on the
    code is by that."""
    gamma, beta = tensors.get(GAMMA), tensors.get(BETA)
    if not isinstance(config, CompressorConfig) or gamma is None or beta is None or gamma.is_meta:
        return None
    fixed = bool((gamma == CODE_SCALE).all()) and bool((beta == -CODE_SHIFT).all())
    if fixed == (config.batch_norm == "fixed"):
        return None
    fits = "fixed" if fixed else "affine"
    return f"its {GAMMA} and {BETA} are {'all' if fixed else 'not all'} {CODE_SCALE:g} and {-CODE_SHIFT:g}, as of " + (
        f"compressor.model.batch_norm={fits}"
    )


def _stated_difference(found: Found, config: ModelConfig) -> str | None:
    """The first setting that its own config states otherwise: heads and scales, for one, show in no tensor's shape."""
    match config:
        case _ if "_class_name" not in found.settings:
            ours = config.model_dump(mode="json")
        case StageAConfig() | StageBConfig() | StageCConfig():
            ours = convert.arguments(config)
        case _:
            ours = {}
    for key, value in ours.items():
        stated = found.settings.get(key, value)
        if key not in UNSEEN and stated != value:
            return f"the config beside it has {key} {stated}, not {value}"
    return None


def torchvision_url(name: str) -> str:
    """The address of an entry of torchvision's list of weights, such as `VGG16_Weights.IMAGENET1K_V1`."""
    from torchvision.models import get_weight

    url: str = get_weight(name).url
    return url
