"""What a plan would leave out, said before anything runs, and whether it is too much."""

from typing import Any

import pyarrow as pa

from datasets.config import DataConfig
from datasets.left_out import in_words
from datasets.planning import plan
from datasets.planning.plan import Counts

EXAMPLES = 3  # of each cause, on the screen


def ahead(config: DataConfig, seed: int) -> Counts | None:
    """What `plan.make` would come to, where the source's settings bound what may be left out (`max_left_out`).

    Such a source lies on this machine, and is listed in seconds. None for others.

    Raises:
        DataError: as of `plan.make`.
    """
    return plan.make(config, seed, _drop) if _budget(config) is not None else None


def told(config: DataConfig, counts: Counts) -> list[str]:
    """What a person should know of rows that are not taken, a sentence each."""
    where = config.metadata or config.source
    lost = {cause: count for cause, count in counts.rejected.items() if cause != "limit"}
    sentences = []
    if told := in_words(lost):
        sentences.append(f"{where}: {counts.captions:,} of {counts.read:,} used; left out: {told}")
        sentences += [f"  left out: {example}" for example in counts.left_out.examples(EXAMPLES)]
    if others := in_words(counts.left_out.others):
        sentences.append(f"{where}: passed over, as neither pictures nor captions in use: {others}")
    if beyond := counts.rejected.get("limit", 0):
        fit = counts.captions + beyond
        sentences.append(f"data.limit={config.limit}: {counts.captions:,} of {fit:,} rows are taken; null takes all")
    return sentences


def document(counts: Counts) -> dict[str, Any]:
    """The counts for a JSON document; `listed` are the first rows of each cause that are left out."""
    passed_over, listed = dict(counts.left_out.others), counts.left_out.examples(EXAMPLES)
    rejected = {cause: count for cause, count in counts.rejected.items() if count}
    return {
        "planned": counts.planned,
        "captions": counts.captions,
        "read": counts.read,
        "left_out": rejected,
        "passed_over": passed_over,
        "listed": listed,
    }


def beyond_budget(config: DataConfig, counts: Counts) -> str | None:
    """That more is left out than the source's settings allow, as a sentence; None where it is within."""
    budget = _budget(config)
    lost = {cause: count for cause, count in counts.rejected.items() if cause not in ("limit", "removed")}
    if budget is None or sum(lost.values()) <= budget * counts.read:
        return None
    first = "; ".join(counts.left_out.examples(1)[:EXAMPLES])
    return (
        f"data.{config.source}.max_left_out={budget:g}: {sum(lost.values()):,} of {counts.read:,} rows would be left "
        f"out: {in_words(lost)}; the first: {first}; mend these, loosen data.filters, or raise it"
    )


def _budget(config: DataConfig) -> float | None:
    return None if config.metadata else getattr(config.settings, "max_left_out", None)


def _drop(part: pa.Table) -> None:
    """A plan is not kept: only its counts are wanted."""
