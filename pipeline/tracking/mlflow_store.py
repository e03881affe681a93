"""Where MLflow keeps runs: an sqlite file under the root, or a server that the config names."""

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.files import storage
from pipeline.environment import quiet_environment
from pipeline.errors import UsageError


@dataclass(frozen=True)
class MlflowStore:
    """An MLflow tracking URI, and local folders: for the runs' files (None = the server's own), for records unsent."""

    uri: str
    artifacts: Path | None
    unsent: Path

    @property
    def database(self) -> Path:
        """The sqlite file of a local store."""
        return Path(self.uri.removeprefix("sqlite:///"))


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
                "give the http address of an MLflow server or sqlite:///<local file>"
            )
        uri = f"sqlite:///{folder_of(root)}/mlflow.db"
    if re.match(r"https?://", uri):
        if "@" in uri.split("/")[2]:
            raise UsageError(
                "tracking.uri: leave user and password out of the address; "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return MlflowStore(uri, artifacts=None, unsent=folder_of(root) / "unsent")
    if not uri.startswith("sqlite:///"):
        raise UsageError(f"tracking.uri={uri}: must be an http(s) address or sqlite:///<local file>")
    database = Path(uri.removeprefix("sqlite:///")).absolute()
    folder = database.parent
    return MlflowStore(f"sqlite:///{database}", artifacts=folder / "artifacts", unsent=folder / "unsent")


def folder_of(root: str) -> Path:
    """The local folder for a root's MLflow: of its store, where no URI names another, and of what is unsent."""
    return Path.home() / ".cache/wuerstchen" if storage.is_remote(root) else Path(storage.absolute(root)) / "mlflow"


def connect(store: MlflowStore, experiment: str) -> tuple[Any, str]:
    """An `MlflowClient` and the experiment's id; store and experiment are created where they are missing."""
    quiet_environment()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # seven by default: minutes for each call
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):  # each table made is a line otherwise
        logging.getLogger(name).setLevel(logging.WARNING)
    with _one_at_a_time(store):
        client = MlflowClient(store.uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return client, found.experiment_id
        # Without a location of its own, MLflow would put files into ./mlruns of whoever comes first.
        return client, client.create_experiment(experiment, store.artifacts and str(store.artifacts))


@contextlib.contextmanager
def _one_at_a_time(store: MlflowStore) -> Iterator[None]:
    """Two processes that create the tables of one sqlite file at the same time break each other's."""
    if store.artifacts is None:
        yield
        return
    store.database.parent.mkdir(parents=True, exist_ok=True)
    with open(store.database.with_suffix(".lock"), "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
