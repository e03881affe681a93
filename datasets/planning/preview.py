"""What a plan would leave out, said before anything runs, and whether it is too much."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pyarrow as pa

from datasets.config import DataConfig
from datasets.files import storage
from datasets.left_out import in_words
from datasets.planning import plan
from datasets.planning.mixture import Tally
from datasets.planning.plan import Counts
from datasets.source_settings import MIXTURE, Part
from datasets.sources import laion

EXAMPLES = 3  # of each cause, on the screen
QUICK = ("openmoji", "folder")  # sources that are listed in seconds
DRAWN = ("share", "limit")  # why rows are not taken that could be: no loss


def ahead(config: DataConfig, seed: int) -> Counts | None:
    """What `plan.make` would come to of the sources that can be listed in seconds, which lie on this machine.

    None where nothing of it would be news: the source bounds nothing that it may leave out (`max_left_out`). Of a
    mixture with others that are read first when it runs, all rows of these sources: shares are not known before.

    Raises:
        DataError: as of `plan.make`.
    """
    quick = [part for part in config.parts if part.config.metadata is None and part.config.source in QUICK]
    if not quick or not (config.source == MIXTURE or any(_budget(part) is not None for part in quick)):
        return None
    if len(quick) < len(config.parts):
        quick = [replace(part, weight=None) for part in quick]
        config = config.model_copy(update={"limit": None})
    return plan.make(config, seed, _drop, quick)


def unread(config: DataConfig, counts: Counts | None) -> list[str]:
    """Of a mixture a sentence for each source of which `ahead` tells nothing: how many rows it has, where that stands
    at the end of its files."""
    told = {tally.part.name for tally in counts.sources} if counts else set()
    found = []
    for part in config.parts if config.source == MIXTURE else ():
        if part.name not in told:
            path = part.config.metadata
            rows = laion.count(path) if path and not storage.is_remote(path) else None
            known = (
                "its rows are known when fetch has read them" if rows is None else f"{rows:,} rows, not filtered yet"
            )
            found.append(f"{called(part)}: {known}")
    return found


def called(part: Part) -> str:
    """What a source is called in sentences."""
    if part.apart:
        return part.name if part.name == part.config.source else f"{part.name} ({part.config.source})"
    return part.config.metadata or part.name


def told(config: DataConfig, counts: Counts) -> list[str]:
    """What a person should know of rows that are lost or passed over, a sentence each."""
    sentences = []
    for tally in counts.sources:
        where = called(tally.part)
        if lost := _lost(tally):
            sentences.append(f"{_used(tally)}; left out: {lost}")
            sentences += [f"  left out: {example}" for example in tally.left_out.examples(EXAMPLES)]
        least = tally.part.config.filters.min_side  # null where a source knows no sizes
        if least is not None and least < config.image.size:
            sentences.append(
                f"{where}: {tally.part.key}.filters.min_side is below data.image.size={config.image.size}: smaller "
                "pictures are planned, but none is stored (too_small), for nothing is enlarged"
            )
        if others := in_words(tally.left_out.others):
            sentences.append(f"{where}: passed over, as neither pictures nor captions in use: {others}")
    return sentences


def as_asked(config: DataConfig, counts: Counts) -> list[str]:
    """What is taken as the config wants it, and is no fault: of each source of a mixture that loses nothing, and below
    `data.limit`."""
    sentences = [_used(tally) for tally in counts.sources if tally.part.apart and not _lost(tally)]
    if left := counts.rejected.get("limit", 0):
        fit = counts.captions + left
        sentences.append(f"data.limit={config.limit}: {counts.captions:,} of {fit:,} rows are taken; null takes all")
    return sentences


def _lost(tally: Tally) -> str:
    """What a source loses, by cause, in words."""
    return in_words({cause: count for cause, count in tally.left_out.counts.items() if cause not in DRAWN})


def _used(tally: Tally) -> str:
    drawn = in_words({cause: tally.left_out.counts[cause] for cause in DRAWN})
    beyond = f"; beyond its share or the limit: {drawn}" if drawn and tally.part.apart else ""
    return f"{called(tally.part)}: {tally.captions:,} of {tally.read:,} used{beyond}"


def document(counts: Counts) -> dict[str, Any]:
    """The counts for a JSON document, in all and by source; `listed` are the first rows of each cause that are left
    out."""
    sources = [_section(tally) for tally in counts.sources]
    names = ("planned", "captions", "read")
    return {
        **{name: sum(source[name] for source in sources) for name in names},
        "left_out": {cause: count for cause, count in counts.rejected.items() if count},
        "passed_over": dict(sum((tally.left_out.others for tally in counts.sources), Counter())),
        "listed": [example for source in sources for example in source["listed"]],
        "sources": sources,
    }


def _section(tally: Tally) -> dict[str, Any]:
    return {
        "name": tally.part.name,
        "source": tally.part.config.source,
        "planned": tally.planned,
        "captions": tally.captions,
        "read": tally.read,
        "left_out": {cause: count for cause, count in tally.left_out.counts.items() if count},
        "passed_over": dict(tally.left_out.others),
        "listed": tally.left_out.examples(EXAMPLES),
    }


def beyond_budget(counts: Counts) -> str | None:
    """That more is left out than a source's settings allow, as a sentence; None where all are within."""
    for tally in counts.sources:
        budget, part = _budget(tally.part), tally.part
        lost = {cause: count for cause, count in tally.left_out.counts.items() if cause not in (*DRAWN, "removed")}
        if budget is not None and sum(lost.values()) > budget * tally.read:
            first = "; ".join(tally.left_out.examples(1)[:EXAMPLES])
            return (
                f"{part.key}.{part.config.source}.max_left_out={budget:g}: {sum(lost.values()):,} of {tally.read:,} "
                f"rows would be left out: {in_words(lost)}; the first: {first}; mend these, loosen "
                f"{part.key}.filters, or raise it"
            )
    return None


def _budget(part: Part) -> float | None:
    return None if part.config.metadata else getattr(part.config.settings, "max_left_out", None)


def _drop(part: pa.Table) -> None:
    """A plan is not kept: only its counts are wanted."""
