"""What is said of a node, and what of it ends `doctor` with an error; of a real one: tests/whole/test_watched.py."""

from dataclasses import replace

import pytest

from pipeline.cluster.nodes import GRADIENTS, Node, Seen, bandwidth, look
from pipeline.verbs.doctor.nodes import of_node

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
        (replace(SEEN, free=3 * GIB), 0, "warning", "3 GiB free for Ray's logs"),
    ],
)
def test_what_is_wrong_with_a_node_comes_first(seen, skew_s, state, words):
    found = told(seen, skew_s)
    assert found[0] == state
    assert found[1].startswith(words)
    assert "64 CPUs" in found[1]


def test_a_look_leaves_nothing_behind(tmp_path):
    seen = look(str(tmp_path))
    assert seen.store is None
    assert min(seen.written_s, seen.read_s) > 0
    assert list(tmp_path.iterdir()) == []
    assert look(str(tmp_path)).code == seen.code
    assert look("/proc/there/is/no/such").store


def test_bandwidth_is_counted_as_that_of_a_ring():
    assert bandwidth(2, 1.0) == GRADIENTS * 4
    assert bandwidth(8, 0.5) == pytest.approx(2 * 7 / 8 * GRADIENTS * 4 / 0.5)
