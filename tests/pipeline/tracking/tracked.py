"""What the tests of MLflow's runs share: an invocation of two steps, and what MLflow has of it."""

import io
from typing import Any

import numpy as np
from PIL import Image

from pipeline.tracking.mlflow_runs import Tracking
from pipeline.tracking.mlflow_store import MlflowStore, connect

PARENT, CHILD = "learning_rate=2e-4 · stage_c micro · 21-1", "train_c · abc"
CONFIG = {
    "seed": 0,
    "stage_c": {"train": {"lr": 1e-4, "phases": [{"steps": 10}]}},
    "data": {"metadata": "s3://reader:canary-1@bucket/laion?secret_key=canary-2", "hub_token": "canary-3"},
}
PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
MANIFEST = {
    "rows": 64,
    "bytes": 1000,
    "seconds": 7.5,
    "peak_bytes": 2**30,
    "attempts": 2,
    "failed_attempts": 1,
    "device_seconds": 7200.0,
    "devices": "cpu",
    "content": "c0ffee",
    "metrics": {"loss": 0.25},
}


def tracking_of(store: MlflowStore) -> Tracking:
    return Tracking(
        store,
        "wuerstchen",
        conf="stage_c",
        targets=["stage_c", "samples"],
        invocation="20261121-1",
        command="python -m pipeline run conf=stage_c scale=micro root=/r stage_c.train.learning_rate=2e-4",
        root=str(store.database.parent.parent),
        fingerprints={"stage_c": "abc", "samples": "def"},
        config=CONFIG,
    )


def small_png() -> bytes:
    png = io.BytesIO()
    Image.fromarray(PIXELS).save(png, "PNG")
    return png.getvalue()


def runs_of(store: MlflowStore) -> dict[str, Any]:
    """Every run of the experiment by its name."""
    client, experiment = connect(store, "wuerstchen")
    return {run.info.run_name: run for run in client.search_runs([experiment])}


def points_of(store: MlflowStore, name: str) -> list[tuple[int, float]]:
    """Step and value of each point of a curve of train_c, over all its runs."""
    client, experiment = connect(store, "wuerstchen")
    runs = client.search_runs([experiment], "tags.`wst.step` = 'train_c'")
    return sorted((p.step, p.value) for run in runs for p in client.get_metric_history(run.info.run_id, name))
