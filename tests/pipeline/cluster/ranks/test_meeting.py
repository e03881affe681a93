"""Which interface ranks listen on."""

import os
from types import SimpleNamespace

import pytest
import ray
import ray.exceptions

from pipeline.cluster.ranks import meeting
from pipeline.cluster.ranks.meeting import GLOO, Backend, Meeting, interface

CARDS = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.2", "fd00::2"], "eth1": ["10.0.0.3"]}


@pytest.mark.parametrize(
    ("address", "card"),
    [("10.0.0.3", "eth1"), ("fd00::2", None), ("127.0.0.1", "lo"), ("203.0.113.7", None)],
)
def test_the_interface_is_the_one_with_the_nodes_address(address, card):
    assert interface(CARDS, address) == card


@pytest.mark.parametrize(("before", "after"), [(None, "eth1"), ("ib0", "ib0")])
def test_gloo_is_told_it_unless_somebody_has_chosen(before, after, monkeypatch):
    cards = {name: [SimpleNamespace(address=address) for address in found] for name, found in CARDS.items()}
    monkeypatch.setattr(meeting.psutil, "net_if_addrs", lambda: cards)
    monkeypatch.setattr(meeting.ray.util, "get_node_ip_address", lambda: "10.0.0.3")
    environment = {GLOO: before} if before else {}
    monkeypatch.setattr(os, "environ", environment)
    meeting.listen_where_ray_does()
    assert environment[GLOO] == after


def test_rays_callbacks_find_what_they_find_in_its_own_backend() -> None:
    """Whether GPUs of a node are shared, and what a rank's training is in the midst of, which one machine's CPUs never
    tell."""
    from ray.train.torch import TorchConfig

    ours, theirs = Meeting("nccl"), TorchConfig("nccl")
    assert ours.backend_cls.share_cuda_visible_devices == theirs.backend_cls.share_cuda_visible_devices
    assert ours.backend_cls.has_replica_groups == theirs.backend_cls.has_replica_groups
    assert ours.train_func_context is meeting.on_own_device


def test_ranks_that_hang_are_not_waited_for(monkeypatch, caplog):
    class Hanging:
        def execute_async(self, function, *arguments):
            assert (function, arguments) == (meeting.part, (True,))
            return []

        def __len__(self):
            return 2

    def late(references, timeout):
        raise ray.exceptions.GetTimeoutError(f"{timeout}")

    monkeypatch.setattr(meeting.ray, "get", late)
    Backend().on_shutdown(Hanging(), Meeting("gloo"))
    assert "the ranks have not left their process group within 30 s" in caplog.text
