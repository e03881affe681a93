"""One rank of a training job: what a Ray Train worker does around the training loop of `stages.training.loop`.

Runs in the worker. State goes to the artifact's building folder, progress and metrics to the board; when everything is
trained, rank 0 publishes the weights and, last, `result.json`, which the driver turns into the manifest.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import ray
import ray.train
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

from datasets.buckets import Frame
from datasets.files import json_files, storage
from datasets.files.storage import CorruptFile, FileEntry
from datasets.reading.bucket_batches import BucketBatches
from pipeline.cluster.board import BoardClient
from pipeline.cluster.checkpoints import Checkpoints
from pipeline.cluster.watchdog import Watchdog
from pipeline.models.encoders import EncodedBatches, TrainingData
from pipeline.models.loading import weights
from stages.settings.training import TrainingConfig
from stages.training import checkpoint, loop
from stages.training.activity import Activity
from stages.training.validation import Validation

RESULT = "result.json"
KEYS_SHOWN = 8  # of a bad batch
M = TypeVar("M", bound=nn.Module)


class Rank:
    """A worker's place in its job: rank, world size, device, board, folders."""

    def __init__(self, payload: dict[str, Any]):
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.path, self.building, self.seed = payload["path"], payload["building"], payload["seed"]
        self.flops, self.stall_s = payload["flops"], payload["stall_s"]
        self.board = BoardClient(payload["board"], payload["job"])
        if torch.cuda.is_available() and ray.get_gpu_ids():
            self.device = ray.train.torch.get_device()
        else:
            self.device = torch.device("cpu")
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.set_float32_matmul_precision("high")
        self.pids = self._every_pid()
        self.files: dict[str, FileEntry] = {}
        self.metrics: dict[str, float] = {"training_seconds": 0.0}
        self.states: Checkpoints  # of what was trained last

    def train(
        self,
        name: str,
        objective: nn.Module,
        config: TrainingConfig,
        data: TrainingData,
        panel: Callable[[], bytes] | None = None,
    ) -> bool:
        """Train (or go on training) an objective.

        `panel` makes a PNG of what the objective's models can do, whatever their weights are at the time. False when it
        was asked to stop before its end, by the run or because one of its nodes is being taken away.
        """
        self._warn_of_small_buckets(name, config, data.batches)
        panel_seconds, begun = 0.0, False
        logged: dict[int, dict[str, float]] = {}  # since the last saved state
        reading = threading.Lock()  # the loop reads in a thread; who asks about a bad step reads the same batches
        folder = checkpoints_of(self.building, name)
        states = Checkpoints(folder, self._warn, self.rank % config.shard, config.shard, config.phase_ends)

        def load_state() -> Iterator[bytes] | None:
            nonlocal begun
            newest = [states.newest() if self.rank == 0 else None]
            if self.world > 1:  # all ranks go on from the same one
                dist.broadcast_object_list(newest)
            if self.rank == 0 and not begun:  # later it is asked to rewind bad steps, which does none of them again
                self.board.post({"kind": "resumed", "training": name, "step": newest[0].step if newest[0] else 0})
            begun = True
            return states.read(newest[0]) if newest[0] else None

        def read_batch(step: int) -> dict[str, Any]:
            phase = config.phase_at(step)
            frame, rows = Frame(phase.size, phase.max_aspect), phase.batch_size // self.world
            with reading:
                return data.batches[frame, phase.view].read(config.images_after(step) + self.rank * rows, rows)

        def save_state(step: int, state: bytes) -> None:
            best = checkpoint.best(state) if config.keeps_best else None
            entries = {entry: logged.pop(entry) for entry in sorted(logged) if entry <= step}
            if self.rank == 0:  # no checkpoint without its log: the driver may be dead, and the next one asks for it
                storage.publish(json.dumps(entries).encode(), storage.join(log_of(self.building, name), f"{step}.json"))
            states.save(step, state, config.recipe(self.seed), best.step if best else None)

        def load_best(step: int) -> Iterator[bytes]:
            return states.read(states.after(step))

        def show(step: int, weights: str) -> None:
            nonlocal panel_seconds
            assert panel is not None
            began = time.monotonic()
            title = f"{name} panel" if weights == "weights" else f"{name} panel ({weights})"
            self.board.post({"kind": "image", "name": title, "png": panel(), "step": step})
            panel_seconds += time.monotonic() - began

        def bad_steps(steps: list[int], done: str) -> None:
            for step in steps:
                phase = config.phase_at(step)
                frame, start = Frame(phase.size, phase.max_aspect), config.images_after(step)
                with reading:
                    batch = data.batches[frame, phase.view].stored.read(start, phase.batch_size)
                self._warn(f"{name}: step {step + 1} went wrong ({done}); {suspects(batch)}")

        def log(step: int, values: dict[str, float]) -> None:
            nonlocal panel_seconds
            if panel_seconds:
                values, panel_seconds = {**values, "panel_seconds": panel_seconds}, 0.0
            self.board.post({"kind": "progress", "done": step, "total": config.num_steps, "unit": f"{name} steps"})
            self.board.post({"kind": "reached", "training": name, "step": step})
            named = {f"{name}/{key}": value for key, value in values.items()}
            self.board.post({"kind": "metrics", "values": named, "step": step})
            self.metrics.update(named)
            logged[step] = named

        def should_stop() -> bool:  # Ray's question is a barrier: the loop asks on all ranks after the same steps
            return ray.train.get_preemption_info() is not None or self.board.stopping()

        if config.panel_every and panel:
            _ = data.shown  # read now: as soon as the training begins, a thread reads from the same batches
        validation = None
        if config.validation and data.held_out:
            validation = Validation(data.held_out.read, data.held_out.rows, load_best)
        began = time.monotonic()
        doing = Activity()
        with Watchdog(self.board, self.rank, doing, self.stall_s):
            outcome = loop.train(
                objective,
                read_batch,
                config,
                seed=self.seed,
                device=self.device,
                rank=self.rank,
                world=self.world,
                load_state=load_state,
                save_state=save_state,
                log=log,
                should_stop=should_stop,
                bad_steps=bad_steps,
                flops_of=lambda phase: self.flops[name][phase.size],
                doing=doing,
                validation=validation,
                show=show if panel else None,
            )
        self.metrics["training_seconds"] += time.monotonic() - began
        if outcome.best:
            self.metrics[f"{name}/best_step"] = outcome.best.step
            self.metrics[f"{name}/best_validation_loss"] = outcome.best.loss
            self.metrics[f"{name}/kept_step"] = outcome.best.step if config.keeps_best else outcome.step
        self.states = states
        return outcome.finished

    def publish_model(self, name: str, model: nn.Module) -> None:
        """Publish the weights of a part of what was trained last: in the end, and after each earlier phase."""
        if self.rank:
            return
        self.publish(f"{name}.safetensors", lambda: weights(model))
        for number, step in enumerate(self.states.milestones[:-1], start=1):
            try:
                parts = self.states.read_all(self.states.after(step))
                every = checkpoint.final_weights(map(checkpoint.load, parts))
            except CorruptFile as error:
                self._warn(f"{name}: the weights after phase {number} are not kept: {error}")
                continue
            ours = {key.removeprefix(f"{name}."): every[key] for key in every if key.startswith(f"{name}.")}
            self.publish(phase_file(name, number), partial(safetensors.torch.save, ours))

    def publish(self, name: str, make: Callable[[], bytes]) -> None:
        """Make a file and put it into the artifact (rank 0 only)."""
        if self.rank == 0:
            self.files[name] = storage.publish(make(), storage.join(self.path, name))

    def finish(self, rows: int) -> None:
        """Say that everything is published (rank 0 only)."""
        result = {
            "files": {name: vars(entry) for name, entry in self.files.items()},
            "metrics": self.metrics,
            "rows": rows,
            "pids": self.pids,
        }
        if self.rank == 0:
            storage.publish(json.dumps(result).encode(), storage.join(self.building, RESULT))

    def _warn_of_small_buckets(
        self, name: str, config: TrainingConfig, batches: Mapping[tuple[Frame, str | None], EncodedBatches]
    ) -> None:
        largest = max((phase.batch_size for phase in config.phases if phase.max_aspect > 1), default=0)
        for one in (encoded.stored for encoded in batches.values()):
            if self.rank == 0 and isinstance(one, BucketBatches):
                small = [f"{bucket} ({rows})" for bucket, rows in one.bucket_rows.items() if rows < largest]
                if small:
                    self._warn(
                        f"{name}: buckets of fewer pictures than a batch of {largest} repeat them in it: "
                        f"{', '.join(small)}; a smaller data.image.max_aspect has fewer buckets"
                    )

    def _every_pid(self) -> list[int]:
        """The processes of all ranks."""
        if self.world == 1:
            return [os.getpid()]
        pids: list[Any] = [None] * self.world
        dist.all_gather_object(pids, os.getpid())
        return sorted(pids)

    def _warn(self, text: str) -> None:
        self.board.post({"kind": "warning", "text": text})


def suspects(batch: Mapping[str, np.ndarray]) -> str:
    """Which rows of a bad step's batch are to blame, in words: those with a number that is not finite, else any."""
    keys = [bytes(key).hex() for key in batch["key"]]
    finite = np.ones(len(keys), bool)
    for values in batch.values():
        if np.issubdtype(values.dtype, np.floating):
            finite &= np.isfinite(values).reshape(len(keys), -1).all(axis=1)
    poor = [key for key, good in zip(keys, finite, strict=True) if not good]
    few = (poor or keys)[:KEYS_SHOWN]
    what = "numbers that are not finite in" if poor else "all numbers are finite in its pictures"
    more = len(poor or keys) - len(few)
    return f"{what} {', '.join(few)}{f' and {more} more' if more else ''}"


def phase_file(model: str, number: int) -> str:
    """File of a model's weights after a phase, counted from 1, that was not the last."""
    return f"phases/{number}/{model}.safetensors"


def checkpoints_of(building: str, name: str) -> str:
    """Where a training of an unfinished artifact keeps its checkpoints."""
    return storage.join(building, "checkpoints", name)


def log_of(building: str, name: str) -> str:
    """Where a training of an unfinished artifact keeps what it logged up to each checkpoint, by step."""
    return storage.join(building, "log", name)


def result(building: str) -> dict[str, Any] | None:
    """What a finished job left for the driver, or None."""
    return json_files.read(storage.join(building, RESULT), _result)


def _result(told: dict[str, Any]) -> dict[str, Any]:
    return {key: told[key] for key in ("files", "metrics", "rows", "pids")}


def seeded(seed: int, make: Callable[[], M]) -> M:
    """Make a module with initial weights that depend on the seed only."""
    torch.manual_seed(seed)
    return make()
