"""extract: Inception's features of a set of pictures, kept for every distance that is ever asked of it."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from datasets.config import DataError
from datasets.formats import shards
from datasets.formats.shards import ImageRow
from datasets.reading.rivals import Rival
from pipeline.cluster.mapping import Made, chunked
from pipeline.models import contests, feature_sets
from pipeline.models.contests import Place
from pipeline.models.feature_sets import FIELD, FeatureSet
from pipeline.settings.config import Config
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact

CHUNK = 256  # pictures between two receipts
Wanted = tuple[str, str]  # key and prompt


def extract(build: Build) -> Facts:
    """samples, or pictures from outside -> features_...: fp32 features and logits in a table a chunk of pictures."""
    config, asked = build.config, feature_sets.feature_sets(build.config)[build.step.output]
    wanted, place, about = build.call(_pictures, config, asked, build.inputs)
    arguments = (config, asked.alteration, place, build.device)
    receipts = build.map_shards(Extractor, arguments, chunked(wanted, CHUNK), len(wanted), "pictures")
    return Facts(
        files={name: entry for receipt in receipts for name, entry in receipt.files.items()},
        rows=len(wanted),
        call="ray.data.Dataset.map_batches",
        workers=sorted({receipt.pid for receipt in receipts}),
        notes={"pictures": about},
    )


def _pictures(
    config: Config, asked: FeatureSet, inputs: dict[str, Artifact]
) -> tuple[list[Wanted], Place, dict[str, Any]]:
    """Which pictures, where they lie, and what there is to say of those that are left out.

    Raises:
        DataError: more of those from outside are no good than `eval.allow_missing`, or none is left.
    """
    captions = [json.loads(artifact.read("captions.json")) for artifact in inputs.values()]
    wanted = [(row["key"], row["caption"]) for row in captions[0]] if captions else []
    if not asked.key:
        (artifact,) = inputs.values()
        place, told = Place(artifact, asked.folder), ""
    else:
        key, path = f"eval.{asked.key}", _path(config, asked)
        place, allowed = Place(outside=(key, path)), config.eval.allow_missing
        wanted, told = contests.usable(Rival(path, key), wanted, asked.prompts, allowed)
    return wanted, place, {"n": len(wanted)} | ({"left out": told} if told else {})


def _path(config: Config, asked: FeatureSet) -> str:
    """Where pictures from outside lie."""
    if asked.whose == feature_sets.REFERENCE:
        return config.eval.distances.references[asked.prompts]
    found = config.eval.rival_path(asked.whose, asked.prompts)
    assert found is not None
    return found[1]


class Extractor:
    """Shows Inception a chunk of pictures and keeps its features."""

    def __init__(self, config: Config, alteration: str | None, place: Place, device: str):
        from pipeline.models import inception, loading

        self.settings, self.place = config.eval.distances, place.open()
        self.alteration = self.settings.alterations[alteration] if alteration else None
        self.inception = inception.load(config, str(loading.device(device)))

    def __call__(self, number: int, wanted: Sequence[Wanted]) -> Made:
        values = np.concatenate(list(self._features(wanted)))
        if not np.isfinite(values).all():
            raise DataError(f"chunk {number}: a feature is no finite number; look at eval.distances.inception")
        first = number * CHUNK
        rows = [ImageRow(first + n, feature_sets.key(one), "", "", "", b"") for n, one in enumerate(wanted)]
        return Made(len(wanted), {shards.tensor_name(number): shards.write_tensors(rows, FIELD, values)})

    def _features(self, wanted: Sequence[Wanted]) -> Iterator[np.ndarray]:
        """Features of FID and KID beside logits of IS, fp32 (B, D + classes), a batch at a time."""
        from stages.scoring.alterations import squared

        for part in chunked(wanted, self.settings.batch).values():
            pictures = [self.place.pixels(one) for one in part]
            seen = {
                side: self.inception([squared(one, side, self.settings.resize, self.alteration) for one in pictures])
                for side in {self.settings.side, self.settings.side_is}
            }
            yield np.concatenate([seen[self.settings.side][0], seen[self.settings.side_is][1]], axis=1)
