"""What a step gets to work with, and what it hands back.

A step is a function `(Build) -> Facts`. It takes the typed values that it needs out of the config, puts files into the
artifact's folder, and returns what the manifest shall say. The engine around it (`run.building`) does the rest.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, assert_never

from datasets.files import notices, storage
from datasets.files.notices import PassedOver, Retry
from datasets.files.storage import FileEntry
from datasets.formats import shards
from datasets.formats.shards import Receipt
from pipeline.cluster import messages
from pipeline.cluster.interruptions import Interruptions
from pipeline.cluster.mapping import ShardActor, Worker
from pipeline.cluster.ranks.job import Job
from pipeline.errors import Interrupted
from pipeline.plan.dag import Step
from pipeline.plan.table import table, work_of
from pipeline.plan.wanted import reading
from pipeline.settings.config import Config
from pipeline.settings.resources import Work
from pipeline.store import deleting
from pipeline.store.artifacts import BUILDING, Artifact, Fingerprint, Look
from pipeline.store.claims import Claim
from pipeline.store.ledger import CPU, Held

if TYPE_CHECKING:  # imports Ray and torch, which a plan can do without
    from pipeline.cluster.board import BoardClient
    from pipeline.cluster.ray_cluster import Cluster

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """What a step reports of a finished build.

    `shards` are the receipts of what it made in shards, by the folder below the artifact's, `files` all other files.
    `call` names the library call that did the work, `workers` the process ids that it ran in, `metrics` what was
    measured, `notes` anything else worth keeping (counts by cause, licences, labels), `timed` the files that tell of
    times and so differ from build to build.
    """

    files: dict[str, FileEntry]
    rows: int
    call: str
    workers: list[int]
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    timed: list[str] = field(default_factory=list)
    shards: dict[str, list[Receipt]] = field(default_factory=dict)


class Reporter(Protocol):
    """Where a step's progress goes: the screen, the log, MLflow."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """Work done so far of a total, in units such as `images` or `steps`."""

    def advance(self, count: int, total: int, unit: str) -> None:
        """So much more work done of a total."""

    def begin_attempt(self) -> None:
        """What is done is told from nothing on: an attempt begins with what those before it have left."""

    def got_further(self) -> bool:
        """Whether more was done, since it was asked last, than ever before."""

    def lost(self, causes: Mapping[str, int]) -> None:
        """Pictures that are lost so far, by cause."""

    def begin_training(self, ranks: int) -> None:
        """An attempt at the trainings begins, on so many ranks."""

    def saved(self, training: str, step: int) -> None:
        """A training's state after so many steps is kept: the first rank's part of it, others may be on their way."""

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Measurements at a training step."""

    def system(self, values: dict[str, float], step: int) -> None:
        """Samples of devices, by a number of their own."""

    def image(self, name: str, png: bytes, step: int) -> None:
        """A picture for the reviewers."""

    def warning(self, text: str) -> None:
        """Something that went wrong and was got over."""


@dataclass(frozen=True)
class Build:
    """One step being built."""

    config: Config
    step: Step
    path: str  # the artifact's folder
    claim: Claim  # on it
    inputs: dict[str, Artifact]
    cluster: "Cluster"
    lease: Callable[..., AbstractContextManager[Held]]  # devices, of what kind, `queued` for? -> the ledger
    report: Reporter
    forgotten: frozenset[str]  # keys, URLs and sha256 of bodies that this root has been asked to forget
    stopped: Callable[[], Interrupted | None]  # why the run should end, if it should
    log: str = ""  # the step's log below the root, beside which its ranks have theirs
    held: list[Held] = field(default_factory=list)  # by the training that goes on

    @property
    def work(self) -> Work:
        """What kind of work it is, which says on which nodes it runs."""
        return work_of(self.step)

    @property
    def device(self) -> str:
        """`cuda` or `cpu`: where its workers compute."""
        return self.cluster.room.device(self.work)

    @property
    def _kind(self) -> str:
        return self.cluster.room.kind(self.work)

    @contextmanager
    def _leased(self, devices: Callable[[], tuple[float, str]]) -> Iterator[Callable[[], None]]:
        """Hold devices meanwhile, as many as there are at the moment and of their kind: what it gives is called now and
        then. While there are none, they are waited for, which costs nothing."""
        with ExitStack() as held:
            last = count, kind = devices()
            held.enter_context(self.lease(count, kind, queued=not count))

            def follow() -> None:
                nonlocal last
                if (now := devices()) != last:
                    held.close()
                    last = count, kind = now
                    held.enter_context(self.lease(count, kind, queued=not count))

            yield follow

    @property
    def building(self) -> str:
        """Folder for what only an unfinished build needs."""
        return storage.join(self.path, BUILDING)

    def made_with(self, config: Config) -> Artifact | None:
        """What this step has made of the same inputs under another config, if it has; paths must not matter to it."""
        step = next(step for step in table(config) if step.output == self.step.output)
        look = Look(self.path.rsplit("/", 3)[0])
        parents = {name: artifact.manifest["fingerprint"] for name, artifact in self.inputs.items()}
        settings = dict(zip(step.reads, map(reading(config, look, [step]), step.reads), strict=True))
        digest = Fingerprint(step.name, step.version, settings, parents).digest
        return look.find(step.output, digest)

    def call(self, function: Callable[..., T], *arguments: Any, accelerated: bool = False) -> T:
        """Run a function as one Ray task: on one CPU, and on one GPU too where it is accelerated and there are any."""
        gpus, room = int(accelerated and self.device == "cuda"), self.cluster.room

        def devices() -> tuple[float, str]:
            return min(1, room.has("GPU" if gpus else "CPU", self.work)), self._kind if gpus else CPU

        with self._leased(devices) as follow:
            return self.cluster.call(
                function, *arguments, work=self.work, gpus=gpus, tick=lambda: self._follow_or_stop(follow)
            )

    def call_each(self, function: Callable[..., T], items: Iterable[tuple[Any, ...]], count: int) -> Iterator[T]:
        """Run a function for each of `count` argument tuples, a Ray task each; they are taken as they are needed."""
        room = self.cluster.room
        if count:
            with self._leased(lambda: (min(count, room.has("CPU", self.work)), CPU)) as follow:
                yield from self.cluster.call_each(function, items, self.work, lambda: self._follow_or_stop(follow))

    def map_shards(
        self,
        worker: Callable[..., Worker],
        arguments: tuple[Any, ...],
        total: Mapping[int, Any],
        rows: int,
        unit: str,
        folder: str | None = None,
        at_once: int = 1,
    ) -> list[Receipt]:
        """Map the shards without a receipt in `folder` with actors that each have a `worker(*arguments)`.

        `total` has by number what the worker is called with for that shard, no more than it needs; so many of them
        `at_once`, by threads. `folder` is the artifact's unless one below it is given; `rows` and `unit` are for the
        progress. Returns the receipts of all shards in the order of `total`, whoever made them.
        """
        folder = folder or self.path
        finished = self.finished_shards(folder)
        self.report.advance(sum(receipt.rows_in for receipt in finished.values()), rows, unit)
        todo = {shard: (shard, work) for shard, work in total.items() if shard not in finished}
        if todo:
            room = self.cluster.room

            def tick() -> None:
                follow()
                self.tick()

            with self._leased(lambda: (room.reserved(self.work, len(todo)), self._kind)) as follow:
                about = (worker, arguments, rows, unit, folder, self.claim.fence, self.cluster.board)
                self.cluster.map_shards(ShardActor, about, list(todo.values()), self.work, tick, at_once)
            self.raise_if_stopped()
            finished |= shards.finished(folder, todo)
        missing = [shard for shard in total if shard not in finished]
        assert not missing, f"shards {missing} have no receipt, yet the map over them succeeded"
        return [finished[shard] for shard in total]

    def finished_shards(self, folder: str) -> dict[int, Receipt]:
        """Receipts of the shards in a folder of this artifact that are done, with all their files.

        Whose files are not there, or cut short, loses its receipt and is made anew: a deletion may have been killed.
        """
        found = shards.finished(folder)
        poor = shards.lacking(folder, found.values())
        for receipt in poor:
            deleting.drop_shard(folder, found.pop(receipt.shard), self.claim.fence)
        if poor:
            self.report.warning(f"{self.step.name}: files of {len(poor)} shards are gone or cut short; made anew")
        return found

    def train(self, loop: "Callable[[Job, BoardClient], None]", job: Job) -> None:
        """Run a training loop as a Ray Train job, on as many of the workers as the cluster has room for."""
        workers = self._workers()
        self.interruptions.begun += 1
        self.interruptions.write(self.building)
        self.report.begin_training(workers)
        with self.lease(self.cluster.room.reserved_for_ranks(workers), self._kind, queued=True) as held:
            self.held[:] = [held]
            self.cluster.train(
                partial(loop, replace(job, attempt=self.interruptions.begun)),
                workers=workers,
                folder=self.building,
                tick=self.tick,
                worlds=self.config.worlds_of(self.step.name),
            )
        self.raise_if_stopped()

    def _workers(self) -> int:
        """Ranks of the next attempt: all that are asked for, or fewer where nodes are gone and none replaces them."""
        worlds = self.config.worlds_of(self.step.name)

        def tick(room: int) -> None:
            self.report.progress(room, worlds[0], "workers found")
            self.tick()
            self.raise_if_stopped()

        workers = self.cluster.settle(worlds, tick)
        if workers < worlds[0]:
            self.report.warning(
                f"{self.step.name} goes on with {workers} of {worlds[0]} workers: the cluster has room for no more; "
                "the batches stay the same"
            )
        return workers

    @cached_property
    def interruptions(self) -> Interruptions:
        """What this step's trainings have been through."""
        return Interruptions.read(self.building)

    def tick(self) -> None:
        """Pass on what the workers said, and tell them whether to stop. Raises ClaimLost."""
        self.claim.raise_if_lost()
        heard = False
        for message in self.cluster.exchange(stop=self.stopped() is not None):
            match message:
                case messages.Advanced(count, total, unit):
                    self.report.advance(count, total, unit)
                case messages.Reached(done, total, unit):
                    self.report.progress(done, total, unit)
                case messages.Assembled(age):
                    for held in self.held:  # none where the message came late, of an earlier step's ranks
                        held.begin(age)
                case messages.Resumed(training, step):
                    self._resumed(training, step)
                    heard = True
                case messages.Logged(training, step, values):
                    # In one message: a driver killed between two would take the step for one that it has logged.
                    self.report.metrics(values, step)
                    self.interruptions.reached[training] = step
                    heard = True
                case messages.Saved(training, step):
                    self.report.saved(training, step)
                case messages.Drawn(name, png, step):
                    self.report.image(name, png, step)
                case messages.Spent(training, step, seconds, age):
                    for held in self.held:
                        held.begin(age)
                        held.phases.add(training, step, seconds)
                case messages.Energy(node, joules):
                    for held in self.held:
                        held.joules[node] = joules
                case messages.Sampled(values, number):
                    self.report.system(values, number)
                case messages.Warned(text):
                    self.report.warning(text)
                case Retry() | PassedOver():
                    notices.tell(message)
                case messages.Sums():
                    raise AssertionError("nodes are examined apart from any step")
                case _:
                    assert_never(message)
        if heard:
            self.interruptions.write(self.building)

    def _follow_or_stop(self, follow: Callable[[], None]) -> None:
        """As `tick`, for work that does not ask whether to stop: whatever it publishes is whole, or not there."""
        follow()
        self.tick()
        self.raise_if_stopped()

    def _resumed(self, training: str, step: int) -> None:
        for held in self.held:
            held.phases.goes_on(training, step, self.interruptions.reached.get(training, 0))
        again = self.interruptions.resumed(training, step)
        if self.interruptions.begun > 1:
            log.info("%s goes on from step %d: %d steps are done again", training, step, again)

    def raise_if_stopped(self) -> None:
        """End the run here if it should; what is committed stays."""
        if reason := self.stopped():
            raise reason
