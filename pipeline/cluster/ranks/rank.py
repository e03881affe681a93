"""One rank of a training job: what a Ray Train worker does around the training loop of `stages.training.loop`.

Runs in the worker. State goes to the artifact's building folder, progress and metrics to the board; when everything is
trained, rank 0 publishes the weights and, last, `result.json`, which the driver turns into the manifest.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn

from datasets.buckets import Frame
from datasets.files import storage
from datasets.files.retrying import persistently
from datasets.files.storage import CorruptFile, FileEntry
from datasets.reading.bucket_batches import BucketBatches
from pipeline.cluster.board import BoardClient
from pipeline.cluster.messages import Assembled, Drawn, Logged, Reached, Resumed, Saved, Spent, Warned
from pipeline.cluster.ranks import devices
from pipeline.cluster.ranks.automatic import settled
from pipeline.cluster.ranks.checkpoints import Checkpoints, Followed
from pipeline.cluster.ranks.job import Job
from pipeline.cluster.ranks.spending import Spending
from pipeline.cluster.ranks.suspects import suspects
from pipeline.cluster.ranks.training_files import checkpoints_of, log_of, logged_steps, phase_file
from pipeline.cluster.ranks.watchdog import Watchdog
from pipeline.models.loading import weights
from pipeline.models.panels import Panel, beside
from pipeline.models.training_data import EncodedBatches, TrainingData
from pipeline.settings.sections import training_key
from pipeline.store import log_files
from pipeline.store.deleting import RESULT
from stages.anatomy.flops import PEAKS
from stages.settings.training import Phase, TrainingConfig
from stages.state_dicts import Serialized, serialized
from stages.training import activity, checkpoint, loop
from stages.training.background import Batch
from stages.training.callbacks import Callbacks, Parts
from stages.training.validation import Validation

SHOWN_AS = {"weights": "weights", "ema": "EMA"}  # in a panel's titles
PACKAGES = ("pipeline", "datasets", "stages", "py.warnings")  # whose words a rank's log takes

log = logging.getLogger(__name__)


class Rank:
    """A worker's place in its job: rank, world size, device, board."""

    def __init__(self, job: Job, board: BoardClient):
        self.job, self.board = job, board
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.spending = Spending()
        if self.rank == 0:  # all of them are there
            self.board.post(Assembled(self.spending.age))
        if torch.cuda.is_available() and ray.get_gpu_ids():
            self.device = ray.train.torch.get_device()
            torch.set_float32_matmul_precision("high")  # fp32 products, as in heads and the compressor, by TF32
        else:
            self.device = torch.device("cpu")
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self.pids = sorted(self.told(os.getpid()))
        self.node = context.get_node_rank()
        self._uuids = self._node_devices(context)
        self.files: dict[str, FileEntry] = {}
        self.metrics: dict[str, float] = {"training_seconds": 0.0}
        self.states: Checkpoints  # of what was trained last

    def train(
        self,
        name: str,
        objective: nn.Module,
        config: TrainingConfig,
        data: TrainingData,
        panel: Callable[[], Panel] | None = None,
    ) -> bool:
        """Train (or go on training) an objective.

        `panel` makes pictures of what the objective's models can do, whatever their weights are at the time. False when
        it was asked to stop before its end, by the run or because one of its nodes is being taken away.
        """
        doing = activity.Activity()
        self.spending.follow(doing)
        # Who never comes to what ranks settle together is missed as one is who never comes to a step.
        with Watchdog(self.board, self.rank, doing, self.job.stall_s):
            config = self._settled(name, config)
            self._warn_of_small_buckets(name, config, data.batches)
            callbacks = RankCallbacks(self, name, config, data, panel, doing)
            began = time.monotonic()
            outcome = loop.train(
                objective,
                callbacks.read_batch,
                config,
                callbacks,
                seed=self.job.seed,
                device=self.device,
                rank=self.rank,
                world=self.world,
                encode=callbacks.encode,
            )
        self.metrics["training_seconds"] += time.monotonic() - began
        self.metrics |= callbacks.measured
        if config.shared_lanes > 1:
            self.metrics[f"{name}/lanes"] = config.shared_lanes
        self.tell_spent(name, outcome.step)
        if outcome.best:
            self.metrics[f"{name}/best_step"] = outcome.best.step
            self.metrics[f"{name}/best_validation_loss"] = outcome.best.loss
            self.metrics[f"{name}/kept_step"] = outcome.best.step if config.keeps_best else outcome.step
        self.states = callbacks.states
        return outcome.finished

    def publish_model(self, name: str, model: nn.Module) -> None:
        """Publish the weights of a part of what was trained last: in the end, and after each earlier phase."""
        if self.rank:
            return
        self.publish(f"{name}.safetensors", lambda: weights(model))
        for number, step in enumerate(self.states.milestones[:-1], start=1):
            try:
                parts = self.states.after(step).parts
                every = checkpoint.final_weights(checkpoint.load(read()) for read in parts)
            except (CorruptFile, FileNotFoundError, checkpoint.CheckpointMismatch) as error:
                self.warn(f"{name}: the weights after phase {number} are not kept: {error}")
                continue
            ours = {key.removeprefix(f"{name}."): every[key] for key in every if key.startswith(f"{name}.")}
            self.publish(phase_file(name, number), partial(serialized, ours))

    def publish(self, name: str, make: Callable[[], bytes | Serialized]) -> None:
        """Make a file and put it into the artifact (rank 0 only)."""
        if self.rank == 0:
            self.job.fence()
            self.files[name] = storage.publish(make(), storage.join(self.job.path, name))

    def finish(self, rows: int) -> None:
        """Say that everything is published (rank 0 only)."""
        result = {
            "files": {name: vars(entry) for name, entry in self.files.items()},
            "metrics": self.metrics,
            "rows": rows,
            "pids": self.pids,
        }
        if self.rank == 0:
            self.job.fence()
            storage.publish(json.dumps(result).encode(), storage.join(self.job.path, RESULT))

    def _warn_of_small_buckets(
        self, name: str, config: TrainingConfig, batches: Mapping[tuple[Frame, str | None], EncodedBatches]
    ) -> None:
        largest = max((phase.batch_size for phase in config.phases if phase.max_aspect > 1), default=0)
        for one in (encoded.stored for encoded in batches.values()):
            if self.rank == 0 and isinstance(one, BucketBatches):
                small = [f"{bucket} ({rows})" for bucket, rows in one.bucket_rows.items() if rows < largest]
                if small:
                    self.warn(
                        f"{name}: buckets of fewer pictures than a batch of {largest} repeat them in it: "
                        f"{', '.join(small)}; a smaller data.image.max_aspect has fewer buckets"
                    )

    def _settled(self, name: str, config: TrainingConfig) -> TrainingConfig:
        """The settings without auto; all ranks ask, and hear the same."""
        warn = self.warn if self.rank == 0 else log.warning
        begun = self.told(self._recipe(name))[0] if config.precision == "auto" else {}
        config, taken = settled(name, config, begun, self.job.bytes[self.world], self.device, self.world, warn)
        self.metrics |= taken
        if self.rank == 0 and self.device.type == "cuda" and torch.cuda.get_device_name(self.device) not in PEAKS:
            log.info("%s: no MFU is told: nobody here knows the peak of this card", name)
        return config

    def _recipe(self, name: str) -> Mapping[str, object]:
        """That of the newest state of a training, as far as its marker can be read; nothing for other ranks than 0."""
        states = Checkpoints(checkpoints_of(self.job.building, name), log.warning)
        return next(states.recipes(), {}) if self.rank == 0 else {}

    def told(self, own: Any) -> list[Any]:
        """What each rank tells all others, in their order."""
        every = [own] * self.world
        if self.world > 1:
            dist.all_gather_object(every, own)
        return every

    def _node_devices(self, context: Any) -> list[str]:
        """What NVML calls the GPUs of this node's ranks, for the first of those; none for the others."""
        if self.device.type != "cuda":
            return []
        own = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        here = [uuid for node, uuid in self.told((self.node, own)) if node == self.node]
        return here if context.get_local_rank() == 0 else []

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Meanwhile this rank has a log beside its step's, with what ended it."""
        path = log_files.of_rank(self.job.log, self.job.attempt, self.rank)
        close = log_files.attached(persistently(path, lambda: log_files.LogFile(path, self.warn)), *PACKAGES)
        logging.captureWarnings(True)
        try:
            log.info(
                "rank %d of %d on %s (%s), process %d",
                self.rank,
                self.world,
                os.uname().nodename,
                self.device,
                os.getpid(),
            )
            yield
            log.info("ends")
        except BaseException:
            log.exception("ends with an error")
            raise
        finally:
            close()

    def sampled(self) -> AbstractContextManager[None]:
        """Samples this node's GPUs meanwhile, where this is its first rank and NVML is there."""
        nvml = devices.library() if self._uuids else None
        return devices.sampled(nvml, self._uuids, self.node, self.board.post) if nvml else nullcontext()

    def tell_spent(self, training: str, step: int) -> None:
        """Tell the driver where the time went until a step (rank 0 only)."""
        if self.rank == 0:
            self.board.post(Spent(training, step, self.spending.seconds(), self.spending.age))

    def warn(self, text: str) -> None:
        """Tell the driver of something that was got over."""
        log.warning("%s", text)
        self.board.post(Warned(text))


class RankCallbacks(Callbacks):
    """One training of a rank: its batches and checkpoints, and what the board, and so the driver, hears of it.

    `panel` makes pictures of what the objective's models can do, whatever their weights are at the time.
    """

    def __init__(
        self,
        rank: Rank,
        name: str,
        config: TrainingConfig,
        data: TrainingData,
        panel: Callable[[], Panel] | None,
        doing: activity.Activity,
    ) -> None:
        self._rank, self._name, self._config, self._data, self._panel = rank, name, config, data, panel
        folder, (replica, place) = checkpoints_of(rank.job.building, name), divmod(rank.rank, config.shard)
        part = place * (rank.world // config.shard) + replica  # in the order of the rows that each rank saves
        self.states = Checkpoints(folder, rank.warn, part, rank.world, config.phase_ends, rank.job.fence)
        if config.validation and data.held_out:
            self.validation = Validation(data.held_out.read, data.held_out.rows)
        if config.panel_every and panel and rank.rank == 0:
            _ = data.shown  # read now: as soon as the training begins, a thread reads from the same batches
        self.key = training_key(name)
        self.measured: dict[str, float] = {}  # with the last entry
        self._begun = False
        self._panel_seconds = 0.0
        self._panels: dict[str, Panel] = {}  # by weights, until all are there
        self._logged: dict[int, dict[str, float]] = {}  # since the last saved state
        self._reading = threading.Lock()  # the loop reads in a thread; who asks about a bad step reads the same batches
        super().__init__(doing)
        doing.begin(0, activity.STARTING)  # anew: what was read up to here is no stall of what comes

    def read_batch(self, step: int) -> dict[str, np.ndarray]:
        """This rank's rows of a step's batch, as far as they are stored."""
        rank, rows = self._rank, self._config.phase_at(step).batch_size // self._rank.world
        with self._reading:
            return self._batches(step).seen(self._config.images_after(step) + rank.rank * rows, rows)

    def encode(self, step: int, batch: Batch) -> Batch:
        """A step's batch, of its rows as they are stored."""
        return self._batches(step).encoded(batch)

    def newest_state(self) -> Parts | None:
        """See `Callbacks`; tells the board where the training goes on."""
        rank = self._rank
        newest = self.states.newest(rank.rank, rank.world, rank.told)
        log.info("%s goes on from step %d", self._name, newest.saved.step if newest else 0)
        if rank.rank == 0 and not self._begun:  # later it is asked to rewind bad steps, which does none of them again
            step = newest.saved.step if newest else 0
            done = [values for at, values in logged_steps(rank.job.building, self._name) if at <= step]
            self.measured = done[-1] if done else {}  # of a training that has come to its end, nothing comes after them
            rank.board.post(Resumed(self._name, step))
        self._begun = True
        return newest.parts if newest else None

    def state_after(self, step: int) -> Parts:
        """See `Callbacks`."""
        return self.states.after(step).parts

    def save_state(self, step: int, data: Serialized) -> None:
        """See `Callbacks`; with what was logged up to that step."""
        best = checkpoint.best(data.header) if self._config.keeps_best else None
        entries = {entry: self._logged.pop(entry) for entry in sorted(self._logged) if entry <= step}
        if self._rank.rank == 0:  # no checkpoint without its log: the driver may be dead, and the next one asks for it
            folder = log_of(self._rank.job.building, self._name)
            storage.publish(json.dumps(entries).encode(), storage.join(folder, f"{step}.json"))
        followed = Followed(data, self.doing.saves_more)
        self.states.save(step, followed, self._config.recipe(self._rank.job.seed), best.step if best else None)
        log.info("%s: step %d is saved, %.1f MB of it here", self._name, step, len(data) / 1e6)
        if self._rank.rank == 0:
            self._rank.board.post(Saved(self._name, step))

    def should_stop(self) -> bool:
        """Whether the run was asked to stop, or a node is being taken away."""
        # Ray's question is a barrier: the loop asks on all ranks after the same steps.
        return ray.train.get_preemption_info() is not None or self._rank.board.stopping()

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Callbacks`."""
        if self._panel_seconds:
            values, self._panel_seconds = {**values, "panel_seconds": self._panel_seconds}, 0.0
        name, post = self._name, self._rank.board.post
        post(Reached(step, self._config.num_steps, f"{name} steps"))
        self._rank.tell_spent(name, step)
        named = {f"{name}/{key}": value for key, value in values.items()}
        post(Logged(name, step, named))
        self._logged[step] = self.measured = named

    def bad_steps(self, steps: list[int], done: str) -> None:
        """See `Callbacks`; a warning that names the rows to blame."""
        for step in steps:
            rows, world = self._config.phase_at(step).batch_size, self._rank.world
            starts = range(start := self._config.images_after(step), start + rows, rows // world)
            with self._reading:  # as much at a time as a rank reads: other lanes' shards take memory too
                found = suspects(self._batches(step).stored.read(first, rows // world) for first in starts)
            self._rank.warn(f"{self._name}: step {step + 1} went wrong ({done}); {found}")

    def show(self, step: int, weights: str) -> None:
        """See `Callbacks`; draws the panel, of the weights and their average side by side.

        One that cannot be drawn ends no training: that is told, and none are drawn from then on.
        """
        if self._panel is None:
            return
        began = time.monotonic()
        try:
            self._panels[SHOWN_AS[weights]] = self._panel()
            if weights == ("ema" if self._config.ema else "weights"):
                png, self._panels = beside(self._panels), {}
                self._rank.board.post(Drawn(f"{self._name} panel", png, step))
        except Exception as error:
            log.exception("the panel")
            self._rank.warn(f"{self._name}: the panel of step {step} could not be drawn, and no more are: {error}")
            self._panel = None
        self._panel_seconds += time.monotonic() - began

    def flops_of(self, phase: Phase) -> float:
        """See `Callbacks`."""
        return self._rank.job.flops[self._name][phase.size]

    def _batches(self, step: int) -> EncodedBatches:
        """What the phase of a step reads."""
        phase = self._config.phase_at(step)
        return self._data.batches[Frame(phase.size, phase.max_aspect), phase.view]
