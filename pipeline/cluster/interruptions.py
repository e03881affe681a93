"""What interruptions cost a training: how often it began again, and how many of its steps were done again.

<artifact>/building/interruptions.json    written by the driver as the training goes on; the next driver reads it
"""

import json
import logging
from dataclasses import asdict, dataclass, field

from datasets.files import json_files, storage

FILE = "interruptions.json"

log = logging.getLogger(__name__)


@dataclass
class Interruptions:
    """The attempts at a step's trainings so far, those of drivers that were killed included.

    A step counts as done once the driver has heard of it, so those of the last moment before a kill may be missing.
    """

    begun: int = 0
    preemptions: int = 0  # attempts that ended because their node was taken away
    steps_again: int = 0
    reached: dict[str, int] = field(default_factory=dict)  # training -> its last logged step

    @classmethod
    def read(cls, building: str) -> "Interruptions":
        """Those of an unfinished build, from its folder."""
        return json_files.read(storage.join(building, FILE), lambda told: cls(**told)) or cls()

    def write(self, building: str) -> None:
        """Keep them in the folder of the unfinished build; a store that fails to must not end the training."""
        try:
            storage.publish(json.dumps(asdict(self)).encode(), storage.join(building, FILE))
        except OSError as error:
            log.warning("the count of interruptions was not written: %s", error)

    def resumed(self, training: str, step: int) -> int:
        """A training goes on after `step` steps; returns how many it does again."""
        again = max(0, self.reached.get(training, 0) - step)
        self.steps_again += again
        self.reached[training] = step
        return again

    def metrics(self) -> dict[str, float]:
        """Figures for the manifest."""
        return {
            "interruptions": max(0, self.begun - 1),
            "preemptions": self.preemptions,
            "steps_again": self.steps_again,
        }
