"""Steps that went wrong: their loss or gradient is not finite, or the loss jumped."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.config import BadStepsConfig

_FOLLOW = 0.1  # share of the newest steps in the usual loss


class BadSteps(ValueError):
    """More steps went wrong than the training may get over; the weights are those before the first that is named."""


@dataclass
class BadStepsWatch:
    """Finds the steps that went wrong, and counts them. Every rank sees the same figures, so all find the same."""

    config: BadStepsConfig
    count: int = 0
    usual_loss: float | None = None

    def find(self, losses: Sequence[float], norms: Sequence[float]) -> list[int]:
        """Places of the bad ones among steps that followed each other, by their losses and gradient norms."""
        bad = [not (math.isfinite(loss) and math.isfinite(norm)) for loss, norm in zip(losses, norms, strict=True)]
        if self.config.jump and self.usual_loss and self.usual_loss > 0:
            most = self.config.jump * self.usual_loss
            bad = [found or loss > most for found, loss in zip(bad, losses, strict=True)]
        good = [loss for loss, found in zip(losses, bad, strict=True) if not found]
        if good:
            mean = sum(good) / len(good)
            usual = mean if self.usual_loss is None else self.usual_loss
            self.usual_loss = usual + _FOLLOW * (mean - usual)
        places = [place for place, found in enumerate(bad) if found]
        self.count += len(places)
        return places

    @property
    def ends_training(self) -> bool:
        """Whether there were too many."""
        return self.count > (0 if self.config.then == "raise" else self.config.at_most)

    def notes(self) -> dict[str, object]:
        """What a checkpoint keeps of this, as JSON values."""
        return {"bad_steps": self.count, "usual_loss": self.usual_loss}

    def restore(self, notes: Mapping[str, object]) -> None:
        """Go on from the notes of a checkpoint; what was counted since then stays counted."""
        count, usual = notes["bad_steps"], notes["usual_loss"]
        assert isinstance(count, int)
        assert usual is None or isinstance(usual, float)
        self.count, self.usual_loss = max(self.count, count), usual
