"""From artifacts to models in memory: what trainings, encoders, sampling and export share.

The compressor (torchvision) and the text towers (open_clip) are imported where they are made: these libraries take
seconds to load, and most workers need neither.
"""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from datasets.files import storage
from pipeline.errors import UsageError
from pipeline.settings.config import Config
from pipeline.settings.sections import STAGES, Sampling, Stage
from pipeline.store.artifacts import Artifact
from stages.models.baseline import Baseline
from stages.models.previewer import Previewer
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.sampling.sample import Models
from stages.settings.losses import StageALoss
from stages.settings.models import (
    BaselineConfig,
    ClipTextConfig,
    CompressorConfig,
    PreviewerConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
    TextConfig,
)
from stages.state_dicts import Serialized, read, serialized
from stages.weight_files import BadWeights, places
from stages.weights import pretrained
from stages.weights.pretrained import Found, Model

if TYPE_CHECKING:
    from stages.models.compressor import Compressor
    from stages.models.text import TextTower
    from stages.training.perceptual import Perceptual

M = TypeVar("M", bound=nn.Module)
TOWER, NULL_TEXT = "tower.safetensors", "null_text.safetensors"
PUBLIC_COMPRESSOR = "the public one is in dome272's file of Stage B (`weights get stage_b`), diffusers' have none"
STAGE_A, COMPRESSOR = "stage_a.safetensors", "compressor.safetensors"


def device(kind: str) -> torch.device:
    """A torch device; on a CPU one thread, so that a picture never depends on the number of cores."""
    if kind == "cpu":
        torch.set_num_threads(1)
    return torch.device(kind)


def weights(module: nn.Module) -> Serialized:
    """A module's parameters and buffers as a safetensors file, in memory."""
    return serialized(module.state_dict())


def _filled(module: M, artifact: Artifact, name: str) -> M:
    module.load_state_dict(safetensors.torch.load(artifact.read(name)))
    return module.eval().requires_grad_(False)


def stage_a(config: StageAConfig, artifact: Artifact) -> StageA:
    """Stage A with its trained weights, in evaluation mode."""
    return _filled(StageA(config), artifact, STAGE_A)


def compressor(config: CompressorConfig, artifact: Artifact) -> "Compressor":
    """The compressor as it was trained with Stage B."""
    from stages.models.compressor import Compressor

    return _filled(Compressor(config), artifact, COMPRESSOR)


def stage_b(config: StageBConfig, artifact: Artifact) -> StageB:
    """Stage B with its trained weights."""
    return _filled(StageB(config), artifact, "stage_b.safetensors")


def stage_c(config: StageCConfig, artifact: Artifact) -> StageC:
    """Stage C with its trained weights."""
    return _filled(StageC(config), artifact, "stage_c.safetensors")


def baseline(config: BaselineConfig, artifact: Artifact) -> Baseline:
    """The baseline with its trained weights."""
    return _filled(Baseline(config), artifact, "baseline.safetensors")


def previewer(config: PreviewerConfig, artifact: Artifact) -> Previewer:
    """The previewer with its trained weights."""
    return _filled(Previewer(config), artifact, "previewer.safetensors")


def state_dict(path: str) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch file at a path or URI, or of the one model in a folder; nothing else in it is
    ever loaded.

    Raises:
        BadWeights: it cannot be read, or a folder holds none, or several.
    """
    models = places(local(path))
    if len(models) != 1:
        raise BadWeights(f"{path} holds the weights of {len(models) or 'no'} models; name one file, or its folder")
    return {key: value for file in models[0] for key, value in read(file).items()}


@cache
def local(path: str) -> Path:
    """A local path of what lies at a path or URI; copies of remote weights last as long as the process."""
    if not storage.is_remote(path):
        return storage.local_copy(path, Path())
    folder = tempfile.mkdtemp(prefix="weights-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return storage.local_copy(path, Path(folder))


def existing(stage: Stage, weights: str, compressor: str | None = None, key: str | None = None) -> dict[Model, Found]:
    """Existing weights of a stage, for Stage B with its compressor: its own, else the whole one at `compressor`.

    `key` is the config key that names them, if it is not `<stage>.weights`.

    Raises:
        BadWeights: they are not there, or not of this stage; the message names key and file.
    """
    key = key or f"{stage}.weights"
    with _naming(key):
        found = pretrained.find(local(weights))
    if stage not in found:
        holds = ", ".join(pretrained.NAMES[model] for model in found)
        raise BadWeights(f"{key}={weights} holds {holds}, not {pretrained.NAMES[stage]}")
    if stage != "stage_b":
        return {stage: found[stage]}
    other: dict[Model, Found] = {}
    if "compressor" not in found and compressor is not None:
        with _naming("compressor.weights"):
            other = pretrained.find(local(compressor))
    if "compressor" not in found | other:
        raise BadWeights(
            f"stage_b.weights={weights} holds no compressor; give the one that Stage B was trained with: "
            f"compressor.weights=PATH (tensors backbone.* and mapper.*); {PUBLIC_COMPRESSOR}"
        )
    return {"stage_b": found["stage_b"], "compressor": (other | found)["compressor"]}


def compressor_start(weights: str) -> Found:
    """What the compressor starts from: a whole one, or ImageNet weights of its backbone."""
    with _naming("compressor.weights"):
        found = pretrained.find(local(weights))
    for model in ("compressor", "imagenet"):
        if model in found:
            return found[model]
    raise BadWeights(f"compressor.weights={weights} holds neither a compressor nor an EfficientNetV2 classifier")


def perceptual(loss: StageALoss, where: torch.device) -> "Perceptual | None":
    """The perceptual distance of a loss's files on a device: LPIPS where both are given; None where none is.

    Raises:
        BadWeights: a file is damaged, or holds other tensors; names the key.
    """
    if loss.perceptual_weights is None:
        return None
    from stages.training.perceptual import Perceptual

    with _naming("stage_a.loss.perceptual_weights"):
        network = state_dict(loss.perceptual_weights)
    with _naming("stage_a.loss.perceptual_heads"):
        heads = state_dict(loss.perceptual_heads) if loss.perceptual_heads else None
    return Perceptual(network, heads, where)


def check_existing(config: Config, made: Iterable[str]) -> None:
    """Refuse damaged weights, and those of other models than the stages `made` are to be; they are read whole.

    Remote files are looked at when their step runs: it has to copy them.
    """
    for stage in STAGES:
        weights = getattr(config, stage).weights
        compressor = config.compressor.weights if stage == "stage_b" else None
        if stage not in made or any(path and storage.is_remote(path) for path in (weights, compressor)):
            continue
        found: list[tuple[str, Found]] = []
        if stage == "stage_c" and config.between:
            for key, path in config.between.paths.items():
                if not storage.is_remote(path):
                    found.append((key, existing("stage_c", path, key=key)["stage_c"]))
        if weights:
            for item in existing(stage, weights, compressor).values():
                inside = item.files[0].is_relative_to(local(weights))
                found.append((f"{stage}.weights" if inside else "compressor.weights", item))
        elif compressor:
            found.append(("compressor.weights", compressor_start(compressor)))
        for key, item in found:
            with _naming(key):
                pretrained.require_fit(item, getattr(config, item.section).model)
                pretrained.require_finite(item.tensors, item.files[0])


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """Say of bad weights also which key names them."""
    try:
        yield
    except BadWeights as error:
        raise BadWeights(f"{key}: {error}") from error


def fresh_tower(config: TextConfig, name: str) -> "TextTower":
    """The text tower of a name as its config describes it: pretrained, or seeded and not yet centred.

    Raises:
        BadWeights: a file is damaged, or holds another tower; names the key.
    """
    from stages.models.text import clip_tower, seeded_tower

    if not isinstance(config, ClipTextConfig):
        return seeded_tower(config)
    with _naming(f"text.{name}.weights"):
        return clip_tower(config, state_dict(config.weights))


def tower(config: TextConfig, artifact: Artifact) -> "TextTower":
    """The text tower that encoded an artifact's captions."""
    from stages.models.text import TextTower

    return _filled(TextTower(config.width, config.layers, config.heads, config.context_length), artifact, TOWER)


def check_compressor(seen: str | None, stage_b: Artifact, whose: str) -> None:
    """Refuse an artifact made with codes of another compressor than Stage B's; `seen` is its sha256, where known.

    A Stage B that was built again may be another, though all fingerprints are the same.
    """
    own = stage_b.files[COMPRESSOR].sha256
    if seen not in (None, own):
        raise UsageError(
            f"{whose} was made with another compressor ({str(seen)[:12]}) than Stage B's ({own[:12]}): "
            "run again with --force encode_c --force train_c"
        )


def null_text(artifact: Artifact) -> Tensor:
    """Hidden states of the empty caption, (N, D) fp32."""
    return safetensors.torch.load(artifact.read(NULL_TEXT))["null_text"].float()


def ready(load: Callable[[torch.device], Models], sampling: Sampling, where: torch.device) -> Models:
    """Models for sampling on a device: there, or on the CPU until their turn; compiled where asked for."""
    if sampling.compile:
        require_compiler("sample.compile")
    models = load(torch.device("cpu") if sampling.offload else where)
    if sampling.compile:
        models.compile()
    return models


def require_compiler(key: str) -> None:
    """Refuse a key's `true` where models cannot be compiled."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UsageError(f"{key}=true needs a C++ compiler, and this machine has none: install g++ or clang++")


def everything(config: Config, artifacts: dict[str, Artifact], where: torch.device) -> Models:
    """All models that sampling and a release need, on one device; the previewer where it is among the artifacts."""
    check_compressor(artifacts["stage_c"].manifest["notes"].get("compressor"), artifacts["stage_b"], "stage_c")
    text_b, text_c = config.stage_b.text, config.stage_c.text
    tower_c = tower(config.text[text_c], artifacts[f"text_{text_c}"]).to(where)
    tower_b = tower_c if text_b == text_c else tower(config.text[text_b], artifacts[f"text_{text_b}"]).to(where)
    return Models(
        stage_a=stage_a(config.stage_a.model, artifacts["stage_a"]).to(where),
        stage_b=stage_b(config.stage_b.model, artifacts["stage_b"]).to(where),
        stage_c=stage_c(config.stage_c.model, artifacts["stage_c"]).to(where),
        text_b=tower_b,
        text_c=tower_c,
        compressor=compressor(config.compressor.model, artifacts["stage_b"]).to(where),
        previewer=previewer(config.previewer.model, artifacts["previewer"]).to(where)
        if "previewer" in artifacts
        else None,
        settings=config.sample.settings(),
    )
