"""Ray: starting it, tasks, actor pools over shards, training jobs. The only file that calls Ray.

Ray's blocking calls run in a thread, so that the driver's main thread stays free for signals and progress. Workers talk
back through one small actor, the board: progress, metrics, and the wish to stop.
"""

import contextlib
import itertools
import logging
import os
import random
import secrets
import signal
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import ray
import ray.data
import ray.exceptions
import ray.train
import ray.train.torch
import torch
from ray.autoscaler.sdk import request_resources
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import UserCodeException
from ray.train.v2._internal.exceptions import (
    RayTrainError,
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from datasets import storage
from pipeline.config import Cluster as ClusterConfig
from pipeline.environment import quiet_environment
from pipeline.errors import InfrastructureError, Preempted, UsageError
from pipeline.watchdog import Pulses

T = TypeVar("T")
Post = Callable[[dict[str, Any]], None]
POLL_S = 0.5
SLOT_POLL_S = 0.05
SHARDS_PER_ACTOR = 4
PING_S = 60.0  # for an answer of a node: it may have to start a process; one that is dead fails sooner


class Board:
    """What workers tell the driver, and whether they should stop. Runs as an actor without a CPU of its own.

    Where its node dies, Ray starts it anew: messages that nobody has fetched are lost, the wish to stop comes again
    with the next exchange.
    """

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._stop = False
        self._job, self._pulses = 0, Pulses()

    def post(self, message: dict[str, Any]) -> None:
        """Leave a message for the driver."""
        self._messages.append(message)

    def exchange(self, stop: bool) -> list[dict[str, Any]]:
        """The driver's visit: tell whether to stop, take the messages along."""
        self._stop = stop
        messages, self._messages = self._messages, []
        return messages

    def stopping(self) -> bool:
        """Whether workers should save and return."""
        return self._stop

    def begin_job(self, job: int) -> None:
        """Forget the ranks of the jobs before; jobs are numbered in their order."""
        self._job, self._pulses = job, Pulses()

    def beat(self, job: int, rank: int, step: int, doing: str, seconds: float, stall_s: float) -> str | None:
        """A rank's pulse; answers the stall of its job. One that a frozen node sent late must not end a later job."""
        if job > self._job:  # this actor was started anew
            self.begin_job(job)
        return self._pulses.beat(rank, step, doing, seconds, stall_s) if job == self._job else "this attempt is over"

    def rest(self, job: int, rank: int) -> None:
        """A rank has no pulse for now."""
        if job == self._job:
            self._pulses.rest(rank)

    def stall(self) -> str | None:
        """The stall of the job, if it was in one."""
        return self._pulses.stall


class BoardClient:
    """A worker's view of the board."""

    def __init__(self, board: Any, job: int = 0):
        self._board, self._job = board, job
        self._asked = 0.0
        self._stopping = False

    def post(self, message: dict[str, Any]) -> None:
        """Leave a message for the driver, without waiting."""
        self._board.post.remote(message)

    def stopping(self) -> bool:
        """Whether to save and return; asks the board at most twice a second."""
        if time.monotonic() - self._asked > 0.5:
            self._stopping = _get(self._board.stopping.remote())
            self._asked = time.monotonic()
        return self._stopping

    def beat(self, rank: int, step: int, doing: str, seconds: float, stall_s: float) -> str | None:
        """What this rank does; returns the stall that its job is in. None too while the board starts anew."""
        try:
            found: str | None = _get(self._board.beat.remote(self._job, rank, step, doing, seconds, stall_s))
        except InfrastructureError:
            return None
        return found

    def rest(self, rank: int) -> None:
        """This rank has no pulse for now."""
        self._board.rest.remote(self._job, rank)


class Slots:
    """How many of something are held at a time, over all workers, by name. Runs as an actor without a CPU of its own.

    A slot that its holder never gives back, because it died, is free again after `held_s`.
    """

    def __init__(self, each: int, held_s: float) -> None:
        self._each, self._held_s = each, held_s
        self._held: defaultdict[str, dict[int, float]] = defaultdict(dict)  # name -> ticket -> when it lapses
        self._tickets = itertools.count()

    def take(self, name: str) -> int | None:
        """A ticket for one of the slots of `name`, or None while all are held."""
        now = time.monotonic()
        held = self._held[name] = {ticket: end for ticket, end in self._held[name].items() if end > now}
        if len(held) >= self._each:
            return None
        ticket = next(self._tickets)
        held[ticket] = now + self._held_s
        return ticket

    def give_back(self, name: str, ticket: int) -> None:
        """End the hold of a ticket."""
        self._held[name].pop(ticket, None)
        if not self._held[name]:
            del self._held[name]


class SlotsClient:
    """A worker's view of the slots: `with slots(name)` holds one, waiting for it where all are held."""

    def __init__(self, slots: Any):
        self._slots = slots

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        while (ticket := _get(self._slots.take.remote(name))) is None:
            time.sleep(random.uniform(0.5, 1.5) * SLOT_POLL_S)
        try:
            yield
        finally:
            self._slots.give_back.remote(name, ticket)


class Cluster:
    """A running Ray, local or remote."""

    def __init__(self, config: ClusterConfig, workers: int):
        self.config = config
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # A signal to our whole process group must not end Ray before the workers have saved. Its processes inherit what
        # is blocked; for SIGINT Ray sees to this itself.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            ray.init(
                address=config.address or "local",  # None would be any Ray that happens to run on this machine
                num_cpus=config.num_cpus if config.address is None else None,
                include_dashboard=False if config.address is None else None,
                logging_level=logging.WARNING,
                log_to_driver=False,
                runtime_env={"env_vars": quiet_environment()} if config.address else None,
            )
        except ConnectionError as error:
            raise UsageError(f"cluster.address={config.address}: no Ray answers there ({error})") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        for number, handler in handlers.items():  # Ray takes SIGTERM for itself and would end without saving
            signal.signal(number, handler)
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = 0
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        total = ray.cluster_resources()
        self.cpus = int(total.get("CPU", 1))
        self.gpus = int(total.get("GPU", 0)) if config.device != "cpu" else 0
        self._check_room(workers)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)  # lives as we do
        self.board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(
            Board
        ).remote()
        self._jobs = 0  # trainings so far, attempts counted
        names = [name.removeprefix("accelerator_type:") for name in total if name.startswith("accelerator_type:")]
        self.kind = f"cuda:{'+'.join(sorted(names)) or 'GPU'}" if self.gpus else "cpu"

    def close(self) -> None:
        """Leave (or end) Ray."""
        ray.shutdown()

    @property
    def device(self) -> str:
        """`cuda` or `cpu`: where workers compute."""
        return "cuda" if self.gpus else "cpu"

    def _check_room(self, workers: int) -> None:
        """Refuse what would wait for ever, before any step starts."""
        if self.config.device == "cuda" and self.gpus == 0:
            raise UsageError("cluster.device=cuda, but Ray sees no GPU; use cluster.device=auto or cpu")
        room = self.gpus // max(1, self.config.gpus_per_worker) if self.gpus else self.cpus
        if workers > room and self.config.address is None:  # a cluster may still grow
            kind = "GPUs" if self.gpus else "CPU cores"
            raise UsageError(f"workers={workers}: this machine has {kind} for {room}; lower workers")

    def slots(self, each: int, held_s: float) -> Any:
        """New `Slots` for the workers of this cluster, for their `SlotsClient`."""
        return ray.remote(num_cpus=0)(Slots).remote(each, held_s)

    def exchange(self, stop: bool) -> list[dict[str, Any]]:
        """Tell the workers whether to stop; returns what they posted since the last time."""
        messages: list[dict[str, Any]] = _get(self.board.exchange.remote(stop))
        return messages

    def call(self, function: Callable[..., T], *arguments: Any, gpus: int, tick: Callable[[], None]) -> T:
        """Run one function as a Ray task on one CPU and so many GPUs."""
        reference = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(function).remote(*arguments)
        return _patiently(lambda: _get(reference), tick)

    def call_each(
        self, function: Callable[..., T], items: Iterable[tuple[Any, ...]], tick: Callable[[], None]
    ) -> Iterator[T]:
        """Run a function once for each argument tuple, a Ray task each, at most one per CPU at a time."""
        task = ray.remote(num_cpus=1, max_retries=0)(function)
        coming = (task.remote(*item) for item in items)
        running = list(itertools.islice(coming, self.cpus))
        while running:
            done, running = ray.wait(running, timeout=POLL_S)
            running += itertools.islice(coming, len(done))
            tick()
            for reference in done:
                yield _get(reference)

    def reserved(self, items: int) -> float:
        """Devices that an encoding pool over that many shards holds: GPUs, or CPUs where there are none."""
        actors, cpus = self._pool(items)
        return actors * (self.config.encoders.gpus if self.device == "cuda" else cpus)

    def reserved_for_training(self, workers: int) -> float:
        """Devices that a training job with that many ranks holds."""
        return workers * (self.config.gpus_per_worker if self.device == "cuda" else self._training_cpus(workers))

    def _pool(self, items: int) -> tuple[int, int]:
        """Actors of an encoding pool, and the CPUs of each; an actor takes seconds to start, so it gets some shards."""
        worthwhile = -(-items // SHARDS_PER_ACTOR)
        room = self.gpus * int(1 / self.config.encoders.gpus) or self.cpus  # an actor never lies across two GPUs
        actors = max(1, min(self.config.encoders.max, worthwhile, room))
        return actors, 1

    def settle(self, worlds: Sequence[int], tick: Callable[[int], None]) -> int:
        """The number of ranks to train on: the first of `worlds`, descending, or the largest that there is room for.

        Where there is a choice, the first has `replacement_s` to find room, then the others get their turn. Meanwhile
        `tick` is told for how many there is room.

        Raises:
            InfrastructureError: there is not even room for the last.
        """
        if len(worlds) == 1 or self.config.address is None:
            return worlds[0]  # Ray waits for room, or there always is
        deadline = time.monotonic() + self.config.replacement_s
        request_resources(bundles=[self._rank_resources(worlds[0])] * worlds[0])  # where there is an autoscaler
        try:
            while (room := self._room()) < worlds[0] and time.monotonic() < deadline:
                tick(room)
                time.sleep(POLL_S)
        finally:
            request_resources(bundles=[])
        found = next((world for world in worlds if world <= room), None)
        if found is None:
            raise InfrastructureError(f"the nodes that are left have room for {room} workers, not for {worlds[-1]}")
        return found

    def _room(self) -> int:
        """Ranks for which there is room on the nodes that are there to stay."""
        wanted = self._rank_resources(1)
        return sum(
            min(int(node["Resources"].get(name, 0) / count) for name, count in wanted.items() if count)
            for node in _lasting_nodes()
        )

    def _rank_resources(self, workers: int) -> dict[str, float]:
        """What each of so many training ranks holds, by Ray's names."""
        resources: dict[str, float] = {"CPU": self._training_cpus(workers)}
        if self.device == "cuda":
            resources["GPU"] = self.config.gpus_per_worker
        return resources

    def _training_cpus(self, workers: int) -> int:
        """CPUs of each rank: all there are on our own local Ray, what the config says elsewhere."""
        return max(1, self.cpus // workers) if self.config.address is None else self.config.cpus_per_worker

    def map_shards(
        self, worker: type, arguments: tuple[Any, ...], shards: Sequence[int], tick: Callable[[], None]
    ) -> list[dict[str, Any]]:
        """Ray Data over shard numbers: a pool of `worker(*arguments)` actors maps each to a small result row.

        `worker.__call__(batch)` gets `{"shard": array([number])}`. Tensors never travel through the object store.
        """
        most, cpus = self._pool(len(shards))
        least = min(self.config.encoders.min, most)
        data = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Ray has no other way to say max_restarts yet
            mapped = data.map_batches(
                worker,
                batch_size=1,
                fn_constructor_args=arguments,
                compute=ActorPoolStrategy(min_size=least, max_size=most),
                num_cpus=cpus,
                num_gpus=self.config.encoders.gpus if self.device == "cuda" else 0,
                max_restarts=0,  # a dead actor fails the map; the step's next attempt goes on with what is left
            )
        return _patiently(lambda: list(mapped.iter_rows()), tick)

    def train(
        self,
        loop: Callable[[dict[str, Any]], None],
        payload: dict[str, Any],
        *,
        workers: int,
        folder: str,
        tick: Callable[[], None],
    ) -> None:
        """Run `loop(payload)` on `workers` ranks as a Ray Train job; a dead worker ends it, the step tries again.

        A node that is being drained ends it too, as `Preempted`, once all ranks have saved or their time is over.

        State lives in our own checkpoints, so each attempt gets a fresh Ray Train name: a damaged snapshot of an
        earlier attempt can never stop a run from starting.
        """
        self._jobs += 1
        trainer = ray.train.torch.TorchTrainer(
            loop,
            train_loop_config={**payload, "job": self._jobs},
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=self.device == "cuda",
                resources_per_worker=self._rank_resources(workers),
            ),
            run_config=ray.train.RunConfig(
                name=secrets.token_hex(6),
                storage_path=storage.join(folder, "ray_train"),
                failure_config=ray.train.FailureConfig(  # we retry
                    max_failures=0, controller_failure_limit=1, max_preemption_failures=0
                ),
            ),
        )
        _get(self.board.begin_job.remote(self._jobs))
        try:
            _patiently(trainer.fit, tick)
        except InfrastructureError as error:
            if stall := _get(self.board.stall.remote()):
                raise InfrastructureError(stall) from error
            raise


def _patiently(blocking: Callable[[], T], tick: Callable[[], None]) -> T:
    """Run a blocking Ray call in a thread and tick meanwhile."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(blocking())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="ray", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        tick()
    tick()  # what was said last belongs to this call
    if failure:
        raise _cause(failure[0]) from failure[0]
    return outcome[0]


def _lasting_nodes() -> list[dict[str, Any]]:
    """The nodes, as Ray describes them, that answer and are not being drained; Ray may miss a death for a while."""
    drained = ray._private.state.state.get_draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in drained]
    pings = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        pings[ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_answer).remote()] = node
    answered, _ = ray.wait(list(pings), num_returns=len(pings), timeout=PING_S)
    return [pings[reference] for reference in answered if _succeeded(reference)]


def _answer() -> None:
    """What a node does that is asked whether it is there."""


def _succeeded(reference: Any) -> bool:
    try:
        ray.get(reference)
    except ray.exceptions.RayError:
        return False
    return True


def _get(reference: Any) -> Any:
    """A task's result, or the error that it raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise _cause(error) from error


def _cause(error: BaseException) -> BaseException:
    """The error that a worker raised, out of Ray's wrappings; failures of Ray itself as `InfrastructureError`."""
    if isinstance(error, PreemptionError):
        return Preempted("a node was taken away before the training had saved its state")
    if isinstance(error, TrainingFailedError):
        causes = [_cause(failure) for failure in (getattr(error, "worker_failures", None) or {}).values()]
        for kind in (Preempted, ValueError, InfrastructureError, BaseException):  # one rank's end makes others fail
            if found := [cause for cause in causes if isinstance(cause, kind)]:
                return found[0]
        return InfrastructureError(f"the training job failed: {error}")
    if isinstance(error, UserExceptionWithTraceback):  # of a training worker
        return _cause(error._base_exc)
    if isinstance(error, WorkerHealthCheckFailedError):  # a rank's process or node is gone
        return _cause(error.health_check_failure)
    if isinstance(error, ray.exceptions.RayTaskError):
        return _cause(error.cause)
    if isinstance(error, UserCodeException) and error.__cause__:
        return _cause(error.__cause__)
    if getattr(error, "preempted", False):  # an actor's death
        return Preempted("a node was taken away")
    if isinstance(error, (ray.exceptions.RayError, RayTrainError)):
        return InfrastructureError(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    if isinstance(error, torch.AcceleratorError):  # not that its memory is full, which the config must cure
        return InfrastructureError(f"a device failed: {str(error).splitlines()[0]}")
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error)):
        return InfrastructureError("a training rank no longer reaches another")
    return error
