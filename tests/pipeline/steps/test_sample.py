"""sample, in this process, with tiny models of random weights: which prompts are drawn, how, and each of them once."""

import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datasets.buckets import Size
from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shard_table import Shard
from datasets.formats.shards import ImageRow
from datasets.reading import prompts, views
from pipeline.models import loading
from pipeline.models.drawing import caption_seed
from pipeline.models.prompt_sets import Prompt
from pipeline.steps import encode, sample
from pipeline.steps.build import Facts
from pipeline.store.artifacts import Artifact
from stages.models.compressor import Compressor
from stages.models.previewer import Previewer
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from tests.pipeline.in_process import ROWS, Root, download, trained

FOLDERS = ("original", "stage_a", "stage_b", "generated")
HELD = tuple(f"{number:032x}" for number in (1, 6))  # keys of pictures, of shards 0 and 1


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster.board.BoardClient", lambda board: board)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Caption and seed of every picture that was drawn from its caption alone."""
    found: list[tuple[str, int]] = []
    ours = sample.drawn

    def counting(models: Any, texts: list[str], seeds: list[int], *others: Any, **how: Any) -> Iterator[Any]:
        if len(others) == 3 and not how:  # without a picture
            found.extend(zip(texts, seeds, strict=True))
        yield from ours(models, texts, seeds, *others, **how)

    monkeypatch.setattr(sample, "drawn", counting)
    monkeypatch.setattr(sample, "CHUNK", 2)
    return found


def ready(root: Root, stored: Any) -> None:
    """What drawing needs: pictures, text tower, and models of random weights."""
    download(root, stored)
    root.commit(build := root.build("text_tiny"), encode.encode_text(build))
    config = root.config
    makers = {
        "stage_a": {loading.STAGE_A: partial(StageA, config.stage_a.model)},
        "stage_b": {
            "stage_b.safetensors": partial(StageB, config.stage_b.model),
            loading.COMPRESSOR: partial(Compressor, config.compressor.model),
        },
        "stage_c": {"stage_c.safetensors": partial(StageC, config.stage_c.model)},
    }
    for output, parts in makers.items():
        build = root.build(output)
        files = {n: storage.publish(trained(make, 0), storage.join(build.path, n)) for n, make in parts.items()}
        root.commit(build, Facts(files, rows=0, call="", workers=[]))


@pytest.fixture
def prepared(tmp_path: Path, tars: Any) -> Any:
    """A root with pictures, text tower and models, two pictures held out, and a prompt set of five."""
    (tmp_path / "mine.tsv").write_text("Prompt\tCategory\n" + "".join(f"prompt {n}\tAnimals\n" for n in range(5)))
    words = ("targets=[scores]", "data.held_out_captions=[x]", f"eval.prompts.mine={tmp_path / 'mine.tsv'}")

    def prepare(name: str, *more: str) -> Root:
        root = Root(tmp_path / name, "data.image.size=128", "sample.limit=100", *words, *more)
        ready(root, tars)
        held = {shard: (count, np.packbits(bits(shard, count)).tobytes()) for shard, count in enumerate(ROWS)}
        build = root.build("held_out")
        entry = storage.publish(views.dump(views.View(held)), storage.join(build.path, views.FILE))
        root.commit(build, Facts({views.FILE: entry}, rows=2, call="", workers=[]))
        return root

    return prepare


def bits(shard: int, count: int) -> np.ndarray:
    """Which of a shard's pictures are held out."""
    first = sum(ROWS[:shard])
    return np.array([f"{first + row:032x}" in HELD for row in range(count)], bool)


def made(root: Root, output: str, step: Any = sample.sample) -> Artifact:
    build = root.build(output)
    return root.commit(build, step(build))


def rows(samples: Artifact) -> list[dict[str, Any]]:
    found = json.loads(samples.read("captions.json"))
    table = pq.read_table(io.BytesIO(samples.read("samples.parquet"))).to_pylist()
    assert [{name: value for name, value in row.items() if value is not None} for row in table] == found
    return found


def test_captions_that_were_trained_on_and_held_out_ones_are_drawn_apart(prepared, drawn):
    root = prepared("root", "eval.prompts.held_out=held_out")
    training, held = made(root, "samples"), made(root, "samples_held_out")
    keys = [f"{number:032x}" for number in range(sum(ROWS))]
    assert [row["key"] for row in rows(training)] == [key for key in keys if key not in HELD]
    assert [row["key"] for row in rows(held)] == list(HELD)
    for samples in (training, held):
        seen = set[str]()
        for row in rows(samples):
            assert row.keys() == {"key", "caption", "seed"}
            said = f"{row['caption']}\0{row['key']}" if row["caption"] in seen else row["caption"]
            assert row["seed"] == caption_seed(root.config.seed, said)  # a caption that comes again is another drawing
            seen.add(row["caption"])
            assert {f"{folder}/{row['key']}.png" for folder in FOLDERS} <= samples.files.keys()
    assert len(drawn) == sum(ROWS)
    assert held.manifest["notes"]["prompts"] == {"set": "held_out", "of": "held_out", "n": 2}


def test_prompts_of_a_file_are_drawn_once_though_it_is_killed_half_way(prepared, drawn, monkeypatch):
    whole = made(prepared("whole"), "samples_mine")
    assert [row["category"] for row in rows(whole)] == ["Animals"] * 5
    assert rows(whole)[3]["key"] == prompts.Prompt("prompt 3").key
    names = {f"generated/{row['key']}.png" for row in rows(whole)}
    assert whole.files.keys() == names | {"samples.parquet", "captions.json", "grid.png"}
    drawn.clear()
    root = prepared("killed")
    publish = shards.publish_receipt

    def dying(folder: str, shard: int, **facts: Any) -> Any:
        if shard == 1:
            raise OSError("the machine is gone")
        return publish(folder, shard, **facts)

    monkeypatch.setattr(shards, "publish_receipt", dying)
    with pytest.raises(OSError, match="gone"):
        made(root, "samples_mine")
    monkeypatch.setattr(shards, "publish_receipt", publish)
    assert [text for text, _ in drawn] == [f"prompt {n}" for n in (0, 1, 2, 3)]
    drawn.clear()
    again = made(root, "samples_mine")
    assert [text for text, _ in drawn] == [f"prompt {n}" for n in (2, 3, 4)]  # the first two had their receipt
    assert {name: again.read(name) for name in again.files} == {name: whole.read(name) for name in whole.files}


def test_drawn_again_everything_but_the_seeds_is_the_same(prepared, drawn, tmp_path):
    (tmp_path / "w").write_text("weights")
    root = prepared("root", f"eval.scorers.clip_h={tmp_path / 'w'}")
    first, again = made(root, "samples_mine"), made(root, "null_samples_mine", sample.sample_again)
    assert rows(again) == rows(first)
    ours, theirs = drawn[:5], drawn[5:]
    assert [text for text, _ in ours] == [text for text, _ in theirs]
    assert not {seed for _, seed in ours} & {seed for _, seed in theirs}
    pictures = [name for name in first.files if name.startswith("generated/")]
    assert all(first.read(name) != again.read(name) for name in pictures)


def test_ablations_show_which_model_decides_what(prepared, drawn):
    root = prepared("root", "sample.ablations=[preview,without_text]", "eval.prompts.held_out=held_out")
    plain = prepared("plain", "eval.prompts.held_out=held_out")
    build = root.build("previewer")
    content = trained(partial(Previewer, root.config.previewer.model), 0)
    files = {"previewer.safetensors": storage.publish(content, storage.join(build.path, "previewer.safetensors"))}
    root.commit(build, Facts(files, rows=0, call="", workers=[]))
    samples, without = made(root, "samples_held_out"), made(plain, "samples_held_out")
    more = {f"{folder}/{key}.png" for folder in ("preview", "without_text") for key in HELD}
    assert samples.files.keys() - without.files.keys() == more
    assert all(samples.read(name) == without.read(name) for name in without.files if name != "grid.png")
    with Image.open(io.BytesIO(samples.read(f"preview/{HELD[0]}.png"))) as preview:
        assert preview.size == (24, 24)
    assert samples.read(f"without_text/{HELD[1]}.png") != samples.read(
        f"stage_b/{HELD[1]}.png"
    )  # whose caption says much
    sheets = [Image.open(io.BytesIO(one.read("grid.png"))) for one in (samples, without)]
    assert sheets[0].width > sheets[1].width
    mine = made(root, "samples_mine")
    assert {name.partition("/")[0] for name in mine.files if "/" in name} == {"generated", "preview"}


def test_only_the_pictures_of_the_prompts_are_decoded(monkeypatch, tmp_path):
    def picture(level: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (level, level, level)).save(buffer, "PNG")
        return buffer.getvalue()

    images = [ImageRow(row, f"{row:032x}", "", "", "png", picture(row)) for row in range(40)]
    names = [shards.image_name(number) for number in (0, 1)]
    entries = [
        storage.publish(shards.write_images(images[20 * number :][:20]), f"{tmp_path}/{name}")
        for number, name in enumerate(names)
    ]
    stored = [Shard(str(tmp_path), number, 20, None, {names[number]: entries[number]}) for number in (0, 1)]
    decoded: list[str] = []
    read: list[str] = []
    pixels, reads = ImageRow.pixels, Shard.read

    def noted(row: ImageRow, *arguments: Any) -> np.ndarray:
        decoded.append(row.key)
        return pixels(row, *arguments)

    def counted(shard: Shard, name: str) -> bytes:
        read.append(name)
        return reads(shard, name)

    monkeypatch.setattr(ImageRow, "pixels", noted)
    monkeypatch.setattr(Shard, "read", counted)
    painter = sample.Painter.__new__(sample.Painter)  # whose making loads models
    painter.square, painter._last = Size(16, 16), (-1, [])
    wanted = (3, 5, 7, 19, 20, 21, 22)
    levels: list[int] = []
    for chunk in (wanted[:2], wanted[2:5], wanted[5:]):
        originals = painter._originals([Prompt(images[row].key, "", 0, stored[row // 20]) for row in chunk])
        assert originals is not None
        levels += originals[:, 0, 0, 0].tolist()
    assert levels == list(wanted)
    assert decoded == [images[row].key for row in wanted]
    assert read == names  # each shard once
    assert painter._originals([Prompt("k", "a prompt of a file", 0)]) is None
