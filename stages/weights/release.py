"""A release: the trained models as a folder for diffusers' stock Würstchen pipelines, and the way back.

    model_index.json                                                    WuerstchenCombinedPipeline
    {tokenizer,text_encoder,decoder,scheduler,vqgan}/                   ... its decoder half
    prior_{tokenizer,text_encoder,prior,scheduler}/                     ... its prior half
    decoder/model_index.json, decoder/{tokenizer,...,vqgan}/            WuerstchenDecoderPipeline by itself
    prior/model_index.json, prior/{tokenizer,...,scheduler}/            WuerstchenPriorPipeline by itself
    compressor/  sampling.json                                          not part of a pipeline: for `load`
    README.md                                                           the model card (`card`)

`decoder/` is twice a name: the combined pipeline's model Stage B, and the pipeline that goes with `prior/`.
Their files do not clash.
"""

import filecmp
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from stages import diffusion
from stages.models.compressor import Compressor
from stages.models.geometry import CODE_SCALE, CODE_SHIFT, LATENTS_PER_CODE, PIXELS_PER_CODE
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.models.text import TextTower, from_transformers, to_transformers, tokenizer_files
from stages.sampling.sample import Models
from stages.settings.models import CompressorConfig, StageAConfig, StageBConfig, StageCConfig
from stages.settings.sampling import SamplingConfig
from stages.weights import convert
from stages.weights.card import DIFFUSERS_VERSION

File = tuple[str, bytes]  # relative path, content
M = TypeVar("M", bound=nn.Module)

SETTINGS = "sampling.json"
MODEL_WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name
WEIGHTS = "model.safetensors"  # transformers' name

STOCK_LATENT_CHANNELS = 4  # fixed in WuerstchenDecoderPipeline

# Library and class of a pipeline's parts. The models are named by their module: diffusers moved its Würstchen
# package out of reach of the package name `wuerstchen` that the first public checkpoints give.
_PACKAGE = "diffusers.pipelines.deprecated.wuerstchen"
_COMMON_PARTS = {
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "scheduler": ("diffusers", "DDPMWuerstchenScheduler"),
}
_PRIOR_PARTS = _COMMON_PARTS | {"prior": (f"{_PACKAGE}.modeling_wuerstchen_prior", "WuerstchenPrior")}
_DECODER_PARTS = _COMMON_PARTS | {
    "decoder": (f"{_PACKAGE}.modeling_wuerstchen_diffnext", "WuerstchenDiffNeXt"),
    "vqgan": (f"{_PACKAGE}.modeling_paella_vq_model", "PaellaVQModel"),
}
_COMBINED_PARTS = _DECODER_PARTS | {f"prior_{name}": kind for name, kind in _PRIOR_PARTS.items()}


def _signed(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": kind, "_diffusers_version": DIFFUSERS_VERSION, **config}


_INDICES = {
    "model_index.json": _signed("WuerstchenCombinedPipeline", _COMBINED_PARTS),
    "prior/model_index.json": _signed(
        "WuerstchenPriorPipeline",
        {
            "latent_mean": CODE_SCALE,  # diffusers' names for the factor and the summand of the code
            "latent_std": CODE_SHIFT,
            "resolution_multiple": PIXELS_PER_CODE,
            **_PRIOR_PARTS,
        },
    ),
    "decoder/model_index.json": _signed(
        "WuerstchenDecoderPipeline", {"latent_dim_scale": LATENTS_PER_CODE, **_DECODER_PARTS}
    ),
}
_SCHEDULER = _signed("DDPMWuerstchenScheduler", {"s": diffusion.OFFSET, "scaler": 1.0})


class NotReleasable(ValueError):
    """The stock pipelines cannot run these models."""


class BadRelease(ValueError):
    """A folder is no release of ours, or damaged."""


def release_files(
    models: Models,
    compressor: Compressor,
    *,
    stage_a_config: StageAConfig,
    stage_b_config: StageBConfig,
    stage_c_config: StageCConfig,
    compressor_config: CompressorConfig,
    card: str,
) -> Iterator[File]:
    """Yield every file of the release, equal bytes for equal models; only one is in memory at a time.

    A part that several pipelines have is made once and yielded once for each of their folders. The stock
    pipelines draw the picture of `stages.sampling.sample.generate` from a CPU generator of the same seed.

    card: the text of `model_card`.

    Raises NotReleasable for a Stage B without text, latents of other than 4 channels, or codes not scaled.
    """
    if models.text_b is None:
        raise NotReleasable("stage_b was trained without text, which the stock decoder needs: name a text tower")
    if stage_b_config.latent_channels != STOCK_LATENT_CHANNELS:
        raise NotReleasable(
            f"stage_b.latent_channels is {stage_b_config.latent_channels}, "
            f"but the stock decoder has {STOCK_LATENT_CHANNELS}: train with that many"
        )
    if not stage_c_config.scaled_codes:
        raise NotReleasable("stage_c.scaled_codes is false, but the stock prior takes (code + 1) / 42: train with that")
    yield "README.md", card.encode()
    yield SETTINGS, _json(models.settings.model_dump(mode="json"))
    for place, index in _INDICES.items():
        yield place, _json(index)

    vqgan = _model("PaellaVQModel", convert.arguments(stage_a_config), models.stage_a)
    decoder = _model("WuerstchenDiffNeXt", convert.arguments(stage_b_config), models.stage_b)
    prior = _model("WuerstchenPrior", convert.arguments(stage_c_config), models.stage_c)
    yield from _within(vqgan, "vqgan", "decoder/vqgan")
    yield from _within(decoder, "decoder", "decoder/decoder")
    yield from _within(prior, "prior_prior", "prior/prior")
    yield from _within(_text_encoder(models.text_b), "text_encoder", "decoder/text_encoder")
    yield from _within(_text_encoder(models.text_c), "prior_text_encoder", "prior/text_encoder")
    yield from _within(_tokenizer(models.text_b), "tokenizer", "decoder/tokenizer")
    yield from _within(_tokenizer(models.text_c), "prior_tokenizer", "prior/tokenizer")
    yield from _within(_scheduler(), "scheduler", "decoder/scheduler", "prior_scheduler", "prior/scheduler")
    yield from _within(_compressor(compressor, compressor_config), "compressor")


def _within(files: Iterator[File], *folders: str) -> Iterator[File]:
    for name, content in files:
        for folder in folders:
            yield f"{folder}/{name}", content


def _model(kind: str, config: Mapping[str, Any], model: nn.Module) -> Iterator[File]:
    yield "config.json", _json(_signed(kind, config))
    yield MODEL_WEIGHTS, _safetensors(convert.to_diffusers(model.state_dict()))


def _scheduler() -> Iterator[File]:
    yield "scheduler_config.json", _json(_SCHEDULER)


def _text_encoder(tower: TextTower) -> Iterator[File]:
    config, state = to_transformers(tower)
    yield "config.json", _json(config)
    yield WEIGHTS, _safetensors(state)


def _tokenizer(tower: TextTower) -> Iterator[File]:
    for name, text in tokenizer_files(tower.context_length).items():
        yield name, text.encode()


def _compressor(compressor: Compressor, config: CompressorConfig) -> Iterator[File]:
    yield "config.json", _json(config.model_dump(mode="json"))
    yield WEIGHTS, _safetensors(compressor.state_dict())


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _safetensors(state: Mapping[str, Tensor]) -> bytes:
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    return safetensors.torch.save(tensors, metadata={"format": "pt"})  # which transformers insists on


def settings_of(folder: str | Path) -> SamplingConfig:
    """How the pictures of a release were drawn; `load` checks the rest of the folder. Raises BadRelease."""
    path = Path(folder, SETTINGS)
    with _blamed(path):
        return SamplingConfig.model_validate(_read_json(path))


def load(folder: str | Path, device: torch.device | str = "cpu") -> Models:
    """The models of a release in memory, in evaluation mode: what `release_files` wrote, on a local disk.

    Raises BadRelease, which names the file, where the folder is none of ours, or a file is missing, damaged
    or does not fit the others.
    """
    root = Path(folder)
    settings = settings_of(root)
    for place in ("", "prior_"):
        _require_values(root / f"{place}scheduler/scheduler_config.json", _SCHEDULER)
    for place, index in _INDICES.items():
        _require_values(root / place, json.loads(_json(index)))
    text_c = _load_tower(root, "prior_")
    _require_file(root / "text_encoder" / WEIGHTS)
    shared = filecmp.cmp(root / "prior_text_encoder" / WEIGHTS, root / "text_encoder" / WEIGHTS, shallow=False)
    if shared:
        _require_tower(root, "", text_c)
    models = Models(
        stage_a=_load_stage(root / "vqgan", lambda config: StageA(convert.config_of(StageAConfig, config))),
        stage_b=_load_stage(root / "decoder", lambda config: StageB(convert.config_of(StageBConfig, config))),
        stage_c=_load_stage(root / "prior_prior", lambda config: StageC(convert.config_of(StageCConfig, config))),
        text_b=text_c if shared else _load_tower(root, ""),
        text_c=text_c,
        compressor=_load_compressor(root / "compressor"),
        settings=settings,
    )
    for module in vars(models).values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False).to(device)
    return models


def _load_stage(folder: Path, build: Callable[[Mapping[str, Any]], M]) -> M:
    with _blamed(folder / "config.json"), torch.device("meta"):  # its weights come from the file: none are drawn
        module = build(_read_json(folder / "config.json"))
    state = _tensors(folder / MODEL_WEIGHTS, convert.to_diffusers(module.state_dict()))
    module.load_state_dict(convert.from_diffusers(state), assign=True)
    return module


def _load_tower(root: Path, prefix: str) -> TextTower:
    path = root / f"{prefix}text_encoder/config.json"
    config = _read_json(path)
    with _blamed(path):
        tower = TextTower(
            config["hidden_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config["max_position_embeddings"],
        )
    _require_tower(root, prefix, tower)
    layout = to_transformers(tower)[1]
    tower.load_state_dict(from_transformers(_tensors(path.with_name(WEIGHTS), layout)))
    return tower


def _require_tower(root: Path, prefix: str, tower: TextTower) -> None:
    """What stands beside a tower's weights describes this tower and its tokenizer."""
    _require_values(root / f"{prefix}text_encoder/config.json", to_transformers(tower)[0])
    for name, text in tokenizer_files(tower.context_length).items():
        file = root / f"{prefix}tokenizer" / name
        if _read(file) != text.encode():
            raise BadRelease(f"{file} is not of CLIP's tokenizer as `export` writes it: export the release again")


def _load_compressor(folder: Path) -> Compressor:
    with _blamed(folder / "config.json"):
        compressor = Compressor(CompressorConfig.model_validate(_read_json(folder / "config.json")))
    compressor.load_state_dict(_tensors(folder / WEIGHTS, compressor.state_dict()))
    return compressor


def _tensors(path: Path, layout: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A safetensors file with exactly these names, shapes and dtypes, and finite values."""
    _require_file(path)
    try:
        found = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise BadRelease(f"{path} is damaged ({error}): copy the release again") from error
    for key in sorted(found.keys() | layout.keys()):
        ours, theirs = (_described(state.get(key)) for state in (layout, found))
        if ours != theirs:
            raise BadRelease(f"{path} holds {theirs} for {key}, but its config.json asks for {ours}")
        if not bool(torch.isfinite(found[key]).all()):
            raise BadRelease(f"{path} is damaged: its {key} holds values that are no finite numbers: copy it again")
    return found


def _described(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _require_values(path: Path, expected: Mapping[str, Any]) -> None:
    found = _read_json(path)
    for key, value in expected.items():
        if found.get(key) != value:
            raise BadRelease(f"{path} has {key} = {found.get(key)}, which must be {value}: give a folder of `export`")


def _read(path: Path) -> bytes:
    _require_file(path)
    return path.read_bytes()


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise BadRelease(f"{path} is missing: give a folder that `export` wrote")


def _read_json(path: Path) -> dict[str, Any]:
    data = _read(path)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRelease(f"{path} is damaged ({error}): copy the release again") from error
    if not isinstance(content, dict):
        raise BadRelease(f"{path} holds no JSON object: copy the release again")
    return content


@contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """A config that no model can be built of is the fault of its file."""
    try:
        yield
    except BadRelease:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRelease(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except KeyError as error:
        raise BadRelease(f"{path} lacks {error}: give a folder that `export` wrote") from error
    except (TypeError, ValueError, AssertionError) as error:
        raise BadRelease(f"{path} describes no model ({error})") from error
