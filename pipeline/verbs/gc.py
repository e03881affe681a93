"""The verb `gc`: artifacts that nobody needs any more, and what builders that died have left.

Whatever a run that is at work wants stays, of any user and any checkout, and whatever one wants that was at work in the
last days (`days=`, a week). Without `days=` also what the last run by each command wants: the same words may ask for
something else once a conf has changed, so those before it count for nothing.
"""

import contextlib
import re
import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from rich.table import Table

from datasets.files import notices, storage
from pipeline.errors import LeaseHeld, UsageError
from pipeline.settings.words import Words, parse
from pipeline.store import claims, deleting, readers
from pipeline.store.artifacts import BUILDING, DIGEST, MANIFEST, Store
from pipeline.store.readers import Name, Run
from pipeline.terminal import console, out, print_json, print_table

DAYS, MOST_DAYS = 7, 36_500


def handle(words: Words) -> None:
    collect(
        storage.absolute(words.root),
        words.number("days", "runs that are older want nothing", 0, MOST_DAYS),
        words.yes,
        words.json,
    )


@dataclass(frozen=True)
class Unwanted:
    """A folder that may go: an artifact, an unfinished build, or what the build of a finished one has left."""

    name: str
    fingerprint: str
    path: str
    reason: str
    bytes: int


def collect(root: str, days: int | None, delete: bool, as_json: bool) -> None:
    """List what may go and why, and delete it if asked to.

    Raises:
        CorruptFile: something is to be deleted, but a record of a run is damaged, so nobody knows what is needed; or a
            manifest has an unknown format.
        UsageError: something is to be deleted, but there is no record of any run.
        LeaseHeld: somebody else is deleting below this root.
    """
    alone = claims.hold(root, claims.ROOT, _tell, "cleaned up") if delete else contextlib.nullcontext()
    with alone:
        if delete:
            readers.check_records(root)
        records = readers.record_files(root)
        if delete and days is None and not records and any(_names(storage.join(root, "artifacts"))):
            raise UsageError(
                f"root={root} has artifacts and no record of any run ({storage.join(root, readers.FOLDER)}), so nobody "
                "knows what is needed, and nothing is deleted; put the records back, or give days="
            )
        runs = readers.runs(root, _tell)
        found = unwanted(root, runs, keeping(runs, days))
        deleted = [item for item in found if _delete(root, item, records)] if delete else []
    if as_json:
        listed = {"unwanted": [vars(item) for item in found], "deleted": [item.path for item in deleted]}
        print_json({"root": root, **listed})
        return
    lines = Table("artifact", "fingerprint", "MiB", "why", box=None, pad_edge=False)
    for item in found:
        lines.add_row(item.name, item.fingerprint, f"{item.bytes / 2**20:.1f}", item.reason)
    if found:
        print_table(lines)
    shown = deleted if delete else found
    told = f"{len(shown)} folders with {sum(item.bytes for item in shown):,} bytes"
    out.print(f"deleted {told}" if delete else f"{told} could go; nothing is deleted without --yes")


def keeping(runs: Sequence[Run], days: int | None) -> list[Run]:
    """The runs whose wants count."""
    since = datetime.now(UTC) - timedelta(days=DAYS if days is None else days)
    last = {_command(run): run for run in runs} if days is None else {}
    return [run for run in runs if run.live or run.lived >= since or last.get(_command(run)) is run]


def _command(run: Run) -> tuple[str, ...]:
    """What was asked for, by whom and from where: verb, conf and overrides; flags and root do not count."""
    whose = (run.user, str(run.record.get("checkout", "")))
    try:
        words = parse(shlex.split(run.record["command"])[3:])
    except ValueError:  # by a version with other verbs, or of no run
        return (*whose, run.record["command"])
    return (*whose, words.verb, *words.rest, words.conf or "", *sorted(words.overrides))


def unwanted(root: str, runs: Sequence[Run], keeping: Sequence[Run]) -> list[Unwanted]:
    """Folders below a root's artifacts that no run of `keeping` wants, largest first."""
    store, folder = Store(root), storage.join(root, "artifacts")
    wants = readers.Wants(store)
    wanted = wants.of(keeping)
    askers = {name: run for run in runs for name in wants.of([run])}
    found = []
    for name, digest in _names(folder):
        path = storage.join(folder, name, digest)
        left, whole = storage.join(path, BUILDING), storage.exists(storage.join(path, MANIFEST))
        if (name, digest) not in wanted:
            reason = _reason(askers.get((name, digest)), keeping)
            reason = reason if whole else f"an unfinished build; {reason}"
            if size := _bytes(store, name, digest):  # a folder without files is nothing
                found.append(Unwanted(name, digest, path, reason, size))
        elif whole and (sizes := storage.sizes(left)):
            found.append(Unwanted(name, digest, left, "left by the build of a finished one", sum(sizes.values())))
    return sorted([*found, *_aside(root)], key=lambda item: -item.bytes)


def _aside(root: str) -> list[Unwanted]:
    """What killed deletions have moved aside."""
    folder, sizes = storage.join(root, deleting.ASIDE), Counter[str]()
    for file, size in storage.sizes(folder).items():
        sizes[file.partition("/")[0]] += size
    for name in [name for name in sizes if not re.fullmatch("[0-9a-f]{32}", name)]:
        notices.tell(notices.PassedOver(storage.join(folder, name), "none of our files"))
        del sizes[name]
    left = "left by a deletion"
    return [Unwanted(deleting.ASIDE, name, storage.join(folder, name), left, size) for name, size in sizes.items()]


def _names(folder: str) -> list[Name]:
    """All artifacts below a folder, finished or not; what else lies there is passed over."""
    strange, names = storage.children(folder)
    found = []
    for name in names:
        files, digests = storage.children(storage.join(folder, name))
        ours = [digest for digest in digests if re.fullmatch(DIGEST, digest)]
        found += [(name, digest) for digest in ours]
        strange += [f"{name}/{other}" for other in (*files, *digests) if other not in ours]
    for file in strange:
        notices.tell(notices.PassedOver(storage.join(folder, file), "none of our files"))
    return found


def _bytes(store: Store, name: str, digest: str) -> int:
    """What an artifact holds: by its manifest, where it has one, since to list its files may take long."""
    path = store.path(name, digest)
    if artifact := store.find(name, digest):
        manifest = storage.stamps(storage.join(path, MANIFEST))[""]
        return int(artifact.manifest["bytes"]) + (manifest[0] if manifest else 0)
    return sum(storage.sizes(path).values())


def _reason(asker: Run | None, keeping: Sequence[Run]) -> str:
    """Why an artifact may go whose last asker, if it had one, does not count."""
    if asker is None:
        return "no run here has asked for it"
    age = (datetime.now(UTC) - asker.lived).days
    told = f"last wanted by run {asker.id} of {asker.user}, {age} days ago"
    since = str(asker.record["started"])
    later = [run for run in keeping if str(run.record["started"]) > since and _command(run) == _command(asker)]
    return f"{told}; the same command wants another one since run {later[0].id}" if later else told


def _delete(root: str, item: Unwanted, records: Collection[str]) -> bool:
    """Delete a folder unless somebody is building there, or a run has begun that may want it."""
    if item.name == deleting.ASIDE:  # nobody's
        storage.remove(item.path)
        return True
    whole = not item.path.endswith(f"/{BUILDING}")
    try:
        with claims.hold(root, claims.artifact(item.name, item.fingerprint), _tell, deleting.DELETED) as claim:
            if new := set(readers.record_files(root)) - set(records):
                run = min(new).rpartition("/")[2].removesuffix(".json")
                raise LeaseHeld(f"{item.path}: run {run} has begun meanwhile and may want it; call gc again")
            if whole:
                deleting.discard(item.path, claim.fence)
            elif artifact := Store(root).find(item.name, item.fingerprint):
                deleting.tidy(artifact, claim.fence)
    except LeaseHeld as error:
        _tell(f"left alone: {error}")
        return False
    return True


def _tell(text: str) -> None:
    console.print(text, markup=False)
