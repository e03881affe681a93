"""Several captions a picture from end to end, without Ray: one picture stored, a text for each caption, one drawn."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from datasets.buckets import Frame
from datasets.config import DataError
from datasets.fetching.download import download_shard
from datasets.formats import removal, shards
from datasets.planning import plan, plan_files
from datasets.reading import captions
from datasets.reading.batches import Batches
from datasets.sources import folder
from pipeline.cluster import board
from pipeline.models import encoders
from pipeline.models.training_data import EncodedBatches
from pipeline.plan import cost
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.plan.wanted import planned_steps
from pipeline.settings import compose
from pipeline.settings.selection import Selection
from pipeline.steps import caption, encode, fetch, select, train
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact, Look, Store
from pipeline.verbs.data.forgetting import forget
from pipeline.verbs.data.trace import trace
from stages.models.text import Tokenizer
from tests.pipeline.in_process import Report, Root
from tests.pipeline.models.foreign import test_captioners

PICTURES, EACH = 6, 5
WORDS = ("data=folder", "scale=micro", "targets=[stage_c]")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, each with five captions, a line each, one of them everybody's."""
    path = tmp_path_factory.mktemp("pictures")
    for number in range(PICTURES):
        noise = np.random.default_rng(number).integers(0, 256, (130, 140, 3), np.uint8)
        Image.fromarray(noise).save(path / f"{number}.png")
        lines = [f"{number} seen {which} times" for which in range(EACH - 1)] + ["a picture"]
        (path / f"{number}.txt").write_text("\n".join(lines))
    return path


class Captioned(Root):
    """A root whose steps are built in this process, as far as the text."""

    def __init__(self, path: Path, *words: str):
        words = (*WORDS, "data.folder.caption_lines=each", *words)
        self.config, self.store = compose.load("stage_c", list(words)), Store(str(path))
        self.steps = order(table(self.config), self.config.targets)
        self.prints = fingerprints(self.steps, self.config.lookup)
        self.report = Report()

    def make(self, output: str, function: Any) -> Facts:
        build = self.build(output)
        facts: Facts = function(build)
        self.commit(build, facts)
        return facts

    def commit(self, build: Build, facts: Facts) -> Artifact:
        told = vars(facts) | {"created": "now", "device_seconds": 0.0}
        return self.store.commit(build.step.output, self.prints[build.step.output], told)

    def artifact(self, name: str) -> Artifact:
        found = super().artifact(name)
        return found if found.path else replace(found, manifest={"parents": {}})

    def stored(self) -> "Captioned":
        """With a plan and the pictures."""
        self.make("metadata", fetch.fetch)
        self.make("images", _download)
        return self


def _download(build: Build) -> Facts:
    data, metadata = build.config.data, build.inputs["metadata"]
    with folder.hosts(data.folder) as hosts:
        made = [
            download_shard(rows, shard=n, folder=build.path, image=data.image, download=data.download, hosts=hosts)
            for n, rows in plan_files.all_shards(metadata.read, metadata.files)
        ]
    rows = sum(receipt.rows_out for receipt in made)
    return Facts({}, rows=rows, call="", workers=[], shards={"": made}, notes={"lost": {}})


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "BoardClient", lambda given: given)


def write_table(path: Path, urls: list[str]) -> str:
    """Captions of another kind of all pictures but one, and of one that is not here."""
    columns = {"url": [*urls, "http://elsewhere.org/"], "re_caption": [f"dense words of {url}" for url in urls] + ["?"]}
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture(scope="module")
def recapped(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Captioned:
    """Pictures with five captions, all but one of them with a sixth from a table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board, "BoardClient", lambda given: given)
        path = tmp_path_factory.mktemp("recapped")
        recaps = write_table(path / "recaps.parquet", [folder.url(f"{number}.png") for number in range(1, PICTURES)])
        words = ("data.captions={alt: 0.25, dense: 0.75}", f"data.recaps.dense.path={recaps}")
        root = Captioned(path / "root", f"data.folder.path={pictures}", *words).stored()
        root.make("captions_dense", caption.recap)
        root.make("text_tiny", encode.encode_text)
        return root


def test_five_captions_store_one_picture_and_each_is_encoded(recapped):
    metadata, images, text = (recapped.artifact(name) for name in ("metadata", "images", "text_tiny"))
    assert metadata.manifest["rows"] == images.manifest["rows"] == text.manifest["rows"] == PICTURES
    assert metadata.manifest["notes"]["captions"] == PICTURES * EACH
    rows = [row for shard in images.shards().values() for row in shard.images()]
    assert all(len(row.captions) == EACH for row in rows)
    keys = [key for n in text.shards() for key in shards.read_tensors(text.read(shards.tensor_name(n)), "text")[0]]
    assert len(keys) == PICTURES * EACH + PICTURES - 1
    assert Counter(keys).keys() == {row.key for row in rows}
    notes = text.manifest["notes"]
    assert notes["captions"] == {"alt": PICTURES * EACH, "dense": PICTURES - 1}
    assert notes["pictures"] == {"alt": 1, "alt+dense": PICTURES - 1}


def test_a_table_of_captions_says_what_became_of_its_rows(recapped):
    made = recapped.artifact("captions_dense").manifest
    assert (made["rows"], made["notes"]) == (PICTURES - 1, {"captions": 5, "table": {"joined": 5, "unknown": 1}})
    assert any("captions_dense: 1 of 6 pictures have none" in told for told in recapped.report.warnings)


def test_more_captions_leave_pictures_and_latents_as_they_are(recapped, tmp_path, pictures):
    """And other weights leave the text as it is."""
    alone = Captioned(tmp_path, f"data.folder.path={pictures}", "data.captions={alt: 1}")
    theirs = {found.digest for found in recapped.prints.values()}
    shared = {name for name, found in alone.prints.items() if found.digest in theirs}
    assert {"metadata", "images"} <= shared
    assert not {"text_tiny", "stage_c"} & shared
    words = [f"data.recaps.dense.path={recapped.config.data.recaps['dense'].path}", f"data.folder.path={pictures}"]
    other = Captioned(tmp_path, *words, "data.captions={alt: 0, dense: 1}")
    differ = {name for name in other.prints if other.prints[name].digest != recapped.prints[name].digest}
    assert {"stage_b", "stage_c"} <= differ
    assert not {"metadata", "images", "captions_dense", "text_tiny", "stage_a"} & differ


def drawn(root: Captioned, start: int, rows: int) -> dict[str, np.ndarray]:
    """Samples of the text alone, as the training of Stage C reads them."""
    reading = train._reading(root.build("stage_c"), ("text",), "tiny")
    return Batches(next(iter(reading.sources.values())), reading.seed).stretch(start, rows)


def test_trainings_draw_one_caption_a_picture_by_the_weights(recapped):
    passes = 200
    batch = drawn(recapped, 0, passes * PICTURES)
    text = recapped.artifact("text_tiny")
    called: dict[tuple[str, bytes], str] = {}
    for number in text.shards():
        content = text.read(shards.tensor_name(number))
        for name, key, value in zip(captions.names(content), *shards.read_tensors(content, "text"), strict=True):
            called[key, value.tobytes()] = name
    pairs = zip(batch["key"], batch["text"], strict=True)
    seen = [called[key.tobytes().hex(), value.tobytes()] for key, value in pairs]
    dense = Counter(seen)["dense"] / (passes * (PICTURES - 1))
    assert abs(dense - 0.75) < 4 * (0.75 * 0.25 / (passes * (PICTURES - 1))) ** 0.5
    again = drawn(recapped, 17, 23)
    for field in again:
        np.testing.assert_array_equal(again[field], batch[field][17:40])


def test_a_panel_s_samples_have_the_captions_that_stand_above_them(recapped):
    reading = train._reading(recapped.build("stage_c"), ("text",), "tiny")
    shown = EncodedBatches(Batches(next(iter(reading.sources.values())), reading.seed), Frame(128), ("text",), [])
    assert reading.planned
    encoder = encoders.text(recapped.config, recapped.artifact("text_tiny")).load(torch.device("cpu"))
    tokens = Tokenizer(recapped.config.text["tiny"].context_length)(shown.captions(PICTURES, reading.planned))
    states = encoder(tokens.ids.numpy().astype(np.uint16))
    np.testing.assert_allclose(shown.first(PICTURES)["text"], states, rtol=0.01, atol=0.01)


def test_a_training_tells_of_pictures_without_a_weighted_caption(recapped):
    build = recapped.build("stage_c")
    told = len(recapped.report.warnings)
    train._tell_of_others(build, recapped.artifact("text_tiny"))
    assert recapped.report.warnings[told:] == []  # all have alt
    data = recapped.config.data.model_copy(update={"captions": {"alt": 0.0, "dense": 1.0}})
    train._tell_of_others(
        Build(**vars(build) | {"config": recapped.config.model_copy(update={"data": data})}),
        recapped.artifact("text_tiny"),
    )
    assert recapped.report.warnings[told:] == [
        "train_c: 1 of 6 pictures have no caption called dense; others are drawn of them"
    ]


def test_a_plan_counts_captions_where_text_is_encoded(recapped):
    planned = planned_steps(recapped.config, Look(recapped.store.root), Selection())
    costs = dict(zip([item.step.output for item in planned], cost.estimates(planned, recapped.config), strict=True))
    assert costs["latents_c"].work == PICTURES
    fresh = planned_steps(recapped.config, Look(f"{recapped.store.root}/none"), Selection())
    (text,) = [
        estimate
        for item, estimate in zip(fresh, cost.estimates(fresh, recapped.config), strict=True)
        if item.step.output == "text_tiny"
    ]
    assert (text.work, text.unit) == (32, "captions")  # data.limit=16, alt and dense


def test_held_out_captions_hold_the_picture_out(recapped):
    metadata, images = (recapped.artifact(name) for name in ("metadata", "images"))
    assert select.held_out(0.0, ("2 seen 3 times",), metadata, images, None).rows == 1
    as_in_a_file = recapped.config.data.model_validate(
        recapped.config.data.model_dump() | {"held_out_captions": [" 2  seen\t3 times "]}
    )
    assert select.held_out(0.0, as_in_a_file.held_out_captions, metadata, images, None).rows == 1


def test_trace_shows_all_captions_and_forget_reaches_them(recapped, tmp_path, capsys):
    root = tmp_path / "root"
    shutil.copytree(recapped.store.root, root)
    url = folder.url("3.png")
    trace(recapped.config, str(root), plan.key_of(url), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["planned"]["captions"][:2] == ["3 seen 0 times", "3 seen 1 times"]
    assert told["captions"] == {"dense": [f"dense words of {url}"]}
    assert {"captions_dense", "text_tiny"} <= {Path(file).parts[-3] for file in told["files"]}
    done = forget(str(root), {url})
    assert done.pictures == {plan.key_of(url)}
    for name, pictures in (("images", 5), ("text_tiny", 5), ("captions_dense", 4)):
        left = Store(str(root)).find(name, recapped.prints[name].digest)
        assert left is not None
        assert sum(shard.rows for shard in left.shards().values()) == pictures
        for number in left.shards() if name != "images" else ():
            assert not removal.holds(left.read(shards.tensor_name(number)), {plan.key_of(url)})


def test_a_table_of_other_pictures_is_refused(tmp_path, pictures):
    path = tmp_path / "recaps.parquet"
    pq.write_table(pa.table({"url": ["http://elsewhere.org/"], "caption": ["x"]}), path)
    words = ("data.captions={alt: 1, dense: 1}", f"data.recaps.dense.path={path}")
    root = Captioned(tmp_path / "root", f"data.folder.path={pictures}", *words).stored()
    with pytest.raises(DataError, match=r"data.recaps.dense.path: .* has a caption of no stored picture \(unknown 1\)"):
        root.make("captions_dense", caption.recap)


def test_a_model_writes_captions_of_all_pictures_with_receipts(tmp_path, pictures):
    weights = test_captioners.save(tmp_path / "blip")
    words = ("data.captions={alt: 1, seen: 1}", f"data.captioners.seen.weights={weights}")
    words += ("data.captioners.seen.max_tokens=5", "data.captioners.seen.batch=2", f"data.folder.path={pictures}")
    root = Captioned(tmp_path / "root", *words).stored()
    root.make("captions_seen", caption.caption)
    made = root.artifact("captions_seen")
    assert made.manifest["rows"] == made.manifest["notes"]["captions"] == PICTURES
    receipts = shards.receipts(made.path)
    assert {n: (one.rows_in, one.rows_out) for n, one in receipts.items()} == {0: (4, 4), 1: (2, 2)}
    root.make("text_tiny", encode.encode_text)
    assert root.artifact("text_tiny").manifest["notes"]["captions"] == {"alt": PICTURES * EACH, "seen": PICTURES}
