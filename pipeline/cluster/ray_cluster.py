"""Ray: starting it, tasks, actor pools over shards, training jobs. What a step asks of Ray, it asks here.

Ray's blocking calls run in a thread, so that the driver's main thread stays free for signals and progress. Workers talk
back through one small actor, the board: progress, metrics, and the wish to stop.
"""

import collections
import contextlib
import itertools
import logging
import math
import os
import pickle
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import ray
import ray.data
import ray.exceptions
import ray.train
from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET
from ray.autoscaler.sdk import request_resources
from ray.data import ActorPoolStrategy, DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from datasets.fetching.pace import HostSlots
from datasets.files import storage
from pipeline.cluster import joining
from pipeline.cluster.answers import get
from pipeline.cluster.board import Board, BoardClient, HeardActor, heard
from pipeline.cluster.failures import cause
from pipeline.cluster.messages import Message
from pipeline.cluster.ranks.allocator import KEEPS_FREED
from pipeline.cluster.ranks.meeting import Meeting
from pipeline.cluster.room import Room, grown, ranks
from pipeline.errors import Grows, InfrastructureError, RetriesExhausted
from pipeline.settings.resources import Cluster as ClusterConfig
from pipeline.settings.resources import Work
from pipeline.store.redact import hidden

log = logging.getLogger(__name__)

T = TypeVar("T")
MAIN_PROCESSES = {PROCESS_TYPE_RAYLET, PROCESS_TYPE_GCS_SERVER}
POLL_S = 0.5
END_S = 10.0  # for tasks that were ended
LOOK_S = 3.0  # between two looks whether a training that has shrunk can grow
PING_S = 60.0  # for an answer of a node: it may have to start a process; one that is dead fails sooner


class Cluster:
    """A running Ray, local or remote; `say` tells what went wrong on the way to it."""

    def __init__(self, config: ClusterConfig, workers: int, say: Callable[[str], object] = print):
        self.config = config
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
        if config.address is None:
            # Nobody drains this machine: spare each training a process that would look.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", f"{POLL_S}")  # see at once that a training ends
        joining.start(config, say)
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = 0
        context.raise_original_map_exception = True  # not one of Ray's, in which ours is lost
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised, and told once
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        self.room = Room(config, ray.nodes)
        self.room.require(workers)
        self.board = self._beside_us(Board, max_restarts=-1, max_task_retries=-1).remote()
        self._unheard: collections.deque[Message] = collections.deque()
        self._jobs = 0  # trainings so far, attempts counted
        self._grows = False  # whether the ranks are asked to save, so that more of them go on
        # Leases on one machine, or on one cluster, share its devices.
        self.where = ray.get_runtime_context().gcs_address if config.address else socket.gethostname()

    def close(self) -> None:
        """Leave (or end) Ray."""
        ray.shutdown()

    def __str__(self) -> str:
        """What a person is told of where the work runs."""
        nodes, cpus, gpus = len(self.room.nodes()), self.room.has("CPU"), self.room.has("GPU")
        return f"the Ray at {self.where}: {nodes} nodes, {cpus} CPUs, {gpus} GPUs"

    def devices(self) -> int:
        """How many it has at the moment: GPUs, or CPUs where there are none."""
        return self.room.has("GPU" if self.room.device() == "cuda" else "CPU")

    def slots(self, each: int, patience_s: float, held_s: float) -> Any:
        """New `HostSlots` for the workers of this cluster, for their `SlotsClient`."""
        return self._beside_us(HostSlots).remote(each, patience_s, held_s)

    def _beside_us(self, kind: type, **options: Any) -> Any:
        """An actor class without a CPU, on the driver's node: it lives as we do.

        A soft affinity is none here: where nothing is asked for, Ray takes any node, and that one's end would be ours.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return ray.remote(num_cpus=0, scheduling_strategy=here, **options)(kind)

    def exchange(self, stop: bool) -> Iterator[Message]:
        """Tell the workers whether to stop; gives what they posted, and keeps for the next time what is not taken.

        Raises:
            RetriesExhausted: a Ray of our own has died: within seconds it would end this process, too, without a word.
        """
        self._visit_board(stop or self._grows)
        while self._unheard:
            yield self._unheard.popleft()

    def _ask_to_stop(self) -> None:
        """Ask the workers to save and return; what they post is heard by the next exchange."""
        self._visit_board(stop=True)

    def _visit_board(self, stop: bool) -> None:
        if self.config.address is None and MAIN_PROCESSES & {name for name, _ in _node().dead_processes()}:
            self.close()
            raise RetriesExhausted("this run's own Ray has died; the same command goes on from here")
        self._unheard += get(self.board.exchange.remote(stop))

    def call(self, function: Callable[..., T], *arguments: Any, work: Work, gpus: int, tick: Callable[[], None]) -> T:
        """Run one function as a Ray task on one CPU and so many GPUs; what `tick` raises ends the task."""
        where = self.room.selector(work)
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, label_selector=where or None)(heard)
        reference = task.options(name=function.__name__).remote(self.board, hidden(), function, *arguments)
        try:
            return _patiently(lambda: get(reference), tick, lambda: ray.cancel(reference, force=True))
        except BaseException:
            ray.cancel(reference, force=True)  # nothing, where it has ended by itself
            raise

    def call_each(
        self, function: Callable[..., T], items: Iterable[tuple[Any, ...]], work: Work, tick: Callable[[], None]
    ) -> Iterator[T]:
        """Run a function once for each argument tuple, a Ray task each, at most one per CPU at a time.

        What `tick` raises ends the tasks, and so does a caller that takes no more results: none writes beside the next
        attempt.
        """
        where = self.room.selector(work)
        task = ray.remote(num_cpus=1, max_retries=0, label_selector=where or None)(heard).options(
            name=function.__name__
        )
        coming = (task.remote(self.board, hidden(), function, *item) for item in items)
        running: list[Any] = []
        try:
            while True:
                running += itertools.islice(coming, max(0, self.room.tasks(work) - len(running)))
                if not running:
                    return
                done, running = ray.wait(running, timeout=POLL_S)
                tick()
                for reference in done:
                    yield get(reference)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            if running:
                ray.wait(running, num_returns=len(running), timeout=END_S)

    def settle(self, worlds: Sequence[int], tick: Callable[[int], None]) -> int:
        """The number of ranks to train on: the first of `worlds`, descending, or the largest that there is room for.

        Where there is a choice, the first has `replacement_s` to find room, then the others get their turn. Meanwhile
        `tick` is told for how many there is room.

        Raises:
            InfrastructureError: there is not even room for the last.
        """
        comes = self.config.starts_nodes  # whatever is asked for, sooner or later
        if self.config.address is None or (len(worlds) == 1 and not comes):
            return worlds[0]  # there always is room, or Ray waits for it
        patience_s = math.inf if len(worlds) == 1 else self.config.replacement_s
        deadline = time.monotonic() + patience_s
        with self._demand(worlds[0]):
            while (room := self.room_for_ranks()) < worlds[0] and time.monotonic() < deadline:
                tick(room)
                time.sleep(POLL_S)
        found = next((world for world in worlds if world <= room), None)
        if found is None:
            raise InfrastructureError(f"the nodes that are left have room for {room} workers, not for {worlds[-1]}")
        return found

    @contextlib.contextmanager
    def _demand(self, ranks: int) -> Iterator[None]:
        """Ask for room for so many ranks meanwhile, where there is an autoscaler."""
        where = self.room.selector("train")
        request_resources(bundles=[self.room.of_rank(ranks)] * ranks, bundle_label_selectors=[where] * ranks)
        try:
            yield
        finally:
            request_resources(bundles=[])

    def room_for_ranks(self, free: bool = False) -> int:
        """Ranks for which there is room on the nodes that are there to stay; `free`: beside what goes on there."""
        left = ray._private.state.available_resources_per_node() if free else {}
        nodes = {
            node["NodeID"]: left.get(node["NodeID"], {}) if free else node["Resources"]
            for node in self.room.nodes("train")
        }
        each = self.room.of_rank(1)
        if not ranks(nodes.values(), each):  # each node is asked only where that matters
            return 0
        return ranks([nodes[name] for name in _lasting(nodes)], each)

    def map_shards(
        self,
        worker: type,
        arguments: tuple[Any, ...],
        shards: Sequence[Any],
        work: Work,
        tick: Callable[[], None],
        at_once: int = 1,
    ) -> None:
        """Ray Data over shards: a pool of `worker(*arguments)` actors, one of which is called with each.

        So many shards are `at_once` in an actor's hands, by a thread each. What stands for a shard is small; tensors
        never travel through the object store. The pool grows onto nodes that are added.
        """
        least, most = self.room.actors(work, len(shards))
        sent = [{"shard": pickle.dumps(shard)} for shard in shards]  # bytes have a column of their own in any block
        data = ray.data.from_items(sent, override_num_blocks=len(shards))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Ray has no other way to say max_restarts yet
            mapped = data.map_batches(
                HeardActor,
                batch_size=1,
                fn_constructor_args=(self.board, hidden(), worker, *arguments),
                compute=ActorPoolStrategy(
                    min_size=least,
                    max_size=most,
                    max_concurrent_calls_per_actor=at_once,
                    max_tasks_in_flight_per_actor=at_once + 1,
                    enable_true_multi_threading=at_once > 1,
                ),
                num_cpus=1,
                num_gpus=self.config.encoders.gpus if self.room.device(work) == "cuda" else 0,
                label_selector=self.room.selector(work) or None,
                max_restarts=0,  # a dead actor fails the map; the step's next attempt goes on with what is left
            )
        _patiently(lambda: collections.deque(mapped.iter_rows(), maxlen=0), tick, self._ask_to_stop)

    def train(
        self,
        loop: Callable[[BoardClient], None],
        *,
        workers: int,
        folder: str,
        tick: Callable[[], None],
        worlds: Sequence[int] = (),
    ) -> None:
        """Run `loop(board)` on `workers` ranks as a Ray Train job; a dead worker ends it, the step tries again.

        A node that is being drained ends it too, as `Preempted`, once all ranks have saved or their time is over. So
        does room for more ranks, of which there should be as many as the first of `worlds`, descending: as `Grows`.
        Ray's elastic jobs end the ranks without a word, which costs all steps since the last checkpoint.

        State lives in our own checkpoints, so each attempt gets a fresh Ray Train name: a damaged snapshot of an
        earlier attempt can never stop a run from starting.
        """
        from ray.train.torch import TorchTrainer  # imports torch, which other steps' runs can do without

        self._jobs += 1
        gpus = self.room.device("train") == "cuda"
        # Bound here, not handed to Ray as the loop's config: that may be shown, and Ray's process beside the training
        # would import all that it names. A function of its own, since Ray hands a config to whatever takes *arguments.
        work = partial(heard, self.board, hidden(), loop, BoardClient(self.board, self._jobs))

        def rank() -> None:
            work()

        trainer = TorchTrainer(
            rank,
            torch_config=Meeting("nccl" if gpus else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=gpus,
                resources_per_worker=self.room.of_rank(workers),
                label_selector=self.room.selector("train") or None,
            ),
            run_config=ray.train.RunConfig(
                name=secrets.token_hex(6),
                storage_path=storage.join(folder, "ray_train"),
                failure_config=ray.train.FailureConfig(  # we retry
                    max_failures=0, controller_failure_limit=1, max_preemption_failures=0
                ),
                worker_runtime_env={"env_vars": KEEPS_FREED} if self.room.trains_here else None,
            ),
        )
        get(self.board.begin_job.remote(self._jobs))
        try:
            self._fit(trainer, workers, worlds, tick)
        except InfrastructureError as error:
            if stall := get(self.board.stall.remote()):
                raise InfrastructureError(stall) from error
            raise

    def _fit(self, trainer: Any, workers: int, worlds: Sequence[int], tick: Callable[[], None]) -> None:
        """Train, and ask the ranks to save once there is room for more of them."""
        if workers >= max(worlds, default=0):
            _patiently(trainer.fit, tick, self._ask_to_stop)
            return
        looked, more = time.monotonic(), None

        def look() -> None:
            nonlocal looked, more
            if more is None and time.monotonic() - looked > LOOK_S:
                if free := self.room_for_ranks(free=True):
                    free = min(free, self.room_for_ranks() - workers)  # ours may not have taken theirs yet
                more = grown(worlds, workers, free)
                self._grows, looked = more is not None, time.monotonic()
            tick()

        with self._demand(worlds[0]):
            try:
                _patiently(trainer.fit, look, self._ask_to_stop)
            finally:
                self._grows = False
        if more is not None:
            raise Grows(f"there is room for {more} workers again; it is saved, and goes on with them")


def _patiently(blocking: Callable[[], T], tick: Callable[[], None], end: Callable[[], object]) -> T:
    """Run a blocking Ray call in a thread and tick meanwhile.

    Where a tick fails in a way that the step's next attempt may get over, the call is asked to `end`, and waited for,
    before that is raised: two attempts at once would write to the same files.
    """
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
        try:
            tick()
        except (InfrastructureError, OSError) as error:
            log.warning("the work is ended, since the driver failed meanwhile: %s", error)
            while thread.is_alive():
                with contextlib.suppress(InfrastructureError):
                    end()
                thread.join(POLL_S)
            with contextlib.suppress(InfrastructureError, OSError):
                tick()  # else what was said last would be heard by the next attempt, and so would the wish to stop
            raise
    tick()  # what was said last belongs to this call
    if failure:
        raise cause(failure[0]) from failure[0]
    return outcome[0]


def _node() -> Any:
    """What has started the processes of a Ray of our own."""
    return ray._private.worker._global_node


def _lasting(nodes: Iterable[str]) -> list[str]:
    """Of these nodes, by their ids, those that answer and are not being drained; Ray may miss a death for a while."""
    drained = ray._private.state.state.get_draining_nodes()
    pings = {}
    for node in set(nodes).difference(drained):
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        pings[ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_answer).remote()] = node
    answered, _ = ray.wait(list(pings), num_returns=len(pings), timeout=PING_S) if pings else ([], [])
    return [pings[reference] for reference in answered if _succeeded(reference)]


def _answer() -> None:
    """What a node does that is asked whether it is there."""


def _succeeded(reference: Any) -> bool:
    try:
        ray.get(reference)
    except ray.exceptions.RayError:
        return False
    return True
