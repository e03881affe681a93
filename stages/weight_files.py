"""Files of existing weights: where those of a model lie, which model it is, and its sizes; without torch.

Names of tensors tell the model, shapes its sizes. The header of a safetensors file holds both, so that a plan can look
at gigabytes in milliseconds; `pretrained` reads the tensors themselves, of every format.
"""

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

from safetensors import SafetensorError, safe_open

from stages.settings.models import CompressorConfig, StageAConfig, StageBConfig, StageCConfig

Model = Literal["stage_a", "stage_b", "compressor", "stage_c", "imagenet"]
ModelConfig = StageAConfig | StageBConfig | CompressorConfig | StageCConfig
Shapes = Mapping[str, tuple[int, ...]]
V = TypeVar("V")

NAMES: dict[Model, str] = {
    "stage_a": "Stage A",
    "stage_b": "Stage B",
    "compressor": "the compressor",
    "stage_c": "Stage C",
    "imagenet": "an EfficientNetV2 classifier",
}
MARKS: dict[Model, tuple[str, str]] = {  # keys that no other model of these has, under dome272's names
    "stage_a": ("in_block.1.weight", "out_block.0.weight"),
    "stage_b": ("clip_mapper.weight", "clf.1.weight"),
    "compressor": ("backbone.0.0.weight", "mapper.0.weight"),
    "stage_c": ("projection.weight", "cond_mapper.0.weight"),
    "imagenet": ("features.0.0.weight", "classifier.1.weight"),
}
# Of another architecture, by names of which one of theirs ends in each
OTHERS = {
    "Stable Cascade's Stage B": ("effnet_mapper.0.weight", "pixels_mapper.0.weight"),
    "Stable Cascade's Stage C": ("clip_txt_pooled_mapper.weight", "clip_img_mapper.weight"),
}
NO_MODEL = "holds none of Stage A, B, C and the compressor, to go by its tensors' names"
WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")  # anywhere in a name
AVERAGED = re.compile(r"(^|_)(ema|averaged|swa|shadow)(_|$)", re.IGNORECASE)
DEEPEST = 5  # sections of a file that are looked into
SAFE = ".safetensors"
SUFFIXES = (SAFE, ".bin", ".pt", ".pth", ".ckpt")  # the better first
VARIANT = re.compile(r"(\.(?:fp16|bf16))?(?:-\d{5}-of-(\d{5}))?$")  # diffusers' ends of a file name before its suffix
BACKBONES = {780: "efficientnet_v2_s", 1546: "efficientnet_v2_l"}  # by number of tensors


class BadWeights(ValueError):
    """A file cannot be read, or holds another model than the one asked for."""


def section(model: Model) -> str:
    """The config's section of a model."""
    return "compressor" if model == "imagenet" else model


def places(path: Path) -> list[tuple[Path, ...]]:
    """The files of each model at a path: one, or all shards of one; of several variants the full and safe one. In a
    folder, those nearer to its top come first."""
    return [(path,)] if path.is_file() else sorted(_groups(path), key=lambda files: len(files[0].parts))


def _groups(folder: Path) -> Iterator[tuple[Path, ...]]:
    def base(file: Path) -> tuple[str, str]:
        return str(file.parent), VARIANT.sub("", file.stem, count=1)

    def rank(file: Path) -> tuple[bool, int]:
        ends = VARIANT.search(file.stem)
        return bool(ends and ends[1]), SUFFIXES.index(file.suffix)

    every = [file for depth in ("*", "*/*", "*/*/*") for file in folder.glob(depth) if file.suffix in SUFFIXES]
    visible = [file for file in every if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    for _, group in groupby(sorted(visible, key=lambda file: (base(file), rank(file), file.name)), key=base):
        variants = list(group)
        yield tuple(file for file in variants if rank(file) == rank(variants[0]))


def models_in(tensors: Mapping[str, V], deepest: int = DEEPEST) -> dict[Model, tuple[str, dict[str, V]]]:
    """The models among tensors, each with what stands before all of its names, and its tensors without that.

    Such are the entries of a file, and what DistributedDataParallel, Lightning and averages put there (`module.`,
    `model.`, `ema_model.`). Of two of a model, the moving average counts, as with the released Stage C; else the first.
    """
    names = {WRAPPERS.sub("", key): value for key, value in tensors.items()}
    if model := model_of(names):
        return {model: ("", {key: value for key, value in names.items() if "." in key})}  # not: n_averaged
    sections: dict[str, dict[str, V]] = {}
    for key, value in names.items():
        first, dot, rest = key.partition(".")
        if dot:
            sections.setdefault(first, {})[rest] = value
    found: dict[Model, tuple[str, dict[str, V]]] = {}
    for name in sorted(sections, key=lambda name: AVERAGED.search(name) is None) if deepest else ():
        for model, (before, inside) in models_in(sections[name], deepest - 1).items():
            found.setdefault(model, (f"{name}.{before}", inside))
    return found


def model_of(tensors: Mapping[str, object]) -> Model | None:
    """Which model has tensors of these names, if one of ours has."""
    if other_of(tensors):
        return None
    return next((model for model, marks in MARKS.items() if all(mark in tensors for mark in marks)), None)


def other_of(tensors: Mapping[str, object]) -> str | None:
    """Which known model of another architecture has tensors of these names, if one has."""
    for name, (first, second) in OTHERS.items():
        befores = (key.removesuffix(first) for key in tensors if key.endswith(first))
        if any(f"{before}{second}" in tensors for before in befores):
            return name
    return None


def other_sizes(model: Model, shapes: Shapes, config: ModelConfig) -> dict[str, Any]:
    """The settings in which a model is another than the configured one, as far as shapes tell."""
    try:
        sizes = _sizes(model, shapes)
    except (ValueError, IndexError, KeyError):  # they are of no such model
        return {}
    return {key: value for key, value in sizes.items() if getattr(config, key) != value}


def as_words(model: Model, sizes: Mapping[str, Any]) -> str:
    """Settings of a model as overrides."""
    return " ".join(
        f"{section(model)}.model.{key}={list(value) if isinstance(value, tuple) else value}"
        for key, value in sizes.items()
    )


def misfit(path: Path, models: Sequence[Model], config: ModelConfig) -> str | None:
    """Why weights at a path are those of none of these models as configured, as a sentence, as far as headers tell.

    Of files in other formats than safetensors no more is known before they are loaded than that they are whole.
    """
    if told := damage(path):
        return told
    every = places(path)
    found: dict[Model, tuple[Path, Shapes]] = {}
    foreign: str | None = None
    for files in every:
        shapes: Shapes = {key: shape for file in files if file.suffix == SAFE for key, shape in _header(file).items()}
        foreign = foreign or other_of(shapes)
        for model, (_, inside) in models_in(shapes).items():
            found.setdefault(model, (files[0], inside))
    for model in models:
        if model in found:
            file, own = found[model]
            others = as_words(model, other_sizes(model, own, config))
            return f"{file} is not {NAMES[model]} of this config; it is a model of {others}" if others else None
    if foreign:
        return f"{path} holds {foreign}, which is of another architecture: give Würstchen's"
    if any(files[0].suffix != SAFE for files in every):
        return None
    if not found:
        return f"{path} {NO_MODEL}"
    wanted = " or ".join(NAMES[model] for model in models)
    return f"{path} holds {', '.join(NAMES[model] for model in found)}, not {wanted}"


def damage(path: Path) -> str | None:
    """Why weights at a path are no weights at all, as a sentence, as far as the files' first and last bytes tell."""
    every = places(path)
    try:
        for file in chain.from_iterable(every):
            if file.suffix == SAFE:
                _header(file)
            else:
                _check_ends(file)
    except BadWeights as error:
        return str(error)
    return None if every else f"{path} holds no weights, which are files named *{', *'.join(SUFFIXES)}"


def _check_ends(file: Path) -> None:
    """Refuse what torch can never read: no zip with its directory at the end, and no pickle, as it once wrote them."""
    with file.open("rb") as opened:
        pickled = opened.read(1) == b"\x80"
    if not (pickled or zipfile.is_zipfile(file)):
        raise BadWeights(f"{file} is truncated or no {file.suffix or 'torch'} file: get it anew from its source")


def _header(file: Path) -> Shapes:
    """Shapes by name of a safetensors file's tensors, none of which is read."""
    try:
        with safe_open(file, framework="numpy") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadWeights(f"{file} is truncated or no {SAFE} file: get it anew from its source") from error


def _sizes(model: Model, shapes: Shapes) -> dict[str, Any]:
    """Settings that tensors' shapes tell, where the tensors are there."""
    sizes: dict[str, Any]
    if model == "stage_a":
        hidden, latents = shapes.get("up_blocks.0.0.weight", (0, 0))[:2]
        codes = shapes.get("vquantizer.codebook.weight", (0,))[0]
        sizes = {"hidden": hidden, "latent_channels": latents, "codebook_size": codes}
    elif model == "stage_b":
        cond, text = shapes["clip_mapper.weight"]
        widths = [_first(shapes, rf"down_blocks\.{level}\.\d+\.depthwise\.weight") for level in range(8)]
        code = _first(shapes, r"effnet_mappers\.\d+\.weight", 1)
        sizes = {"text_width": text, "cond_width": cond, "code_channels": code, "widths": tuple(filter(None, widths))}
    elif model == "stage_c":
        width, latents = shapes["projection.weight"][:2]
        depth = sum(key.endswith(".depthwise.weight") for key in shapes)
        text = shapes["cond_mapper.0.weight"][1]
        sizes = {"text_width": text, "width": width, "depth": depth, "latent_channels": latents}
    else:
        count = sum(key.startswith(("backbone.", "features.")) for key in shapes)
        sizes = {"backbone": BACKBONES.get(count), "latent_channels": shapes.get("mapper.0.weight", (0,))[0]}
        if model == "compressor" and "mapper.1.weight" not in shapes:
            sizes["batch_norm"] = "plain"
    return {key: value for key, value in sizes.items() if value}


def _first(shapes: Shapes, pattern: str, dimension: int = 0) -> int:
    return next((shape[dimension] for key, shape in shapes.items() if re.fullmatch(pattern, key)), 0)
