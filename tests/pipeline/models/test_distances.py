"""The table of distances, from small features that are known: FID is told of enough pictures only, and of the first so
many of both sides."""

from pathlib import Path

import numpy as np
import pytest

from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shards import ImageRow
from pipeline.models import distances, feature_sets
from pipeline.settings import compose
from pipeline.store.artifacts import Artifact
from stages.scoring.distribution import Moments, frechet_distance, inception_score, kernel_distance

WIDTH, CLASSES = 8, 5


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_sets, "WIDTH", WIDTH)


def features(path: Path, n: int, mean: float) -> tuple[Artifact, np.ndarray]:
    """An artifact of n pictures in chunks of 50."""
    values = np.random.default_rng(n).normal(mean, 1, (n, WIDTH + CLASSES)).astype(np.float32)
    files = {}
    for number, part in enumerate(np.split(values, range(50, n, 50))):
        rows = [ImageRow(row, f"{row:032x}", "", "", "", b"") for row in range(len(part))]
        content = shards.write_tensors(rows, feature_sets.FIELD, part)
        name = shards.tensor_name(number)
        files[name] = vars(storage.publish(content, str(path / name)))
    return Artifact("features", str(path), {"files": files, "rows": n}), values


def test_fid_is_told_of_enough_pictures_and_of_the_first_so_many(tmp_path):
    (tmp_path / "w").write_text("weights")
    told = ("eval.distances.fid_from=120", "eval.distances.counts=[60,130,500]")
    config = compose.load("evaluate", ["scale=micro", f"eval.distances.inception={tmp_path / 'w'}", *told])
    ours, mine = features(tmp_path / "ours", 150, 0.5)
    real, theirs = features(tmp_path / "real", 140, 0)
    again, _ = features(tmp_path / "null", 150, 0.5)
    sets = {"ours": ours, "null": again, "reference": real}
    found = distances.measured(config, {f"features_training-{name}": one for name, one in sets.items()})
    whole, few, most = (line for line in found if line.whose == "ours")
    assert [(line.part, line.n, line.n_real) for line in (whole, few, most)] == [
        ("all", 150, 140),
        ("first 60", 60, 60),
        ("first 130", 130, 130),
    ]
    for line, a, b in ((whole, mine, theirs), (most, mine[:130], theirs[:130])):
        a, b, logits = a[:, :WIDTH], b[:, :WIDTH], a[:, WIDTH:]
        assert line.fid == pytest.approx(frechet_distance(Moments.of(a), Moments.of(b)), abs=1e-8)
        assert line.kid == pytest.approx(kernel_distance(a, b).mean, abs=1e-12)
        assert line.inception_score == pytest.approx(inception_score(logits).mean, abs=1e-12)
    assert few.fid is None
    assert few.kid is not None
    metrics = distances.metrics([whole, few])
    prefix = whole.called["fid"]
    assert prefix.startswith("fd:")
    assert metrics[f"{prefix}/training/ours"] == whole.fid
    assert f"{prefix}/training/ours/first_60" not in metrics
    assert metrics[f"{whole.called['kid']}/training/ours/first_60/n"] == 60
