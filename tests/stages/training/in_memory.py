"""What tests put around a training: its states and figures stay in memory."""

from functools import partial

from stages.state_dicts import Serialized
from stages.training.callbacks import Callbacks, Parts
from stages.training.meter import SPEED


class InMemory(Callbacks):
    """Goes on from a state, keeps those that are saved and what is logged but for times, and stops after a step."""

    def __init__(self, state: bytes | None = None, stop_after: int | None = None) -> None:
        super().__init__()
        self.state, self.stop_after = state, stop_after
        self.saved: dict[int, bytes] = {}
        self.logged: dict[int, dict[str, float]] = {}

    def newest_state(self) -> Parts | None:
        return [partial(bytes, self.state)] if self.state else None

    def save_state(self, step: int, data: Serialized) -> None:
        self.saved[step] = bytes(data)

    def should_stop(self) -> bool:
        return self.stop_after in self.logged

    def log(self, step: int, values: dict[str, float]) -> None:
        self.logged[step] = {name: value for name, value in values.items() if not name.startswith(SPEED)}
