"""extract, and what `evaluate` makes of it, in this process: with Inception of random weights, on a few pictures."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.config import DataError
from datasets.files import storage
from pipeline.models import distances, feature_sets, known_weights, scorers
from pipeline.plan import dag
from pipeline.plan import weights as files
from pipeline.plan.rivals import remarks
from pipeline.plan.table import table
from pipeline.settings.selection import Selection
from pipeline.steps import evaluate
from pipeline.steps.measuring import extract
from pipeline.store.artifacts import Artifact
from stages.scoring.alterations import squared
from stages.scoring.distribution import kernel_distance
from stages.scoring.inception import Inception, load
from stages.settings.scoring import Alteration
from stages.weight_files import BadWeights
from tests.pipeline.in_process import Root
from tests.pipeline.steps.test_evaluate import captions, flat, noise, prepared, put, scored
from tests.stages.scoring.test_inception import weights  # noqa: F401

ORIGINALS = [noise(n) for n in range(4)]  # as `prepared` has them


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster.board.BoardClient", lambda board: board)
    monkeypatch.setattr(extract, "CHUNK", 3)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often Inception was shown each picture."""
    found: Counter[bytes] = Counter()
    call = Inception.__call__

    def counting(self: Inception, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        found.update(picture.tobytes() for picture in pictures)
        return call(self, pictures)

    monkeypatch.setattr(Inception, "__call__", counting)
    return found


def words(weights: Path) -> list[str]:  # noqa: F811
    sizes = ["eval.distances.side=64", "eval.distances.side_is=64"]  # what the pictures have: nothing is resized
    return ["targets=[scores]", f"eval.distances.inception={weights}", *sizes]


def extracted(root: Root) -> dict[str, Artifact]:
    made = {}
    for output in feature_sets.feature_sets(root.config):
        build = root.build(output)
        made[output] = root.commit(build, extract.extract(build))
    return made


def test_drawn_pictures_and_those_of_other_seeds_stand_beside_their_originals(weights, tmp_path, seen):  # noqa: F811
    root = prepared(tmp_path / "root", *words(weights), "eval.distances.alterations.jpeg_75.jpeg=75")
    made = extracted(root)
    assert [*made] == [f"features_training-{whose}" for whose in ("ours", "null", "reference", "ours-jpeg_75")]
    again = [picture // 2 for picture in ORIGINALS]
    drawn = [ORIGINALS[0], *(picture // 2 for picture in ORIGINALS[1:])]
    changed = [squared(picture, 64, "bicubic", Alteration(jpeg=75)) for picture in drawn]
    assert seen == Counter(picture.tobytes() for picture in [*drawn, *again, *ORIGINALS, *changed])
    scores = scored(root)
    whole, null, altered = json.loads(scores.read(distances.FILE))
    assert [(line["whose"], line["part"]) for line in (whole, null, altered)] == [
        ("ours", "all"), ("null", "all"), ("ours", "jpeg_75"),
    ]  # fmt: skip
    assert (whole["n"], whole["n_real"], whole["fid"]) == (4, 4, None)  # too few
    extractor = load(weights)
    real = extractor(ORIGINALS)[0]
    for line, pictures in ((whole, drawn), (null, again)):
        assert line["kid"] == pytest.approx(kernel_distance(extractor(pictures)[0], real).mean, rel=1e-3)
    assert whole["kid_low"] < whole["kid"] < whole["kid_high"]
    digits = next(name for name in scores.manifest["metrics"] if name.startswith("kd:"))[:11]
    assert scores.manifest["metrics"][f"{digits}/training/ours"] == whole["kid"]  # random weights are no Inception
    assert not [name for name in scores.manifest["metrics"] if name.startswith(("fid", "kid", "is/"))]


def test_killed_half_way_no_picture_is_looked_at_twice(weights, tmp_path, seen, monkeypatch):  # noqa: F811
    root = prepared(tmp_path / "root", *words(weights))
    publish = extract.shards.publish_receipt

    def dying(folder: str, shard: int, **facts: object) -> None:
        publish(folder, shard, **facts)
        raise OSError("the machine is gone")

    monkeypatch.setattr(extract.shards, "publish_receipt", dying)
    with pytest.raises(OSError, match="gone"):
        extract.extract(root.build("features_training-ours"))
    monkeypatch.setattr(extract.shards, "publish_receipt", publish)
    made = extracted(root)["features_training-ours"]
    assert set(seen.values()) <= {1, 2}  # one picture is its own original, three come again with other seeds
    assert seen.total() == 12
    keys = [feature_sets.key((row["key"], row["caption"])) for row in captions("training", 4)]
    tables = [extract.shards.read_tensors(made.read(f"0000{n}.parquet"), feature_sets.FIELD) for n in (0, 1)]
    assert [key for names, _ in tables for key in names] == keys
    assert tables[0][1][0].shape == (2048 + 1008,)


def test_what_is_asked_later_of_the_same_pictures_costs_no_second_look(weights, tmp_path):  # noqa: F811
    first = prepared(tmp_path / "root", *words(weights))
    more = Root(tmp_path / "root", *words(weights), "eval.distances.fid_from=2", "eval.distances.alterations.b.blur=1")
    other = Root(tmp_path / "root", *words(weights), "eval.distances.resize=box")
    for output in ("features_training-ours", "features_training-reference"):
        assert more.prints[output].digest == first.prints[output].digest != other.prints[output].digest
    assert more.prints["scores"].digest != first.prints["scores"].digest


def test_real_pictures_of_a_folder_may_have_any_size_and_name(weights, tmp_path):  # noqa: F811
    (tmp_path / "real").mkdir()
    for n in range(5):
        Image.fromarray(flat(40 * n)).resize((70 + n, 64)).save(tmp_path / f"real/COCO_val2014_{n:012d}.jpg")
    (tmp_path / "mine.txt").write_text("\n".join(f"prompt {n}" for n in range(4)))
    mine = [f"eval.prompts.mine={tmp_path}/mine.txt", f"eval.distances.references.mine={tmp_path}/real"]
    root = Root(tmp_path / "root", *words(weights), *mine)
    build = root.build("features_mine-reference")
    made = root.commit(build, extract.extract(build))
    assert (made.manifest["rows"], made.manifest["parents"]) == (5, {})
    (tmp_path / "real/COCO_val2014_000000000001.jpg").write_bytes(b"no picture")
    planned = dag.plan(root.steps, root.config.lookup, root.store, Selection())
    with pytest.raises(DataError, match=r"^eval\.distances\.references\.mine: of 5 .*1 undecodable"):
        remarks(root.config, planned)
    allowed = Root(tmp_path / "root", *words(weights), *mine, "eval.allow_missing=0.2")
    build = allowed.build("features_mine-reference")
    assert extract.extract(build).notes["pictures"]["n"] == 4
    (told,) = (one for one in remarks(allowed.config, planned) if "references" in one)
    assert told.endswith("4 are compared with")


def test_a_file_of_another_architecture_is_refused_before_anything_is_done(weights, tmp_path):  # noqa: F811
    (tmp_path / "other.pth").write_bytes(b"no weights")
    root = Root(tmp_path / "root", *words(tmp_path / "other.pth"))
    planned = dag.plan(root.steps, root.config.lookup, root.store, Selection())
    with pytest.raises(BadWeights, match=r"^eval\.distances\.inception: \S*other\.pth .*; give weights-inception-2015"):
        files.check(root.config, planned)
    gone = Root(tmp_path / "root", *words(tmp_path / "none.pth"))
    told = files.missing(gone.config, planned)
    assert told is not None
    assert "weights get inception" in told or "there is nothing at" in told


def test_names_are_decided_once_of_the_whole(weights, tmp_path, monkeypatch):  # noqa: F811
    """Somebody vouches for the files in the middle of an evaluation."""
    (tmp_path / "w.safetensors").write_text("weights")

    class Constant:
        wants_originals = False

        def __call__(self, pictures: Sequence[np.ndarray], *others: object) -> np.ndarray:
            return np.zeros(len(pictures), np.float32)

        def is_truncated(self, prompt: str) -> bool:
            return False

    monkeypatch.setattr(scorers, "load", lambda config, device: {"pickscore": Constant()})
    monkeypatch.setattr(evaluate, "CHUNK", 2)
    publish = evaluate.shards.publish_receipt

    def dying(folder: str, shard: int, **facts: object) -> None:
        publish(folder, shard, **facts)
        raise OSError("the machine is gone")

    root = prepared(tmp_path / "root", *words(weights), f"eval.scorers.pickscore={tmp_path}/w.safetensors")
    assert scorers.names(root.config)["pickscore"].startswith("clip:")
    made = extracted(root)
    monkeypatch.setattr(evaluate.shards, "publish_receipt", dying)
    with pytest.raises(OSError, match="gone"):
        evaluate.evaluate(root.build("scores"))
    monkeypatch.setattr(evaluate.shards, "publish_receipt", publish)
    for path in (tmp_path / "w.safetensors", weights):
        digest = storage.entry_of(path.read_bytes()).sha256
        known_weights.record(path).write_text(f"{digest}  {path.name}\n")
    try:
        metrics = scored(root).manifest["metrics"]
    finally:
        known_weights.record(weights).unlink()
    assert len(made) == 3
    assert metrics["pickscore/training/n"] == 4
    assert "kid/training/ours" in metrics
    assert not [name for name in metrics if ":" in name]


def test_a_set_without_real_pictures_has_its_inception_score_alone(weights, tmp_path):  # noqa: F811
    (tmp_path / "mine.txt").write_text("\n".join(f"prompt {n}" for n in range(4)))
    root = Root(tmp_path / "root", *words(weights), f"eval.prompts.mine={tmp_path}/mine.txt")
    rows = captions("mine", 4)
    for output in ("samples_mine", "null_samples_mine"):
        put(root, output, {"generated": ORIGINALS}, rows)
    assert [*feature_sets.feature_sets(root.config)] == ["features_mine-ours", "features_mine-null"]
    for line in distances.measured(root.config, extracted(root)):
        assert (line.fid, line.kid, line.n_real) == (None, None, None)
        assert 1 <= line.inception_score <= 4


def test_features_are_steps_of_the_table(weights, tmp_path):  # noqa: F811
    steps = {step.output: step for step in table(Root(tmp_path, *words(weights)).config)}
    assert steps["features_training-reference"].inputs == ("samples",)
    assert {"features_training-ours", "features_training-reference"} < set(steps["scores"].inputs)
