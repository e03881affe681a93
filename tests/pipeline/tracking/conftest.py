"""What the tests of tracking share."""

import shutil
from pathlib import Path

import pytest

from pipeline.tracking.mlflow_store import MlflowStore, locate_store


@pytest.fixture
def store(empty_mlflow: Path, tmp_path: Path) -> MlflowStore:
    """Real MLflow on sqlite, without a run, beside the root `tmp_path`/root."""
    store = locate_store(str(tmp_path / "root"), None)
    store.database.parent.mkdir(parents=True)
    shutil.copy(empty_mlflow, store.database)
    return store
