"""evaluate: what the samples are worth."""

import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from datasets.files import storage
from datasets.files.storage import FileEntry
from pipeline.settings.sections import BASELINE
from pipeline.settings.sections import PickScore as PickScoreSettings
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact


def evaluate(build: Build) -> Facts:
    """samples, rivals -> scores: retrieval and PSNR against the originals, PickScore against a rival if configured."""
    samples = build.inputs["samples"]
    files, metrics, notes, pid = build.call(
        _evaluate,
        samples,
        build.inputs.get("baseline_samples"),
        build.config.eval.pickscore,
        build.path,
        build.cluster.device,
        accelerated=build.config.eval.pickscore is not None,
    )
    build.report.metrics(metrics, 0)
    return Facts(
        files=files,
        rows=samples.manifest["rows"],
        call="stages.scoring.metrics.retrieval_top1",
        workers=[pid],
        metrics=metrics,
        notes=notes,
    )


def _evaluate(
    samples: Artifact, baseline: Artifact | None, pickscore: PickScoreSettings | None, path: str, device: str
) -> tuple[dict[str, FileEntry], dict[str, float], dict[str, Any], int]:
    from stages.scoring.metrics import psnr, retrieval_top1

    rows = json.loads(samples.read("captions.json"))
    pictures = {name: _pictures(samples, name, rows) for name in ("original", "stage_a", "stage_b", "generated")}
    metrics = {
        "retrieval_top1": retrieval_top1(pictures["generated"], pictures["original"]),
        "retrieval_top1_stage_b": retrieval_top1(pictures["stage_b"], pictures["original"]),
    }
    drawn = ["stage_a", "stage_b", "generated"]
    if baseline is not None:
        assert json.loads(baseline.read("captions.json")) == rows, "the baseline drew other captions or seeds"
        pictures["baseline"] = _pictures(baseline, "generated", rows)
        metrics["retrieval_top1_baseline"] = retrieval_top1(pictures["baseline"], pictures["original"])
        drawn.append("baseline")
    originals = np.stack(pictures["original"])
    for name in drawn:
        values = psnr(np.stack(pictures[name]), originals)
        metrics[f"psnr_{name}"] = float(values.mean())
        for row, value in zip(rows, values, strict=True):
            row[f"psnr_{name}"] = float(value)
    notes: dict[str, Any] = {
        "retrieval_top1": "share of generated pictures whose nearest original (L2 of RGB at 32x32) is their own",
        "chance": 1 / len(rows),
    }
    if pickscore is not None:
        metrics |= _pickscore(samples, baseline, rows, pickscore, device)
        notes["pickscore_win_rate"] = f"share of captions for which PickScore prefers ours to {pickscore.rival}"
    table = json.dumps(rows, indent=1, ensure_ascii=False).encode()
    files = {"scores.json": storage.publish(table, storage.join(path, "scores.json"))}
    return files, metrics, notes, os.getpid()


def _pickscore(
    samples: Artifact,
    baseline: Artifact | None,
    rows: list[dict[str, Any]],
    settings: PickScoreSettings,
    device: str,
) -> dict[str, float]:
    """Win rate over the rival's pictures of the same captions, with its 95 % interval."""
    from stages.scoring.pickscore import compare_folders, load_pickscore

    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        _unpack(samples, rows, Path(ours))
        rival = Path(settings.rival)
        if settings.rival == BASELINE:
            assert baseline is not None
            _unpack(baseline, rows, rival := Path(theirs))
        scorer = load_pickscore(Path(settings.weights), device)
        prompts = {row["key"]: row["caption"] for row in rows}
        compared = compare_folders(scorer, Path(ours), rival, prompts)
    won = compared.win_rate
    return {
        "pickscore_win_rate": won.rate,
        "pickscore_win_low": won.low,
        "pickscore_win_high": won.high,
        "pickscore_mean": float(compared.scores_a.mean()),
        "pickscore_rival_mean": float(compared.scores_b.mean()),
        "pickscore_truncated_prompts": float(compared.truncated_prompts),
    }


def _unpack(samples: Artifact, rows: list[dict[str, Any]], folder: Path) -> None:
    """The generated pictures as files of a local folder, named by key."""
    for row in rows:
        name = f"{row['key']}.png"
        (folder / name).write_bytes(samples.read(f"generated/{name}"))


def _pictures(samples: Artifact, folder: str, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    from PIL import Image

    found = []
    for row in rows:
        with Image.open(io.BytesIO(samples.read(f"{folder}/{row['key']}.png"))) as image:
            found.append(np.asarray(image.convert("RGB")))
    return found
