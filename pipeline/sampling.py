"""The verb `sample`: draw pictures with the models of exactly this config, in this process, without Ray."""

import hashlib
import io
import re

from datasets import storage
from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.reports import wanted
from pipeline.run import check_writable
from pipeline.screen import console

NUMBERS = {
    "seed": int, "n": int, "width": int, "height": int,
    "steps_c": int, "steps_b": int, "guidance_c": float, "guidance_b": float,
}  # fmt: skip


def sample(config: Config, root: str, words: dict[str, str]) -> None:
    """Write `n` pictures of a prompt as PNGs to `out`; seeds count up from `seed`.

    Raises:
        UsageError: prompt= or out= is missing, a number is none, or the models are not trained yet.
    """
    if not words.get("prompt") or not words.get("out"):
        raise UsageError('sample needs prompt="..." and out=DIR')
    numbers = {key: _number(key, words[key]) for key in NUMBERS if key in words}
    settings = {**config.sample.model_dump(), **numbers}
    width, height = int(settings["width"]), int(settings["height"])
    for key, side in (("width", width), ("height", height)):
        if side <= 0 or side % 128:
            raise UsageError(f"{key}={side}: sides must be multiples of 128 px")
    count = int(numbers.get("n", 1))
    for key in ("n", "steps_c", "steps_b"):
        if key in numbers and numbers[key] < 1:
            raise UsageError(f"{key}={words[key]}: give 1 or more")
    if not 0 <= numbers.get("seed", 0) < 2**63 - count:
        raise UsageError(f"seed={words['seed']}: must be between 0 and 2^63")
    folder = storage.absolute(words["out"])
    texts = sorted({f"text_{config.stage_b.text}", f"text_{config.stage_c.text}"})
    artifacts = wanted(config, root, ["stage_a", "stage_b", "stage_c", *texts])
    check_writable(folder, "out")

    prompt = words["prompt"]
    first = int(numbers["seed"]) if "seed" in numbers else caption_seed(config.seed, prompt)
    from PIL import Image

    from pipeline import models
    from stages.sample import generate

    where = models.device(config.cluster.device if config.cluster.device != "auto" else _auto_device())
    loaded = models.everything(config, artifacts, where)
    truncated = loaded.text_c.tokenizer([prompt]).truncated
    if truncated:
        console.print(f"[yellow]the prompt is longer than {loaded.text_c.context_length} tokens; its end is cut off[/]")
    for seed in range(first, first + count):
        pixels = generate(
            loaded,
            [prompt],
            [words.get("negative", config.sample.negative)],
            [seed],
            width=width,
            height=height,
            steps_c=int(settings["steps_c"]),
            steps_b=int(settings["steps_b"]),
            guidance_c=float(settings["guidance_c"]),
            guidance_b=float(settings["guidance_b"]),
        )
        buffer = io.BytesIO()
        Image.fromarray(pixels[0].numpy()).save(buffer, "PNG")
        path = storage.join(folder, f"{_slug(prompt)}-{seed}.png")
        storage.publish(buffer.getvalue(), path)
        console.print(path)


def caption_seed(seed: int, caption: str) -> int:
    """The seed of a caption's picture where none is given: 31 bits from the run's seed and the text."""
    digest = hashlib.sha256(f"{seed}\0{caption}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _auto_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _number(key: str, text: str) -> float:
    try:
        return NUMBERS[key](text)
    except ValueError:
        raise UsageError(f"{key}={text}: not a number") from None


def _slug(prompt: str) -> str:
    """A file name from a prompt: letters and digits kept, the rest as dashes, at most 60 characters."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60] or "picture"
