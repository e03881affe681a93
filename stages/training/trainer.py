"""Where a training stands on one rank, and what takes it further: a step, a look at it, an older state."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.draws import Draws, derived_seed
from stages.models.layers import checkpoint_blocks, compile_blocks, uncompile
from stages.settings.training import TrainingConfig
from stages.training import checkpoint
from stages.training.activity import Activity
from stages.training.background import Batch
from stages.training.bad_steps import BadStepsWatch
from stages.training.callbacks import Parts
from stages.training.checkpoint import Best, Checkpoint, State
from stages.training.optimizer import Optimizer
from stages.training.parallel import Replica, most, shared
from stages.training.update import average_of, follow, learning_rate_factor, moves, update
from stages.training.validation import Validation

GRAPHS = 256  # compiled at most, one for each kind of block and size of images; more would run uncompiled


class Trainer:
    """A training on one rank after `step` steps: weights, moments, moving average, and what it knows of bad steps."""

    def __init__(
        self, objective: nn.Module, config: TrainingConfig, seed: int, device: torch.device, rank: int, world: int
    ) -> None:
        self.config, self.seed, self.device, self.rank, self.world = config, seed, device, rank, world
        self.replica = Replica(objective, device, rank, world, config.shard, config.reduces)
        self.optimizer = Optimizer(self.replica.module, self.replica.trained, config, device)
        self._average = average_of(self.replica.state(), config.ema) if config.ema else None
        self.recipe = config.recipe(seed)
        self.watch = BadStepsWatch(config.bad_steps)
        self.best: Best | None = None
        self.step = 0
        self.learning_rate = 0.0
        self._norm_frozen: bool | None = None  # as the modes are set
        self._graphs = config.compile == "graphs"
        assert config.checkpointing != "auto", "who knows the devices decides before"
        assert config.precision != "auto", "who knows the devices decides before"
        checkpoint_blocks(self.replica.module, config.checkpointing)
        if config.deterministic and device.type == "cuda":
            be_deterministic()
        if config.compile:
            torch._dynamo.config.recompile_limit = GRAPHS
            compile_blocks(self.replica.module, self._graphs)

    @property
    def at_end(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.num_steps

    def due(self, every: int) -> bool:
        """Whether it is time for what is done every so many steps, and after the last one of each phase."""
        return self.step % every == 0 or self.step in self.config.phase_ends

    def most(self, value: float) -> float:
        """The largest value of any rank; all of them ask, and none goes on before the others have."""
        return most(value, self.world, self.device)

    def is_finite(self) -> bool:
        """Whether all trained weights are finite numbers; all ranks ask."""
        return not self.most(any(not weight.isfinite().all() for weight in self.replica.trained.values()))

    def advance(self, batch: Batch, doing: Activity) -> dict[str, Tensor]:
        """Do the next step; returns its scalars."""
        config, step = self.config, self.step
        phase = config.phase_at(step)
        if phase.freeze_norm != self._norm_frozen:  # whoever changes modes in between puts them back
            _set_mode(self.replica.model, freeze_norm=phase.freeze_norm)
            self._norm_frozen = phase.freeze_norm
        self.replica.reduce = config.reduce_in(phase)
        self.learning_rate = config.learning_rate * learning_rate_factor(config, step)
        torch.manual_seed(derived_seed(self.seed, step, 0, self.rank))  # dropout; four parts: apart from all of Draws
        own = phase.batch_size // self.world
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # nothing of the last step is read any more but weights
        draws = Draws(self.seed, step, self.rank * own, own, phase.batch_size, self.device)
        scalars = update(self.replica, self.optimizer, batch, draws, self.learning_rate, config, doing)
        self.step += 1
        if self._average is not None and moves(config, self.step):
            follow(self._average, self.replica.state(), config, self.step)
        return scalars

    @property
    def average(self) -> dict[str, Tensor] | None:
        """The moving average, where one is kept; until its start a copy of the weights, made when it is asked for."""
        ema, average = self.config.ema, self._average
        if ema and average is not None and self.step < ema.start:
            follow(average, self.replica.state(), self.config, self.step)
        return average

    def validate(self, validation: Validation) -> dict[str, float]:
        """The losses on held-out samples; what comes out would be judged by that of the average, where one is kept."""
        with self._uncompiled():
            losses = validation.losses(self.replica, self.average, self.config, self.rank)
        loss = losses["validation_loss_ema" if self.config.ema else "validation_loss"]
        if math.isfinite(loss) and (self.best is None or loss < self.best.loss):
            self.best = Best(self.step, loss)
        return losses

    def present(self, show: Callable[[int, str], None], begin: Callable[[], None]) -> None:
        """Show the weights, and the moving average; on all ranks, which share buffers meanwhile. Each of them is begun:
        whoever looks for a stall takes them for one activity each."""
        for name, shown in {"weights": None, "ema": self.average}.items():
            if name == "weights" or shown:
                begin()
                with self._uncompiled(), self.replica.evaluating(shown):
                    if self.rank == 0:
                        show(self.step, name)

    def checkpoint(self) -> Checkpoint:
        """This rank's part of all that the training goes on from; its tensors are references."""
        replicas = self.world // self.config.shard
        tensors, rows = self._state().share(self.replica.number, replicas)
        return Checkpoint(self.step, self.recipe, tensors, rows, self.watch.notes(), self.best)

    def restore(self, parts: Parts) -> Checkpoint:
        """Put a saved state's tensors in place; returns one of its parts. Each part is read by one rank."""
        found = []

        def checked() -> Iterator[Checkpoint]:
            for number, read in enumerate(parts):
                saved = checkpoint.load(shared(read, number % self.world, self.rank, self.world, self.device))
                checkpoint.require_recipe(saved.recipe, self.recipe)
                found.append(replace(saved, tensors={}))
                yield saved

        self._state().restore(checked())
        return found[0]

    def resume(self, parts: Parts | None) -> None:
        """Go on from a saved state, if there is one."""
        if parts is not None:
            saved = self.restore(parts)
            self.step, self.best = saved.step, saved.best
            self.watch.restore(saved.notes)

    def rewind(self, parts: Parts) -> None:
        """Take the weights of a saved state, but go on from this step: what lies between is left out."""
        saved = self.restore(parts)
        self.watch.restore(saved.notes)
        self.watch.left_out += self.config.images_after(self.step) - self.config.images_after(saved.step)
        self.optimizer.found_inf.zero_()

    def finish(self) -> None:
        """Put the outcome into the objective: the moving average, where one is kept."""
        if self._graphs:  # whoever uses its models from now on marks no steps
            uncompile(self.replica.module)
        if (average := self.average) is not None:
            self.replica.fill(average)
        self.replica.give_back()

    def _uncompiled(self) -> AbstractContextManager[None]:
        """Around what is no step, where steps are graphs: these hold each call of a model between two marks."""
        return torch.compiler.set_stance("force_eager") if self._graphs else nullcontext()

    def _state(self) -> State:
        """The live tensors."""
        replica = self.replica
        return State(replica.state(), replica.trained, self.optimizer, self.average, replica.rows())


def _set_mode(model: nn.Module, *, freeze_norm: bool) -> None:
    model.train()
    if freeze_norm:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def be_deterministic() -> None:
    """Kernels that give the same bits each time, where torch has them; it warns of those that it has not."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS begins
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
