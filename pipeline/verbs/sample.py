"""Drawing pictures: the verb `sample`, in this process and without Ray."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from PIL import Image
from pydantic import Field, PositiveInt, ValidationError

from datasets import pictures
from datasets.files import storage
from datasets.files.errors import reason_of
from datasets.outcomes import Lost
from pipeline.errors import UsageError
from pipeline.models.drawing import caption_seed, drawn
from pipeline.plan.wanted import wanted
from pipeline.run.writable import check_writable
from pipeline.settings.compose import explain
from pipeline.settings.config import Config
from pipeline.settings.sections import Sampling
from pipeline.settings.words import Words
from pipeline.store import readers
from pipeline.store.artifacts import Store
from pipeline.terminal import console
from pipeline.verbs.configured import configured
from stages.settings.sampling import SamplingConfig

if TYPE_CHECKING:
    import torch

    from stages.sampling.sample import Models


def handle(words: Words) -> None:
    own = dict(words.own)
    run_seed, folder = own.pop("run_seed", None), own.pop("from", None)  # `seed=` is the picture's
    overrides = [*words.overrides, *([f"seed={run_seed}"] if run_seed is not None else [])]
    if folder is None:
        loaded, root = configured(replace(words, overrides=overrides))
        sample(loaded, root, own)
    else:
        overridden = {word.partition("=")[0] for word in words.overrides}
        check_overrides_of_release(overridden | ({"run_seed"} & words.own.keys()))
        loaded, _ = configured(words if words.conf else replace(words, conf="release"))
        sample_release(loaded, storage.absolute(folder), own, overridden)


class Request(SamplingConfig):
    """The words of `sample` over the settings that they change."""

    out: str = ""
    prompt: str = ""
    image: str | None = None
    strength: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**62)
    n: PositiveInt = 1
    preview: bool = False

    @property
    def idle(self) -> set[str]:
        """The words that change nothing of what is drawn: of a stage that has no part in it, or has no guidance."""
        parts = {"c": self.image is None or self.strength is not None, "b": not self.preview}
        found = {f"{word}_{stage}" for stage, draws in parts.items() if not draws for word in ("steps", "guidance")}
        guided = any(draws and getattr(self, f"guidance_{stage}") > 1 for stage, draws in parts.items())
        return found if guided else found | {"negative"}


def sample(config: Config, root: str, words: dict[str, str]) -> None:
    """Write `n` pictures as PNGs to `out`, with the models of exactly this config; seeds count up from `seed`.

    `image` alone is reconstructed; with `strength`, image-to-image. It is fitted to `width` x `height`, or to
    the nearest allowed size of its own aspect. With `preview`, the previewer shows the codes in place of Stage B and A.

    A file's name is `<prompt>-<seed>-<six digits>.png`: the digits stand for the models and all settings, so that
    another setting never overwrites a picture, and the same command makes the same file.

    Raises:
        UsageError: a word is missing or out of range, the picture cannot be read, the models are not trained yet.
    """
    request = _request(words, config.sample)
    picture = _picture(request)
    texts = sorted({f"text_{config.stage_b.text}", f"text_{config.stage_c.text}"})
    names = ["stage_a", "stage_b", "stage_c", *texts] + ["previewer"] * request.preview
    artifacts = wanted(config, root, names, seed_word="run_seed")
    from pipeline.models import loading

    origin = sorted(artifact.manifest["fingerprint"] for artifact in artifacts.values())
    with readers.reading(Store(root), artifacts.values(), partial(console.print, markup=False)):
        _draw(request, picture, words, config, origin, lambda where: loading.everything(config, artifacts, where))


def check_overrides_of_release(overridden: set[str]) -> None:
    """Refuse words that drawing with a release's own models would ignore.

    Raises:
        UsageError: names them.
    """
    heard = {f"sample.{name}" for name in Sampling.model_fields if name != "limit"} | {"cluster", "cluster.device"}
    ignored = sorted(overridden - heard)
    if ignored:
        raise UsageError(
            f"{', '.join(ignored)}: from=DIR draws with that release's own models and settings; leave "
            f"{'them' if len(ignored) > 1 else 'it'} out, only sample.* and cluster.device count here"
        )


def sample_release(config: Config, folder: str, words: dict[str, str], overridden: set[str]) -> None:
    """The same with the models and settings of a release folder; of the config, what is `overridden` counts more.

    Raises:
        UsageError: as `sample`.
        BadRelease: the folder is no release, or damaged.
    """
    from stages.weights import release

    own = release.settings_of(folder).model_dump()
    changes = {name: value for name, value in own.items() if f"sample.{name}" not in overridden}
    config = config.model_copy(update={"sample": config.sample.model_copy(update=changes)})
    request = _request(words, config.sample)
    if request.preview:
        raise UsageError("preview=true: a release holds no previewer; give the conf= and root= of a run that has one")
    picture = _picture(request)
    _draw(request, picture, words, config, [folder], lambda where: release.load(folder, where))


def _request(words: dict[str, str], sampling: Sampling) -> Request:
    """The words, checked."""
    if not words.get("out") or not (words.get("prompt", "").strip() or "image" in words):
        raise UsageError('sample needs prompt="..." and out=DIR; without a prompt, image=PATH is reconstructed')
    if "strength" in words and "image" not in words:
        raise UsageError(f"strength={words['strength']}: how far to go from a picture; give image=PATH too")
    if "strength" in words and not words.get("prompt"):
        raise UsageError(f"strength={words['strength']}: how far to go from image= to a prompt; give prompt=... too")
    if "steps_c" in words and sampling.timesteps == "released":
        raise UsageError(f"steps_c={words['steps_c']}: sample.timesteps=released has 29 steps; leave one of them out")
    tree = {**sampling.settings().model_dump(), **words}
    try:
        return Request.model_validate(tree)
    except ValidationError as error:
        raise UsageError(explain(error, tree)) from None


def _picture(request: Request) -> Image.Image | None:
    """The picture at `image`."""
    if request.image is None:
        return None
    path = storage.absolute(request.image)
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise UsageError(f"image={request.image}: is no file; give a picture's path")
    try:
        return pictures.opened(storage.read(path))
    except FileNotFoundError:
        raise UsageError(f"image={request.image}: there is no such file; give a picture's path") from None
    except OSError as error:
        raise UsageError(f"image={request.image}: cannot be read: {reason_of(error)}") from None
    except Lost as error:
        formats = ", ".join(pictures.FETCHED_FORMATS)
        raise UsageError(f"image={request.image}: no whole picture of the formats {formats} ({error})") from None


def _draw(
    request: Request,
    picture: Image.Image | None,
    words: dict[str, str],
    config: Config,
    origin: list[str],
    load: Callable[["torch.device"], "Models"],
) -> None:
    """Draw and write; `origin` tells the models of one run or release from those of others."""
    import torch

    from pipeline.models import loading
    from stages.models.geometry import nearest_size
    from stages.sampling.grid import png

    image = None
    if picture is not None:
        if not {"width", "height"} & words.keys():
            width, height = nearest_size(*picture.size, request.width * request.height)
            request = request.model_copy(update={"width": width, "height": height})
        fitted = pictures.fitted(picture, request.width, request.height)
        image = torch.from_numpy(fitted.copy()).permute(2, 0, 1).expand(request.n, -1, -1, -1)

    auto = "cuda" if torch.cuda.is_available() else "cpu"
    where = loading.device(auto if config.cluster.device == "auto" else config.cluster.device)
    folder = storage.absolute(request.out)
    first = caption_seed(config.seed, request.prompt) if request.seed is None else request.seed
    seeds = range(first, first + request.n)
    texts = [request.prompt] * request.n
    ending = "-preview" if request.preview else ""
    name, digits = _slug(request.prompt or PurePosixPath(request.image or "").stem), _digits(request, image, origin)
    places = [storage.join(folder, f"{name}-{seed}-{digits}{ending}.png") for seed in seeds]
    check_writable(folder, "out")
    for word in sorted(request.idle & words.keys()):
        why = "no stage draws with guidance above 1" if word == "negative" else "that stage has no part in it"
        console.print(f"{word}= changes nothing: {why}", style="yellow", markup=False)
    try:
        loaded = loading.ready(load, config.sample, where)
        _tell_truncation(loaded, request)
        found = drawn(
            loaded, texts, seeds, request, config.sample.batch, where, image, request.strength, request.preview
        )
        for path, pixels in zip(places, found, strict=True):
            storage.publish(png(pixels), path)
            console.print(path, markup=False)
    except torch.OutOfMemoryError:
        raise UsageError(
            f"{where} has too little memory for sample.batch={config.sample.batch} at "
            f"{request.width}x{request.height} px: a smaller batch or size, or sample.offload=true"
        ) from None


def _tell_truncation(models: "Models", request: Request) -> None:
    """Say what of the captions no tower will see."""
    from stages.sampling.sample import cut_off

    for word in ("prompt", "negative"):
        if length := cut_off(models, getattr(request, word)):
            console.print(f"[yellow]the {word} is longer than {length} tokens; its end is cut off[/]")


def _digits(request: Request, image: "torch.Tensor | None", origin: list[str]) -> str:
    """Six hexadecimal digits that stand for all that decides a picture beside its seed."""
    facts = request.model_dump(mode="json", exclude={"out", "n", "seed", "image"})
    pixels = b"" if image is None else image[0].numpy().tobytes()
    text = json.dumps([facts, origin], sort_keys=True).encode()
    return hashlib.sha256(text + pixels).hexdigest()[:6]


def _slug(text: str) -> str:
    """A file name from a text: letters and digits kept, the rest as dashes, at most 60 characters or 180 bytes."""
    dashed = re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:60]
    return dashed.encode()[:180].decode(errors="ignore") or "picture"
