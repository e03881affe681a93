"""What is said of rows that are not taken: a fault where they are lost, none where the config asks for no more."""

import logging
from types import SimpleNamespace

import pytest

from pipeline.settings import compose
from pipeline.steps.fetch import fetch


def test_a_limit_that_was_asked_for_is_in_the_log_and_no_warning(tmp_path, caplog: pytest.LogCaptureFixture):
    warnings: list[str] = []
    build = SimpleNamespace(
        config=compose.load("stage_c", ["scale=micro"]),
        path=str(tmp_path),
        call=lambda function, *arguments: function(*arguments),
        report=SimpleNamespace(warning=warnings.append),
    )
    with caplog.at_level(logging.INFO, "pipeline"):
        assert fetch(build).rows == 16  # type: ignore[arg-type]
    assert warnings == []
    assert "data.limit=16: 16 of 64 rows are taken; null takes all" in caplog.text
