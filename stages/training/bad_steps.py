"""Steps that went wrong: their loss or gradient is not finite, or the loss jumped."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.settings.training import BadStepsConfig

_FOLLOW = 0.05  # share of a step in the usual loss


class BadSteps(ValueError):
    """More steps went wrong than the training may get over; the weights are those before the first that is named."""


@dataclass
class BadStepsWatch:
    """Finds the steps that went wrong, and counts them. Every rank sees the same figures, so all find the same.

    `left_out` are the images of the steps before this one that have changed nothing: skipped, or rewound.
    """

    config: BadStepsConfig
    count: int = 0
    left_out: int = 0
    usual_loss: float | None = None

    def find(self, losses: Sequence[float], norms: Sequence[float]) -> list[int]:
        """Places of the bad ones among steps that followed each other, by their losses and gradient norms."""
        places = []
        for place, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)) or self._jumps(loss):
                places.append(place)
            else:
                self.usual_loss = (
                    loss if self.usual_loss is None else self.usual_loss + _FOLLOW * (loss - self.usual_loss)
                )
        self.count += len(places)
        return places

    def _jumps(self, loss: float) -> bool:
        """Whether a loss is out of all proportion; where the usual one is not above 0, there is none."""
        if not self.config.jump or not self.usual_loss or self.usual_loss < 0:
            return False
        return loss > self.config.jump * self.usual_loss

    @property
    def ends_training(self) -> bool:
        """Whether there were too many."""
        return self.count > (0 if self.config.then == "raise" else self.config.at_most)

    def notes(self) -> dict[str, object]:
        """What a checkpoint keeps of this, as JSON values."""
        return {"bad_steps": self.count, "images_left_out": self.left_out, "usual_loss": self.usual_loss}

    def restore(self, notes: Mapping[str, object]) -> None:
        """Go on from the notes of a checkpoint; what was counted since then stays counted."""
        count, usual = notes["bad_steps"], notes["usual_loss"]
        left_out = notes.get("images_left_out", 0)  # of a checkpoint that is older than this count, nobody knows them
        assert isinstance(count, int)
        assert isinstance(left_out, int)
        assert usual is None or isinstance(usual, float)
        self.count, self.left_out, self.usual_loss = max(self.count, count), left_out, usual
