"""Prompt sets: what the model is asked to draw where it is measured, and under which seed each."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from datasets.formats import ranges, shards
from datasets.formats.shard_table import Shard
from datasets.planning import grouping, plan_files
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
    """The prompts of a set in their order, and what its artifacts note of it: how many there were, what was left out,
    how many captions of held-out pictures others were `trained` with.

    `inputs` hold the images, and the view of those that are held out where there are any, for captions of the data.
    """
    place = config.drawn_sets()[name]
    if place in (HELD_OUT, TRAINING):
        found = list(_captions(config, place, inputs, config.sample.limit))
        about = {"set": name, "of": place, "n": len(found)}
        if place == HELD_OUT:
            trained = _trained([prompt.caption for prompt in found], inputs["images"], inputs["held_out"])
            about |= {"trained": sum(prompt.caption in trained for prompt in found)} if trained else {}
        return found, about
    file = files.read(place, config.eval.limit, config.seed, f"eval.prompts.{name}")
    found = [
        Prompt(one.key, one.text, caption_seed(config.seed, one.text), None, one.category, one.challenge)
        for one in file.prompts
    ]
    counts = {"read": file.read, "repeated": file.repeated, "blank": file.blank, "seed": config.seed}
    return found, {"set": name, "of": "file", "n": len(found), "file": PurePosixPath(place).name, **counts}


def _trained(captions: Iterable[str], images: Artifact, held: Artifact) -> set[str]:
    """Those of some captions that a picture has too which is not held out."""
    if (metadata := images.parent("metadata")) is None:
        return set()
    named, view = pa.array(captions, pa.string()), views.read(held.read(views.FILE))
    stored, found = images.shards(), set[str]()
    for number, planned in plan_files.all_shards(metadata.read, metadata.files):
        rows = grouping.a_row_each(planned)
        meant = rows.filter(pc.is_in(rows["caption"], named))
        if meant.num_rows and number in stored:
            keys = views.stored_keys(stored[number].read(shards.index_name(number)))
            seen = pa.array(set(keys.to_pylist()) - set(keys.take(view.places(number)).to_pylist()), pa.string())
            found.update(meant.filter(pc.is_in(meant["key"], seen))["caption"].to_pylist())
    return found


def _captions(config: Config, of: str, inputs: dict[str, Artifact], most: int) -> Iterator[Prompt]:
    """The first captions of the stored pictures, in their order: of those that the trainings see, or of the others.

    A caption that comes again has another seed: it would give the same picture, and count as another."""
    images, held = inputs["images"], inputs.get("held_out")
    view = views.read(held.read(views.FILE)) if held else None
    if view and of == TRAINING:
        view = ~view
    seen = set[str]()
    for number, shard in images.shards().items():
        places = (range(shard.rows) if view is None else view.places(number).tolist())[:most]
        for row in ranges.read(shard, places) if places else ():
            drawn = f"{row.caption}\0{row.key}" if row.caption in seen else row.caption
            seen.add(row.caption)
            yield Prompt(row.key, row.caption, caption_seed(config.seed, drawn), shard)
        if not (most := most - len(places)):
            return
