"""Turns at hosts for all workers of a job: one small actor knows the pace of each host, and gives them out."""

from typing import Any

from datasets.fetching.pace import Heard, Turn
from pipeline.cluster.answers import get


class SlotsClient:
    """A worker's view of the actor that runs `HostSlots`, as a `Pace`."""

    def __init__(self, slots: Any):
        self._slots = slots

    def take(self, host: str) -> Turn:
        """A turn, or how long to wait before the next question for one."""
        turn: Turn = get(self._slots.take.remote(host))
        return turn

    def give_back(self, host: str, turn: Turn, heard: Heard, after_s: float) -> None:
        """End a turn, with what was heard, without waiting."""
        self._slots.give_back.remote(host, turn, heard, after_s)
