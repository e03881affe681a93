"""`doctor` with a conf: whether that could run here, or as much as can be told without its cluster."""

import json
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.__main__ import main
from pipeline.cluster import joining
from pipeline.verbs.doctor import conf

MICRO = ("conf=stage_c", "scale=micro")
PAPER = ("conf=stage_c", "scale=paper", "cluster=a100x64", "workers=64")
NOBODY = "127.0.0.1:9"  # the discard service, which no machine has run for decades


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def listening() -> Iterator[str]:
    """The address of somebody who takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def findings(capsys, tmp_path, *words: str) -> dict[str, dict[str, str]]:
    main(["doctor", f"root={tmp_path}/root", *words, "--json"])
    found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert not (tmp_path / "root").exists()
    return found


def test_the_paper_on_64_workers_is_looked_through_without_them(capsys, tmp_path):
    names = ("TEXT", "URL", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE")
    pq.write_table(pa.table({name: [None] for name in names}), tmp_path / "laion.parquet")
    found = findings(capsys, tmp_path, *PAPER, f"data.metadata={tmp_path}", f"cluster.address={NOBODY}")
    assert found["workers"]["found"].endswith(
        "a batch: stage_a.train 16 on 16 of them; stage_b.train 8, 2; stage_c.train 24, 24, 12, 6"
    )  # not the previewer's and the baseline's
    assert (found["device memory"]["state"], found["inputs"]["state"]) == ("warning", "failed")
    assert "metadata" not in found["inputs"]["found"]
    assert (found["device"]["state"], found["memory"]["state"]) == ("warning", "ok")
    assert "cluster.device=cuda; other nodes must have some" in found["device"]["found"]
    assert found["disk"]["found"].endswith("what the steps will store is not known yet")
    assert "local scale" not in str(found)


def test_metadata_and_weights_that_are_not_there_are_named(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    found = findings(capsys, tmp_path, *PAPER, f"data.metadata={tmp_path}/empty", f"cluster.address={NOBODY}")
    assert "there is no Parquet file at" in found["inputs"]["found"]
    assert "weights get clip_h efficientnet_v2_s" in found["inputs"]["found"]


def test_memory_is_that_of_the_fewest_workers(capsys, tmp_path):
    words = (*PAPER, f"data.metadata={tmp_path}", "cluster.gpu_memory_gib=40", f"cluster.address={NOBODY}")
    assert findings(capsys, tmp_path, *words)["device memory"]["state"] == "ok"
    found = findings(capsys, tmp_path, *words, "cluster.min_workers=8")
    assert found["device memory"]["state"] == "failed"
    assert "of device memory a worker" in found["device memory"]["found"]


def test_a_config_for_cpus_is_held_against_this_machine(capsys, tmp_path):
    found = findings(capsys, tmp_path, *MICRO, "data.limit=16", "workers=2", "cluster.num_cpus=2")
    assert found["ray folder"]["state"] == "ok"
    assert found["config"]["found"] == "conf=stage_c: 11 of 11 steps are to be done"
    assert found["device memory"] == {
        "check": "device memory",
        "state": "ok",
        "found": "none is needed: trainings run on this machine's CPUs",
    }
    assert "train_a, the largest, about 1.1 for each of workers=2" in found["memory"]["found"]
    one = findings(
        capsys, tmp_path, *MICRO, "data.limit=16", "workers=2", "cluster.num_cpus=2", "stage_a.train.ranks=1"
    )
    assert "train_a" not in one["memory"]["found"]  # two ranks of another take more than its one
    assert "the steps to do store at most 0.1, beside weights and checkpoints" in found["disk"]["found"]
    assert {found[check]["state"] for check in ("device", "cluster.address", "tracking", "inputs")} == {"ok"}
    large = findings(capsys, tmp_path, *MICRO, "scale=paper", "data=openmoji", "cluster.device=cpu", "data.limit=null")
    assert large["memory"]["state"] == "warning"
    assert findings(capsys, tmp_path, *MICRO, "cluster.device=cuda")["device"]["state"] == "failed"


def test_a_batch_larger_than_the_data_fails(capsys, tmp_path):
    found = findings(capsys, tmp_path, *MICRO, "stage_c.train.phases.0.batch_size=64")
    assert found["inputs"]["state"] == "failed"
    assert found["inputs"]["found"].startswith("train_c: a batch of 64 is larger than the data, which has at most 16")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("workers=63", "data.metadata=x"), "stage_b.train.phases.0.batch_size=512 does not divide among workers=63"),
        (("cluster.min_workers=65", "data.metadata=x"), "cluster.min_workers=65 is more than workers=64"),
        ((), "data.metadata is not set"),
        (("data.metadata=x", "targets=[stage_d]"), "no step makes 'stage_d'"),
    ],
)
def test_beside_a_wrong_config_machine_and_cluster_are_looked_at(capsys, tmp_path, words, told):
    found = findings(capsys, tmp_path, *PAPER, f"cluster.address={NOBODY}", *words)
    assert found["config"]["state"] == "failed"
    assert told in found["config"]["found"]
    assert {"memory", "disk", "storage", "tracking"} <= found.keys()
    assert (found["device"]["state"], found["cluster.address"]["state"]) == ("warning", "failed")
    assert "ray folder" not in found  # of a Ray of our own, which there will not be


def test_a_conf_that_does_not_compose_leaves_the_machine(capsys, tmp_path):
    found = findings(capsys, tmp_path, "conf=stage_d")
    assert found["config"]["found"].startswith("conf=stage_d: there is no such conf")
    assert {found[check]["state"] for check in ("python", "packages", "datasets package")} == {"ok"}
    assert main(["doctor", "workers=2"]) == 2
    assert "doctor needs conf=NAME" in capsys.readouterr().err


def test_ray_is_asked_for_where_a_run_would_look(monkeypatch, listening):
    def told(address: str) -> tuple[str, str]:
        asked: Any = SimpleNamespace(cluster=SimpleNamespace(address=address))
        found = conf.cluster(asked)
        return found.state, found.found

    monkeypatch.setattr(joining, "rays_here", lambda: [listening])
    assert told(listening) == ("ok", f"{listening}: there is one at {listening}")
    assert told(NOBODY)[0] == "failed"
    assert told("no-port") == ("failed", "no-port is no address; give auto, or HOST:PORT of Ray's head")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert told("auto") == ("ok", f"auto: there is one at {listening}")
    monkeypatch.setenv("RAY_ADDRESS", NOBODY)
    assert told("auto")[1].startswith(f"auto: no Ray answers at {NOBODY} (")
    monkeypatch.setattr(joining, "rays_here", list)
    assert told(listening)[1].startswith(
        f"cluster.address={listening}: no Ray runs on this machine; run on one of its "
    )


def test_an_mlflow_server_that_does_not_answer_is_a_warning(capsys, tmp_path):
    words = (*MICRO, "tracking=server", f"tracking.uri=http://{NOBODY}")
    found = findings(capsys, tmp_path, *words)["tracking"]
    assert found["state"] == "warning"
    assert f"http://{NOBODY}: no server answers (" in found["found"]
    assert "a later one sends them" in found["found"]
