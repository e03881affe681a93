"""What is said of a node, and what of it ends `doctor` with an error; of a real one: tests/whole/test_watched.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datasets.files import storage
from pipeline.cluster.nodes import GRADIENTS, Node, Seen, bandwidth, look
from pipeline.verbs.doctor.finding import Asked
from pipeline.verbs.doctor.machine import takes_files
from pipeline.verbs.doctor.nodes import of_node, of_ranks
from pipeline.verbs.doctor.traces import no_traces

GIB = 2**30
SEEN = Seen({"python": "3.11.7", "ray": "2.60.0"}, "c0ffee", 500 * GIB, None, written_s=0.5, read_s=0.25)
NODE = Node("a", "10.0.0.1", {"CPU": 64.0, "GPU": 8.0, "accelerator_type:A100": 1.0})


def told(seen: Seen = SEEN, skew_s: float = 0.002) -> tuple[str, str]:
    found = of_node(NODE, seen, SEEN, skew_s, sample=10**8)
    assert found.check == "node 10.0.0.1"
    return found.state, found.found


def test_a_good_node_is_told_of_in_a_line():
    line = "64 CPUs, 8 GPUs (A100), 500 GiB free, clock +0.002 s, root 200 MB/s written, 400 read"
    assert told() == ("ok", line)


@pytest.mark.parametrize(
    ("seen", "skew_s", "state", "words"),
    [
        (
            replace(SEEN, versions={"python": "3.11.7", "ray": "2.59.0"}),
            0,
            "failed",
            "ray 2.59.0, where the driver has 2.60",
        ),
        (replace(SEEN, code="other"), 0, "failed", "its code is not the driver's"),
        (replace(SEEN, store="AccessDenied"), 0, "failed", "the root: AccessDenied"),
        (SEEN, -7.5, "warning", "set its clock, which is -7.5 s off"),
        (
            replace(SEEN, free=3 * GIB),
            0,
            "warning",
            "3 GiB free in /tmp, where Ray's logs and spilled objects want 20",
        ),
    ],
)
def test_what_is_wrong_with_a_node_comes_first(seen, skew_s, state, words):
    found = told(seen, skew_s)
    assert found[0] == state
    assert found[1].startswith(words)
    assert "64 CPUs" in found[1]
    assert found[1].count("GiB free") == 1


def test_a_look_leaves_nothing_behind(tmp_path):
    seen = look(str(tmp_path))
    assert seen.store is None
    assert min(seen.written_s, seen.read_s) > 0
    assert list(tmp_path.iterdir()) == []
    assert look(str(tmp_path)).code == seen.code
    assert look("/proc/there/is/no/such").store


def test_what_others_put_below_a_root_meanwhile_is_theirs(tmp_path):
    root = tmp_path / "root"
    with no_traces(str(root)) as folder:
        storage.publish(b"x", storage.join(folder, "ranks/x"))
        storage.publish(b"theirs", str(root / "artifacts/images/0/manifest.json"))
    assert [file.name for file in root.rglob("*") if file.is_file()] == ["manifest.json"]
    assert list(root.iterdir()) == [root / "artifacts"]


def test_a_root_that_was_not_there_is_not_there_afterwards(tmp_path):
    root = tmp_path / "root"

    def fail() -> None:
        with no_traces(str(root)) as folder:
            storage.publish(b"x", storage.join(folder, "x"))
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert not root.exists()
    root.mkdir()
    with no_traces(str(root)) as folder:
        storage.publish(b"x", storage.join(folder, "x"))
    assert list(tmp_path.rglob("*")) == [root]  # an empty one that was there stays


def test_the_check_of_the_storage_leaves_the_root_to_who_began_there(tmp_path, monkeypatch):
    begun = tmp_path / "root/runs/one.json"

    def also(folder: str, word: str) -> None:
        storage.publish(b"{}", str(begun))

    monkeypatch.setattr("pipeline.verbs.doctor.machine.check_writable", also)
    assert takes_files(Asked(str(tmp_path / "root"))).state == "ok"
    assert begun.exists()
    monkeypatch.undo()
    assert takes_files(Asked(str(tmp_path / "none"))).state == "ok"
    assert not Path(tmp_path / "none").exists()


class Busy:
    """A cluster for eight ranks, some of whose devices a training has; nothing may wait for them."""

    def __init__(self, free: int) -> None:
        self._free = free

    def room_for_ranks(self, free: bool = False) -> int:
        return self._free if free else 8


@pytest.mark.parametrize("free", [0, 1])
def test_beside_a_training_the_devices_are_in_use_and_nothing_is_broken(free, tmp_path):
    cluster: Any = Busy(free)
    found = of_ranks(cluster, str(tmp_path), workers=4)
    assert found.state == "warning"
    assert found.found.startswith(f"the devices are in use: {free} of 4 ranks would find room now")
    assert of_ranks(cluster, str(tmp_path), workers=1).found == "1 rank: nothing to exchange"


def test_bandwidth_is_counted_as_that_of_a_ring():
    assert bandwidth(2, 1.0) == GRADIENTS * 4
    assert bandwidth(8, 0.5) == pytest.approx(2 * 7 / 8 * GRADIENTS * 4 / 0.5)
