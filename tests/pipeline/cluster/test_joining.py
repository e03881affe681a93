"""Which Ray is joined, and why one cannot be, before Ray is asked."""

import subprocess
import sys

import pytest

from pipeline.cluster import joining

HEAD = "10.0.0.1:6379"
OTHER = "10.0.0.2:6379"


def test_rays_of_this_machine_are_found_by_their_processes():
    address = "127.0.0.1:9"
    words = ["/opt/ray/raylet", "-c", "input()", f"--gcs-address={address}"]
    with subprocess.Popen(words, executable=sys.executable, stdin=subprocess.PIPE) as process:
        assert address in joining.rays_here()
        process.communicate(b"\n")
    assert address not in joining.rays_here()


@pytest.mark.parametrize(
    ("address", "here", "told"),
    [
        ("ray://head:10001", [HEAD], "cluster.address=ray://head:10001: no training runs through Ray's client"),
        (HEAD, [], f"cluster.address={HEAD}: no Ray runs on this machine; run on one of its nodes"),
        ("auto", [], "cluster.address=auto: no Ray runs on this machine; start one with `ray start --head`, or run on"),
        ("auto", [HEAD, OTHER], f"cluster.address=auto: several Rays run on this machine; name one of {HEAD}, {OTHER}"),
        ("head", [HEAD], "head is no address; give auto, or HOST:PORT"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_refused_in_a_sentence(address, here, told, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = joining.why_not(address, here)
    assert found is not None
    assert found.startswith(told)


def test_auto_is_the_one_that_runs_here_or_that_the_environment_names(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert joining.why_not("auto", [HEAD]) is None
    assert joining.found("auto", [HEAD]) == HEAD
    monkeypatch.setenv("RAY_ADDRESS", OTHER)
    assert joining.why_not("auto", [HEAD, OTHER]) is None
    assert joining.found("auto", [HEAD, OTHER]) == OTHER
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert "Ray's client" in str(joining.why_not("auto", [HEAD]))


@pytest.mark.parametrize("word", ["auto", ""])
def test_an_environment_that_names_none_is_as_good_as_no_word(word, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", word)
    assert joining.why_not("auto", [HEAD]) is None
    assert joining.found("auto", [HEAD]) == HEAD
    assert "name one of" in str(joining.why_not("auto", [HEAD, OTHER]))


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_where_jobs_are_handed_in_nobody_joins(scheme, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"{scheme}://head:8265")
    for address in ("auto", f"{scheme}://head:8265"):
        told = str(joining.why_not(address, [HEAD]))
        assert told.startswith(f"cluster.address={scheme}://head:8265: there jobs are handed in")
        assert "ray job submit --address" in told


def test_a_node_without_our_code_is_sent_all_of_it():
    assert [path.rpartition("/")[2] for path in joining.code()] == ["pipeline", "stages", "datasets", "settings"]
