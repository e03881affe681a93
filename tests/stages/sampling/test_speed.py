"""Times of the stages, by a clock that is known."""

from itertools import accumulate, cycle
from types import SimpleNamespace

import pytest
import torch

from stages.sampling import speed
from stages.settings.sampling import SamplingConfig


def test_the_median_counts_for_each_stage_and_picture_and_the_first_time_does_not(monkeypatch):
    calls: list[str] = []
    for name in ("draw_code", "draw_latents", "decode"):
        monkeypatch.setattr(speed, name, lambda *given, name=name: calls.append(name))
    seconds = {0: (90, 90, 90), 1: (4, 40, 8), 2: (6, 20, 8), 3: (2, 60, 80)}  # by repetition, of C, B, A
    pauses = [pause for which in seconds.values() for pause in (0, *which)]
    ticks = accumulate(cycle(pauses))
    found = dict(
        speed.seconds_a_picture(
            SimpleNamespace(), SamplingConfig(), (1, 4), 3, torch.device("cpu"), lambda: next(ticks)
        )
    )
    assert found[1] == pytest.approx({"stage_c": 4, "stage_b": 40, "stage_a": 8})
    assert found[4] == pytest.approx({"stage_c": 1, "stage_b": 10, "stage_a": 2})
    assert calls == ["draw_code", "draw_latents", "decode"] * 8


def test_a_cpu_is_called_so_with_its_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert speed.device_name(torch.device("cpu")) == "cpu, 1 thread"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert speed.device_name(torch.device("cpu")) == "cpu, 8 threads"
