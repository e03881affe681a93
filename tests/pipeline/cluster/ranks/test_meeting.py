"""Which interface ranks listen on."""

import os
from types import SimpleNamespace

import pytest

from pipeline.cluster.ranks import meeting
from pipeline.cluster.ranks.meeting import GLOO, interface

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
