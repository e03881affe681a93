"""The table of win rates: ours over each rival, then over ourselves, then what the paper reports, grey."""

import io
from dataclasses import asdict

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from pipeline.models import score_tables
from pipeline.models.distances import Distance
from pipeline.models.drawing_speed import Timing
from pipeline.results.measures import distance_table, speed_table
from pipeline.verbs.show import _measures, _win_rates


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


def printed(table: Table) -> list[str]:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_fid_is_not_told_of_too_few_and_the_papers_stands_below():
    kid = {"kid": 0.001234, "kid_low": -0.0001, "kid_high": 0.0025}
    about = {"set": "coco", "whose": "ours", "inception_score": 40.123, "inception_score_std": 0.5}
    named = {name: name for name in ("fid", "kid", "is")}
    lines = [
        Distance(**about, **kid, part="all", n=30000, n_real=30000, fid=23.456, called=named),
        Distance(**about, **kid, part="first 1000", n=1000, n_real=1000, fid=None, called=named),
        Distance(**about, **dict.fromkeys(kid), part="jpeg_75", n=9, n_real=None, fid=None, called=named),
    ]
    found = printed(_measures(distance_table([asdict(line) for line in lines])))
    assert " ".join(found[0].split()) == "pictures for changed by n real FID KID x 1000 IS"
    assert " ".join(found[1].split()) == "ours coco 30,000 30,000 23.46 1.23 [-0.10, 2.50] 40.12 ± 0.50"
    assert "first 1000" in found[2]
    assert "too few" in found[2]
    assert " ".join(found[3].split()) == "ours coco jpeg_75 9 40.12 ± 0.50"
    assert " ".join(found[4].split()) == "Würstchen, the paper's coco 30,000 23.6 40.9"
    elsewhere = [asdict(line) | {"set": "mine"} for line in lines]
    assert len(printed(_measures(distance_table(elsewhere)))) == 4
    other = [asdict(line) | {"called": named | {"fid": "fd:01234567"}} for line in lines]
    assert len(found := printed(_measures(distance_table(other)))) == 4  # of another network: nothing to compare with
    assert "FD:01234567" in found[0]


def test_the_time_of_each_stage_stands_beside_what_they_take_together():
    found = printed(_measures(speed_table([asdict(Timing("compiled", 4, "NVIDIA H200", "bf16", 0.25, 0.5, 0.0125))])))
    assert " ".join(found[0].split()) == "drawn at a time Stage C Stage B Stage A all on in"
    assert " ".join(found[1].split()) == "compiled 4 0.25 0.5 0.0125 0.762 NVIDIA H200 bf16"
