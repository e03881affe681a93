"""What a run holds open while it works: Ray, MLflow, the ledger, and the record that tells others of it."""

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from datasets.files import storage
from pipeline.plan import dag, obstacles
from pipeline.plan.dag import Planned
from pipeline.plan.table import table
from pipeline.plan.wanted import prints_of
from pipeline.run import neighbours
from pipeline.run.account import Books
from pipeline.run.last_screen import Summary
from pipeline.run.memory import PeakMemory
from pipeline.run.record import Record
from pipeline.run.stopping import Stop
from pipeline.settings.config import Config
from pipeline.store import claims
from pipeline.store.artifacts import Artifact, Fingerprint, Look, Store
from pipeline.store.ledger import About
from pipeline.store.provenance import provenance
from pipeline.store.redact import redact, redact_path
from pipeline.store.removal_list import check_carried_out
from pipeline.terminal import console
from settings import FILES

log = logging.getLogger(__name__)


@contextlib.contextmanager
def _less_than(error: BaseException | None) -> Iterator[None]:
    """What fails at the end of a run is told, and raised where nothing else has ended it."""
    try:
        yield
    except Exception as failure:
        if error is None:
            raise
        console.print(f"at the end of the run: {failure}", style="yellow", markup=False)


@dataclass
class Session:
    """One invocation that does work: Ray, MLflow, the ledger, logs, and the record for `status`."""

    config: Config
    conf: str
    look: Look
    planned: list[Planned]
    command: str
    memory: PeakMemory
    summary: Summary
    stopped: Stop

    @property
    def root(self) -> str:
        """Where it all lies."""
        return self.look.root

    def __enter__(self) -> "Session":
        with self.stopped.at_once():  # these take seconds
            from pipeline.cluster.ray_cluster import Cluster
            from pipeline.tracking.mlflow_runs import Tracking
            from pipeline.tracking.mlflow_store import locate_store

        self.id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:4]
        self.store = Store(self.root)
        self.summary.root = self.root
        self.artifacts: dict[str, Artifact] = {i.step.output: i.artifact for i in self.planned if i.artifact}
        console.print(f"run {self.id} of conf={self.conf} in {self.root}", markup=False)
        warn = partial(console.print, style="yellow", markup=False)
        with contextlib.ExitStack() as exits:
            exits.enter_context(claims.at_work(self.root, self.id, reads=self._reads()))
            check_carried_out(self.root)  # again: whoever writes a request now sees that a run is at work
            self.tracking = Tracking(
                locate_store(self.root, self.config.tracking.uri),
                self.config.tracking.experiment,
                conf=self.conf,
                targets=self.config.targets,
                invocation=self.id,
                command=self.command,
                root=self.root,
                fingerprints={item.step.output: item.fingerprint.digest for item in self.planned},
                config=self.config.model_dump(mode="json"),
                say=warn,
            )
            exits.push(self._warn)
            exits.enter_context(self.tracking)
            with self.stopped.at_once():
                self.cluster = Cluster(self.config.cluster, self.config.workers, warn)
            exits.callback(self.cluster.close)
            if self.config.cluster.address:
                console.print(f"on {self.cluster}", markup=False)
            self.books = self._open_books()
            obstacles.check_precision(self.config, self.planned, self.cluster.room.kind())
            self.summary.devices = self.cluster.room.kind()
            self.record = self._recorded()
            exits.push(self._tell)
            exits.push(self._end)
            neighbours.check_standing(self.store, self.artifacts.values())
            self.exits = exits.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """End all that was begun, whatever of it fails; the error that ended the run is the one that is told."""
        with _less_than(error):
            self.exits.__exit__(kind, error, trace)

    def _end(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with _less_than(error):
            self.record.end(error)

    def _warn(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Tell at the end what was got over, where no last screen does."""
        self.summary.warnings += self.tracking.warnings
        for warning in self.summary.warnings if error else ():
            console.print(f"warning: {warning}", style="yellow", markup=False)

    def _open_books(self) -> Books:
        cluster, keys = self.cluster, [(item.step.name, item.fingerprint.digest) for item in self.planned]
        about = About(where=cluster.where, price=self.config.cluster.price_per_hour)
        return Books(self.root, self.id, about, keys, self.config.budget.hours, cluster.devices)

    def _tell(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Describe the run in MLflow, which must not change how it ends."""
        from pipeline.run import telling

        try:
            leases = self.books.of_run()
            telling.of_run(self.tracking, self.summary, self.record.told, self.artifacts, leases, error)
        except Exception as failure:
            log.exception("the run could not be described")
            self.summary.warnings.append(f"MLflow has no description of this run: {failure}")

    def _reads(self) -> list[str]:
        """What nobody may delete from now on: its record, which says the same, comes when Ray and MLflow are there."""
        return [self.store.path(name, print_.digest) for name, print_ in self._wanted().items()] + self._paths()

    def _paths(self) -> list[str]:
        """The files that the config names; gc knows nothing of links."""
        named = [storage.absolute(path) for path in self.config.paths(FILES).values()]
        real = [os.path.realpath(path) for path in named if not storage.is_remote(path)]
        return sorted(map(redact_path, {*named, *real}))

    def _recorded(self) -> Record:
        told = {
            "id": self.id,
            "conf": self.conf,
            **provenance(self.command),
            "checkout": str(Path.cwd()),
            "fingerprints": {name: print_.digest for name, print_ in self._wanted().items()},
            "paths": self._paths(),
            "config": redact(self.config.model_dump(mode="json")),
        }
        return Record(self.root, told)

    def _wanted(self) -> dict[str, Fingerprint]:
        """All that this config asks for, also what the flags leave out."""
        return prints_of(self.config, self.look, dag.order(table(self.config), self.config.targets))
