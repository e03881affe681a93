"""Aesthetic scores: the formula, through the real loading code, and what views, funnel and trace make of them."""

import json
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from datasets.config import DataError, ScorerConfig
from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shards import INDEX, Clock, ImageRow
from datasets.planning import plan, plan_files
from datasets.reading import aesthetic, views
from pipeline.models import scorers
from pipeline.plan import obstacles
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.plan.wanted import planned_steps
from pipeline.settings import compose
from pipeline.settings.selection import Selection
from pipeline.steps import score, select
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact, Look, Store
from pipeline.verbs.data import funnel, trace
from pipeline.verbs.data.forgetting import forget
from stages.sampling.grid import png
from stages.scoring.aesthetic import AestheticScorer
from stages.weight_files import BadWeights
from tests.pipeline.in_process import ALONE, Here, Report

TINY = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
SIZES = (24, 8, 6, 4, 2, 1)  # of the second predictor's five layers, in the small
VIEW = "data.views={fine: {min_aesthetic: 5.0}}"
PHASES = "stage_c.train.phases=[{steps: 4, batch_size: 2, size: 128, view: fine}]"
ROWS = (4, 0, 3)  # pictures of each shard


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP, both forms of a head, and a head for another CLIP."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "tiny-scorer.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = CLIP(**TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    save_file(model.state_dict(), folder / "clip.safetensors")
    second: dict[str, torch.Tensor] = {}
    for name, (inside, outside) in zip((0, 2, 4, 6, 7), pairwise(SIZES), strict=True):
        second |= {f"layers.{name}.weight": torch.randn(outside, inside), f"layers.{name}.bias": torch.randn(outside)}
    torch.save(second, folder / "second.pth")
    middle = np.median(expected(folder, "second.pth", [picture(number) for number in range(8)]))
    torch.save(second | {"layers.7.bias": second["layers.7.bias"] + 5 - middle}, folder / "second.pth")
    torch.save({"weight": torch.randn(1, 24), "bias": torch.ones(1)}, folder / "first.pth")
    torch.save({"weight": torch.randn(1, 768), "bias": torch.ones(1)}, folder / "other.pth")
    return folder


def picture(number: int) -> np.ndarray:
    random = np.random.default_rng(number)
    coarse = random.integers(0, 256, (5 + number % 3, 6, 3), np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))


def expected(files: Path, head: str, pictures: list[np.ndarray]) -> list[float]:
    """The score by the definition: CLIP's embedding over its length, then W x + b in float64, layer by layer."""
    model, _, transform = open_clip.create_model_and_transforms(
        "tiny-scorer", pretrained=str(files / "clip.safetensors")
    )
    with torch.inference_mode():
        inputs = torch.stack([transform(Image.fromarray(array)) for array in pictures])
        values = model.eval().encode_image(inputs).numpy().astype(np.float64)
    values /= np.sqrt((values**2).sum(axis=1, keepdims=True))
    state = {name: tensor.double().numpy() for name, tensor in torch.load(files / head, weights_only=True).items()}
    for name in [name for name in state if name.endswith("weight")]:
        values = values @ state[name].T + state[name.replace("weight", "bias")]
    return values[:, 0].tolist()


def scorer_of(clip: Path, head: Path) -> AestheticScorer:
    config = ScorerConfig(clip_weights=str(clip), head_weights=str(head), model="tiny-scorer")
    return scorers.of_pictures(config, "cpu")


@pytest.mark.parametrize("head", ["first.pth", "second.pth"])
def test_a_score_is_the_head_of_the_embedding_of_length_one(files, head):
    pictures = [picture(number) for number in range(5)]
    scorer = scorer_of(files / "clip.safetensors", files / head)
    scores, wanted = scorer.score(pictures), expected(files, head, pictures)
    assert scores.dtype == np.float32
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("clip", "head", "told"),
    [
        ("first.pth", "second.pth", "data.scorer.clip_weights: .*first.pth does not hold the tensors of a CLIP tiny"),
        ("clip.safetensors", "clip.safetensors", "data.scorer.head_weights: .*holds no head of an aesthetic predictor"),
        (
            "clip.safetensors",
            "other.pth",
            "data.scorer.head_weights: .*other.pth makes 1 numbers of 768, not one of 24",
        ),
    ],
)
def test_other_weights_are_refused_by_key_and_file(files, clip, head, told):
    with pytest.raises(BadWeights, match=told):
        scorer_of(files / clip, files / head)


class Root:
    """A root with a plan and pictures of one config, whose steps run in this process."""

    def __init__(self, path: Path, *words: str):
        self.path = path
        words = ("scale=micro", "targets=[stage_c]", PHASES, *words)
        self.config, self.store = compose.load("stage_c", list(words)), Store(str(path))
        self.steps = order(table(self.config), self.config.targets)
        self.prints = fingerprints(self.steps, self.config.lookup)
        rows = [
            {"key": f"{16 * shard + row:032x}", "shard": shard, "row": row, "url": f"http://a.invalid/{shard}/{row}"}
            for shard, count in enumerate(ROWS)
            for row in range(count + 1)  # of each shard, the first is lost
        ]
        planned = pa.Table.from_pylist(rows, schema=plan.SCHEMA)
        self.commit(
            "metadata",
            {"plan/00000.parquet": plan_files.parquet_bytes(planned, 8)},
            len(rows),
            notes={"read": len(rows), "rejected": {}},
        )
        contents: dict[str, bytes] = {}
        where = self.store.path("images", self.prints["images"].digest)
        for shard, count in enumerate(ROWS):
            kept = [row for row in rows if row["shard"] == shard and row["row"]]
            index = [
                {"key": row["key"], "row": row["row"], "status": "ok" if row["row"] else "gone"}
                for row in rows
                if row["shard"] == shard
            ]
            made = {
                shards.image_name(shard): shards.write_images(
                    ImageRow(row["row"], row["key"], row["url"], "a", "png", png(picture(int(row["key"], 16))))
                    for row in kept
                ),
                shards.index_name(shard): shards.table_bytes(index, INDEX),
            }
            entries = {name: storage.publish(content, storage.join(where, name)) for name, content in made.items()}
            shards.publish_receipt(
                where, shard, rows_in=count + 1, rows_out=count, files=entries, clock=Clock(), dropped={"gone": 1}
            )
            contents |= made
        self.commit("images", contents, sum(ROWS), notes={"lost": {"gone": len(ROWS)}})

    def commit(self, name: str, contents: dict[str, bytes], rows: int, **about: Any) -> None:
        path = self.store.path(name, self.prints[name].digest)
        entries = {file: storage.publish(content, storage.join(path, file)) for file, content in contents.items()}
        self.finish(name, Facts(entries, rows, call="", workers=[], **about))

    def finish(self, name: str, facts: Facts) -> Artifact:
        return self.store.commit(name, self.prints[name], vars(facts) | {"created": "now"})

    def build(self, name: str, function: Callable[[Build], Facts]) -> Artifact:
        step = next(step for step in self.steps if step.output == name)
        found = {parent: self.store.find(parent, self.prints[parent].digest) for parent in step.inputs}
        build = Build(
            config=self.config.with_absolute_paths(),
            step=step,
            path=self.store.path(name, self.prints[name].digest),
            claim=ALONE,
            inputs={parent: artifact for parent, artifact in found.items() if artifact},
            cluster=Here(),
            lease=lambda *_, **__: nullcontext(),
            report=Report(),
            stopped=lambda: None,
            forgotten=frozenset(),
        )
        return self.finish(name, function(build))


@pytest.fixture
def root(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    monkeypatch.setattr("pipeline.cluster.board.BoardClient", lambda board: board)
    keys = {"clip_weights": files / "clip.safetensors", "head_weights": files / "second.pth"}
    scorer = [f"data.scorer.{key}={path}" for key, path in keys.items()]
    return Root(
        tmp_path,
        *scorer,
        "data.scorer.model=tiny-scorer",
        "data.scorer.batch=2",
        "data.views={fine: {min_aesthetic: 5.0}}",
    )


def scores_of(artifact: Artifact) -> dict[str, float]:
    tables = [pq.read_table(pa.BufferReader(artifact.read(name))) for name in sorted(artifact.shards().files())]
    assert all(table.schema.equals(aesthetic.SCHEMA) for table in tables)
    return {row["key"]: row["aesthetic"] for table in tables for row in table.to_pylist()}


def test_every_stored_picture_is_scored_and_views_go_by_that(root, files):
    artifact = root.build("aesthetic", score.score)
    keys = [f"{16 * shard + row:032x}" for shard, count in enumerate(ROWS) for row in range(1, count + 1)]
    wanted = expected(files, "second.pth", [picture(int(key, 16)) for key in keys])
    found = scores_of(artifact)
    assert list(found) == keys
    np.testing.assert_allclose(list(found.values()), wanted, rtol=1e-4, atol=1e-4)
    notes = artifact.manifest["notes"]
    assert notes["scores"] == {
        f"{n} to {n + 1}": sum(math.floor(s) == n for s in wanted) for n in sorted({math.floor(s) for s in wanted})
    }
    settings = artifact.manifest["settings"]["data.scorer"]
    assert settings["head_weights"] == f"sha256 {storage.sha256(str(files / 'second.pth'))}"
    assert "batch" not in settings

    view = root.build("view_fine", select.select)
    chosen = views.read(view.read(views.FILE))
    high = [key for key, value in zip(keys, wanted, strict=True) if value >= 5]
    assert 0 < len(high) < len(keys)
    assert [f"{16 * shard + place + 1:032x}" for shard in range(len(ROWS)) for place in chosen.places(shard)] == high
    assert view.manifest["rows"] == len(high)


def test_trace_funnel_and_forget_know_the_scores(root, capsys):
    artifact = root.build("aesthetic", score.score)
    root.build("view_fine", select.select)
    key, value = next((key, value) for key, value in scores_of(artifact).items() if value >= 5)
    trace.trace(root.config, str(root.path), key, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["scored"] == {"row": int(key, 16) % 16, "key": key, "aesthetic": value}
    assert any("/aesthetic/" in path for path in told["files"])
    funnel.funnel(root.config, str(root.path), as_json=True)
    assert json.loads(capsys.readouterr().out)["funnel"][-1] == {"level": "scored", "rows": sum(ROWS), "lost": {}}

    before = root.store.find("view_fine", root.prints["view_fine"].digest)
    forget(str(root.path), {key})
    after = {name: root.store.find(name, root.prints[name].digest) for name in ("aesthetic", "view_fine")}
    assert key not in scores_of(after["aesthetic"])
    assert after["aesthetic"].manifest["rows"] == sum(ROWS) - 1
    assert after["view_fine"].manifest["rows"] == before.manifest["rows"] - 1


def test_only_views_that_go_by_scores_depend_on_the_scorer():
    scorer = ["data.scorer.clip_weights=a", "data.scorer.head_weights=b"]
    views_of = "data.views={fine: {min_aesthetic: 5.0}, large: {min_side: 600}}"
    for words, wanted in (([], False), (scorer, True)):
        steps = {step.output: step for step in table(compose.load("stage_c", ["scale=micro", views_of, *words]))}
        assert ("aesthetic" in steps) is wanted
        assert ("aesthetic" in steps["view_fine"].inputs) is wanted
        assert "aesthetic" not in steps["view_large"].inputs


def test_a_view_by_scores_that_neither_exist_nor_are_configured_is_refused(tmp_path):
    row = {"URL": "http://a.invalid/1", "TEXT": "a caption", "WIDTH": 512, "HEIGHT": 512}
    rows = pa.Table.from_pylist([row | {"similarity": 0.3, "punsafe": 0.0, "pwatermark": 0.0}])
    pq.write_table(rows, tmp_path / "rows.parquet")

    def told(*words: str) -> str | None:
        config = compose.load(
            "stage_c",
            [
                "scale=micro",
                "data=laion_aesthetic",
                f"data.metadata={tmp_path}/rows.parquet",
                "data.filters.min_aesthetic=null",
                "data.image.size=128",
                VIEW,
                *words,
            ],
        )
        return obstacles.missing_scores(config, planned_steps(config, Look(str(tmp_path / "root")), Selection()))

    assert told() is None  # no phase uses the view
    assert "data.views.fine.min_aesthetic: the metadata have no aesthetic scores; join some with" in str(told(PHASES))
    assert told(PHASES, "data.scores=table.parquet") is None
    assert told(PHASES, "data.scorer.clip_weights=a", "data.scorer.head_weights=b") is None
    pq.write_table(rows.append_column("aesthetic_score", pa.array([5.0])), tmp_path / "rows.parquet")
    assert told(PHASES) is None


def test_a_plan_without_scores_is_named_where_its_view_is_made(tmp_path):
    with pytest.raises(DataError, match=r"data.views.fine.min_aesthetic: the metadata have no aesthetic scores; join"):
        Root(tmp_path, VIEW).build("view_fine", select.select)


def test_missing_weights_of_the_scorer_end_a_run_before_it_begins(tmp_path):
    scorer = ["data.scorer.clip_weights=weights/clip-vit-large-patch14.safetensors", "data.scorer.head_weights=none"]
    config = compose.load("stage_c", ["scale=micro", VIEW, PHASES, *scorer])
    planned = planned_steps(config, Look(str(tmp_path / "root")), Selection())
    told = obstacles.every(config, planned, None)[0]
    assert re.search(r"data.scorer.clip_weights: there is nothing at .*weights get clip_l", told)
