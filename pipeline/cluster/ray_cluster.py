"""Ray: starting it, tasks, actor pools over shards, training jobs. The only file that calls Ray.

Ray's blocking calls run in a thread, so that the driver's main thread stays free for signals and progress. Workers talk
back through one small actor, the board: progress, metrics, and the wish to stop.
"""

import collections
import contextlib
import itertools
import logging
import os
import pickle
import secrets
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import psutil
import ray
import ray.data
import ray.exceptions
import ray.train
import ray.train.torch
from ray.autoscaler.sdk import request_resources
from ray.data import ActorPoolStrategy, DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from datasets.fetching.pace import HostSlots
from datasets.files import retrying, storage
from pipeline.cluster.board import Board, HeardActor, heard
from pipeline.cluster.failures import cause, get
from pipeline.environment import quiet_environment, ray_folder
from pipeline.errors import InfrastructureError, Interrupted, RetriesExhausted, UsageError
from pipeline.settings.resources import Cluster as ClusterConfig

T = TypeVar("T")
Post = Callable[[dict[str, Any]], None]
POLL_S = 0.5
SHARDS_PER_ACTOR = 4
ENDING_S = 10.0  # for the kernel to end what was killed
PING_S = 60.0  # for an answer of a node: it may have to start a process; one that is dead fails sooner


class Cluster:
    """A running Ray, local or remote."""

    def __init__(self, config: ClusterConfig, workers: int):
        self.config = config
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
        _start(config)
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
        # Leases on one machine, or on one cluster, share its devices.
        self.where = ray.get_runtime_context().gcs_address if config.address else socket.gethostname()
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

    def slots(self, each: int, patience_s: float, held_s: float) -> Any:
        """New `HostSlots` for the workers of this cluster, for their `SlotsClient`."""
        return ray.remote(num_cpus=0)(HostSlots).remote(each, patience_s, held_s)

    def exchange(self, stop: bool) -> list[dict[str, Any]]:
        """Tell the workers whether to stop; returns what they posted since the last time."""
        messages: list[dict[str, Any]] = get(self.board.exchange.remote(stop))
        return messages

    def call(self, function: Callable[..., T], *arguments: Any, gpus: int, tick: Callable[[], None]) -> T:
        """Run one function as a Ray task on one CPU and so many GPUs; what `tick` raises ends the task."""
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(heard)
        reference = task.options(name=function.__name__).remote(self.board, function, *arguments)
        try:
            return _patiently(lambda: get(reference), tick)
        except BaseException:
            ray.cancel(reference, force=True)  # nothing, where it has ended by itself
            raise

    def call_each(
        self, function: Callable[..., T], items: Iterable[tuple[Any, ...]], tick: Callable[[], None]
    ) -> Iterator[T]:
        """Run a function once for each argument tuple, a Ray task each, at most one per CPU at a time.

        What `tick` raises ends the tasks, and so does a caller that takes no more results.
        """
        task = ray.remote(num_cpus=1, max_retries=0)(heard).options(name=function.__name__)
        coming = (task.remote(self.board, function, *item) for item in items)
        running = list(itertools.islice(coming, self.cpus))
        try:
            while running:
                done, running = ray.wait(running, timeout=POLL_S)
                running += itertools.islice(coming, len(done))
                tick()
                for reference in done:
                    yield get(reference)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

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
        self,
        worker: type,
        arguments: tuple[Any, ...],
        shards: Sequence[Any],
        tick: Callable[[], None],
        at_once: int = 1,
    ) -> None:
        """Ray Data over shards: a pool of `worker(*arguments)` actors, one of which is called with each.

        So many shards are `at_once` in an actor's hands, by a thread each. What stands for a shard is small; tensors
        never travel through the object store.
        """
        most, cpus = self._pool(len(shards))
        least = min(self.config.encoders.min, most)
        sent = [{"shard": pickle.dumps(shard)} for shard in shards]  # bytes have a column of their own in any block
        data = ray.data.from_items(sent, override_num_blocks=len(shards))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Ray has no other way to say max_restarts yet
            mapped = data.map_batches(
                HeardActor,
                batch_size=1,
                fn_constructor_args=(self.board, worker, *arguments),
                compute=ActorPoolStrategy(
                    min_size=least,
                    max_size=most,
                    max_concurrent_calls_per_actor=at_once,
                    max_tasks_in_flight_per_actor=at_once + 1,
                    enable_true_multi_threading=at_once > 1,
                ),
                num_cpus=cpus,
                num_gpus=self.config.encoders.gpus if self.device == "cuda" else 0,
                max_restarts=0,  # a dead actor fails the map; the step's next attempt goes on with what is left
            )
        _patiently(lambda: collections.deque(mapped.iter_rows(), maxlen=0), tick)

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
            partial(heard, self.board, loop),
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
        get(self.board.begin_job.remote(self._jobs))
        try:
            _patiently(trainer.fit, tick)
        except InfrastructureError as error:
            if stall := get(self.board.stall.remote()):
                raise InfrastructureError(stall) from error
            raise


def _start(config: ClusterConfig) -> None:
    """Start or join Ray, from the main thread: its processes end with the thread that has started them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    others = _children()
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
            _temp_dir=ray_folder() if config.address is None else None,
            runtime_env={"env_vars": quiet_environment() | retrying.environment()} if config.address else None,
        )
    except ConnectionError as error:
        raise UsageError(f"cluster.address={config.address}: no Ray answers there ({error})") from None
    except (ValueError, TypeError, AssertionError):  # ours
        raise
    except Exception as error:  # Ray raises a plain one where its processes do not answer in time
        _end_half_started(others)
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RetriesExhausted(
            f"Ray did not start ({why}): the machine is very busy, or its memory or the disk of {ray_folder()} is "
            "full; start the same command again once it is not"
        ) from error
    except SystemExit as error:  # of the handler that Ray sets at first, which knows no clean end
        _end_half_started(others)
        raise Interrupted(signal.SIGTERM) from error
    except BaseException:  # somebody does not want to wait for it
        _end_half_started(others)
        raise
    finally:
        for number, handler in handlers.items():  # Ray takes SIGTERM for itself and would end without saving
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


def _end_half_started(others: Collection[psutil.Process]) -> None:
    """End the Ray that this process has begun to start, of which Ray itself may know nothing yet."""
    if ray.is_initialized():
        ray.shutdown()
    begun = _children().difference(others)
    for process in begun:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(begun, timeout=ENDING_S)


def _children() -> set[psutil.Process]:
    """The processes below this one."""
    return set(psutil.Process().children(recursive=True))


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
        raise cause(failure[0]) from failure[0]
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
