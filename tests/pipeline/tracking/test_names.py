"""What runs are called: what was typed."""

import pytest

from pipeline.tracking import names


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python -m pipeline run conf=stage_c", "stage_c · 3fa2"),
        ("python -m pipeline run conf=stage_c scale=micro root='/a b' workers=2", "stage_c micro · 3fa2"),
        (
            "python -m pipeline run conf=stage_c scale=micro stage_c.train.learning_rate=2e-4 seed=1",
            "learning_rate=2e-4 seed=1 · stage_c micro · 3fa2",
        ),
        (
            "run conf=stage_c stage_b.train.learning_rate=1e-4 stage_c.train.learning_rate=2e-4 seed=1",
            "stage_b.train.learning_rate=1e-4 stage_c.train.learning_rate=2e-4 seed=1 · stage_c · 3fa2",
        ),
        (
            "run conf=stage_c stage_c.train.phases.0.steps=4 stage_c.train.phases.1.steps=8 limit=3 data.limit=9",
            "0.steps=4 1.steps=8 limit=3 data.limit=9 · stage_c · 3fa2",
        ),
        ("python -m pipeline run conf=stage_c --force train_c", "force=train_c · stage_c · 3fa2"),
        (
            "python -m pipeline run conf=stage_c --json --force train_c --force=train_b --dry seed=1",
            "force=train_c train_b seed=1 · stage_c · 3fa2",
        ),
        ("python -m pipeline run conf=stage_c data.hub_token=canary", "hub_token=*** · stage_c · 3fa2"),
        ("python -m pipeline run conf=stage_c budget.hours=3 cluster.price_per_hour=2", "stage_c · 3fa2"),
        ("", "stage_c · 3fa2"),
    ],
)
def test_a_run_is_called_what_was_typed(command, name):
    assert names.of_command("stage_c", command, "20261129-215150-3fa2") == name


def test_a_name_of_many_words_fits_the_column_of_any_database():
    words = " ".join(f"eval.prompts.set{number}=/data/prompts/{number}.txt" for number in range(40))
    name = names.of_command("stage_c", f"python -m pipeline run conf=stage_c {words}", "20261129-215150-3fa2")
    assert name.startswith("set0=/data/prompts/0.txt set1=")
    assert name.endswith("… · stage_c · 3fa2")
    assert len(name) == names.LONGEST <= 250


def test_a_step_is_told_from_others_of_its_name():
    assert names.of_step("train_c", "6e3b000000000000") == "train_c · 6e3b"


def test_a_step_of_a_long_name_fits_too():
    name = names.of_step("samples_" + "x" * 245, "6e3b000000000000")
    assert name.endswith("x… · 6e3b")
    assert len(name) == names.LONGEST


def test_settings_are_parameters_as_one_would_type_them():
    settings = {"stage_c": {"text": "clip_h", "train": {"lr": 1e-4, "phases": [{"steps": 1}]}}, "seed": 0}
    assert names.plain(settings) == {
        "stage_c.text": "clip_h",
        "stage_c.train.lr": "0.0001",
        "stage_c.train.phases": '[{"steps": 1}]',
        "seed": "0",
    }


def test_mlflow_shows_a_trainings_losses_first_then_its_pictures():
    values = {"stage_c/gradient_norm": 1.0, "stage_c/loss": 2.0, "stage_c/validation_loss": 3.0, "hours/so_far": 4.0}
    first = names.seen_first(values | {"stage_c/validation_loss_ema": 5.0, "speed/mfu": 0.1, "loss": 6.0})
    assert first == {
        "1 Loss/stage_c": 2.0, "1 Loss/stage_c validation": 3.0, "1 Loss/stage_c validation of the average": 5.0
    }  # fmt: skip
    sections = {name.rpartition("/")[0] for name in [*values, *first, names.of_picture("stage_c panel")]}
    wanted = ["1 Loss", "2 Pictures", "hours", "stage_c"]
    assert sorted(sections) == sorted(sections, key=str.casefold) == wanted  # both of which MLflow's pages do
