"""Which process wrote something: never taken for another one of the same number, and dead only by proof."""

import getpass
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from pipeline.store import process
from pipeline.store.process import ProcessId, user_name

NOBODY = 2**22 - 1  # above the kernel's usual numbers


def test_this_process_is_local_exact_and_alive():
    own = ProcessId.own()
    assert own.is_local
    assert own.is_exact
    assert not own.is_dead()
    assert (own.host, own.pid) == (socket.gethostname(), os.getpid())
    assert ProcessId(**vars(own)) == own
    if sys.platform == "linux":
        assert own.namespace.startswith("pid:[")
        assert len(own.boot) == 36


def test_one_that_is_gone_is_dead_and_one_that_took_its_number_is_not_it():
    own = ProcessId.own()
    assert replace(own, pid=NOBODY).is_dead()
    before = replace(own, ticks=0)  # by a version that did not know them
    assert replace(before, started=own.started - 3).is_dead()
    assert not replace(before, started=own.started - 1).is_dead()  # clocks drift


@pytest.mark.skipif(sys.platform != "linux", reason="only there are ticks known")
def test_a_clock_that_is_set_kills_nobody_and_a_number_taken_within_a_second_is_another():
    own = ProcessId.own()
    assert own.ticks > 0
    assert not replace(own, started=own.started - 3600).is_dead()
    assert replace(own, ticks=own.ticks + 1).is_dead()


@pytest.mark.parametrize("name", ["a) b (c", "(", ") R 1 1 1 1 1"])
def test_ticks_are_found_whatever_the_process_is_called(name, monkeypatch):
    fields = " ".join(["S", *map(str, range(4, 30))])
    monkeypatch.setattr(process.Path, "read_bytes", lambda _: f"7 ({name}) {fields}".encode())
    assert process._ticks(7) == 22


def test_a_record_by_another_version_is_read_as_far_as_it_goes():
    own = ProcessId.own()
    assert ProcessId.of({**vars(own), "cgroup": "a later field"}) == own
    assert ProcessId.of({"host": own.host, "pid": own.pid, "started": 5}) == ProcessId(own.host, own.pid, 5)
    nobody = ProcessId.of({"pid": "seven", "started": None, "boot": 1})
    assert nobody == ProcessId.of({})
    assert not nobody.is_dead()


def test_one_that_nobody_has_waited_for_is_dead():
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        started, ticks = process.psutil.Process(child.pid).create_time(), process._ticks(child.pid)
        assert replace(ProcessId.own(), pid=child.pid, started=started, ticks=ticks).is_dead()


@pytest.mark.parametrize("of", [{"boot": "another"}, {"namespace": "pid:[1]"}])
def test_the_same_number_on_another_machine_or_in_another_container_is_not_known(of, monkeypatch):
    monkeypatch.setattr(process, "_boot", lambda: "ours")
    monkeypatch.setattr(process, "_namespace", lambda: "pid:[0]")
    other = ProcessId(socket.gethostname(), NOBODY, 0.0, **{"boot": "ours", "namespace": "pid:[0]", **of})
    assert not other.is_local
    assert not other.is_dead()


def test_a_hosts_name_does_not_matter_where_kernel_and_namespace_are_known(monkeypatch):
    monkeypatch.setattr(process, "_boot", lambda: "ours")
    monkeypatch.setattr(process, "_namespace", lambda: "pid:[0]")
    assert ProcessId("renamed", NOBODY, 0.0, "ours", "pid:[0]").is_dead()


def test_records_of_earlier_versions_go_by_the_name_and_are_no_proof(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    here = ProcessId(socket.gethostname(), NOBODY, 0.0)
    assert here.is_dead()
    assert not here.is_exact
    assert not replace(here, host="elsewhere").is_dead()
    assert not replace(here, boot="known").is_exact
    assert not replace(here, namespace="known").is_exact
    assert replace(here, boot="known").is_local
    assert replace(here, namespace="known").is_local


def test_systems_without_namespaces_go_by_the_name_and_that_is_proof(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert ProcessId(socket.gethostname(), NOBODY, 0.0).is_exact


def test_where_the_system_tells_neither_they_are_empty(monkeypatch):
    def fails(*_: object) -> str:
        raise OSError

    monkeypatch.setattr(process.Path, "read_text", fails)
    monkeypatch.setattr(os, "readlink", fails)
    own = ProcessId.own()
    assert (own.boot, own.namespace) == ("", "")


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_a_user_without_a_name_has_a_number(monkeypatch, error):
    assert user_name() == getpass.getuser()

    def fails() -> str:
        raise error("no entry")

    monkeypatch.setattr(getpass, "getuser", fails)
    assert user_name() == f"user {os.getuid()}"
