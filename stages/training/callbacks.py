"""What a training calls back: those around it, who keep its states, hear its figures and may ask for its end."""

from collections.abc import Callable, Sequence

from stages.settings.training import Phase
from stages.state_dicts import Serialized
from stages.training.activity import Activity
from stages.training.validation import Validation

Parts = Sequence[Callable[[], bytes]]  # reads each part of a state, in the order of the ranks that saved them


class Callbacks:
    """What the loop asks and tells. This one keeps nothing, tells nobody and never stops: override what you have.

    Each rank of a training has its own. `doing` is told what goes on at the moment, and may be read by another thread.
    Of all that is called here, only the states that are given back change what is trained.
    """

    key: str = "train"
    """Where the config has this training's settings, as errors name them."""
    validation: Validation | None = None
    """The samples for `config.validation`, whose losses are logged; None: nothing is held out."""

    def __init__(self, doing: Activity | None = None) -> None:
        self.doing = doing or Activity()

    def newest_state(self) -> Parts | None:
        """How to read the newest saved state, the same one on all ranks; None: there is none.

        Every rank is asked at the start, and again where bad steps are rewound. Each reads the parts whose number is
        its own, or that with the number of ranks added once or more; these then pass them on to each other.
        """
        return None

    def state_after(self, step: int) -> Parts:
        """How to read the state that was saved after `step` steps; at the end, where the best one is to be kept."""
        raise NotImplementedError

    def save_state(self, step: int, data: Serialized) -> None:
        """Keep a part of the state after `step` steps; whatever this raises ends the training.

        Called on all ranks, with a part each, in a background thread. The memory of `data` is used again afterwards.
        """

    def should_stop(self) -> bool:
        """Whether to save and return; if any rank says yes, all do.

        Every rank is asked after the same steps: with each log entry, and at least every few seconds.
        """
        return False

    def log(self, step: int, values: dict[str, float]) -> None:
        """Figures after `step` steps, rank 0 only: means since the last entry, of the ranks and of the good steps.

        Those that begin with `speed/` tell of times: the largest of any rank.
        """

    def bad_steps(self, steps: list[int], done: str) -> None:
        """Numbers, from 0, of steps that went wrong, and what is done about them; rank 0 only."""

    def show(self, step: int, weights: str) -> None:
        """Show what the objective can do, before the first step and every `config.panel_every`; rank 0 only.

        It is in evaluation mode, with the weights in place, named `weights`, and then with the moving average, where
        one is kept, named `ema`.
        """

    def flops_of(self, phase: Phase) -> float:
        """Floating-point operations to train on one image of a phase; 0 where nobody knows."""
        return 0.0
