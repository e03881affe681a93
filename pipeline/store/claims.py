"""Claims: whoever writes below a root says so first, so that many runs may share it.

    <root>/claims/<what>/000001.json    the first claim on something, such as artifacts/stage_c/0123456789abcdef
    <root>/claims/<what>/000002.json    of whoever took over
    <root>/claims/runs/<id>.json        a run that is at work, whatever it claims at the moment

A claim is a numbered file. The highest number holds; each is created once, and then written by its owner alone: a
heartbeat every few seconds, and at last that it is released. Who finds the highest one released, or its owner dead,
creates the next number, which succeeds for one of all who try; it deletes the lower ones, and never the highest. Death
is proven by the owner's process being gone from this very kernel and PID namespace, else by a heartbeat that does not
move for a minute in which the store answers.

A holder that was taken for dead may wake up at any time. So it looks whether it still holds (the fence) before it says
of anything that it is done, and the last word, an artifact's manifest, is put beside its place first and then moved
there: whoever takes over removes what is put there before it looks at what is done, and the move fails.

What that rests on, and where it holds:

- Local disks, Lustre, CephFS and the like: numbers are created by a hard link and moves are renames. Exact.
- NFS: the same, decided by its server. Exact. Mounted with `nocto`, a holder may see a loss as late as its client looks
  at a folder again (`acdirmax`, 60 s); but a commit looks right after a write to that folder, which a client notices.
- Without hard links (FAT, some network and user-space file systems): numbers are created by an exclusive open. Exact.
- S3 with conditional writes (Amazon, MinIO, R2, Ceph): a number is put on the condition that it is not there. A move is
  a copy, which fails once what it copies is gone. Exact, but for a copy that the store is busy with while its source is
  removed: milliseconds, however long a client sleeps.
- S3 without them, Google's and Azure's stores: `storage.create` looks, puts, waits and looks again. Of two that begin
  within the same moment one steps back, as long as no request takes longer than `conditional.SETTLE_S`; should one
  do so, the other notices at its next heartbeat or commit.

Everywhere, a receipt or checkpoint marker is only preceded by a look at the fence: what comes between the two may leave
one by a holder that has just lost. It names the sizes and hashes of its files, which are looked at before it counts.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Protocol

from datasets.files import json_files, storage
from pipeline.errors import ClaimLost, LeaseHeld
from pipeline.store.process import ProcessId, user_name

log = logging.getLogger(__name__)

FOLDER, RUNS, ROOT = "claims", "runs", "root"  # the last: all of it
OLD_LEASE = "building/lease.json"  # of versions before claims, in the artifact's own folder
STAGED = "building/commit-"  # and the token of a claim: a manifest on its way
Notify = Callable[[str], None]


class Clock(Protocol):
    """What of `time` is needed."""

    def sleep(self, seconds: float, /) -> None: ...


@dataclass(frozen=True)
class Pace:
    """How often a holder shows that it lives, and how long it must be silent to be taken for dead, in seconds."""

    heartbeat_s: float = 5.0
    silence_s: float = 60.0
    look_s: float = 1.0  # between two looks at a silent one
    clock: Clock = time


PACE = Pace()
TRIES = 100  # to create a number; another one's would be seen at the next look, so only what is no file lasts longer


@dataclass(frozen=True)
class Owner:
    """Whose a claim is, and what its owner said of itself last."""

    token: str
    process: ProcessId
    user: str
    doing: str = "built"
    heartbeat: int = 0
    released: bool = False
    reads: Sequence[str] = ()  # what is used, where no run's record tells

    @classmethod
    def own(cls, doing: str, reads: Sequence[str] = ()) -> "Owner":
        """This process, with a token of its own for each claim."""
        return cls(uuid.uuid4().hex, ProcessId.own(), user_name(), doing, reads=list(reads))

    @classmethod
    def of(cls, content: bytes) -> "Owner":
        """What a file says; what cannot be read may be somebody's who is writing it, and nobody's in the end."""
        try:
            told = json.loads(content)
            said = {field.name: told[field.name] for field in fields(cls) if field.name in told}  # later ones say more
            owner = cls(**{**said, "process": ProcessId.of(told)})
            json_files.require(vars(owner), str, "token", "user", "doing")
            json_files.require(vars(owner), int, "heartbeat", "released")
            json_files.require(vars(owner), Sequence[str], "reads")
            return owner
        except (ValueError, TypeError, AttributeError, RecursionError):
            return cls(hashlib.sha256(content).hexdigest(), ProcessId.of({}), "somebody")

    def content(self) -> bytes:
        """What `of` reads."""
        about = asdict(self)
        return json.dumps({**about.pop("process"), **about}).encode()

    def __str__(self) -> str:
        return f"{self.user} on {self.process.host} (pid {self.process.pid})"


@dataclass(frozen=True)
class Fence:
    """Stands between a holder's workers, to whom it is pickled, and what they make visible: called right before."""

    root: str
    what: str
    number: int
    token: str

    def __call__(self) -> None:
        """Ask the store whether the claim still holds.

        Raises:
            ClaimLost: it does not; the message says who has taken over.
        """
        number, owner = _newest(_folder(self.root, self.what))
        if owner and (number, owner.token) == (self.number, self.token):
            return
        who = f"was taken over by {owner}, who heard nothing from this run" if owner else "has lost its claim by hand"
        raise ClaimLost(f"{_place(self.root, self.what)} {who}: this run ends here, and what is done stays done")


class Claim:
    """A claim that this process has made, on `what` below a root."""

    def __init__(self, root: str, what: str, number: int, owner: Owner):
        self.fence = Fence(root, what, number, owner.token)
        self.lost: ClaimLost | None = None
        self._owner, self._beats = owner, itertools.count(1)
        self._place = _place(root, what)
        self._file = _path(_folder(root, what), number)

    def beat(self) -> None:
        """Show that we live. Raises ClaimLost where somebody has taken us for dead, and leaves what is theirs alone."""
        self._look()
        storage.publish(replace(self._owner, heartbeat=next(self._beats)).content(), self._file)

    def raise_if_lost(self) -> None:
        """Raises ClaimLost where a heartbeat has noticed a loss; asks nobody."""
        if self.lost:
            raise self.lost

    def publish(self, content: bytes, path: str, check: Callable[[], None] = lambda: None) -> None:
        """Put `content` at `path`, as the last word on what is claimed; not if the claim is lost at that very moment.

        `check` raises where it is not true: an earlier holder may have woken up and moved the folder aside.

        Raises:
            ClaimLost: nothing is there, or what the one who has taken over put there.
        """
        staged = storage.join(self._place, f"{STAGED}{self._owner.token}.json")
        storage.publish(content, staged)
        check()  # not before: whoever moves the folder aside from here on takes along what was just put there
        self.beat()
        self._look()  # after a write in the same folder, which makes a client of NFS ask its server
        try:
            storage.move(staged, path)
        except FileNotFoundError:
            if not storage.exists(path) or storage.read(path) != content:  # else it was moved, and the answer is lost
                self._look()
                raise

    def release(self) -> None:
        """Say that whoever comes next need not wait; a store that fails to hear it only makes them do so."""
        try:
            self._look()
            storage.publish(replace(self._owner, heartbeat=next(self._beats), released=True).content(), self._file)
        except ClaimLost:
            log.warning("the claim on %s was lost before its end", self._place)
        except OSError as error:
            log.warning("the claim on %s was not released: %s", self._place, error)

    def _look(self) -> None:
        try:
            self.fence()
        except ClaimLost as error:
            self.lost = error
            raise


@contextlib.contextmanager
def hold(root: str, what: str, notify: Notify, doing: str = "built", pace: Pace = PACE) -> Iterator[Claim]:
    """Hold the claim on `what` during the block.

    Args:
        root: storage root, a local path or a URI.
        what: `artifact(...)`, or `ROOT`.
        notify: told when one waits for a sign of life, and of whom one takes over from.
        doing: what is done to it meanwhile, as a participle: others are told so.
        pace: of heartbeats and waiting.

    Raises:
        LeaseHeld: a live owner has it.
    """
    claim = take(root, what, notify, doing, pace)
    try:
        with _beating(claim.beat, claim.fence.what, pace.heartbeat_s):
            yield claim
    finally:
        claim.release()


def take(root: str, what: str, notify: Notify, doing: str = "built", pace: Pace = PACE) -> Claim:
    """Make a claim; whoever does so by itself must let it beat and release it. Raises LeaseHeld."""
    folder, ours = _folder(root, what), Owner.own(doing)
    if what != ROOT:
        _respect_old_lease(root, what, notify, pace)
    for _ in range(TRIES):
        newest, owner = _newest(folder)
        if owner:
            _require_free(_place(root, what), _path(folder, newest), owner, notify, pace)
        number = newest + 1
        if storage.create(ours.content(), _path(folder, number)):
            if max(_numbers(folder), default=0) == number:
                break
            storage.remove(_path(folder, number))  # taken and let go since we looked, and its number deleted
    else:
        raise LeaseHeld(f"{_path(folder, number)}: something is there that is no claim; move it away")
    claim = Claim(root, what, number, ours)
    try:
        for lower in _numbers(folder):
            if lower < number:
                storage.remove(_path(folder, lower))
        if what != ROOT:
            _disarm(_place(root, what), claim.fence)
    except BaseException:
        claim.release()
        raise
    return claim


@contextlib.contextmanager
def at_work(root: str, run: str, pace: Pace = PACE, reads: Sequence[str] = ()) -> Iterator[None]:
    """Show during the block that a run is at work, so that nobody deletes what it reads.

    A run's record tells what that is; who leaves none names the artifacts by their paths in `reads`.
    """
    path, owner, beats = storage.join(root, FOLDER, RUNS, f"{run}.json"), Owner.own("used", reads), itertools.count()

    def beat() -> None:
        storage.publish(replace(owner, heartbeat=next(beats)).content(), path)

    beat()
    try:
        with _beating(beat, f"run {run}", pace.heartbeat_s):
            yield
    finally:
        with contextlib.suppress(OSError):  # it falls silent, which is as good
            storage.remove(path)


def runs_at_work(root: str, notify: Notify, pace: Pace = PACE) -> dict[str, Owner]:
    """The runs that live, by id, also those seen just now on other machines; what dead ones have left is removed."""
    folder = storage.join(root, FOLDER, RUNS)
    found = filter(None, (re.fullmatch(r"([^./][^/]*)\.json", name) for name in storage.listing(folder)))
    runs = {run[1]: storage.join(folder, run[0]) for run in found}
    owners = {path: owner for path in runs.values() if (owner := _read(path))}
    fresh = {path for path in owners if not owners[path].process.is_local and storage.age_s(path) < pace.silence_s}
    alive = fresh | _living({path: owner for path, owner in owners.items() if path not in fresh}, notify, pace)
    for path in owners.keys() - alive:
        storage.remove(path)
    return {run: owners[path] for run, path in runs.items() if path in alive}


def artifact(name: str, fingerprint: str) -> str:
    """What the claim on an artifact is on."""
    return f"artifacts/{name}/{fingerprint}"


def holder(root: str, what: str, notify: Notify, pace: Pace = PACE) -> Owner | None:
    """The live owner of the claim on something, if it has one."""
    folder = _folder(root, what)
    number, owner = _newest(folder)
    return owner if owner and not owner.released and _living({_path(folder, number): owner}, notify, pace) else None


def old_leases(root: str) -> list[str]:
    """What below a root's artifacts somebody of a version before claims is at work on, or was when he died."""
    names = [f"artifacts/{name}" for name in storage.children(storage.join(root, "artifacts"))[1]]
    places = [f"{name}/{digest}" for name in names for digest in storage.children(storage.join(root, name))[1]]
    return [place for place in places if storage.exists(storage.join(root, place, OLD_LEASE))]


def _require_free(place: str, path: str, owner: Owner, notify: Notify, pace: Pace) -> None:
    """Raise LeaseHeld unless the claim in a file is released, or its owner is dead."""
    if owner.released:
        return
    if _living({path: owner}, notify, pace):
        raise LeaseHeld(f"{place} is being {owner.doing} by {owner}; wait for that run, or stop it")
    notify(f"taking over from pid {owner.process.pid} on {owner.process.host}, which died")


def _respect_old_lease(root: str, what: str, notify: Notify, pace: Pace) -> None:
    place = _place(root, what)
    lease = storage.join(place, OLD_LEASE)
    if owner := _read(lease):
        _require_free(place, lease, owner, notify, pace)
        storage.remove(lease)


def _living(owners: Mapping[str, Owner], notify: Notify, pace: Pace) -> set[str]:
    """Of the owners of claims, by file, those that are not proven dead; who cannot be asked is watched for a while."""
    near = {path for path, owner in owners.items() if owner.process.is_exact and owner.process.is_local}
    alive = {path for path in near if not owners[path].process.is_dead()}
    watched = {path: owner for path, owner in owners.items() if path not in near}
    for owner in watched.values():
        notify(f"watching the claim of {owner} for {pace.silence_s:.0f} s for a sign of life")
    looks = itertools.count()  # that the store answers: while it is away, nobody can show that they live
    while watched and next(looks) * pace.look_s < pace.silence_s:
        pace.clock.sleep(pace.look_s)
        now = {path: _read(path) for path in watched}
        alive |= {path for path, owner in now.items() if owner and not owner.released and owner != watched[path]}
        watched = {path: owner for path, owner in watched.items() if now[path] == owner}
    return alive


def _disarm(place: str, fence: Fence) -> None:
    """Take from an earlier holder that may wake up what it has put beside its place and not yet moved there."""
    building, _, start = STAGED.rpartition("/")
    folder = storage.join(place, building)
    for name in storage.listing(folder):
        if name.startswith(start):
            storage.remove(storage.join(folder, name))
    storage.sweep(place, fence)


@contextlib.contextmanager
def _beating(beat: Callable[[], None], what: str, every_s: float) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(beat, what, lambda: stop.wait(every_s)), name="claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _beat(beat: Callable[[], None], what: str, pause: Callable[[], bool]) -> None:
    """Beat after each pause until one says that it is the last, or the claim is lost."""
    while not pause():
        try:
            beat()
        except ClaimLost as error:
            log.warning("%s", error)
            return
        except Exception as error:  # the next one may get through, and a store may raise anything
            log.warning("a heartbeat of %s failed: %s", what, error)


def _folder(root: str, what: str) -> str:
    return storage.join(root, FOLDER, what)


def _place(root: str, what: str) -> str:
    """Where that lies which a claim is on."""
    return root if what == ROOT else storage.join(root, what)


def _path(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:06d}.json")


def _numbers(folder: str) -> list[int]:
    matches = (re.fullmatch(r"(\d{6,})\.json", name) for name in storage.listing(folder))
    return [int(found[1]) for found in matches if found]


def _newest(folder: str) -> tuple[int, Owner | None]:
    """The highest number and whose it is; 0 where there is none."""
    while number := max(_numbers(folder), default=0):
        if owner := _read(_path(folder, number)):  # else there is a higher one by now
            return number, owner
    return 0, None


def _read(path: str) -> Owner | None:
    """The owner of a claim as it stands; None where it has been deleted."""
    try:
        return Owner.of(storage.read(path))
    except FileNotFoundError:
        return None
