"""The verb `data` where what says "done" is damaged: that is told, and nothing is begun in the dark."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shards import Clock, ImageRow
from pipeline.__main__ import main
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.run import invocation
from pipeline.settings import compose
from pipeline.store.artifacts import Artifact, Store

MICRO = ("conf=stage_a", "scale=micro")
PASSING = {"timeout": 2}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with a plan and a finished download of two shards, from which pictures were lost; where nothing runs."""
    loaded, store = compose.load("stage_a", ["scale=micro"]), Store(str(tmp_path / "root"))
    monkeypatch.setattr(invocation, "run", lambda *_: pytest.fail("a run was begun"))
    for name, print_ in fingerprints(order(table(loaded), ["images"]), loaded.lookup).items():
        path = store.path(name, print_.digest)
        for number in range(2 if name == "images" else 0):
            rows = [ImageRow(row, f"{10 * number + row:032x}", "u", "c", "png", b"x") for row in range(3)]
            entry = storage.publish(shards.write_images(rows), storage.join(path, file := shards.image_name(number)))
            about = {"rows_in": 4, "rows_out": 3, "dropped": {"timeout": 1}, "files": {file: entry}}
            shards.publish_receipt(path, number, **about, clock=Clock())
        receipts = list(shards.finished(path).values())
        facts = {"files": {}, "shards": {"": receipts} if receipts else {}, "rows": 6, "timed": [], "metrics": {}}
        store.commit(name, print_, {**facts, "notes": {"lost": PASSING}, "created": "2026-01-01T00:00:00+00:00"})
    return tmp_path / "root"


@pytest.fixture
def images(root: Path) -> Artifact:
    (found,) = Store(str(root)).finished("images")
    return found


@pytest.fixture
def ask(root: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(*words: str) -> tuple[int, str]:
        code = main(["data", *words, *MICRO, f"root={root}"])
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("name", ["manifest.json", "forgotten.json"])
@pytest.mark.parametrize("content", [b"", b'{"rows": 1, "fi', b'{"files": {"x": 7}}'])
def test_what_was_lost_is_not_asked_for_again_while_what_says_done_is_damaged(images, ask, name, content):
    """Such a download is as good as unfinished, so a run would make its manifest anew."""
    Path(images.path, name).write_bytes(content)
    code, said = ask("retry")
    assert code == 2
    assert f"error: {images.path}/{name} is damaged: " in said
    assert "put it back from a copy" in said
    assert "asking again" not in said


def _torn(receipt: Path) -> None:
    receipt.write_bytes(receipt.read_bytes()[:40])


def _of_another_kind(receipt: Path) -> None:
    receipt.write_text(json.dumps({**json.loads(receipt.read_text()), "rows_out": "3"}))


def _of_other_files(receipt: Path) -> None:
    told = json.loads(receipt.read_text())
    told["files"] = {name: {**entry, "bytes": 1} for name, entry in told["files"].items()}
    receipt.write_text(json.dumps(told))


@pytest.mark.parametrize("harm", [_torn, _of_another_kind, _of_other_files, Path.unlink])
def test_receipts_are_verified_too(images, ask, harm):
    assert ask("verify")[0] == 0
    receipt = Path(images.path, "receipts/00001.json")
    harm(receipt)
    code, said = ask("verify")
    assert code == 2
    assert f"1 of 3 files are missing or damaged: {receipt}; mend them: python -m pipeline data repair" in said
