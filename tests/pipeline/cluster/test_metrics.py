"""What Prometheus hears of a step: the figures that are there anyway, and nothing of what is over."""

import math
from collections.abc import Mapping

import pytest

from pipeline.cluster import metrics
from pipeline.cluster.metrics import METRICS, Metric, Projection
from pipeline.run.step_log import StepReporter


class Heard(dict[tuple[str, str], float]):
    """The last value of each series, by name and labels."""

    def __call__(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self[metric.name, ",".join(labels.values())] = value


@pytest.fixture
def heard() -> Heard:
    return Heard()


def reporter(heard: Heard, clock: list[float]) -> StepReporter:
    class Screen:
        done = 0

        def update(self, done: int, total: int, unit: str) -> None:
            self.done = done

    class Tracked:
        def metrics(self, values: dict[str, float], step: int) -> None: ...

    told = Projection(heard, lambda: clock[0])
    return StepReporter(Screen(), Tracked(), [], hours=lambda: 0.5, exported=told)  # type: ignore[arg-type]


def test_a_training_s_log_progress_and_states_are_told(heard):
    clock = [100.0]
    report = reporter(heard, clock)
    report.begin_training(8)
    report.progress(3, 10, "stage_c steps")
    report.metrics({"stage_c/loss": 0.25, "stage_c/speed/images_per_second": 7.0, "stage_c/gradient_norm": 1.0}, 3)
    assert heard["checkpoint_timestamp_seconds", ""] == heard["progress_timestamp_seconds", ""] == 100.0
    clock[0] = 160.0
    report.saved("stage_c", 3)
    report.progress(3, 10, "stage_c steps")  # no further
    assert heard["checkpoint_timestamp_seconds", ""] == 160.0
    assert heard["progress_timestamp_seconds", ""] == 100.0
    assert (heard["done", "stage_c steps"], heard["backlog", "stage_c steps"], heard["ranks", ""]) == (3, 7, 8)
    assert (heard["loss", "stage_c"], heard["images_per_second", "stage_c"]) == (0.25, 7.0)
    assert math.isnan(heard["mfu", "stage_c"])  # of a CPU
    assert heard["device_hours", ""] == 0.5


def test_of_what_is_over_only_totals_stand(heard):
    report = reporter(heard, [1.0])
    report.lost({"dns": 2, "gone": 0})
    report.progress(8, 10, "pictures")
    report.begin_training(1)
    report.metrics({"stage_a/loss": 1.0}, 1)
    report.exported.end()
    stand = {name: value for name, value in heard.items() if not math.isnan(value)}
    assert stand == {("lost_pictures", "dns"): 2, ("lost_pictures", "gone"): 0, ("device_hours", ""): 0.5}


def test_all_in_the_list_is_told_and_nothing_else(heard):
    report = reporter(heard, [1.0])
    report.lost({"dns": 2})
    report.begin_training(1)
    report.progress(1, 2, "pictures")
    report.saved("stage_a", 1)
    report.metrics({"stage_a/loss": 1.0}, 1)
    assert {name for name, _ in heard} == {metric.name for metric in METRICS}
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_a_label_that_the_list_does_not_have_is_a_fault_of_ours(heard):
    with pytest.raises(AssertionError, match="ranks"):
        Projection(heard)._put(metrics.RANKS, 1, training="stage_c")
