"""Curves of losses, as drawn."""

import re

import pytest

from pipeline.verbs.report import plots


@pytest.mark.parametrize("begin", [0, 400, 1_250_000, 123_456_789])
@pytest.mark.parametrize("length", [4, 7, 1_000])
def test_an_axis_tells_its_marks_apart_however_late_and_short_the_curve_is(begin, length):
    points = [{"step": begin + step, "value": 2.5 + step / 1e4} for step in range(1, length + 1)]
    drawing = plots.curves({"loss": points}, "step")
    assert drawing is not None
    marks = re.findall(r'text-anchor="middle">([\d,.]+)</text>', drawing)
    assert len(marks) > 2
    assert len(set(marks)) == len(marks)
    assert all(0 <= float(mark.replace(",", "")) <= begin + length for mark in marks)
