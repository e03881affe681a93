"""`doctor` with a config: what it needs of a cluster and of storage, told without either."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.__main__ import main

PAPER = ("conf=stage_c", "scale=paper", "cluster=a100x64", "workers=64")


def findings(capsys, tmp_path, *words: str) -> dict[str, dict[str, str]]:
    main(["doctor", *PAPER, f"root={tmp_path}/root", *words, "--json"])
    return {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}


def test_the_paper_on_64_workers_is_looked_through_without_them(capsys, tmp_path):
    names = ("TEXT", "URL", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE")
    pq.write_table(pa.table({name: [None] for name in names}), tmp_path / "laion.parquet")
    found = findings(capsys, tmp_path, f"data.metadata={tmp_path}")
    assert found["workers"]["state"] == "ok"
    assert "stage_c.train 24, 24, 12, 6" in found["workers"]["found"]
    assert (found["device memory"]["state"], found["inputs"]["state"]) == ("warning", "failed")
    assert "metadata" not in found["inputs"]["found"]
    assert "weights get clip_h efficientnet_v2_s" in found["inputs"]["found"]
    assert not (tmp_path / "root").exists()


def test_memory_is_that_of_the_fewest_workers(capsys, tmp_path):
    words = (f"data.metadata={tmp_path}", "cluster.gpu_memory_gib=40")
    assert findings(capsys, tmp_path, *words)["device memory"]["state"] == "ok"
    found = findings(capsys, tmp_path, *words, "cluster.min_workers=8")
    assert found["device memory"]["state"] == "failed"
    assert "of device memory a worker" in found["device memory"]["found"]
    assert "there is no Parquet file at" in found["inputs"]["found"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((*PAPER, "workers=63"), "stage_a.train.phases.0.batch_size=256 does not divide among workers=63"),
        ((*PAPER, "cluster.min_workers=65"), "cluster.min_workers=65 is more than workers=64"),
        (("workers=2",), "doctor needs conf=NAME"),
    ],
)
def test_what_could_never_run_is_refused(capsys, tmp_path, words, told):
    assert main(["doctor", *words, f"data.metadata={tmp_path}", f"root={tmp_path}/root"]) == 2
    assert told in capsys.readouterr().err
