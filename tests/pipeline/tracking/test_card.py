"""Descriptions: the verdict, the data, the cost and what is wrong come first, in four lines."""

from dataclasses import replace

from pipeline.hours.spent import Spent
from pipeline.tracking import card
from pipeline.tracking.card import Score, StepLine, Story

COST = Spent(7200, {"other": 7200}, {"cpu": 7200}, 3600, 0, 0, 0, 0.5, None)
STORY = Story(
    unit="A100-hours",
    cost=COST,
    steps=[
        StepLine("train_c", "stage_c", "built", 1.5, "/root/stage_c"),
        StepLine("sample", "samples", "failed", 0.5, "/x"),
    ],
    scores=[Score("retrieval_top1", 0.75, 64)],
    data="1,000 pictures",
    command="python -m pipeline run conf=stage_c",
)


def test_four_lines_say_what_matters():
    first = card.of_command(STORY).splitlines()[:4]
    assert [line.strip() for line in first] == [
        "**retrieval_top1 0.75 of 64**",
        "Data: 1,000 pictures",
        "Cost: 2 A100-hours (1 failed), 50% in steps that lasted",
        "Wrong with it: nothing known",
    ]
    assert "| [train_c](run:stage_c) | stage_c | built | 1.5000 | `/root/stage_c` |" in card.of_command(STORY)
    assert card.verdict(STORY) == {"retrieval_top1 of 64": 0.75}


def test_the_verdict_is_one_line_however_many_scores_there_are():
    """MLflow shows four lines; the other scores stand among its metrics."""
    scores = [Score(f"psnr_stage_{n}_heldout", 21.4915, 6) for n in "abcdefgh"]
    first = card.of_command(replace(STORY, scores=scores)).partition("\n")[0].strip()
    assert (
        first == "**psnr_stage_a_heldout 21.49 of 6, psnr_stage_b_heldout 21.49 of 6, psnr_stage_c_heldout 21.49 of 6**"
    )
    assert len(card.verdict(replace(STORY, scores=scores))) == 8
    long = [Score("x" * 150, 1.0, 6)] * 2
    assert card.of_command(replace(STORY, scores=long)).startswith(f"**{'x' * 150} 1 of 6**")


def test_energy_is_told_where_it_was_measured():
    measured = replace(COST, joules=1.8e6, measured=3600.0)
    assert card.cost(measured, "A100-hours").endswith("; 0.5 kWh by NVML's counters, of 50% of these: 0.185 kg of CO2")
    assert "kWh" not in card.cost(COST, "A100-hours")


def test_a_run_that_failed_says_so_first():
    text = card.of_command(replace(STORY, error="sample failed 3 times", warnings=["a disk was full"], scores=()))
    assert text.startswith("**not finished: 1 of 2 steps built**")
    assert "Wrong with it: sample failed 3 times; a disk was full" in text


def test_a_step_that_failed_tells_its_sentence_its_hours_and_the_end_of_its_log():
    text = card.of_end("a node left", [f"line {n}" for n in range(100)], COST, "A100-hours")
    assert text.startswith("**a node left**")
    assert "2 A100-hours" in text
    assert "line 99" in text
    assert text.count("line ") == card.LOG_LINES


def test_each_score_is_told_with_the_pictures_that_it_is_of_and_few_of_them():
    metrics = {
        "n_training": 64, "n_heldout": 6, "retrieval_top1": 1.0, "psnr_generated": 26.0, "ssim_generated": 0.9,
        "retrieval_top1_heldout": 0.5, "pickscore/parti/mean": 21.0, "pickscore/parti/n": 1632,
        "pickscore/parti/sd/win_rate": 0.6, "pickscore/parti/sd/win_low": 0.5, "pickscore/parti/sd/n": 1600,
        "pickscore/parti/null/win_rate": 0.5, "pickscore/parti/null/n": 1632,
    }  # fmt: skip
    assert [(score.name, score.value, score.of) for score in card.headlines(metrics)] == [
        ("retrieval_top1", 1.0, 64),
        ("retrieval_top1_heldout", 0.5, 6),
        ("pickscore/parti/sd/win_rate", 0.6, 1600),
        ("pickscore/parti/mean", 21.0, 1632),
        ("psnr_generated", 26.0, 64),
    ]
    many = {f"clip_l/set{n}/mean": 1.0 for n in range(30)}
    assert len(card.headlines(many)) == card.MOST
