"""Where MLflow keeps runs: an sqlite file under the root, or a server that the config names."""

import contextlib
import fcntl
import json
import logging
import os
import re
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from datasets.files import local, storage
from pipeline.environment import home_folder, quiet_environment
from pipeline.errors import UsageError

SQLITE = "sqlite:///"
# Where MLflow tells where an artifact of ours lies: table, column, and what stands before the path
OF_ARTIFACTS = (
    ("tags", "value", ""),
    ("datasets", "dataset_source", '{"uri": "'),
    ("model_versions", "source", ""),
    ("model_versions", "storage_location", ""),
)
ANSWER_S = 5.0  # that a server has to answer in
LOOPBACK = ("127.0.0.1", "localhost")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MlflowStore:
    """An MLflow tracking URI, and local folders: for the runs' files (None = the server's own), for records unsent."""

    uri: str
    artifacts: Path | None
    unsent: Path

    @property
    def database(self) -> Path:
        """The sqlite file of a local store."""
        return Path(unquote(self.uri.partition(":///")[2]))

    @property
    def name(self) -> str:
        """What it is called beside its `unsent`: of a file, with which the whole folder may be moved, no path."""
        return self.uri if self.artifacts is None else self.database.name

    @property
    def location(self) -> str | None:
        """Where a local store's runs put their files, as MLflow writes it: it takes a path for a part of a URI."""
        return str(self.artifacts).replace("%", "%25") if self.artifacts else None


def locate_store(root: str, uri: str | None) -> MlflowStore:
    """The store that `tracking.uri` names; without one, `<root>/mlflow/mlflow.db`.

    Raises:
        UsageError: the URI is neither an http address nor a local sqlite file, carries a password, or is
            missing where the root is remote.
    """
    if uri is None:
        if storage.is_remote(root):
            raise UsageError(
                f"tracking.uri: root={root} is remote, where no sqlite file can live; "
                "give tracking.uri=http://... of an MLflow server, or tracking=server where MLFLOW_TRACKING_URI has "
                "it, or tracking.uri=sqlite:///<local file>"
            )
        return _sqlite(folder_of(root) / "mlflow.db")
    if re.match(r"https?://", uri):
        if "@" in uri.split("/")[2]:
            raise UsageError(
                "tracking.uri: leave user and password out of the address; "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return MlflowStore(uri, artifacts=None, unsent=folder_of(root) / "unsent")
    if not uri.startswith(SQLITE):
        raise UsageError(f"tracking.uri={uri}: must be an http(s) address or sqlite:///<local file>")
    return _sqlite(Path(unquote(uri.removeprefix(SQLITE))).absolute())


def _sqlite(database: Path) -> MlflowStore:
    """The store in a file, whose path may hold what means something in a URI."""
    folder, quoted = database.parent, str(database).replace("%", "%25").replace("?", "%3F")
    # MLflow makes the folders of what follows sqlite:/// as it stands; with the driver's name before, it leaves that.
    uri = f"{SQLITE if quoted == str(database) else 'sqlite+pysqlite:///'}{quoted}"
    return MlflowStore(uri, artifacts=folder / "artifacts", unsent=folder / "unsent")


def folder_of(root: str) -> Path:
    """The local folder for a root's MLflow: of its store, where no URI names another, and of what is unsent."""
    return home_folder() / ".cache/wuerstchen" if storage.is_remote(root) else Path(storage.absolute(root)) / "mlflow"


def connect(store: MlflowStore, experiment: str) -> tuple[Any, str]:
    """An `MlflowClient` and the experiment's id; store and experiment are created where they are missing.

    Raises:
        NeedsMending: the experiment was deleted, or the database is damaged.
    """
    quiet_environment()
    no_proxy_here()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # seven by default: minutes for each call
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):  # each table made is a line otherwise
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # of what it raises too, all of its SQL
    with _one_at_a_time(store):
        if store.artifacts is not None and not _is_only_read(store):
            local.share(store.database)  # sqlite lets nobody but its maker write to it, whatever the umask
        relocate(store)
        client = MlflowClient(store.uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            require_active(found, store)
            return client, found.experiment_id
        # Without a location of its own, MLflow would put files into ./mlruns of whoever comes first.
        return client, client.create_experiment(experiment, store.location)


class NeedsMending(UsageError):
    """MLflow takes nothing until somebody has done what the message says; what is recorded waits."""

    is_told_whole = True


def require_active(experiment: Any, store: MlflowStore) -> None:
    """Refuse an experiment that somebody has deleted in the UI: MLflow would refuse every record of it, for good."""
    if experiment.lifecycle_stage != "active":
        raise NeedsMending(
            f"the experiment {experiment.name} was deleted; bring it back with: MLFLOW_TRACKING_URI={store.uri} "
            f"mlflow experiments restore --experiment-id {experiment.experiment_id}; or choose another with "
            "tracking.experiment="
        )


def no_proxy_here() -> None:
    """Keep proxies out of what goes to this machine's loopback address."""
    for name in ("no_proxy", "NO_PROXY"):
        others = [place for place in os.environ.get(name, "").split(",") if place not in ("", *LOOPBACK)]
        os.environ[name] = ",".join([*others, *LOOPBACK])


def why_silent(uri: str) -> str | None:
    """Why no server answers at an address; None where one does, if only to ask for a password."""
    no_proxy_here()
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=ANSWER_S):
            return None
    except urllib.error.HTTPError as error:
        return None if error.code < 500 else str(error)
    except (OSError, HTTPException, ValueError) as error:  # a name of no host, too
        return str(getattr(error, "reason", error))


def relocate(store: MlflowStore) -> None:
    """Mend where the runs of a local store have their files: MLflow wrote down whole paths, and the root may have been
    moved or copied since.

    Raises:
        NeedsMending: the database is damaged, or cannot be opened.
    """
    if store.artifacts is None or not store.database.exists() or _is_only_read(store):
        return
    try:
        with contextlib.closing(sqlite3.connect(store.database)) as database, database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
                return
            for (place,) in database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall():
                if place != store.location and str(place).split("/")[-2:] == list(store.artifacts.parts[-2:]):
                    log.warning("MLflow's files are looked for in %s, no longer in %s", store.location, place)
                    _relocate(database, place, str(store.location))
    except sqlite3.Error as error:
        raise NeedsMending(
            f"MLflow's database {store.database} cannot be used ({error}); where it is locked, wait for who writes to "
            "it; else change its rights, or, where it is damaged, put a copy back or move it away: the next run begins "
            "a new one"
        ) from error


def _relocate(database: sqlite3.Connection, old: str, new: str) -> None:
    """Put a new place for an old one: of an experiment, of its runs, and of the artifacts that they tell of."""
    database.execute("UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (new, old))
    database.execute(
        "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?",
        (new, len(old) + 1, len(old) + 1, f"{old}/"),
    )
    before, now = (f"{unquote(place).rsplit('/', 2)[0]}/artifacts/" for place in (old, new))
    for table, column, start in OF_ARTIFACTS:
        if any(row[1] == column for row in database.execute(f"PRAGMA table_info({table})")):  # MLflow had fewer once
            was, told = (f"{start}{json.dumps(path)[1:-1] if start else path}" for path in (before, now))
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (told, len(was) + 1, len(was), was),
            )
    described = "UPDATE tags SET value = replace(value, ?, ?) WHERE key = 'mlflow.note.content'"
    database.execute(described, (f"`{before}", f"`{now}"))


def _is_only_read(store: MlflowStore) -> bool:
    """Whether this user may look at a store's database, but change nothing: then nothing is created either."""
    return store.database.exists() and not os.access(store.database, os.W_OK)


@contextlib.contextmanager
def _one_at_a_time(store: MlflowStore) -> Iterator[None]:
    """Two processes that create the tables of one sqlite file at the same time break each other's."""
    if store.artifacts is None or _is_only_read(store):
        yield
        return
    local.make_folder(store.database.parent)
    with open(store.database.with_suffix(".lock"), "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
