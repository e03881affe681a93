"""What a training calls back may be left as it is, and is called when it is said to be."""

import torch

from stages.training.callbacks import Callbacks, Parts
from stages.training.loop import Outcome, train
from tests.stages.training.test_loop import Denoise, Run, config, rows, weights

CPU = torch.device("cpu")


def test_a_training_needs_nobody_around_it() -> None:
    recipe, watched, alone = config(panel_every=4), Denoise(), Denoise()
    Run(recipe).train(watched)
    assert train(alone, rows(recipe), recipe, Callbacks(), seed=0, device=CPU) == Outcome(12, finished=True)
    assert weights(alone) == weights(watched)


class Diary(Run):
    """Writes down what is called, in its order, but for the thread's `save_state`."""

    def __init__(self, **changes: object) -> None:
        super().__init__(config(log_every=3, checkpoint_every=6, panel_every=6, **changes))
        self.lines: list[str] = []

    def newest_state(self) -> Parts | None:
        self.lines.append("newest state")
        return super().newest_state()

    def should_stop(self) -> bool:
        self.lines.append("stop?")
        return False

    def log(self, step: int, values: dict[str, float]) -> None:
        self.lines.append(f"log {step}")

    def show(self, step: int, weights: str) -> None:
        self.lines.append(f"show {step} {weights}")


def test_everything_is_called_in_its_order(monkeypatch) -> None:
    monkeypatch.setattr("stages.training.loop._STOP_S", 1e9)  # but for first steps it asks with log entries alone
    diary = Diary()
    diary.train(Denoise())
    assert diary.lines == [
        "newest state",
        *("show 0 weights", "show 0 ema"),
        *("stop?", "log 3", "stop?"),
        *("show 6 weights", "show 6 ema", "log 6", "stop?"),
        *("log 7", "stop?"),  # a phase ends
        *("stop?", "log 9", "stop?"),
        *("show 12 weights", "show 12 ema", "log 12"),  # and that is the end: nothing to stop
    ]
    assert sorted(diary.saved) == [6, 7, 12]
