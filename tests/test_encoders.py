"""Online equals cached: what a training encodes itself differs from what a step stored by the storage's rounding."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import shards, storage
from datasets.batches import Batches
from datasets.config import DataError
from datasets.rounding import Int8, Rounding, rounded
from datasets.shards import Clock, ImageRow
from pipeline import compose, models
from pipeline.artifacts import Artifact, Fingerprint, Store
from pipeline.build import Build
from pipeline.config import Config
from pipeline.dag import fingerprints, order
from pipeline.errors import UsageError
from pipeline.models import check_compressor
from pipeline.steps import encode, table, train
from stages.compressor import Compressor
from stages.stage_a import StageA

ROWS = [5, 3, 4]  # of each shard
FIELDS = {"latents_a": "stage_a", "latents_c": "stage_b"}
MODES = [("fp16", "fp32"), ("int8", "fp32"), ("fp16", "bf16")]


class Board:
    """As the workers see it."""

    def stopping(self) -> bool:
        return False

    def post(self, message: dict[str, Any]) -> None:
        assert message["kind"] == "advance"


class Local:
    """A cluster in this process: what a step calls of `Build.cluster`."""

    device, cpus, board, kind = "cpu", 1, Board(), "cpu"


def artifact(root: Path, name: str, files: dict[str, bytes], rows: int) -> Artifact:
    """A finished artifact of some files."""
    store, fingerprint = Store(str(root)), Fingerprint(f"make_{name}", 1, {}, {})
    folder = store.path(name, fingerprint.digest)
    entries = {file: storage.publish(content, storage.join(folder, file)) for file, content in files.items()}
    return store.commit(name, fingerprint, {"files": entries, "timed": [], "rows": rows, "notes": {}, "created": "now"})
