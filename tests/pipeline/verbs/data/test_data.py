"""The verb `data`: what it tells of a root, and that it tells of damage before anything is begun in the dark."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets import left_out
from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shards import INDEX, Clock, ImageRow
from datasets.planning import plan, plan_files
from datasets.reading import captions
from pipeline.__main__ import main
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.run import invocation
from pipeline.settings import compose
from pipeline.store import removal_list
from pipeline.store.artifacts import Artifact, Fingerprint, Store
from pipeline.verbs.data import trace

MICRO = ("conf=stage_a", "scale=micro")
ROWS = 4  # of a shard; the last of each is lost, the first to a timeout and the second for good
LOST = ("timeout", "gone")
KEYS = [[f"{10 * shard + row:032x}" for row in range(ROWS)] for shard in range(2)]
Ask = Callable[..., tuple[int, Any, str]]


def _plan() -> dict[str, bytes]:
    rows = [
        {"key": key, "url": f"http://a.invalid/{key}", "caption": f"a {key}", "shard": shard, "row": row}
        for shard in range(2)
        for row, key in enumerate(KEYS[shard])
    ]
    refused = [("folder", "b.gif", "unreadable", "no picture in it")]
    named = [dict(zip(left_out.SCHEMA.names, row, strict=True)) for row in refused]
    return {
        "plan/00000.parquet": plan_files.parquet_bytes(pa.Table.from_pylist(rows, schema=plan.SCHEMA), ROWS),
        left_out.FILE: shards.table_bytes(named, left_out.SCHEMA),
    }


def _shard(path: str, number: int) -> None:
    """A shard of pictures, of which the last is lost, with its table and receipt."""
    kept = [ImageRow(row, key, "u", "c", "png", b"x") for row, key in enumerate(KEYS[number][:-1])]
    told = [{"key": row.key, "row": row.row, "status": "ok"} for row in kept]
    lost = {"key": KEYS[number][-1], "row": ROWS - 1, "status": LOST[number], "error": "Timeout: no\x1b answer"}
    contents = {
        shards.image_name(number): shards.write_images(kept),
        shards.index_name(number): shards.table_bytes([*told, lost], INDEX),
    }
    files = {name: storage.publish(content, storage.join(path, name)) for name, content in contents.items()}
    about = {"rows_in": ROWS, "rows_out": ROWS - 1, "dropped": {LOST[number]: 1}, "files": files}
    shards.publish_receipt(path, number, **about, clock=Clock())  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with a plan and a finished download of two shards, from which pictures were lost; where nothing runs."""
    loaded, store = compose.load("stage_a", ["scale=micro"]), Store(str(tmp_path / "root"))
    monkeypatch.setattr(invocation, "run", lambda *_: pytest.fail("a run was begun"))
    prints = fingerprints(order(table(loaded), ["images"]), loaded.lookup)
    facts: dict[str, Any] = {"timed": [], "metrics": {}, "created": "2026-01-01T00:00:00+00:00"}
    path = store.path("metadata", prints["metadata"].digest)
    files = {name: storage.publish(content, storage.join(path, name)) for name, content in _plan().items()}
    notes = {"read": 20, "rejected": {"url": 11, "unreadable": 1, "caption": 0}, "columns": {"link": "URL"}}
    store.commit("metadata", prints["metadata"], {**facts, "files": files, "rows": 2 * ROWS, "notes": notes})
    path = store.path("images", prints["images"].digest)
    for number in range(2):
        _shard(path, number)
    told = {"files": {}, "shards": {"": list(shards.finished(path).values())}, "rows": 2 * (ROWS - 1)}
    store.commit("images", prints["images"], {**facts, **told, "notes": {"lost": dict.fromkeys(LOST, 1)}})
    return tmp_path / "root"


@pytest.fixture
def images(root: Path) -> Artifact:
    (found,) = Store(str(root)).finished("images")
    return found


@pytest.fixture
def ask(root: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Ask `data`: its exit code, what it prints, of `--json` the document, and what it says on stderr."""

    def call(*words: str) -> tuple[int, Any, str]:
        conf = () if words[0] == "forget" else MICRO
        code = main(["data", *words, *conf, f"root={root}"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if "--json" in words and said.out else said.out, said.err

    return call


LEVELS = [
    {"level": "read", "rows": 20, "lost": {}},
    {"level": "planned", "rows": 8, "lost": {"url": 11, "unreadable": 1}},
    {"level": "kept", "rows": 6, "lost": {"gone": 1, "timeout": 1}},
]


def test_the_funnel_tells_what_is_left_after_each_step_and_what_was_lost(root, ask):
    code, told, _ = ask("funnel", "--json")
    assert (code, told) == (0, {"root": str(root), "funnel": LEVELS, "columns": {}})
    code, out, _ = ask("funnel")
    assert [line.rstrip().split(maxsplit=3) for line in out.splitlines()] == [
        ["pictures", "rows", "share", "lost to"],
        ["read", "20", "100.0%"],
        ["planned", "8", "40.0%", "url 11, unreadable 1"],
        ["kept", "6", "30.0%", "timeout 1, gone 1"],
    ]


def test_columns_that_stood_for_others_are_told(root, ask):
    """Earlier versions told those of their own, the other way round, which is passed over above."""
    (metadata,) = Store(str(root)).finished("metadata")
    told = {**metadata.manifest, "notes": {**metadata.manifest["notes"], "columns": {"URL": "link", "TEXT": "alt"}}}
    Path(metadata.path, "manifest.json").write_text(json.dumps(told))
    assert "URL from link, TEXT from alt" in ask("funnel")[1]
    assert ask("funnel", "--json")[1]["columns"] == {"URL": "link", "TEXT": "alt"}


def test_all_that_was_lost_is_named_with_its_place(root, ask):
    rows = [
        ("folder", "b.gif", "unreadable", "no picture in it"),
        ("plan", "", "url", "11 rows, of which only the number is kept"),
        ("download", f"http://a.invalid/{KEYS[0][-1]}", "timeout", "no\x1b answer"),
        ("download", f"http://a.invalid/{KEYS[1][-1]}", "gone", "no\x1b answer"),
    ]
    names = ("source", "place", "cause", "sentence")
    code, told, _ = ask("lost", "--json")
    assert (code, told["rows"]) == (0, [dict(zip(names, row, strict=True)) for row in rows])
    out = ask("lost")[1]
    assert out.splitlines()[1] == "\t".join(rows[1])
    assert "\x1b" not in out


def test_a_picture_that_a_source_serves_is_called_by_its_name(root, ask, monkeypatch):
    place = "http://webdataset.invalid/my%20x.tar?member=a%2F1.png&offset=512&size=9&sha256=0"
    (metadata,) = Store(str(root)).finished("metadata")
    for name, column in (("plan/00000.parquet", "url"), (left_out.FILE, "place")):
        file = Path(metadata.path, name)
        rows = pq.read_table(file)
        rows = rows.set_column(rows.column_names.index(column), column, pa.array([place] * rows.num_rows, pa.string()))
        pq.write_table(rows, file)
    monkeypatch.setattr(Artifact, "read", lambda self, name: Path(self.path, name).read_bytes())
    assert {row["place"] for row in ask("lost", "--json")[1]["rows"]} == {"my x.tar/a/1.png", ""}
    assert ask("lost")[1].splitlines()[0].startswith("folder\tmy x.tar/a/1.png\t")
    assert ask("trace", KEYS[0][-1], "--json")[1]["picture"] == "my x.tar/a/1.png"
    out = ask("trace", KEYS[0][-1])[1]
    assert out.startswith("picture   my x.tar/a/1.png\n")
    assert f"planned   url         {place}\n" in out


def test_a_picture_is_traced_from_its_row_of_the_plan_to_the_files_that_hold_it(images, ask):
    key = KEYS[1][0]
    code, told, _ = ask("trace", key, "--json")
    assert (code, told["key"], told["planned"]["url"]) == (0, key, f"http://a.invalid/{key}")
    assert told["download"]["status"] == "ok"
    assert told["files"] == [f"{images.path}/{shards.image_name(1)}"]
    assert told.keys() == {"key", "picture", "planned", "download", "files"}
    out = ask("trace", key)[1]
    assert f"planned   url         http://a.invalid/{key}\n" in out
    assert "download  status      ok\n" in out
    assert f"in        {images.path}/{shards.image_name(1)}\n" in out


def test_so_is_one_that_was_lost_and_one_that_is_forgotten(root, ask):
    told = ask("trace", KEYS[0][-1], "--json")[1]
    assert told["download"]["status"] == "timeout"
    assert told.keys() == {"key", "picture", "planned", "download"}
    removal_list.add(str(root), frozenset({KEYS[0][-1]}))
    assert "forgotten" not in ask("trace", KEYS[0][-1], "--json")[1]
    (request,) = removal_list.requests(str(root))
    removal_list.close(str(root), request)
    assert ask("trace", KEYS[0][-1], "--json")[1]["forgotten"] == request.when
    assert f"forgotten on {request.when}: nothing of it is stored" in ask("trace", KEYS[0][-1])[1]


def test_what_others_wrote_of_a_picture_is_told_with_it(root, images, ask, monkeypatch):
    """Captions by name, and scores."""
    key, file = KEYS[1][0], shards.tensor_name(1)
    tables = {
        "captions_dense": captions.table_bytes([(0, key), (1, KEYS[1][1])], [["one", "another"], ["not it"]]),
        "captions_short": captions.table_bytes([(1, KEYS[1][1])], [["not it"]]),
        "aesthetic": shards.table_bytes([{"key": key, "score": 5.5}, {"key": KEYS[1][1], "score": 1.0}]),
    }
    found = {"images": images}
    for name, content in tables.items():
        made = Fingerprint(name, 1, {}, dict([images.called]))
        path = Store(str(root)).path(name, made.digest)
        files = {file: storage.publish(content, f"{path}/{file}")}
        facts = {"files": files, "timed": [], "rows": 2, "created": "2026-01-01"}
        found[name] = Store(str(root)).commit(name, made, facts)
    monkeypatch.setattr(trace, "finished", lambda config, root: found)
    _, told, _ = ask("trace", key, "--json")
    assert told["captions"] == {"dense": ["one", "another"]}
    assert told["scored"] == {"key": key, "score": 5.5}
    assert told["files"] == [
        f"{images.path}/{shards.image_name(1)}",
        *(f"{found[name].path}/{file}" for name in tables),
    ]
    out = ask("trace", key)[1]
    assert "captions  dense       ['one', 'another']\n" in out
    assert "scored    score       5.5\n" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trace", "7" * 31], f"'{'7' * 31}' is no key; keys have 32 hex digits"),
        (["trace", "7" * 32], f"{'7' * 32} is not in the plan of this conf; `data funnel` says what was rejected"),
        (["funnel", "keys=x"], "keys=, urls= and from= go with `data forget`"),
        (["lost", "from=x"], "keys=, urls= and from= go with `data forget`"),
        (["verify", "urls=x"], "keys=, urls= and from= go with `data forget`"),
        (["trance"], "data does no 'trance' (did you mean trace?); it does funnel, lost, verify"),
        (["trace"], "data needs one of: funnel, lost, verify, repair, trace KEY, retry, dedup, forget"),
        (["forget", "conf=stage_a"], "data forget takes keys=, urls=, from=FILE and root=; it concerns every conf's"),
        (["forget", "seed=1"], "data forget takes keys=, urls=, from=FILE and root=; it concerns every conf's"),
        (["forget"], "data forget needs keys=KEY,KEY or urls='URL URL' or from=FILE"),
    ],
    ids=str,
)
def test_words_that_ask_for_nothing_are_refused(ask, words, told):
    code, _, said = ask(*words)
    assert code == 2
    assert said.startswith(f"error: {told}")


@pytest.mark.parametrize("verb", ["verify", "repair"])
def test_nothing_can_be_verified_or_repaired_where_nothing_is_finished(root, ask, verb):
    for artifact in Store(str(root)).finished():
        Path(artifact.path, "manifest.json").unlink()
    code, _, said = ask(verb)
    assert (code, said) == (2, f"error: root={root} has no finished artifact of this conf yet\n")


def test_what_is_whole_is_verified_and_needs_no_repair(root, ask):
    assert ask("verify")[:2] == (0, "all 7 files hold the bytes that their manifests name\n")
    assert ask("verify", "--json")[:2] == (0, {"root": str(root), "files": 7, "damaged": []})
    assert ask("repair")[:2] == (0, "nothing to repair: all files hold the bytes that their manifests name\n")
    nothing = {"root": str(root), "repaired": [], "shards": {}, "others": [], "left": [], "waiting": []}
    assert ask("repair", "--json")[:2] == (0, nothing)


@pytest.mark.parametrize("verb", ["verify", "repair"])
def test_a_damaged_manifest_is_told(root, ask, verb):
    """Its artifact counts as unfinished, so that none of its files would be looked at."""
    (metadata,) = Store(str(root)).finished("metadata")
    Path(metadata.path, "manifest.json").write_text("{")
    code, _, said = ask(verb)
    assert code == 2
    assert f"error: {metadata.path}/manifest.json is damaged" in said
    assert "put it back from a copy, or start a run of the same conf" in said


def test_a_damaged_file_of_no_shard_is_named_and_left(root, ask):
    (metadata,) = Store(str(root)).finished("metadata")
    damaged = Path(metadata.path, left_out.FILE)
    damaged.write_bytes(b"other bytes")
    code, told, said = ask("verify", "--json")
    assert (code, told) == (2, {"root": str(root), "files": 7, "damaged": [str(damaged)]})
    code, told, said = ask("repair", "--json")
    nothing = {"root": str(root), "repaired": [], "shards": {}, "others": [], "waiting": []}
    assert (code, told) == (2, {**nothing, "left": [str(damaged)]})
    told = f"error: {damaged}: damaged, and of no shard; put back a copy, or make all of metadata anew: "
    assert said.startswith(told)
    assert said.endswith(f" {' '.join(MICRO)} --force fetch --until fetch\n".replace(" scale", f" root={root} scale"))
    assert "nothing to repair" not in ask("repair")[1]


def test_what_waits_for_such_a_file_is_named_too_with_what_to_do_in_its_order(root, images, ask):
    (metadata,) = Store(str(root)).finished("metadata")
    damaged = Path(metadata.path, "plan/00000.parquet")
    damaged.write_bytes(b"other bytes")
    Path(images.path, shards.image_name(1)).unlink()
    code, told, said = ask("repair", "--json")
    nothing = {"root": str(root), "repaired": [], "shards": {}, "others": []}
    assert (code, told) == (2, {**nothing, "left": [str(damaged)], "waiting": ["images"]})
    assert "--until fetch; then go on with images, which had to wait: python -m pipeline data repair" in said


def test_a_damaged_manifest_hides_no_other_damage(root, images, ask):
    (metadata,) = Store(str(root)).finished("metadata")
    mark, picture = Path(metadata.path, "manifest.json"), Path(images.path, shards.image_name(1))
    mark.write_text("{")
    picture.unlink()
    code, told, said = ask("verify", "--json")
    assert (code, told) == (2, {"root": str(root), "files": 5, "damaged": [str(mark), str(picture)]})
    assert f"1 of 5 files are missing or damaged: {picture}; mend them: " in said
    assert f"{mark} is damaged: " in said


def test_a_repair_opens_what_is_damaged_and_says_what_it_made(root, images, ask, monkeypatch):
    """Here the run makes nothing, so what it would have made still waits afterwards."""
    for number in range(2):
        Path(images.path, shards.image_name(number)).unlink()
    begun: list[list[str]] = []
    monkeypatch.setattr(
        invocation, "run", lambda config, conf, look, planned, command: begun.append([it.step.output for it in planned])
    )
    code, told, _ = ask("repair", "--json")
    assert (code, told["repaired"], told["shards"], told["others"]) == (
        0,
        ["images"],
        {"images": [0, 1]},
        [images.path],
    )
    assert begun == [["metadata", "images"]]
    code, _, said = ask("verify")
    assert code == 2
    assert said.startswith(
        "error: the repair of images has not come to its end; go on with it: python -m pipeline data"
    )
    code, out, _ = ask("repair")
    assert (code, out) == (0, "images is whole again\n")


def test_a_repair_tells_the_shards_and_what_others_have_to_mend(images, ask, monkeypatch):
    Path(images.path, shards.image_name(1)).unlink()
    monkeypatch.setattr(invocation, "run", lambda *_: None)
    out = ask("repair")[1]
    assert out.startswith("images is whole again: shards 1 were made anew\n")
    assert f"by another conf, whose next run mends them: {images.path}\n" in out


def test_what_was_lost_for_a_passing_reason_is_asked_for_again_as_the_next_attempt(root, ask, monkeypatch):
    begun = []

    def finish(config: Any, conf: str, look: Any, planned: list[Any], command: str) -> None:
        begun.append((config.data.attempt, conf, [it.step.output for it in planned if it.state != "done"]))
        path = look.path("images", planned[-1].fingerprint.digest)
        told = {"files": {}, "rows": 7, "timed": [], "notes": {"lost": {"gone": 1}}, "created": "2026-01-02"}
        storage.publish(b"", storage.join(path, "x"))
        Store(str(root)).commit("images", planned[-1].fingerprint, told)

    monkeypatch.setattr(invocation, "run", finish)
    _, told, said = ask("retry", "--json")
    assert told == {"root": str(root), "asked": {"timeout": 1}, "gained": 1, "rows": 7, "attempt": 2}
    assert "asking again for 1 pictures (timeout 1) with data.attempt=2" in said
    assert begun == [(2, "stage_a", ["images"])]
    assert ask("retry")[1] == "1 pictures gained, 7 in all; give data.attempt=2 from now on\n"
    assert len(begun) == 1
    assert ask("retry", "data.attempt=2")[1] == "nothing to retry: no picture was lost for a reason that may pass\n"


def test_a_download_that_was_given_up_is_gone_on_with(root, images, ask, monkeypatch):
    """As the same attempt, of what its receipts tell."""
    Path(images.path, "manifest.json").unlink()

    def finish(config: Any, conf: str, look: Any, planned: list[Any], command: str) -> None:
        told = {"files": {}, "rows": 8, "timed": [], "notes": {"lost": {}}, "created": "2026-01-02"}
        Store(str(root)).commit("images", planned[-1].fingerprint, told)

    monkeypatch.setattr(invocation, "run", finish)
    code, out, said = ask("retry")
    assert (code, out) == (0, "2 pictures gained, 8 in all\n")
    assert "asking again for 1 pictures (timeout 1) with data.attempt=1" in said


@pytest.mark.parametrize("name", ["manifest.json", "forgotten.json"])
@pytest.mark.parametrize("content", [b"", b'{"rows": 1, "fi', b'{"files": {"x": 7}}'])
def test_what_was_lost_is_not_asked_for_again_while_what_says_done_is_damaged(images, ask, name, content):
    """Such a download is as good as unfinished, so a run would make its manifest anew."""
    Path(images.path, name).write_bytes(content)
    code, _, said = ask("retry")
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
    code, _, said = ask("verify")
    assert code == 2
    assert f"1 of 7 files are missing or damaged: {receipt}; mend them: python -m pipeline data repair" in said
