"""Claims: who may build, what a loser may still do, and that of all who take over at once one does."""

import itertools
import json
import os
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datasets.files import storage
from pipeline.errors import ClaimLost, LeaseHeld, exit_code
from pipeline.store import claims
from pipeline.store.claims import Claim, Owner, Pace
from pipeline.store.process import ProcessId
from tests.pipeline.store.claiming import PRINT, WHAT, Time, file_of, hold, told


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path) -> str:
    """A local root, and one behind a URI that fsspec serves."""
    return str(tmp_path) if request.param == "local" else f"memory://claims-{tmp_path.name}"


def elsewhere(root: str, number: int = 1, **about: Any) -> Owner:
    """The owner of a claim, whose process nobody here can look at."""
    owner = Owner("their token", ProcessId("elsewhere", 7, 0.0, "their boot", "pid:[1]"), "anna", **about)
    storage.publish(owner.content(), file_of(root, number))
    return owner


def numbers(root: str) -> list[str]:
    return storage.listing(f"{root}/claims/{WHAT}")


def take(root: str) -> Claim:
    return claims.take(root, WHAT, print, pace=Pace(clock=Time()))


def test_who_comes_after_a_release_need_not_wait(root):
    for number in (1, 2, 3):
        with hold(root, Time()) as claim:
            assert claim.fence.number == number
            claim.fence()
        assert numbers(root) == [f"{number:06d}.json"]
        assert told(root, number)["released"]


def test_the_owner_is_named_and_a_live_one_respected(root):
    with (
        hold(root),
        pytest.raises(LeaseHeld, match=rf"stage_a/{PRINT.digest} is being built by .*\(pid {os.getpid()}\)"),
    ):
        hold(root, Time()).__enter__()
    assert numbers(root) == ["000001.json"]


def test_a_silent_owner_elsewhere_is_replaced_after_a_minute_and_not_before(root):
    owner, said, clock = elsewhere(root), list[str](), Time()
    with hold(root, clock, said.append):
        assert 60 <= clock.now < 62
        assert told(root, 2)["token"] != owner.token
    assert "on elsewhere (pid 7) for 60 s" in said[0]
    assert said[1] == "taking over from pid 7 on elsewhere, which died"
    assert numbers(root) == ["000002.json"]


@pytest.mark.parametrize("at", [1, 30, 59])
def test_an_owner_elsewhere_that_moves_within_the_minute_is_alive(root, at):
    owner = elsewhere(root, heartbeat=4)
    clock = Time(lambda now: now == at and storage.publish(replace(owner, heartbeat=5).content(), file_of(root, 1)))
    with pytest.raises(LeaseHeld, match="anna on elsewhere"):
        hold(root, clock).__enter__()
    assert clock.now == at
    assert numbers(root) == ["000001.json"]


@pytest.mark.parametrize("away_s", [10, 60, 600])
def test_an_owner_elsewhere_is_not_dead_because_the_store_was_away(root, monkeypatch, away_s):
    """It could not beat meanwhile either, and does so some seconds after the store has come back."""
    owner, clock, back = elsewhere(root, heartbeat=4), Time(), list[float]()
    read = storage.read

    def after_a_while(path: str) -> bytes:
        if clock.now >= 5 and not back:
            clock.now += away_s
            back.append(clock.now)
        return read(path)

    def happens(now: float) -> None:
        if back and now >= back[0] + 10:
            storage.publish(replace(owner, heartbeat=5).content(), file_of(root, 1))

    monkeypatch.setattr(storage, "read", after_a_while)
    clock.happens = happens
    with pytest.raises(LeaseHeld, match="anna on elsewhere"):
        hold(root, clock).__enter__()
    assert numbers(root) == ["000001.json"]


def test_one_that_releases_while_it_is_watched_is_not_waited_for(root):
    owner = elsewhere(root)
    clock = Time(lambda now: now == 3 and storage.publish(replace(owner, released=True).content(), file_of(root, 1)))
    with hold(root, clock):
        assert clock.now == 3


def test_who_holds_now_is_looked_at_before_a_take_over(root):
    """Somebody else takes over in the last second: they live, whatever was seen of the one before them."""
    elsewhere(root)

    def happens(now: float) -> None:
        if now == 60:
            elsewhere(root, 2, heartbeat=1)
            storage.remove(file_of(root, 1))
        if now == 65:
            elsewhere(root, 2, heartbeat=2)

    with pytest.raises(LeaseHeld):
        hold(root, Time(happens)).__enter__()
    assert told(root, 2)["token"] == "their token"


def test_a_number_that_was_free_only_since_higher_ones_came_and_went_is_given_back(root, monkeypatch):
    """We see 1, then sleep; others take 2 and 3, and delete 1 and 2. Our 2 can be created, and must not hold."""
    elsewhere(root, 1, released=True)
    create = storage.create

    def slowly(content: bytes, path: str) -> bool:
        if path == file_of(root, 2):
            elsewhere(root, 3)
            storage.remove(file_of(root, 1))
        return create(content, path)

    monkeypatch.setattr(storage, "create", slowly)
    beats = itertools.count(1)
    with pytest.raises(LeaseHeld):
        hold(root, Time(lambda now: elsewhere(root, 3, heartbeat=next(beats)))).__enter__()
    assert numbers(root) == ["000003.json"]


def test_a_torn_claim_is_somebodys_until_it_is_silent(root):
    storage.publish(b"{", file_of(root, 1))
    clock = Time(lambda now: now == 1 and elsewhere(root))
    with pytest.raises(LeaseHeld):
        hold(root, clock).__enter__()
    for content in (b"", b"[]", b"null", b'{"process": 1}', b"[" * 100_000):
        storage.publish(content, file_of(root, 1))
        with hold(root, clock := Time()):
            assert clock.now >= 60
        storage.remove(f"{root}/claims")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")], ids=["folder", "link"])
def test_what_is_no_file_where_a_claim_would_be_is_told_and_not_tried_for_ever(tmp_path, make):
    file = Path(file_of(str(tmp_path), 1))
    file.parent.mkdir(parents=True)
    make(file)
    with pytest.raises(LeaseHeld, match=r"000001\.json: something is there that is no claim; move it away"):
        take(str(tmp_path))


def test_what_later_versions_tell_is_passed_over(root):
    storage.publish(
        json.dumps({**json.loads(elsewhere(root, released=True).content()), "new": 1}).encode(), file_of(root, 1)
    )
    with hold(root, clock := Time()):
        assert clock.now == 0


def old_lease(root: str, **about: Any) -> str:
    """As versions before claims wrote it, on this very host."""
    own = ProcessId.own()
    told = {"host": own.host, "pid": 2**22 - 1, "started": 0.0, "user": "bert", "token": "t", "heartbeat": 3, **about}
    storage.publish(json.dumps(told).encode(), f"{root}/{WHAT}/building/lease.json")
    return f"{root}/{WHAT}/building/lease.json"


def test_a_lease_of_an_earlier_version_is_respected_while_it_moves(root):
    lease = old_lease(root)
    clock = Time(lambda now: now == 5 and old_lease(root, heartbeat=4))
    with pytest.raises(LeaseHeld, match="is being built by bert"):
        hold(root, clock).__enter__()
    assert storage.exists(lease)
    assert claims.old_leases(root) == [WHAT]


def test_a_lease_of_an_earlier_version_that_is_silent_goes(root):
    """Its process number is of nobody here; but of which container it was, it does not say."""
    lease = old_lease(root)
    with hold(root, clock := Time()):
        assert clock.now >= 60
        assert not storage.exists(lease)
    assert claims.old_leases(root) == []


def test_a_heartbeat_moves_on_and_on(tmp_path):
    root = str(tmp_path)
    seen, deadline = set[int](), time.monotonic() + 60
    with hold(root, heartbeat_s=0.01):
        while len(seen) < 4:
            assert time.monotonic() < deadline, "no heartbeat is ever written"
            seen.add(told(root, 1)["heartbeat"])
    assert max(seen) >= 3
    assert told(root, 1)["released"], "a heartbeat came after the end"


def test_a_store_that_fails_now_and_then_does_not_end_the_heartbeats(caplog):
    """Three failures of any kind, a beat, then the last pause."""
    outcomes: list[Exception | None] = [OSError("away"), ValueError("odd"), OSError("away"), None]
    beats = iter(outcomes)

    def beat() -> None:
        if error := next(beats):
            raise error

    pauses = iter([False] * len(outcomes) + [True])
    claims._beat(beat, WHAT, lambda: next(pauses))
    assert next(beats, "none is left") == "none is left"
    assert caplog.text.count(f"a heartbeat of {WHAT} failed") == 3


def test_a_loss_ends_the_heartbeats(caplog):
    def beat() -> None:
        raise ClaimLost("gone")

    claims._beat(beat, WHAT, iter([False]).__next__)  # a second pause would fail
    assert "gone" in caplog.text


def test_a_holder_that_lost_stops_at_its_next_heartbeat_and_touches_nothing_of_the_other(root):
    claim = take(root)
    claim.beat()
    claim.raise_if_lost()
    theirs = elsewhere(root, 2)
    before = storage.read(file_of(root, 1))
    with pytest.raises(ClaimLost, match=rf"{WHAT} was taken over by anna on elsewhere \(pid 7\)") as caught:
        claim.beat()
    assert exit_code(caught.value) == 4
    with pytest.raises(ClaimLost):
        claim.raise_if_lost()
    claim.release()
    assert storage.read(file_of(root, 2)) == theirs.content()
    assert storage.read(file_of(root, 1)) == before


def test_a_claim_that_somebody_deleted_and_made_anew_is_lost(root):
    """The number is ours again, the token is not."""
    claim = take(root)
    storage.remove(f"{root}/claims")
    with pytest.raises(ClaimLost, match="lost its claim by hand"):
        claim.fence()
    theirs = elsewhere(root, 1)
    for touch in (claim.fence, claim.beat):
        with pytest.raises(ClaimLost):
            touch()
    claim.release()
    assert storage.read(file_of(root, 1)) == theirs.content()


def test_a_fence_goes_with_the_workers(root):
    claim = take(root)
    fence = pickle.loads(pickle.dumps(claim.fence))
    fence()
    elsewhere(root, 2)
    with pytest.raises(ClaimLost) as caught:
        fence()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_last_word_is_put_in_one_step(root):
    claim = take(root)
    claim.publish(b"manifest", f"{root}/{WHAT}/manifest.json")
    assert storage.listing(f"{root}/{WHAT}") == ["manifest.json"]
    assert told(root, 1)["heartbeat"] == 1


def test_a_loser_that_had_looked_before_cannot_have_the_last_word(root, monkeypatch):
    """It stands still between its last look and the move; meanwhile another one takes over."""
    claim, move = take(root), storage.move

    def after_a_while(source: str, target: str) -> None:
        storage.publish(replace(claim._owner, released=True).content(), file_of(root, 1))  # as if it were dead
        take(root)
        move(source, target)

    monkeypatch.setattr(storage, "move", after_a_while)
    with pytest.raises(ClaimLost):
        claim.publish(b"manifest", f"{root}/{WHAT}/manifest.json")
    assert not storage.exists(f"{root}/{WHAT}/manifest.json")


def test_a_last_word_whose_answer_was_lost_counts(root, monkeypatch):
    claim, move = take(root), storage.move

    def twice(source: str, target: str) -> None:
        move(source, target)
        move(source, target)

    monkeypatch.setattr(storage, "move", twice)
    claim.publish(b"manifest", f"{root}/{WHAT}/manifest.json")
    monkeypatch.setattr(storage, "move", lambda source, target: move(f"{source}.none", target))
    with pytest.raises(FileNotFoundError):  # it was deleted by hand: no loss, so another attempt is worth it
        claim.publish(b"another", f"{root}/{WHAT}/manifest.json")


def test_who_takes_over_removes_what_the_one_before_left_half_done(tmp_path):
    for name in ("building/commit-0.json", "building/state.json", ".00000.tar.0.tmp"):
        storage.publish(b"x", f"{tmp_path}/{WHAT}/{name}")
    storage.publish(b"x", f"{tmp_path}/artifacts/other/.file.tmp")
    take(str(tmp_path))
    left = {path.name for path in (tmp_path / "artifacts").rglob("*") if path.is_file()}
    assert left == {"state.json", ".file.tmp"}


def test_all_of_a_root_is_claimed_without_a_touch_of_it(tmp_path):
    storage.publish(b"x", f"{tmp_path}/{WHAT}/.file.tmp")
    with claims.hold(str(tmp_path), claims.ROOT, print, "cleaned up"):
        with pytest.raises(LeaseHeld, match=f"{tmp_path} is being cleaned up by"):
            claims.take(str(tmp_path), claims.ROOT, print)
        assert claims.holder(str(tmp_path), claims.ROOT, print) is not None
    assert claims.holder(str(tmp_path), claims.ROOT, print) is None
    assert (tmp_path / WHAT / ".file.tmp").exists()


def test_a_failed_take_over_is_let_go(tmp_path, monkeypatch):
    def fails(place: str, fence: object) -> None:
        raise OSError("away")

    monkeypatch.setattr(claims, "_disarm", fails)
    with pytest.raises(OSError, match="away"):
        take(str(tmp_path))
    monkeypatch.undo()
    with hold(str(tmp_path), Time()) as claim:
        assert claim.fence.number == 2


def test_a_claim_that_cannot_be_released_ends_no_run(tmp_path, monkeypatch, caplog):
    claim = take(str(tmp_path))

    def fails(*_: Any) -> None:
        raise OSError("away")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish", fails)
        claim.release()
    assert "was not released: away" in caplog.text


def test_runs_at_work_are_told_from_those_that_died(root, monkeypatch):
    with claims.at_work(root, "here"):
        live = Owner("t", ProcessId("elsewhere", 7, 0.0, "their boot", "pid:[1]"), "anna")
        for run in ("moves", "silent", "fresh"):
            storage.publish(live.content(), f"{root}/claims/runs/{run}.json")
        monkeypatch.setattr(storage, "age_s", lambda path: 1.0 if path.endswith("fresh.json") else 61.0)
        beat = replace(live, heartbeat=1).content()
        clock = Time(lambda now: now == 9 and storage.publish(beat, f"{root}/claims/runs/moves.json"))
        said: list[str] = []
        assert claims.runs_at_work(root, said.append, Pace(clock=clock)).keys() == {"here", "moves", "fresh"}
        assert clock.now == 60  # one minute for both, and none for the one that was seen just now
        assert len(said) == 2
        assert storage.listing(f"{root}/claims/runs") == ["fresh.json", "here.json", "moves.json"]
    assert storage.listing(f"{root}/claims/runs") == ["fresh.json", "moves.json"]


def test_who_reads_tells_what(tmp_path):
    with claims.at_work(str(tmp_path), "reader-1", reads=["/root/artifacts/x/0"]):
        (owner,) = claims.runs_at_work(str(tmp_path), print).values()
    assert (owner.doing, owner.reads) == ("used", ["/root/artifacts/x/0"])


def test_nobody_waits_for_a_run_of_another_machine_that_was_seen_just_now(tmp_path):
    root = str(tmp_path)
    live = Owner("t", ProcessId("elsewhere", 7, 0.0, "their boot", "pid:[1]"), "anna")
    storage.publish(live.content(), f"{root}/claims/runs/1.json")
    clock = Time(lambda now: None)
    assert claims.runs_at_work(root, print, Pace(clock=clock)).keys() == {"1"}
    assert clock.now == 0


def test_a_run_at_work_goes_on_showing_it(tmp_path):
    file, deadline = tmp_path / "claims/runs/1.json", time.monotonic() + 60
    with claims.at_work(str(tmp_path), "1", Pace(heartbeat_s=0.01)):
        file.unlink()  # taken for dead
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
