"""Hours beside the paper's: its own figures to the last digit, and no comparison of what is not the same."""

import pytest

from pipeline.hours.paper import CPU_UNIT, compare_with_paper, differs, hours_unit, paper_kg, references, savings
from pipeline.hours.spent import StepHours
from pipeline.hours.table import _papers, peak_of


@pytest.mark.parametrize(
    ("hours", "intensity", "kg"),
    [(24_602, 0.37, 2275.7), (9_200, 0.57, 1311.0), (150_000, 0.30, 11_250), (200_000, 0.30, 15_000)],
)
def test_the_papers_co2_is_that_of_its_hours(hours, intensity, kg):
    assert paper_kg(hours, intensity) == pytest.approx(kg, abs=0.05)


def test_how_many_times_fewer_depends_on_what_is_counted():
    assert [round(times, 3) for times in savings().values()] == [8.129, 5.618, 16.304]


def test_each_reference_tells_what_its_hours_include_and_where_they_are_from():
    assert all(row["scope"] and row["source"] for row in references())


@pytest.mark.parametrize(
    ("kind", "unit"),
    [
        ("cpu", CPU_UNIT),
        ("cuda:NVIDIA A100-SXM4-80GB", "A100-hours"),
        ("cuda:NVIDIA H200", "hours on NVIDIA H200"),
        ("cuda:NVIDIA A100-SXM4-80GB + cuda:NVIDIA H200", "hours on NVIDIA A100-SXM4-80GB + cuda:NVIDIA H200"),
    ],
)
def test_only_a100_hours_are_called_so(kind, unit):
    assert hours_unit(kind) == unit


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("cuda:A100", 312e12),
        ("cuda:NVIDIA A100-SXM4-80GB", 312e12),
        ("cuda:H100", None),  # which of three
        ("cuda:NVIDIA H100 80GB HBM3", 989e12),
        ("cuda:NVIDIA H100 PCIe", 756e12),
        ("cuda:NVIDIA GeForce RTX 4090", 165.2e12),
        ("cuda:NVIDIA GeForce RTX 3090", None),
        ("cpu", None),
        ("cuda:GPU", None),
        ("cuda:A100 + cuda:H200", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(kind, peak):
    assert peak_of(kind) == peak


def _spent(step: str, hours: float, kind: str = "cuda:A100") -> StepHours:
    return StepHours(step, "abc123", 1, 0, False, {kind: hours * 3600})


def test_stage_c_is_compared_with_the_papers_hours():
    ours = compare_with_paper(_spent("train_c", 2460.2))
    assert ours is not None
    assert (ours.paper_hours, ours.ratio) == (24_602, pytest.approx(0.1))
    assert str(ours) == "train_c: 2460 A100-hours (0.1 of the paper's); paper: 24,602 A100-hours"


def test_the_baseline_is_compared_with_the_papers_baseline():
    ours = compare_with_paper(_spent("train_baseline", 2500))
    assert ours is not None
    assert (ours.paper_hours, ours.ratio) == (25_000, pytest.approx(0.1))


def test_cpu_hours_are_not_compared():
    ours = compare_with_paper(_spent("train_c", 0.1, "cpu"))
    assert ours is not None
    assert ours.ratio is None
    assert "not comparable to A100-hours" in str(ours)


def test_a_fine_tune_is_no_share_of_the_papers():
    ours = compare_with_paper(_spent("train_c", 160), "it starts from weights whose hours are not in this")
    assert ours is not None
    assert ours.ratio is None
    assert str(ours).startswith("train_c: 160 A100-hours; not beside the paper's 24,602 A100-hours: it starts from")


@pytest.mark.parametrize("step", ["train_a", "train_previewer", "encode_text"])
def test_what_the_paper_does_not_report_is_not_compared(step):
    assert compare_with_paper(_spent(step, 1)) is None


def test_what_is_not_the_papers_model_or_schedule_is_named():
    paper = _papers()
    assert all(differs(step, paper, paper) is None for step in ("train_b", "train_c", "train_baseline"))
    c = paper["stage_c"]
    narrow = {**paper, "stage_c": {**c, "model": {**c["model"], "width": 64}}}
    assert differs("train_c", narrow, paper) == "other parameters (stage_c.model.width)"
    short = {**paper, "stage_c": {**c, "train": {**c["train"], "phases": c["train"]["phases"][:1]}}}
    assert differs("train_c", short, paper) == "another schedule (stage_c.train.phases)"
    faster = {**paper, "stage_c": {**c, "train": {**c["train"], "learning_rate": 2e-4}}}
    assert differs("train_c", faster, paper) is None
