"""The model card of a release: Markdown with the YAML front matter that the Hugging Face Hub reads."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stages.models.geometry import SIDE_MULTIPLE
from stages.settings.sampling import SamplingConfig

DIFFUSERS_VERSION = "0.42.1"  # whose folder layout and class names a release has

_DATA = "Training data"
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)

# What holds for every release.
_LIMITATIONS = (
    f"The sides of a picture must be multiples of {SIDE_MULTIPLE} px.",
    "The stock decoder takes one prompt a call.",
    "Half precision must be bfloat16: float16 overflows.",
)

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


@dataclass(frozen=True)
class Score:
    """A figure of a card: of how many pictures it is (None: nobody knows), and of which captions or prompts."""

    metric: str
    value: float
    n: int | None
    of: str


@dataclass(frozen=True)
class CardFacts:
    """What a card tells of one release."""

    name: str
    license: str
    """The Hub's identifier, such as `cc-by-sa-4.0`."""
    prompt: str
    """Caption of the example."""
    settings: SamplingConfig
    """How the example is drawn."""
    sources: Sequence[str]
    """What it was trained on, in sentences: a notice for each source of data, with its licence and attribution."""
    scores: Sequence[Score]
    """What was measured; none: nothing was."""
    cost: Sequence[str]
    """Device-hours, in sentences."""
    limitations: Sequence[str]
    """Those of this training, in sentences; what holds for every release is added."""
    lineage: Sequence[str] = ()
    """Of what it was made, in sentences."""


def model_card(facts: CardFacts) -> str:
    """The whole card; equal facts give equal text."""
    sections = {
        "Use": _use(facts.prompt, facts.settings),
        _DATA: _bullets(facts.sources),
        "Scores": _table(facts.scores),
        "Cost": _bullets(facts.cost),
        "Limitations": _bullets([*facts.limitations, *_LIMITATIONS]),
        **({"Lineage": _bullets(facts.lineage)} if facts.lineage else {}),
        "Citation": _CITATION,
    }
    parts = [_opening(facts.name, facts.license), *(f"## {title}\n\n{body}" for title, body in sections.items())]
    return "\n\n".join(parts) + "\n"


def _opening(name: str, license: str) -> str:
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
in `compressor/` made the codes of the training pictures."""


def _use(prompt: str, settings: SamplingConfig) -> str:
    return f"""```python
import torch
from diffusers import AutoPipelineForText2Image

pipeline = AutoPipelineForText2Image.from_pretrained(".")  # the folder of this file
image = pipeline(
{_example(prompt)}
    width={settings.width},
    height={settings.height},
    prior_num_inference_steps={settings.steps_c},
    prior_guidance_scale={settings.guidance_c},
    num_inference_steps={settings.steps_b},
    decoder_guidance_scale={settings.guidance_b},
    generator=torch.Generator().manual_seed(0),
).images[0]
```

Written for diffusers {DIFFUSERS_VERSION}, which loads its Würstchen classes from local folders only: download
from the Hub with `huggingface_hub.snapshot_download` first. `prior/` and `decoder/` also load one by one, as
`WuerstchenPriorPipeline` and `WuerstchenDecoderPipeline`. To pass it on, copy the folder as it is: what diffusers'
`save_pretrained` makes of these pipelines, diffusers cannot load."""


def _table(scores: Sequence[Score]) -> str:
    if not scores:
        return "Nothing was measured."
    rows = "\n".join(
        f"| {one.metric} | {round(one.value, 4):g} | {'not known' if one.n is None else f'{one.n:,}'} | {one.of} |"
        for one in scores
    )
    return f"""| metric | value | n | of |
|---|---|---|---|
{rows}"""


def terms(card: str) -> tuple[str | None, str | None] | None:
    """Licence, and what it says of its training data, of a model card, ours or another's; None for a text that is
    none: it lacks the front matter."""
    text = "\n".join(card.splitlines())
    if not (front := _FRONT.match(text)):
        return None
    licence = re.search(r"^license: *['\"]?([\w.-]+)", front[1], re.MULTILINE)
    data = re.search(rf"^## {_DATA}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return licence and licence[1], (data and data[1].strip()) or None


def with_prompt(card: str, old: str, new: str) -> str:
    """A model card with another caption in its example; as it is where the example has another one than `old`."""
    return card.replace(f"\n{_example(old)}\n", f"\n{_example(new)}\n", 1)


def _example(prompt: str) -> str:
    """The line of the caption."""
    return f"    {prompt!r},"


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
