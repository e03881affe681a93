"""Distances of the drawn pictures, as sets, from real ones: FID, KID and IS from features that are stored.

A line a set of pictures: the whole of it, then what alterations make of it, then its first so many.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial

import numpy as np

from pipeline.models import feature_sets
from pipeline.models.feature_sets import FeatureSet
from pipeline.settings.config import Config
from pipeline.settings.evaluation import OURS, REFERENCE, Distances
from pipeline.store.artifacts import Artifact
from stages.scoring.distribution import Kid, Moments, frechet_distance, inception_score, kernel_distance

Arrays = tuple[np.ndarray, np.ndarray]
FILE = "distances.json"
EVERYTHING = "all"
FEWEST = 4  # pictures of either side that have a KID


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a set of pictures lies from the real ones of a prompt set; what was not measured is None.

    `called` has what FID, KID and IS may be called: of another network than Inception they are other numbers. `fid` is
    None of too few pictures. `part` is `all`, the name of an alteration, or `first <n>`."""

    set: str
    whose: str
    part: str
    n: int
    n_real: int | None
    fid: float | None
    kid: float | None
    kid_low: float | None
    kid_high: float | None
    inception_score: float
    inception_score_std: float
    called: Mapping[str, str]


def measured(config: Config, inputs: Mapping[str, Artifact]) -> list[Distance]:
    """Every line of a config, from the artifacts of its feature sets; what they are called is decided here, once."""
    sets = feature_sets.feature_sets(config)
    if not sets:
        return []
    from pipeline.models import inception

    line = partial(_line, config.eval.distances, inception.names(config))
    return [found for name in config.prompt_sets() for found in _of(config, name, sets, inputs, line)]


def _of(
    config: Config,
    name: str,
    sets: Mapping[str, FeatureSet],
    inputs: Mapping[str, Artifact],
    line: Callable[..., Distance],
) -> Iterator[Distance]:
    mine = {
        one: _Features.of(inputs[output], keep=one.whose in (OURS, REFERENCE) and not one.alteration)
        for output, one in sets.items()
        if one.prompts == name
    }
    real = next((features for one, features in mine.items() if one.whose == REFERENCE), None)
    for one, features in mine.items():
        if one.whose != REFERENCE:
            yield line(features, real, set=name, whose=one.whose, part=one.alteration or EVERYTHING)
        if one.whose == OURS and not one.alteration:
            most = min(len(each) for each in (features, real) if each is not None)
            for count in config.eval.distances.counts:
                if count < most:
                    first = real.first(count) if real else None
                    yield line(features.first(count), first, set=name, whose=OURS, part=f"first {count}")


class _Features:
    """The features and logits of a set, read when they are needed: 12 kB a picture."""

    def __init__(self, read: Callable[[], Arrays], rows: int) -> None:
        self._read, self._rows = read, rows

    @classmethod
    def of(cls, artifact: Artifact, keep: bool) -> "_Features":
        """Those of an artifact; what several lines need is kept once it is read."""

        def read() -> Arrays:
            features, logits = zip(*feature_sets.read(artifact), strict=True)
            return np.concatenate(features), np.concatenate(logits)

        return cls(cache(read) if keep else read, artifact.manifest["rows"])

    def __len__(self) -> int:
        return self._rows

    def first(self, count: int) -> "_Features":
        """Of the first so many pictures."""
        return _Features(self._read, min(count, self._rows))

    def read(self) -> Arrays:
        """(n, D) and (n, classes), fp32."""
        features, logits = self._read()
        return features[: self._rows], logits[: self._rows]

    @cached_property
    def moments(self) -> Moments:
        """Those of the features."""
        return _moments(self.read()[0])


def _line(
    settings: Distances, called: Mapping[str, str], ours: _Features, real: _Features | None, **about: str
) -> Distance:
    features, logits = ours.read()
    score = inception_score(logits)
    fid: float | None = None
    kid: Kid | None = None
    if real is not None:
        others, _ = real.read()
        n = min(len(features), len(others))
        if n >= FEWEST:
            kid = kernel_distance(features, others)
        if n >= settings.fid_from:
            fid = frechet_distance(_moments(features), real.moments)
    return Distance(
        **about,
        n=len(features),
        n_real=None if real is None else len(others),
        fid=fid,
        kid=kid.mean if kid else None,
        kid_low=kid.low if kid else None,
        kid_high=kid.high if kid else None,
        inception_score=score.mean,
        inception_score_std=score.std,
        called=called,
    )


def _moments(features: np.ndarray) -> Moments:
    """In fp64, a part at a time."""
    parts = [Moments.of(part) for part in np.array_split(features, -(-len(features) // 4096))]
    return sum(parts[1:], parts[0])


def metrics(lines: Iterable[Distance]) -> dict[str, float]:
    """The lines by name: FID, KID with its interval, IS, the pictures that they are of."""
    found: dict[str, float | None] = {}
    for line in lines:
        about = "/".join([line.set, line.whose, *[line.part.replace(" ", "_")] * (line.part != EVERYTHING)])
        found |= {f"{line.called['fid']}/{about}": line.fid, f"{line.called['is']}/{about}": line.inception_score}
        kid = f"{line.called['kid']}/{about}"
        found |= {kid: line.kid, f"{kid}/low": line.kid_low, f"{kid}/high": line.kid_high, f"{kid}/n": line.n}
    return {name: value for name, value in found.items() if value is not None}
