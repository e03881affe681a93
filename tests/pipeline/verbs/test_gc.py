"""gc: what runs at work, of the last days, or the last by a command want stays; why all else may go."""

import errno
import json
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from datasets.files import storage
from datasets.files.errors import StoreRefuses
from pipeline.__main__ import main
from pipeline.errors import ClaimLost, LeaseHeld
from pipeline.store import claims, readers
from pipeline.store.artifacts import Artifact, Fingerprint, Store
from pipeline.store.process import ProcessId
from pipeline.verbs import gc


def commit(store: Store, name: str, setting: int, *parents: Artifact) -> Artifact:
    digests = {parent.name: parent.manifest["fingerprint"] for parent in parents}
    fingerprint = Fingerprint(name, 1, {"setting": setting}, digests)
    entry = storage.publish(bytes(1000), storage.join(store.path(name, fingerprint.digest), "file"))
    facts = {"files": {"file": entry}, "timed": [], "rows": 1, "notes": {}, "created": "2026-01-01"}
    return store.commit(name, fingerprint, facts)


def record(root: Path, number: int, command: str, *wanted: Artifact, **about: Any) -> None:
    told = {
        "id": str(number),
        "outcome": "done",
        "command": f"python -m pipeline {command}",
        "started": f"2026-01-01T00:00:{number:02d}+00:00",
        "steps": {},
        "fingerprints": {artifact.name: artifact.manifest["fingerprint"] for artifact in wanted},
        **about,
    }
    storage.publish(json.dumps(told).encode(), str(root / "invocations" / f"{number}.json"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two stages made from the same images, of which the first is no longer what its command asks for."""
    store = Store(str(tmp_path))
    images = commit(store, "images", 0)
    first, second = (commit(store, "stage_c", setting, images) for setting in (1, 2))
    record(tmp_path, 1, "run conf=stage_c", first)
    record(tmp_path, 2, "run conf=stage_c --until train_c root=elsewhere", second)
    return tmp_path


def stages(root: Path) -> list[int]:
    return sorted(artifact.manifest["settings"]["setting"] for artifact in Store(str(root)).finished("stage_c"))


def collect(root: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list]:
    assert main(["gc", f"root={root}", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_dry_run_names_what_no_last_run_wants_and_deletes_nothing(root, capsys):
    told = collect(root, capsys)
    assert [item["name"] for item in told["unwanted"]] == ["stage_c"]
    assert told["unwanted"][0]["bytes"] > 1000
    assert told["deleted"] == []
    assert stages(root) == [1, 2]


def test_people_get_a_table(root, capsys):
    assert main(["gc", f"root={root}"]) == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["artifact", "fingerprint", "MiB", "why"]
    assert "last wanted by run 1 of somebody" in lines[0]
    assert last.startswith("1 folders with ")
    assert last.endswith(" bytes could go; nothing is deleted without --yes")


def test_others_are_told_that_it_is_being_deleted(root, capsys, monkeypatch):
    told: list[str] = []

    def discard(path: str, fence: claims.Fence) -> None:
        with pytest.raises(LeaseHeld) as caught:
            claims.take(str(root), fence.what, print)
        told.append(str(caught.value))

    monkeypatch.setattr(gc.deleting, "discard", discard)
    (path,) = collect(root, capsys, "--yes")["deleted"]
    assert [text.partition(" by ")[0] for text in told] == [f"{path} is being deleted"]


def test_with_yes_it_is_gone_and_the_ancestors_of_what_is_wanted_stay(root, capsys):
    (path,) = collect(root, capsys, "--yes")["deleted"]
    assert not Path(path).exists()
    assert stages(root) == [2]
    assert [artifact.name for artifact in Store(str(root)).finished("images")] == ["images"]
    assert collect(root, capsys)["unwanted"] == []


def test_without_any_record_nobody_knows_what_is_needed(root, capsys):
    """Of a root of which somebody has cleared away what looked like a log, all would go."""
    shutil.rmtree(root / "invocations")
    assert len(collect(root, capsys)["unwanted"]) == 3
    assert main(["gc", f"root={root}", "--yes"]) == 2
    assert f"root={root} has artifacts and no record of any run" in capsys.readouterr().err
    assert stages(root) == [1, 2]
    assert len(collect(root, capsys, "--yes", "days=0")["deleted"]) == 3


def test_another_command_keeps_its_own(root, capsys):
    stages = Store(str(root)).finished("stage_c")
    first = next(artifact for artifact in stages if artifact.manifest["settings"]["setting"] == 1)
    for number, command in enumerate(("run conf=stage_c seed=1", "data dedup conf=stage_c"), start=3):
        record(root, number, command, first)
    assert collect(root, capsys)["unwanted"] == []


def test_what_a_run_names_by_its_path_stays(root, capsys):
    stages = {artifact.manifest["settings"]["setting"]: artifact for artifact in Store(str(root)).finished("stage_c")}
    paths = [f"{stages[1].path}/stage_c.safetensors", "/elsewhere/stage_c.pt", f"{root}x/artifacts/stage_c/0"]
    record(root, 3, "run conf=interpolate interpolate.first=...", stages[2], paths=paths)
    assert collect(root, capsys)["unwanted"] == []


def test_a_run_is_as_old_as_its_last_sign_of_life(root, capsys):
    """Long trainings keep what they are made from, and so do their unfinished builds."""
    (images,) = Store(str(root)).finished("images")
    first, second = Store(str(root)).finished("stage_c")
    lives = {"outcome": "running", "process": vars(ProcessId.own())}
    record(root, 3, "run conf=stage_c seed=3", images, **lives)
    assert {item["path"] for item in collect(root, capsys, "days=9")["unwanted"]} == {first.path, second.path}
    elsewhere = {"outcome": "running", "process": {"host": "elsewhere", "pid": 1, "started": 0}}
    record(root, 3, "run conf=stage_c seed=3", images, **elsewhere)
    assert len(collect(root, capsys, "days=9")["unwanted"]) == 3
    lines = [{"time": time.time() - 86400 * age} for age in (40, 8)]
    storage.publish("".join(json.dumps(line) + "\n" for line in lines).encode() + b'{"ti', str(root / "ledger/3.jsonl"))
    assert len(collect(root, capsys, "days=7")["unwanted"]) == 3
    assert {item["path"] for item in collect(root, capsys, "days=9")["unwanted"]} == {first.path, second.path}


def test_runs_older_than_the_days_want_nothing(root, capsys):
    assert len(collect(root, capsys, "days=1")["unwanted"]) == 3
    for days in ("soon", "", "-1", "1.5", "²", "٣", "99999999999999999999", "9" * 5000):
        assert main(["gc", f"root={root}", f"days={days}"]) == 2
        assert f"days={days}: runs that are older want nothing; give a number from 0 to" in capsys.readouterr().err


def test_an_unfinished_build_goes_unless_a_last_run_wants_it_or_somebody_builds_it(root, capsys):
    store = Store(str(root))
    unfinished = store.path("stage_b", "0" * 16)
    storage.publish(b"state", storage.join(unfinished, "building/checkpoints/1.safetensors"))
    assert "stage_b" in {item["name"] for item in collect(root, capsys)["unwanted"]}
    with claims.hold(str(root), f"artifacts/stage_b/{'0' * 16}", print):
        assert unfinished not in collect(root, capsys, "--yes")["deleted"]
    assert Path(unfinished).exists()
    wanted = Artifact("stage_b", unfinished, {"fingerprint": "0" * 16})
    record(root, 3, "run conf=stage_b", wanted)
    assert collect(root, capsys)["unwanted"] == []


def test_images_stay_until_the_attempt_that_takes_them_over_is_finished(tmp_path, capsys):
    store = Store(str(tmp_path))
    metadata = commit(store, "metadata", 0)
    images = [commit(store, "images", attempt, metadata) for attempt in (1, 2)]
    record(tmp_path, 1, "run conf=stage_c", metadata, images[0])
    record(tmp_path, 2, "run conf=stage_c", metadata, images[1])  # whose conf now says data.attempt=2
    manifest = storage.join(images[1].path, "manifest.json")
    text = storage.read(manifest)
    storage.remove(manifest)
    assert collect(tmp_path, capsys)["unwanted"] == []
    storage.publish(text, manifest)
    assert [item["path"] for item in collect(tmp_path, capsys)["unwanted"]] == [images[0].path]


def test_what_the_build_of_a_finished_artifact_has_left_goes_alone(root, capsys):
    collect(root, capsys, "--yes")
    capsys.readouterr()
    (artifact,) = Store(str(root)).finished("stage_c")
    storage.publish(b"state", storage.join(artifact.path, "building/checkpoints/1.safetensors"))
    assert collect(root, capsys, "--yes")["deleted"] == [storage.join(artifact.path, "building")]
    assert artifact.read("file") == bytes(1000)


def days_ago(days: float) -> str:
    return (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")


def reasons(root: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    return {item["path"]: item["reason"] for item in collect(root, capsys, *words)["unwanted"]}


@pytest.fixture
def two(root: Path) -> tuple[Artifact, Artifact]:
    """The stage that its command no longer asks for, and the one that it does."""
    found = {artifact.manifest["settings"]["setting"]: artifact for artifact in Store(str(root)).finished("stage_c")}
    return found[1], found[2]


def test_what_a_run_at_work_reads_stays_whatever_came_after_it(root, capsys, two):
    """Another user's run by the same command, of another checkout, in another container."""
    elsewhere = {"host": "elsewhere", "pid": 1, "started": 0.0, "boot": "theirs", "namespace": "pid:[1]"}
    record(root, 1, "run conf=stage_c", two[0], outcome="running", process=elsewhere)
    assert two[0].path in reasons(root, capsys)
    with claims.at_work(str(root), "1"):
        assert reasons(root, capsys) == {}
        assert list(reasons(root, capsys, "days=0")) == [two[1].path]
        assert collect(root, capsys, "--yes")["deleted"] == []
    with claims.at_work(str(root), "starts", reads=[two[0].path]):  # it has no record yet
        assert reasons(root, capsys) == {}
    assert stages(root) == [1, 2]
    assert two[0].path in reasons(root, capsys)


def test_what_a_run_of_the_last_days_wanted_stays(root, capsys, two):
    record(root, 1, "run conf=stage_c", two[0], started=days_ago(6.9))
    record(root, 2, "run conf=stage_c", two[1], started=days_ago(6.8))
    assert reasons(root, capsys) == {}
    assert len(reasons(root, capsys, "days=6")) == 3
    assert reasons(root, capsys, "days=7") == {}
    record(root, 1, "run conf=stage_c", two[0], started=days_ago(7.1))
    assert list(reasons(root, capsys)) == [two[0].path]
    record(root, 1, "run conf=stage_c", two[0], started=days_ago(40), ended=days_ago(3))
    assert reasons(root, capsys) == {}


def test_another_user_or_checkout_keeps_its_own(root, capsys, two):
    record(root, 3, "run conf=stage_c", two[0], user="anna")
    assert reasons(root, capsys) == {}
    record(root, 4, "run conf=stage_c", two[1], user="anna", checkout="/a")
    assert reasons(root, capsys) == {}
    record(root, 3, "run conf=stage_c", two[0], user="anna", checkout="/a")
    assert list(reasons(root, capsys)) == [two[0].path]


def test_for_each_thing_it_says_why_it_may_go(root, capsys, two):
    store = Store(str(root))
    alone = commit(store, "stage_a", 0)
    unfinished = store.path("stage_b", "0" * 16)
    storage.publish(b"state", f"{unfinished}/building/checkpoints/1.safetensors")
    record(root, 3, "run conf=stage_b", Artifact("stage_b", unfinished, {"fingerprint": "0" * 16}), user="anna")
    record(root, 4, "run conf=stage_b", user="anna")
    age = (datetime.now(UTC) - datetime(2026, 1, 1, tzinfo=UTC)).days
    assert reasons(root, capsys) == {
        alone.path: "no run here has asked for it",
        two[
            0
        ].path: f"last wanted by run 1 of somebody, {age} days ago; the same command wants another one since run 2",
        unfinished: "an unfinished build; "
        f"last wanted by run 3 of anna, {age} days ago; the same command wants another one since run 4",
    }
    assert reasons(root, capsys, "days=1")[two[1].path] == f"last wanted by run 2 of somebody, {age} days ago"
    assert main(["gc", f"root={root}"]) == 0
    assert "no run here has asked for it" in capsys.readouterr().out


def test_a_run_that_begins_meanwhile_is_not_robbed(root, capsys, two, monkeypatch):
    """Its record comes before it looks at what is there, and we look at records after the claim: one sees the other."""
    hold = gc.claims.hold

    def slowly(root_: str, what: str, *arguments: Any, **more: Any) -> Any:
        if what != claims.ROOT:
            record(root, 9, "run conf=stage_c", two[0])
        return hold(root_, what, *arguments, **more)

    monkeypatch.setattr(gc.claims, "hold", slowly)
    assert collect(root, capsys, "--yes")["deleted"] == []
    assert stages(root) == [1, 2]
    assert main(["gc", f"root={root}", "--yes", "days=0"]) == 0


def test_what_is_left_alone_is_said_with_the_reason(root, capsys, two):
    with claims.hold(str(root), claims.artifact("stage_c", two[0].manifest["fingerprint"]), print, "built"):
        assert main(["gc", f"root={root}", "--yes"]) == 0
        assert "left alone: " in (said := capsys.readouterr().err)
        assert f"{two[0].path} is being built by" in said.replace("\n", " ")
    assert stages(root) == [1, 2]


def test_of_two_that_collect_at_once_one_is_refused(root, capsys):
    with claims.hold(str(root), claims.ROOT, print, "cleaned up"):
        assert main(["gc", f"root={root}", "--yes"]) == 4
        assert main(["gc", f"root={root}"]) == 0  # who only looks hinders nobody
    assert stages(root) == [1, 2]


def test_the_claim_says_that_it_is_being_deleted(root, capsys, two, monkeypatch):
    what = claims.artifact("stage_c", two[0].manifest["fingerprint"])
    owners = []
    discard = gc.deleting.discard
    monkeypatch.setattr(
        gc.deleting,
        "discard",
        lambda *arguments: (owners.append(claims.holder(str(root), what, print)), discard(*arguments)),
    )
    collect(root, capsys, "--yes")
    assert [owner.doing for owner in owners if owner] == ["deleted"]


def test_a_record_that_cannot_be_read_ends_it_before_anything_goes(root, capsys):
    record = str(root / "invocations/20260101-000000-abcd.json")
    for content in (b"", b"[]", b'{"id": 1'):
        storage.publish(content, record)
        assert main(["gc", f"root={root}", "--yes"]) == 2
        assert "so nobody knows what its run wants: move it away first" in capsys.readouterr().err
    storage.remove(record)
    Path(record).mkdir()
    assert main(["gc", f"root={root}", "--yes"]) == 2
    assert "it is a folder; so nobody knows what its run wants" in capsys.readouterr().err
    Path(record).rmdir()
    storage.publish(b"", str(root / "invocations/.DS_Store"))
    storage.publish(b"", str(root / "artifacts/.DS_Store"))
    assert len(collect(root, capsys, "--yes")["deleted"]) == 1
    assert stages(root) == [2]


def test_leftovers_are_not_taken_from_under_a_build_that_has_begun_anew(root, capsys, monkeypatch):
    collect(root, capsys, "--yes")
    (artifact,) = Store(str(root)).finished("stage_c")
    checkpoint = f"{artifact.path}/building/checkpoints/1.safetensors"
    storage.publish(b"state", checkpoint)
    hold = gc.claims.hold

    def slowly(root_: str, what: str, *arguments: Any, **more: Any) -> Any:
        storage.remove(f"{artifact.path}/manifest.json")  # --force, and then it was killed
        return hold(root_, what, *arguments, **more)

    monkeypatch.setattr(gc.claims, "hold", slowly)
    collect(root, capsys, "--yes")
    assert storage.exists(checkpoint)


def test_what_a_killed_deletion_has_moved_aside_goes(root, capsys):
    """And nothing that somebody else has put there."""
    aside = root / "deleted" / ("0123" * 8)
    storage.publish(bytes(10), str(aside / "receipts/00000.json"))
    storage.publish(bytes(5), str(aside / "00000.tar"))
    storage.publish(b"mine", str(root / "deleted/README.txt"))
    listed = [item for item in collect(root, capsys)["unwanted"] if item["name"] == "deleted"]
    assert [(item["path"], item["bytes"]) for item in listed] == [(str(aside), 15)]
    assert str(aside) in collect(root, capsys, "--yes")["deleted"]
    assert not aside.exists()
    assert (root / "deleted/README.txt").read_bytes() == b"mine"


def test_what_was_wanted_by_its_path_stays_after_the_root_was_moved(root, capsys, two):
    record(root, 3, "run conf=interpolate", two[1], paths=[two[0].path.replace(str(root), "/before") + "/file"])
    assert reasons(root, capsys) == {}


def test_what_is_drawn_with_or_copied_stays(root, capsys, two):
    """By who is no run, and leaves no record when it ends."""
    with readers.reading(Store(str(root)), [two[0]], print):
        assert reasons(root, capsys) == {}
        assert reasons(root, capsys, "days=0").keys() == {two[1].path}
    assert reasons(root, capsys).keys() == {two[0].path}
    storage.remove(two[0].path)
    with pytest.raises(LeaseHeld, match="was deleted a moment ago"), readers.reading(Store(str(root)), [two[0]], print):
        raise AssertionError


def test_a_root_that_may_only_be_read_is_read_all_the_same(root, two, monkeypatch):
    def refuses(content: bytes, path: str) -> None:
        raise StoreRefuses(errno.EROFS, "the file system is read-only", path)

    monkeypatch.setattr(storage, "publish", refuses)
    said: list[str] = []
    with readers.reading(Store(str(root)), [two[0]], said.append):
        assert "so gc may delete it meanwhile" in said[0]


def test_who_loses_a_claim_while_collecting_hears_it(root, capsys, monkeypatch):
    def taken(path: str, fence: Any) -> None:
        raise ClaimLost(f"{path} was taken over by anna")

    monkeypatch.setattr(gc.deleting, "discard", taken)
    assert main(["gc", f"root={root}", "--yes"]) == 4
    assert "was taken over by anna" in capsys.readouterr().err
