"""Weights by content: what a fingerprint notices and what it does not, and that files are read once."""

import os
import shutil
import sqlite3
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import pytest

from datasets.files import storage
from pipeline.errors import UsageError
from pipeline.plan.dag import differences, fingerprints, order
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.store import identity
from settings import FILES

OLD_NS = 10**18  # a time of change long ago


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The database of known sums, in a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/wuerstchen-pipeline/digests.sqlite"


def known(kept: Path) -> dict[str, str]:
    """What is kept: sha256 by path."""
    with closing(sqlite3.connect(kept)) as database:
        return {path.decode(): digest for path, digest in database.execute("select path, sha256 from digests")}


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(OLD_NS, OLD_NS))
    return path


@cache
def load(*words: str) -> Config:
    return compose.load("stage_c", ["scale=micro", *words])


def fingerprint(*words: str, of: str) -> dict[str, str]:
    """The digest of an artifact and of what it is made from, by name."""
    loaded = load(*words)
    return {name: found.digest for name, found in fingerprints(order(table(loaded), [of]), loaded.lookup).items()}


# ------------------------------------------------------------------------------------------------- the identity


def test_a_file_is_its_bytes_and_a_folder_its_visible_names_and_bytes(tmp_path: Path) -> None:
    file, folder = write(tmp_path / "a.pt", b"weights"), tmp_path / "folder"
    # what `sha256sum` says of the file, and of its own output for x/a.pt
    assert identity.of_path(str(file)) == "sha256 9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    write(folder / "x/a.pt", b"weights")
    before = identity.of_path(str(folder))
    assert before == "sha256 469a30b902f7dd1c3c17b50c41de0392d2a8502e9bbdb952bda34e15eb058883"
    write(folder / ".cache/note", b"")
    write(folder / "x/.hidden", b"")
    assert identity.of_path(str(shutil.copytree(folder, tmp_path / "copy"))) == before
    os.rename(folder / "x/a.pt", folder / "x/b.pt")
    assert identity.of_path(str(folder)) != before
    os.rename(folder / "x/b.pt", folder / "x/a.pt")
    write(folder / "b.pt", b"more")
    assert identity.of_path(str(folder)) != before
    assert identity.of_path("weights/none.pt") == "nothing at weights/none.pt"


def test_what_is_kept_is_not_read_again_until_it_changes(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.pt", b"weights")
    read: list[str] = []
    digest = identity._digest
    monkeypatch.setattr(identity, "_digest", lambda path: read.append(path) or digest(path))
    before = identity.of_path(str(file))
    assert before == identity.of_path(str(file))
    assert read == [str(file)]
    assert known(kept) == {str(file): before.split()[1]}
    write(file, b"WEIGHTS")  # of the same size, and set back to the same time
    assert identity.of_path(str(file)) != before
    same = write(tmp_path / "b.pt", b"weights")
    os.replace(same, file)  # another file of the same size and times
    assert identity.of_path(str(file)) == before
    kept.write_text("damaged")
    assert identity.of_path(str(file)) == before
    assert read == [str(file)] * 4


def test_a_file_that_may_still_change_within_its_times_grain_is_not_kept(tmp_path: Path, kept: Path) -> None:
    file = tmp_path / "new.pt"
    file.write_bytes(b"just now")
    identity.of_path(str(file))
    assert known(kept) == {}


def test_many_files_are_looked_up_at_once_and_names_may_be_any_bytes(tmp_path: Path, kept: Path) -> None:
    files = {f"{number}": str(write(tmp_path / f"{number}", b"%d" % number)) for number in range(1200)}
    odd = os.fsdecode(b"\xff.txt")
    files[odd] = str(write(tmp_path / odd, b"odd"))
    before = identity.of_files(files)
    assert identity.of_files(files) == before
    with closing(sqlite3.connect(kept)) as database:
        assert database.execute("select count(*) from digests").fetchone() == (1201,)


def test_a_cache_that_cannot_be_written_is_said_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", b"")))
    assert identity.of_path(str(write(tmp_path / "a.pt", b"weights"))).startswith("sha256 ")
    assert "cannot be written" in caplog.text


def test_a_uri_whose_store_says_nothing_of_its_content_is_its_bytes(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/weights-test/a.pt", b"weights")
    local = identity.of_path(str(write(tmp_path / "folder/a.pt", b"weights")))
    assert identity.of_path("memory://weights-test/a.pt") == local
    assert identity.of_path("memory://weights-test") == identity.of_path(str(tmp_path / "folder"))
    memory.rm("/weights-test", recursive=True)
    assert identity.of_path("memory://weights-test/a.pt") == "nothing at memory://weights-test/a.pt"


ONE, TWO = b"URL,TEXT one", b"URL,TEXT two"


@pytest.mark.parametrize("spelling", ["{0}", "{0}/", "{0}/*.parquet", "link", "data", "./data/", "data/../data"])
def test_a_table_is_its_files_in_their_order_however_it_is_named(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (("a.parquet", ONE), ("b.parquet", TWO), (".hidden.parquet", b"x"), ("note.txt", b"x")):
        write(tmp_path / "data" / name, content)
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    before = identity.of_rows(str(tmp_path / "data"), ".parquet")
    assert identity.of_rows(spelling.format(tmp_path / "data"), ".parquet") == before


def test_a_table_changes_with_its_rows_alone(tmp_path: Path) -> None:
    def of(*contents: bytes, names: str = "ab") -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, content in zip(names, contents, strict=False):
            write(folder / f"{name}.parquet", content)
        return identity.of_rows(str(folder), ".parquet")

    before = of(ONE, TWO)
    assert of(ONE, TWO, names="xy") == before, "what the files are called does not matter"
    assert len({before, of(TWO, ONE), of(ONE), of(ONE, ONE), of(ONE, b"URL,TEXT tw0")}) == 5
    assert of(ONE) == identity.of_path(str(write(tmp_path / "one.parquet", ONE)))
    assert identity.of_rows("none/*.parquet", ".parquet") == "nothing at none/*.parquet"


def test_stamps_of_a_store_are_sizes_and_times(tmp_path: Path) -> None:
    file = write(tmp_path / "folder/a.pt", b"weights")
    assert storage.stamps(str(file)) == {"": (7, OLD_NS)}
    assert storage.stamps(str(tmp_path / "folder")) == {"a.pt": (7, OLD_NS)}


# ----------------------------------------------------------------------------------------------- in fingerprints


def test_every_key_that_names_weights_enters_by_content(tmp_path: Path) -> None:
    """Of a config with all of them: another content behind the same path changes what reads it, a move nothing."""
    keys = {
        "text.tower.weights": "text_tower",
        "stage_a.loss.perceptual_weights": "stage_a",
        "stage_a.loss.perceptual_heads": "stage_a",
        "stage_a.weights": "stage_a",
        "compressor.weights": "stage_b",
        "stage_b.weights": "stage_b",
        "stage_c.weights": "stage_c",
        "eval.scorers.pickscore": "scores",
        "eval.rivals.other": "scores",
    }

    def words(folder: Path) -> list[str]:
        paths = {key: folder / f"{number}.pt" for number, key in enumerate(keys)}
        first = f"text.tower={{model: ViT-H-14, weights: '{paths.pop('text.tower.weights')}'}}"
        named = [f"{key}={path}" for key, path in paths.items()]
        return [first, "stage_c.text=tower", "stage_c.model.text_width=1024", "eval=pickscore", *named]

    def all_of(folder: Path) -> dict[str, str]:
        return fingerprint(*words(folder), of="release")

    for number, key in enumerate(keys):
        write(tmp_path / f"w/{number}.pt", key.encode())
    assert load(*words(tmp_path / "w")).paths(FILES).keys() == keys.keys()
    before = all_of(tmp_path / "w")
    assert all_of(Path(shutil.copytree(tmp_path / "w", tmp_path / "moved"))) == before
    for number, (key, artifact) in enumerate(keys.items()):
        write(tmp_path / f"w/{number}.pt", key.upper().encode())
        after = all_of(tmp_path / "w")
        assert after[artifact] != before[artifact], key
        write(tmp_path / f"w/{number}.pt", key.encode())
    assert all_of(tmp_path / "w") == before


@pytest.mark.parametrize(
    ("words", "file", "artifact"),
    [
        (["eval.prompts={{mine: {0}/p.txt}}"], "p.txt", "samples_mine"),
        (["eval.distances={{inception: {0}/i.pt}}"], "i.pt", "features_training-ours"),
        (
            ["eval.distances={{inception: /none, references: {{training: {0}/r}}}}"],
            "r/a.png",
            "features_training-reference",
        ),
        (["eval.scorers={{clip_l: /none, aesthetic: {0}/x.pt}}"], "x.pt", "scores"),
        (
            ["data.recaps={{more: {{path: {0}/c}}}}", "data.captions={{more: 0.5, alt: 0.5}}"],
            "c/1.parquet",
            "text_tiny",
        ),
        (["data.captioners={{more: {{weights: {0}}}}}", "data.captions={{more: 0.5, alt: 0.5}}"], "x.bin", "text_tiny"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_so_does_all_that_lies_outside_of_the_config(
    words: list[str], file: str, artifact: str, tmp_path: Path
) -> None:
    def of(folder: str) -> str:
        load.cache_clear()
        return fingerprint(*(word.format(tmp_path / folder) for word in words), of="release")[artifact]

    write(tmp_path / "here" / file, b"a red heart")
    write(tmp_path / "moved" / file, b"a red heart")
    assert of("here") == of("moved")
    before = of("moved")
    write(tmp_path / "moved" / file, b"a RED heart")
    assert of("moved") != before


def test_interpolated_weights_enter_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.pt", b"a")
    write(tmp_path / "b.pt", b"b")
    relative = fingerprint("interpolate={first: a.pt, second: b.pt}", of="stage_c")
    assert fingerprint(f"interpolate={{first: {tmp_path}/a.pt, second: {tmp_path}/b.pt}}", of="stage_c") == relative
    assert fingerprint("interpolate={first: b.pt, second: a.pt}", of="stage_c") != relative


@pytest.mark.parametrize("imported", [True, False])
def test_stage_c_never_gets_codes_of_another_compressor(imported: bool, tmp_path: Path) -> None:
    """Whether Stage B is imported or trained: another compressor behind its path gives other codes to learn from."""
    b, x = write(tmp_path / "b.pt", b"Stage B"), write(tmp_path / "x.pt", b"a compressor")
    words = [f"stage_b.weights={b}", "stage_b.train=null"] if imported else []
    before = fingerprint(*words, f"compressor.weights={x}", of="stage_c")
    write(x, b"A COMPRESSOR")
    after = fingerprint(*words, f"compressor.weights={x}", of="stage_c")
    assert {name for name in before if before[name] != after[name]} == {"stage_b", "latents_c", "stage_c"}


def test_a_plan_says_that_the_content_changed(tmp_path: Path) -> None:
    file = write(tmp_path / "c.pt", b"weights")

    def wanted() -> Any:
        loaded = load("stage_c.train=null", f"stage_c.weights={file}")
        return fingerprints(order(table(loaded), ["stage_c"]), loaded.lookup)["stage_c"]

    first = wanted()
    write(file, b"others!")
    old, new = (found.settings["stage_c.weights"].split()[1][:12] for found in (first, wanted()))
    assert differences(first.as_dict(), wanted()) == [f"stage_c.weights: content changed, sha256 {old} -> sha256 {new}"]
    file.unlink()
    (told,) = differences(first.as_dict(), wanted())
    assert told.startswith(f"stage_c.weights: sha256 {old} -> nothing at /")


def test_weights_that_cannot_be_read_are_named_with_their_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "c.pt", b"weights")

    def broken(path: str) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(identity, "_digest", broken)
    with pytest.raises(UsageError, match=r"stage_c.weights: .*c.pt cannot be read .*Permission denied"):
        load(f"stage_c.weights={file}").lookup("stage_c")


def test_a_removal_list_counts_by_its_lines_wherever_it_lies(tmp_path: Path) -> None:
    def planned(path: Path) -> str:
        return fingerprint(f"data.removed={path}", of="metadata")["metadata"]

    file = write(tmp_path / "removed.txt", b"https://example.org/1.jpg\n")
    before = planned(file)
    assert planned(write(tmp_path / "moved/list.txt", file.read_bytes())) == before
    write(file, b"https://example.org/1.jpg\nhttps://example.org/2.jpg\n")
    assert planned(file) != before
