"""Prompt sets: what the model is asked to draw where it is measured, and under which seed each."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from datasets.formats import ranges
from datasets.formats.shard_table import Shard
from datasets.reading import prompts as files
from datasets.reading import views
from pipeline.models.drawing import caption_seed
from pipeline.settings.config import Config
from pipeline.settings.evaluation import BASELINE, HELD_OUT, NULL, TRAINING, samples_of
from pipeline.store.artifacts import Artifact


@dataclass(frozen=True)
class Prompt:
    """A prompt to draw: its picture's key, its text and seed; the shard of its original where it is a caption of the
    data; category and challenge where its file names them."""

    key: str
    caption: str
    seed: int
    shard: Shard | None = None
    category: str | None = None
    challenge: str | None = None

    def row(self) -> dict[str, Any]:
        """Its line in the table of samples, which says no more than there is to say."""
        return {name: value for name, value in vars(self).items() if name != "shard" and value is not None}


def drawn_for(config: Config, output: str) -> str:
    """Name of the prompt set that an artifact of samples, ours or a rival's, is of."""
    ours = output.removeprefix(f"{NULL}_").removeprefix(f"{BASELINE}_")
    return next(name for name in config.drawn_sets() if samples_of(name) == ours)


def read(config: Config, name: str, inputs: dict[str, Artifact]) -> tuple[list[Prompt], dict[str, Any]]:
    """The prompts of a set in their order, and what its artifacts note of it: how many there were, what was left out.

    `inputs` hold the images, and the view of those that are held out where there are any, for captions of the data.
    """
    place = config.drawn_sets()[name]
    if place in (HELD_OUT, TRAINING):
        found = list(_captions(config, place, inputs, config.sample.limit))
        return found, {"set": name, "of": place, "n": len(found)}
    file = files.read(place, config.eval.limit, config.seed, f"eval.prompts.{name}")
    found = [
        Prompt(one.key, one.text, caption_seed(config.seed, one.text), None, one.category, one.challenge)
        for one in file.prompts
    ]
    counts = {"read": file.read, "repeated": file.repeated, "blank": file.blank, "seed": config.seed}
    return found, {"set": name, "of": "file", "n": len(found), "file": PurePosixPath(place).name, **counts}


def _captions(config: Config, of: str, inputs: dict[str, Artifact], most: int) -> Iterator[Prompt]:
    """The first captions of the stored pictures, in their order: of those that the trainings see, or of the others."""
    images, held = inputs["images"], inputs.get("held_out")
    view = views.read(held.read(views.FILE)) if held else None
    if view and of == TRAINING:
        view = ~view
    for number, shard in images.shards().items():
        places = (range(shard.rows) if view is None else view.places(number).tolist())[:most]
        for row in ranges.read(shard, places) if places else ():
            yield Prompt(row.key, row.caption, caption_seed(config.seed, row.caption), shard)
        if not (most := most - len(places)):
            return
