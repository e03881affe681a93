"""Batches larger than the data would hold a sample twice: what plan, run and a training's step say of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.plan.dag import Step
from pipeline.settings.config import Config
from pipeline.store.artifacts import Artifact


@dataclass(frozen=True)
class Seen:
    """How many rows a phase sees, or can see at most (`bound`): of which view, if that is known to leave any out, and
    whether those held out are counted off."""

    rows: int
    view: str | None
    less_held_out: bool
    bound: bool = False


def inputs(step: Step, made: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """What of a training's samples is made: pictures, and what is encoded of them or of their captions."""
    others = ("stage_", "view_", "held_out")
    return {name: made[name] for name in step.inputs if name in made and not name.startswith(others)}


def at_most(config: Config, step: Step, made: Mapping[str, Artifact], view: str | None) -> Seen | None:
    """What a training can see at most through a view (None: of all), by the manifests of what is made so far.

    None where neither these nor the config tell.
    """
    before = {name: made[name] for name in ("metadata", "images") if name in made}  # what all samples come from
    known = [artifact.manifest["rows"] for artifact in (before | inputs(step, made)).values()]
    if "metadata" not in made and config.data.expected_rows is not None:
        known.append(config.data.expected_rows)
    held = made.get("held_out")
    rows = min(known) - (held.manifest["rows"] if held else 0) if known else None
    chosen = made.get(f"view_{view}")
    if chosen and (rows is None or chosen.manifest["rows"] < rows):
        return Seen(chosen.manifest["rows"], view, less_held_out=False, bound=True)
    return None if rows is None else Seen(rows, None, bool(held and held.manifest["rows"]), bound=True)


def too_large(config: Config, step: Step, seen: Callable[[str | None], Seen | None]) -> str | None:
    """What is wrong with the batches of a training, as a sentence; None if nothing is, as far as is known.

    `seen` tells what a phase sees through its view (None: of all data).
    """
    data = config.data
    limited = data.limit is not None and data.limit == data.expected_rows  # not by the captions of the source
    for training in config.trainings_of(step.name).values():
        for phase in training.phases:
            found = seen(phase.view)
            if found is None or phase.batch_size <= found.rows:
                continue
            what, remedy = "data", "raise data.limit" if limited else "take more data"
            if found.view:
                what, remedy = f"view {found.view}", "loosen the view"
            if data.holdout and found.less_held_out:
                remedy += ", or lower data.holdout"
            return (
                f"{step.name}: a batch of {phase.batch_size} is larger than the {what}, which has "
                f"{'at most ' * found.bound}{found.rows} rows{' to train on' * found.less_held_out}; "
                f"lower batch_size of the training's phases, or {remedy}"
            )
    return None
