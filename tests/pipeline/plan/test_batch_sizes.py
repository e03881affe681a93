"""What of the data is made tells how many rows a training can see at most, and what would help."""

from typing import Any

import pytest

from pipeline.plan import batch_sizes
from pipeline.plan.dag import order
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.store.artifacts import Artifact

VIEWED = (
    "data.holdout=0.2",
    "data.views={fine: {min_side: 64}}",
    "stage_c.train.phases=[{steps: 2, batch_size: 16, size: 128}, {steps: 2, batch_size: 8, size: 128, view: fine}]",
)


def told(made: dict[str, int], *words: str) -> str | None:
    """What is said of Stage C's batches, where artifacts of so many rows are there."""
    config = compose.load("stage_c", ["scale=micro", *words])
    (step,) = (step for step in order(table(config), config.targets) if step.name == "train_c")
    artifacts: Any = {name: Artifact(name, "", {"rows": rows}) for name, rows in made.items()}
    return batch_sizes.too_large(config, step, lambda view: batch_sizes.at_most(config, step, artifacts, view))


@pytest.mark.parametrize(
    ("batch", "made", "rows"),
    [
        (17, {}, "16 rows;"),  # the config alone
        (16, {"metadata": 15}, "15 rows;"),
        (16, {"metadata": 16, "images": 14}, "14 rows;"),  # some could not be fetched
        (16, {"metadata": 16, "images": 16, "text_tiny": 16, "latents_c": 12}, "12 rows;"),
        (16, {"metadata": 16, "images": 16, "held_out": 2}, "14 rows to train on;"),
        (14, {"metadata": 16, "images": 16, "held_out": 2}, None),
        (16, {"metadata": 16, "images": 16, "held_out": 0}, None),
        (16, {"stage_a": 1, "stage_b": 1}, None),
    ],
)
def test_a_batch_is_held_to_what_is_made(batch, made, rows):
    said = told(made, f"stage_c.train.phases.0.batch_size={batch}", "data.shard_rows=16")
    assert (said is None) if rows is None else (f"larger than the data, which has at most {rows}" in (said or ""))


def test_the_remedy_is_of_what_is_short():
    data = "train_c: a batch of 16 is larger than the data, which has at most"
    lower = "lower batch_size of the training's phases, or"
    assert told({"images": 15}, *VIEWED) == f"{data} 15 rows; {lower} raise data.limit"
    held = {"images": 16, "held_out": 1}
    assert told(held, *VIEWED) == f"{data} 15 rows to train on; {lower} raise data.limit, or lower data.holdout"
    captions = ("data.holdout=0", "data.held_out_captions=[a]")
    assert told(held, *VIEWED, *captions) == f"{data} 15 rows to train on; {lower} raise data.limit"
    fine = "train_c: a batch of 8 is larger than the view fine, which has at most 7 rows; "
    assert told({"images": 16, "view_fine": 7}, *VIEWED) == f"{fine}{lower} loosen the view"
    assert told({"images": 16, "view_fine": 8, "held_out": 0}, *VIEWED) is None
