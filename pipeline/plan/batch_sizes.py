"""Batches larger than the data would hold a sample twice: what plan, run and a training's step say of them."""

from collections.abc import Callable

from pipeline.settings.config import Config


def too_large(config: Config, step: str, rows: Callable[[str | None], int], bound: bool = False) -> str | None:
    """What is wrong with the batches of a training step, as a sentence; None if nothing is.

    `rows` tells how many a phase sees through its view (None: of all data); as a `bound`, how many there can be at all.
    """
    data = config.data
    limited = data.limit is not None and data.limit == data.expected_rows  # not by the captions of the source
    for training in config.trainings_of(step).values():
        for phase in training.phases:
            view = None if bound else phase.view
            if phase.batch_size <= (count := rows(view)):
                continue
            seen, remedy = "data", "raise data.limit" if limited else "take more data"
            if view:
                seen, remedy = f"view {view}", "loosen the view"
            if data.holdout and not bound:
                remedy += ", or lower data.holdout"
            return (
                f"{step}: a batch of {phase.batch_size} is larger than the {seen}, which has "
                f"{'at most ' * bound}{count} rows; lower batch_size of the training's phases, or {remedy}"
            )
    return None
