"""A release: the trained models as a folder for diffusers' stock Würstchen pipelines, and its model card.

    model_index.json                                                    WuerstchenCombinedPipeline
    {tokenizer,text_encoder,decoder,scheduler,vqgan}/                   ... its decoder half
    prior_{tokenizer,text_encoder,prior,scheduler}/                     ... its prior half
    decoder/model_index.json, decoder/{tokenizer,...,vqgan}/            WuerstchenDecoderPipeline by itself
    prior/model_index.json, prior/{tokenizer,...,scheduler}/            WuerstchenPriorPipeline by itself
    compressor/                                                         not part of a pipeline
    README.md                                                           the model card

`decoder/` is twice a name: the combined pipeline's model Stage B, and the pipeline that goes with `prior/`.
Their files do not clash.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from stages import convert, diffusion
from stages.compressor import Compressor
from stages.config import CompressorConfig, StageAConfig, StageBConfig, StageCConfig
from stages.geometry import CODE_SCALE, CODE_SHIFT, LATENTS_PER_CODE, PIXELS_PER_CODE, SIDE_MULTIPLE
from stages.sample import Models
from stages.text import TextTower, to_transformers, tokenizer_files

File = tuple[str, bytes]  # relative path, content

DIFFUSERS_VERSION = "0.42.1"  # whose folder layout and class names are written
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


class NotReleasable(ValueError):
    """The stock pipelines cannot run these models."""


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
    pipelines draw the picture of `stages.sample.generate` from a CPU generator of the same seed.

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
    yield "model_index.json", _index("WuerstchenCombinedPipeline", _COMBINED_PARTS)
    yield (
        "prior/model_index.json",
        _index(
            "WuerstchenPriorPipeline",
            _PRIOR_PARTS,
            latent_mean=CODE_SCALE,  # diffusers' names for the factor and the summand of the code
            latent_std=CODE_SHIFT,
            resolution_multiple=PIXELS_PER_CODE,
        ),
    )
    yield (
        "decoder/model_index.json",
        _index("WuerstchenDecoderPipeline", _DECODER_PARTS, latent_dim_scale=LATENTS_PER_CODE),
    )

    vqgan = _model("PaellaVQModel", convert.vqgan_config(stage_a_config), models.stage_a)
    decoder = _model("WuerstchenDiffNeXt", convert.decoder_config(stage_b_config), models.stage_b)
    prior = _model("WuerstchenPrior", convert.prior_config(stage_c_config), models.stage_c)
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


def _index(pipeline: str, parts: Mapping[str, tuple[str, str]], **settings: float) -> bytes:
    return _json(_signed(pipeline, settings | dict(parts)))


def _model(kind: str, config: Mapping[str, Any], model: nn.Module) -> Iterator[File]:
    yield "config.json", _json(_signed(kind, config))
    yield "diffusion_pytorch_model.safetensors", _safetensors(convert.to_diffusers(model.state_dict()))


def _scheduler() -> Iterator[File]:
    config = {"s": diffusion.OFFSET, "scaler": 1.0}
    yield "scheduler_config.json", _json(_signed("DDPMWuerstchenScheduler", config))


def _text_encoder(tower: TextTower) -> Iterator[File]:
    config, state = to_transformers(tower)
    yield "config.json", _json(config)
    yield "model.safetensors", _safetensors(state)


def _tokenizer(tower: TextTower) -> Iterator[File]:
    for name, text in tokenizer_files(tower.context_length).items():
        yield name, text.encode()


def _compressor(compressor: Compressor, config: CompressorConfig) -> Iterator[File]:
    yield "config.json", _json(config.model_dump(mode="json"))
    yield "model.safetensors", _safetensors(compressor.state_dict())


def _signed(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": kind, "_diffusers_version": DIFFUSERS_VERSION, **config}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _safetensors(state: Mapping[str, Tensor]) -> bytes:
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    return safetensors.torch.save(tensors, metadata={"format": "pt"})  # which transformers insists on


_CITATION = r"""
```bibtex
@inproceedings{pernias2024wuerstchen,
  title = {W{\"u}rstchen: An Efficient Architecture for Large-Scale Text-to-Image Diffusion Models},
  author = {Pablo Pernias and Dominic Rampas and Mats L. Richter and Christopher J. Pal and Marc Aubreville},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  eprint = {2306.00637},
  archivePrefix = {arXiv}
}
```
""".strip()


def model_card(
    *,
    name: str,
    license: str,
    prompt: str,
    width: int,
    height: int,
    steps_c: int,
    steps_b: int,
    guidance_c: float,
    guidance_b: float,
    sources: Sequence[str],
    scores: Mapping[str, float],
    cost: str,
    limitations: Sequence[str],
) -> str:
    """A Hugging Face model card as Markdown with YAML front matter.

    license: the Hub's identifier, such as `cc-by-sa-4.0`. From prompt to guidance: of the example, as
    `stages.sample.generate` takes them. sources: a notice for each source of training data, with its licence
    and attribution. scores: values by name. cost: device-hours in words. limitations: those of this training,
    in sentences; what holds for every release is added.
    """
    general = [
        f"The sides of a picture must be multiples of {SIDE_MULTIPLE} px.",
        "The stock decoder takes one prompt a call.",
        "Half precision must be bfloat16: float16 overflows.",
    ]
    rows = "\n".join(f"| {metric} | {round(value, 4):g} |" for metric, value in scores.items())
    return f"""---
license: {license}
library_name: diffusers
pipeline_tag: text-to-image
tags:
- text-to-image
- wuerstchen
---

# {name}

A Würstchen text-to-image model: from text, Stage C (`prior`) writes a code with 1/42 of the picture's side,
Stage B (`decoder`) turns the code into latents, Stage A (`vqgan`) turns the latents into pixels. The network
in `compressor/` made the codes of the training pictures.

## Use

```python
import torch
from diffusers import AutoPipelineForText2Image

pipeline = AutoPipelineForText2Image.from_pretrained(".")  # the folder of this file
image = pipeline(
    {prompt!r},
    width={width},
    height={height},
    prior_num_inference_steps={steps_c},
    prior_guidance_scale={guidance_c},
    num_inference_steps={steps_b},
    decoder_guidance_scale={guidance_b},
    generator=torch.Generator().manual_seed(0),
).images[0]
```

Written for diffusers {DIFFUSERS_VERSION}, which loads its Würstchen classes from local folders only: download
from the Hub with `huggingface_hub.snapshot_download` first. `prior/` and `decoder/` also load one by one, as
`WuerstchenPriorPipeline` and `WuerstchenDecoderPipeline`.

## Training data

{_bullets(sources)}

## Scores

| metric | value |
|---|---|
{rows}

## Cost

{cost}

## Limitations

{_bullets([*limitations, *general])}

## Citation

{_CITATION}
"""


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
