"""Which interface ranks listen on; that they meet there is in `tests/whole/test_watched.py`."""

import pytest

from pipeline.cluster.ranks.meeting import interface

CARDS = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.2", "fd00::2"], "eth1": ["10.0.0.3"]}


@pytest.mark.parametrize(
    ("address", "card"),
    [("10.0.0.3", "eth1"), ("fd00::2", "eth0"), ("127.0.0.1", "lo"), ("203.0.113.7", None)],
)
def test_the_interface_is_the_one_with_the_nodes_address(address, card):
    assert interface(CARDS, address) == card
