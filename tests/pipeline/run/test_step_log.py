"""What goes from a step to MLflow: measurements with the hours so far."""

from types import SimpleNamespace
from typing import Any

from pipeline.run.step_log import StepReporter


def reporter(**options: Any) -> tuple[StepReporter, list[Any]]:
    heard: list[Any] = []
    screen: Any = SimpleNamespace(done=0)
    return StepReporter(screen, SimpleNamespace(metrics=lambda *told: heard.append(told)), [], **options), heard


def test_each_entry_tells_the_hours_so_far_so_that_a_curve_can_be_read_against_cost():
    spent = iter((1.0, 2.0))
    report, heard = reporter(hours=lambda: next(spent))
    report.metrics({"compressor/loss": 0.5}, 10)
    report.metrics({"stage_b/loss": 0.5}, 1)
    assert heard == [
        ({"compressor/loss": 0.5, "hours/so_far/compressor": 1.0}, 10),  # whose steps are not those that follow
        ({"stage_b/loss": 0.5, "hours/so_far": 2.0}, 1),
    ]


def test_samples_of_devices_are_no_entries():
    report, heard = reporter(hours=lambda: 1.0)
    report.system({"system/node_0/gpu_0_power_usage_watts": 250.0}, 7)
    assert heard == [({"system/node_0/gpu_0_power_usage_watts": 250.0}, 7)]
