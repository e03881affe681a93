"""What is printed: as it is, whatever brackets it holds, and whole where there is no terminal."""

from types import SimpleNamespace
from typing import Any

from rich.table import Table

from pipeline.run.last_screen import Built, Summary, show_summary
from pipeline.terminal import print_table
from pipeline.verbs.plan import show_plan


def test_brackets_in_words_paths_and_warnings_are_no_markup(capsys):
    step = Built("train_a", "stage_a", "built", "/runs/[old]/stage_a")
    show_summary(
        Summary(
            steps=[step],
            pictures=["/runs/[old]/grid.png"],
            warnings=["a [bold] word"],
            next_command="python -m pipeline sample conf=stage_c targets=[stage_c] out=pictures",
        )
    )
    said = capsys.readouterr().err
    assert "conf=stage_c targets=[stage_c] out=pictures\n" in said
    assert "/runs/[old]/stage_a" in said
    assert "/runs/[old]/grid.png" in said
    assert "a [bold] word" in said


def test_the_last_screen_cuts_off_no_path(capsys):
    path = "/runs/" + "x" * 200
    show_summary(Summary(steps=[Built("train_a", "stage_a", "built", path)]))
    assert path in capsys.readouterr().err


def test_interruptions_are_told_with_what_they_cost(capsys):
    steps = [
        Built("train_b", "stage_b", "built", "/b", interruptions=1, steps_again=12),
        Built("train_c", "stage_c", "built", "/c", interruptions=2, preemptions=1, steps_again=1),
        Built("export", "release", "built", "/r"),
    ]
    show_summary(Summary(steps=steps))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("interrupted")]
    assert said == [
        "interrupted train_b: 12 steps done again after 1 interruption",
        "interrupted train_c: 1 step done again after 2 interruptions, 1 of them because a node was taken away",
    ]


def test_a_plans_reason_is_shown_whole(capsys):
    reason = "data.openmoji.captions: [red, heart] -> [blue]; " + "and more; " * 40 + "to the end"
    step = SimpleNamespace(name="fetch", output="metadata")
    item: Any = SimpleNamespace(step=step, state="stale", reason=reason)
    show_plan([item], [{"memory": None, "text": "64 rows", "phases": []}])
    assert reason in capsys.readouterr().out


def test_a_table_in_a_pipe_is_as_wide_as_its_content(capsys):
    table = Table("a", "b", box=None, pad_edge=False)
    table.add_row("x" * 300, "y" * 300)
    print_table(table)
    assert f"{'x' * 300}  {'y' * 300}" in capsys.readouterr().out
