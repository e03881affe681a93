"""Several sources in one plan: what became of the rows of each, and how many of each are taken where they have shares.

Every row of a source has a number, in the order of its lot. Row number k of a source with weight w is wanted at the
moment (k + 1/2) / w: so at every moment the counts are as the weights, to within a row. Rows are taken up to the limit,
or until the first source has no more: a larger limit only adds rows.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from datasets.config import DataError
from datasets.left_out import LeftOut
from datasets.planning import grouping
from datasets.planning.spill import Spill
from datasets.source_settings import Part
from datasets.sources.table import known_as


@dataclass
class Tally:
    """What became of the rows of a source: `left_out` names and counts those that are not planned."""

    part: Part
    left_out: LeftOut = field(init=False)
    read: int = 0
    planned: int = 0
    captions: int = 0

    def __post_init__(self) -> None:
        self.left_out = LeftOut(self.part.renamed, known_as)


def in_shares(
    drawn: Iterator[pa.Table],
    spill: Spill,
    weights: Mapping[str, float],
    limit: int | None,
    tallies: Mapping[str, Tally],
) -> Iterator[pa.Table]:
    """Of rows in the order of their lots as many of each source as the weights and the limit say.

    The others are left out: as `share` where the sources have no more that would fit them, else as `limit`.

    Raises:
        DataError: a source has none of its own.
    """
    there: Counter[str] = Counter()
    for rows in drawn:
        there.update(grouping.by_source(rows.select(["source"])))
        spill.add(rows)
    if bare := next((name for name in weights if not there[name]), None):
        raise DataError(
            f"{tallies[bare].part.key}: each picture of {bare} is of a source before it, so its weight leaves "
            "no row of any; leave it out, or all weights"
        )
    shared, taken = quotas(there, weights, None), quotas(there, weights, limit)
    numbers: Counter[str] = Counter()
    for _, rows in spill.buckets():
        places = np.zeros(rows.num_rows, np.int64)
        sources = rows["source"].to_numpy(zero_copy_only=False)
        for name in weights:
            mine = np.flatnonzero(sources == name)
            places[mine] = numbers[name] + np.arange(len(mine))
            numbers[name] += len(mine)
        fits, within = (np.array([quota[name] for name in sources]) for quota in (taken, shared))
        for cause, beyond in {"share": places >= within, "limit": (places >= fits) & (places < within)}.items():
            for name, count in grouping.by_source(rows.filter(pa.array(beyond))).items():
                tallies[name].left_out.counts[cause] += count
        yield rows.filter(pa.array(places < fits))


def quotas(there: Mapping[str, int], weights: Mapping[str, float], limit: int | None) -> dict[str, int]:
    """How many rows of each source are taken, of those that are there."""

    def wanted(moment: float) -> dict[str, int]:
        return {name: min(there.get(name, 0), math.ceil(moment * weight - 0.5)) for name, weight in weights.items()}

    def following(name: str) -> float:
        return (taken[name] + 0.5) / weights[name]

    end = min((there.get(name, 0) + 0.5) / weight for name, weight in weights.items())  # when one would need one more
    taken = wanted(end)
    if limit is not None and sum(taken.values()) > limit:
        start = 0.0
        while start < (middle := (start + end) / 2) < end:
            start, end = (middle, end) if sum(wanted(middle).values()) <= limit else (start, middle)
        taken = wanted(start)
        while sum(taken.values()) < limit:  # of those that are wanted at the same moment, the first ones
            taken[min(weights, key=following)] += 1
    return taken
