"""Feature sets: of which sets of pictures Inception's features are taken, a step each, and what these steps store."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from datasets.formats import shards
from datasets.formats.shards import KEY
from datasets.reading.prompts import Prompt
from pipeline.models.contests import GENERATED
from pipeline.settings.config import Config
from pipeline.settings.evaluation import BASELINE, HELD_OUT, NULL, OURS, REFERENCE, TRAINING, samples_of
from pipeline.store.artifacts import Artifact

FEATURES, FIELD = "features", "features"  # what artifacts, and a table's column, are called
WIDTH = 2048  # of Inception's features; its logits follow
EXTRACTOR = tuple(f"eval.distances.{key}" for key in ("inception", "side", "side_is", "resize"))


@dataclass(frozen=True)
class FeatureSet:
    """A set of pictures: those that an artifact of samples has in a folder, or those at a key of the config.

    `whose`: ours, null, a rival's name, or `reference`. `inputs` are the artifacts that say what they are."""

    prompts: str
    whose: str
    inputs: tuple[str, ...] = ()
    folder: str = GENERATED
    key: str | None = None
    alteration: str | None = None

    @property
    def output(self) -> str:
        """The artifact of its features."""
        return f"{FEATURES}_" + "-".join(filter(None, (self.prompts, self.whose, self.alteration)))

    @property
    def reads(self) -> tuple[str, ...]:
        """The config keys that decide them."""
        outside = [f"eval.{self.key}", "eval.allow_missing"] if self.key else []
        altered = [f"eval.distances.alterations.{self.alteration}"] if self.alteration else []
        return (*EXTRACTOR, *outside, *altered)


def feature_sets(config: Config) -> dict[str, FeatureSet]:
    """All of a config, by the artifacts of their features; none where no Inception is given."""
    if config.eval.distances.inception is None:
        return {}
    found = [one for name in config.prompt_sets() for one in _of(config, name)]
    return {one.output: one for one in found}


def _of(config: Config, name: str) -> list[FeatureSet]:
    samples = samples_of(name)
    ours = FeatureSet(name, OURS, (samples,))
    found = [ours] + [FeatureSet(name, NULL, (f"{NULL}_{samples}",))] * config.eval.compares
    for rival, place in config.eval.rivals.items():
        if place == BASELINE:
            found.append(FeatureSet(name, rival, (f"{BASELINE}_{samples}",)))
        elif outside := config.eval.rival_path(rival, name):
            found.append(FeatureSet(name, rival, (samples,), key=outside[0]))
    if name in config.eval.distances.references:
        found.append(FeatureSet(name, REFERENCE, key=f"distances.references.{name}"))
    elif name in (HELD_OUT, TRAINING):
        found.append(FeatureSet(name, REFERENCE, (samples,), folder="original"))
    return found + [FeatureSet(name, OURS, (samples,), alteration=how) for how in config.eval.distances.alterations]


def key(wanted: tuple[str, str]) -> str:
    """The key of a picture in the tables: its own, or for a file of any name one made of that, 32 hex digits."""
    return wanted[0] if KEY.fullmatch(wanted[0]) else Prompt(wanted[0]).key


def read(artifact: Artifact) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features (n, 2048) and logits (n, classes), fp32, of the pictures of an artifact, a chunk at a time, in order."""
    for name in sorted(name for name in artifact.files if name.endswith(".parquet")):
        _, values = shards.read_tensors(artifact.read(name), FIELD)
        assert isinstance(values, list)
        if values:
            together = np.stack(values)
            yield together[:, :WIDTH], together[:, WIDTH:]
