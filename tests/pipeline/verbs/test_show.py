"""The table of win rates: ours over each rival, then over ourselves, then what the paper reports, grey."""

import io
from dataclasses import asdict

import numpy as np
import pyarrow as pa
from rich.console import Console

from pipeline.models import score_tables
from pipeline.verbs.show import _win_rates


def test_under_every_table_stands_what_chance_gives_and_what_the_paper_reports():
    rows = [
        {
            "set": prompts, "key": f"{n:032x}", "prompt": "p", "scorer": "pickscore", "truncated": False,
            "score": np.float32(n), "null": np.float32(n + (1 if n % 2 else -1)), "rival_other": np.float32(-1),
        }
        for prompts in ("parti", "mine")
        for n in range(10)
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=score_tables.schema(["other"]))
    console = Console(width=160, record=True, file=io.StringIO(), force_terminal=True)
    console.print(_win_rates([asdict(line) for line in score_tables.win_rates(table)]))
    lines = [line.rstrip() for line in console.export_text(clear=False).splitlines()]
    assert lines[0].split() == ["ours", "wins", "by", "parti", "mine"]
    assert lines[1].count("100.0 % [72.2, 100.0] n 10 p 0.002") == 2
    assert lines[2].startswith("same model, other seed")
    assert lines[2].count("50.0 % [23.7, 76.3] n 10 p 1") == 2
    theirs = next(line for line in lines if line.startswith("over SD 2.1, the paper's"))
    assert theirs.endswith("74.6 %")  # of Parti's prompts; nobody reports mine
    assert "\x1b[90m" in console.export_text(styles=True)
