"""What a run proposes when it has ended."""

from pipeline.run.last_screen import Summary
from pipeline.settings.words import parse
from pipeline.verbs.run import _next_command


def test_what_shows_a_run_finds_the_mlflow_that_the_run_had():
    words = [
        "run",
        "conf=stage_a",
        "scale=micro",
        "root=s3://bucket/x",
        "tracking=server",
        "tracking.uri=http://m:5000",
    ]
    shown = _next_command(parse(words), Summary())
    assert shown == "python -m pipeline ui root=s3://bucket/x tracking=server tracking.uri=http://m:5000"
