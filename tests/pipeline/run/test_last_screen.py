"""What is printed: as it is, whatever brackets it holds, and whole where there is no terminal."""

from types import SimpleNamespace
from typing import Any

import pytest
from rich.table import Table

from pipeline.errors import UsageError
from pipeline.plan.cost import Estimate
from pipeline.run.last_screen import Built, Summary, show_summary
from pipeline.terminal import COLUMNS, print_table
from pipeline.verbs.plan import show_plan, tell_why
from tests.experiment import SKIPPED, Experiment


def test_brackets_in_words_paths_and_warnings_are_no_markup(capsys):
    step = Built("train_a", "stage_a", "built", "/runs/[old]/[new]/stage_a")
    show_summary(
        Summary(
            root="/runs/[old]",
            steps=[step],
            pictures=["/runs/[old]/grid.png"],
            warnings=["a [bold] word"],
            next_command="python -m pipeline sample conf=stage_c targets=[stage_c] out=pictures",
        )
    )
    said = capsys.readouterr().err
    assert "conf=stage_c targets=[stage_c] out=pictures\n" in said
    assert "all in /runs/[old]\n" in said
    assert "[new]/stage_a" in said
    assert "/runs/[old]/grid.png" in said
    assert "a [bold] word" in said


def test_the_last_screen_cuts_off_no_path(capsys):
    root = "/runs/" + "x" * 200
    path = f"{root}/artifacts/stage_a/0123456789abcdef"
    show_summary(Summary(root=root, steps=[Built("train_a", "stage_a", "built", path)]))
    said = capsys.readouterr().err.splitlines()
    assert f"all in {root}" in said
    assert any(line.endswith("artifacts/stage_a/0123456789abcdef") for line in said)


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


def test_scores_have_a_line_a_prompt_set(capsys):
    show_summary(Summary(scores=["training, n 64: psnr 31", "held_out, n 6: psnr [29]"]))
    said = capsys.readouterr().err.splitlines()
    place = said.index("scores      training, n 64: psnr 31")
    assert said[place + 1] == "            held_out, n 6: psnr [29]"


def test_what_trainings_left_out_is_told_of_earlier_runs_too(tmp_path, capsys):
    of = Experiment(tmp_path)
    of.data(SKIPPED)
    summary = Summary(steps=[Built("export", "release", "built", "/r")])
    summary.take(of.artifacts)
    show_summary(summary)
    assert "left out    Stage C: 2 bad steps, 4 pictures\n" in capsys.readouterr().err


def stale(changes: int) -> Any:
    told = tuple(f"data.key_{n}: {n * 'some'} -> other" for n in range(changes))
    step = SimpleNamespace(name="fetch", output="metadata")
    return SimpleNamespace(step=step, state="stale", reason="; ".join(told), changes=told)


def test_a_plan_shows_the_most_telling_changes_and_how_to_see_the_others(capsys):
    show_plan([stale(3), stale(9)], [Estimate(text="64 rows")] * 2)
    said = capsys.readouterr().out
    words = " ".join(said.split())
    assert all(f"data.key_{n}:" in words for n in range(3))
    assert "data.key_3" not in words
    assert words.count("and 6 more (--why fetch)") == 1
    assert max(map(len, said.splitlines())) <= COLUMNS


def test_the_whole_reason_of_a_step_is_a_change_a_line(capsys):
    item = stale(9)
    tell_why([item], "fetch")
    assert capsys.readouterr().out.splitlines() == [
        "fetch (metadata): stale",
        *(f"    {change}" for change in item.changes),
    ]
    with pytest.raises(UsageError, match=r"--why fetsh: .* no such step \(did you mean fetch\?\); it has fetch"):
        tell_why([item], "fetsh")


def test_no_table_is_wider_than_120_columns_where_there_is_no_terminal_and_nothing_is_cut_off(capsys):
    table = Table("a", "b", box=None, pad_edge=False)
    table.add_row("x" * 300, "y" * 300)
    print_table(table)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= COLUMNS
    assert (said.count("x"), said.count("y")) == (300, 300)
