"""A root with a small experiment in it, made without any training: what reports are made of, with figures that are
known. Its captions are foreign text."""

import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from datasets.files import storage
from datasets.formats import shards
from pipeline.models import distances, drawing_speed, score_tables
from pipeline.models.distances import Distance
from pipeline.models.drawing_speed import Timing
from pipeline.store.artifacts import Artifact, Fingerprint, Store
from pipeline.store.ledger import About, Writer

SCRIPT = "<script>alert('1')</script> & a heart"
SKIPPED = {"stage_c/bad_steps": 2.0, "stage_c/images": 4.0, "stage_c/images_left_out": 4.0}  # of a training
TRAIN = {"phases": [{"steps": 4, "batch_size": 2, "size": 128}]}
COMMIT = {"sha": "c0ffee" * 6 + "abcd", "branch": "main", "changed": True}
RUN = "20260101-000000-a1b2"
BEFORE = "20251231-000000-9f9f"
CALLED = {"fid": "fd:1a2b3c4d", "kid": "kd:1a2b3c4d", "is": "is:1a2b3c4d"}
_LEAST = {"n": 3, "n_real": 3, "fid": None, "inception_score": 1.25, "inception_score_std": 0.125, "called": CALLED}
DISTANCES = [
    Distance(set="held_out", whose="ours", part="all", kid=0.02, kid_low=0.01, kid_high=0.03, **_LEAST),
    Distance(set="held_out", whose="null", part="all", kid=0.0175, kid_low=0.007, kid_high=0.028, **_LEAST),
    Distance(set="held_out", whose="ours", part="jpeg_75", kid=0.0225, kid_low=0.012, kid_high=0.033, **_LEAST),
    Distance(set="coco", whose="ours", part="all", kid=0.5, kid_low=0.25, kid_high=0.75, **(_LEAST | {"fid": 9.125})),
]
TIMED = [
    Timing(mode, batch, "cpu", "fp32", 0.5 / batch, 0.25, 0.125) for mode in ("eager", "compiled") for batch in (1, 4)
]


def png(shade: int) -> bytes:
    """A small picture."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class Experiment:
    """The root, and what lies in it; artifacts are made one by one."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.store = Store(self.root)
        self.artifacts: dict[str, Artifact] = {}

    def add(
        self,
        name: str,
        step: str,
        parents: tuple[str, ...] = (),
        files: Mapping[str, bytes] | None = None,
        settings: Mapping[str, Any] | None = None,
        kind: str = "cpu",
        **facts: Any,
    ) -> Artifact:
        """A finished artifact that some devices were held for."""
        digests = {parent: self.artifacts[parent].manifest["fingerprint"] for parent in parents}
        print_ = Fingerprint(step, 1, dict(settings or {}), digests)
        about = About(build=f"build of {name}", output=name, parents=digests)
        with Writer(self.root, f"{RUN}-{name}").lease(step, print_.digest, 2, kind, about):
            time.sleep(0.002)  # the ledger counts milliseconds
        path = self.store.path(name, print_.digest)
        entries = {
            file: storage.publish(content, f"{path}/{file}") for file, content in (files or {"file": b"x"}).items()
        }
        told = {
            "timed": [], "rows": 1, "created": "2026-01-01T00:00:00+00:00", "metrics": {}, "notes": {}, "seconds": 1.0,
            "commit": COMMIT, "user": "somebody", "versions": {}, **facts,
        }  # fmt: skip
        self.artifacts[name] = self.store.commit(name, print_, {**told, "files": entries})
        return self.artifacts[name]

    def data(self, measured: Mapping[str, float] | None = None) -> None:
        """Metadata, pictures, of which two are held out, and trainings on the others, on two kinds of device; what
        Stage C's has `measured` too."""
        licence = {"licence": "CC BY-SA 4.0", "attribution": "All by OpenMoji"}
        notes = {"read": 20, "rejected": {"url": 4}, "source": "openmoji", "licence": licence}
        self.add("metadata", "fetch", rows=16, notes={**notes, "licences": {}, "opt_outs": {}})
        self.add("images", "download", ("metadata",), rows=16, notes={"planned": 16, "lost": {}})
        self.add("held_out", "hold_out", ("metadata", "images"), rows=2)
        self.add("stage_a", "train_a", ("images", "held_out"), settings={"stage_a": {"train": TRAIN}}, rows=14)
        settings = {"stage_c": {"train": {**TRAIN, "learning_rate": 2e-4}}}
        metrics = {"stage_c/loss": 0.5, "stage_c/images": 8.0, **(measured or {})}
        about = {"settings": settings, "rows": 14, "metrics": metrics, "kind": "cuda:NVIDIA A100"}
        self.add("stage_c", "train_c", ("images", "held_out"), **about)

    def drawn(self, count: int = 3) -> None:
        """Samples of both prompt sets and the baseline's, and their scores: ours wins over the baseline wherever its
        number is even."""
        lines = []
        for prompts, name in (("training", "samples"), ("held_out", "samples_held_out")):
            rows = [{"key": f"{at:032x}", "caption": f"{SCRIPT} {at}", "seed": at} for at in range(count)]
            shades = {"original": 0, "stage_a": 40, "stage_b": 80, "generated": 120}
            files = {f"{folder}/{row['key']}.png": png(shades[folder]) for folder in shades for row in rows}
            parents = ("stage_a", "stage_c", "images", "held_out")
            self.add(name, "sample", parents, {**files, "captions.json": json.dumps(rows).encode()}, rows=count)
            theirs = {f"generated/{row['key']}.png": png(200) for row in rows}
            self.add(f"baseline_{name}", "sample_baseline", ("stage_a",), theirs, settings={"of": name}, rows=count)
            for row in rows:
                about = {"set": prompts, "key": row["key"], "prompt": row["caption"], "seed": row["seed"]}
                ours = 10.0 + row["seed"]
                scores = {"score": ours, "null": ours, "rival_baseline": ours + (1 if row["seed"] % 2 else -1)}
                lines.append({**about, "scorer": "psnr", "truncated": False, **scores})
        table = pa.Table.from_pylist(lines, schema=score_tables.schema(["baseline"]))
        rates = score_tables.win_rates(table)
        metrics = score_tables.metrics(table, rates) | {"retrieval_top1": 1.0, "retrieval_top1_heldout": 1 / count}
        metrics |= distances.metrics(DISTANCES) | drawing_speed.metrics(TIMED)
        told, apart, timed = (json.dumps([vars(one) for one in some]).encode() for some in (rates, DISTANCES, TIMED))
        parents = ("samples", "samples_held_out", "baseline_samples", "baseline_samples_held_out")
        sets = {"training": {"of": "training", "n": count}, "held_out": {"of": "held_out", "n": count}}
        files = {score_tables.FILE: shards.parquet_bytes(table), score_tables.TABLES: told}
        files |= {distances.FILE: apart, drawing_speed.FILE: timed}
        self.add("scores", "evaluate", parents, files, rows=len(lines), metrics=metrics, notes={"prompts": sets})

    def record(self, run: str = RUN, outcome: str = "done", **more: Any) -> None:
        """The record of a run that asked for all of it."""
        prints = {name: artifact.manifest["fingerprint"] for name, artifact in self.artifacts.items()}
        steps = {
            name: {
                "state": "done",
                "step": artifact.manifest["step"],
                "log": f"{self.root}/logs/{run}/{name}.log",
                "artifact": artifact.path,
            }
            for name, artifact in self.artifacts.items()
        }
        day = f"{run[:4]}-{run[4:6]}-{run[6:8]}T00:00:00+00:00"
        told = {
            "id": run, "conf": "stage_c", "command": "python -m pipeline run conf=stage_c", "user": "somebody",
            "commit": COMMIT, "versions": {"torch": "2.15.0"}, "started": day, "ended": day, "outcome": outcome,
            "fingerprints": prints, "paths": [], "steps": steps, **more,
        }  # fmt: skip
        storage.publish(json.dumps(told).encode(), storage.join(self.root, "invocations", f"{run}.json"))


def experiment(root: Path) -> Experiment:
    """A finished one, and the record of a run before it with another learning rate."""
    made = Experiment(root)
    made.data()
    made.drawn()
    made.record(BEFORE, config={"stage_c": {"train": {"learning_rate": 1e-4}}, "seed": 0})
    made.record(config={"stage_c": {"train": {"learning_rate": 2e-4}}, "seed": 0})
    return made
