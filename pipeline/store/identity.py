"""What lies at a path, as fingerprints know it: its content, wherever it lies and whatever it is called.

    a local file     `sha256 <hex>` of its bytes
    several files    `sha256 <hex>` of the list of theirs: with their names where names mean something (a folder of
                     weights, of pictures), in their order alone where they do not (the Parquet files of a table)
    a URI            as above, with what its store says of an object's content (its ETag) in place of the bytes'
                     sha256: `version <hex>`; without one the bytes are read
    nothing          `nothing at <path>`
    packages         the versions of those that bring or make it, or the sha256 of a file that one brings

Local files are read once: their sums are kept in the user's cache folder for as long as size, inode and times stay the
same, so that a plan need not read gigabytes each time. What is long in reading is told.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets.files import storage
from datasets.files.inputs import Bundled, Input, Made, Named, Rows, Whole
from datasets.files.retrying import persistently
from pipeline.environment import home_folder

SHA256, VERSION = "sha256", "version"  # what an identity is of: the bytes, or what a store says of them
LARGE = 1 << 30  # bytes: reading them takes seconds, so it is said
TELL_EVERY_S = 10.0
SETTLED_NS = 2 * 10**9  # file systems' clocks are coarse: a younger file may change again and keep its time
LOOK_UP = 500  # files a query

log = logging.getLogger(__name__)


def of(found: Input) -> str | dict[str, str]:
    """The identity of an input.

    Raises:
        OSError: it cannot be read, or the store cannot be reached.
    """
    match found:
        case Whole(path):
            return of_path(path)
        case Rows(path, suffix):
            return of_rows(path, suffix)
        case Named(files):
            return of_files(files)
        case Made(packages):
            return {package: importlib.metadata.version(package) for package in packages}
        case Bundled(package, file):
            return of_path(_bundled(package, file))


def of_path(path: str) -> str:
    """The identity of a file, or of a folder's visible files by name.

    Raises:
        OSError: it cannot be read, or the store cannot be reached.
    """
    if not storage.exists(path):
        return f"nothing at {path}"
    files = _files(path)
    return _one(_digests(list(files.values()))[files[""]]) if "" in files else of_files(files)


def _files(path: str) -> dict[str, str]:
    """A file, named "", or a folder's visible files by name."""
    path = storage.absolute(path)
    if storage.is_file(path):
        return {"": path}
    visible = (name for name in storage.listing(path) if not any(part[0] == "." for part in name.split("/")))
    return {name: storage.join(path, name) for name in visible}


def of_rows(path: str, suffix: str) -> str:
    """The identity of a table in one or more files: those that a file, folder, pattern or URI stands for.

    Their names and where they lie do not count, only their order: `dir`, `dir/` and `dir/*.parquet` are the same.

    Raises:
        OSError: as `of_path`.
    """
    files = list(storage.matching(path, suffix).values())
    digests = _digests(files)
    if not files:
        return f"nothing at {path}"
    if len(files) == 1:
        return _one(digests[files[0]])
    return _joint(digests[file] for file in files)


def of_files(files: Mapping[str, str]) -> str:
    """The identity of files that are given as path by name, which counts too."""
    digests = _digests(list(files.values()))
    return _joint(f"{digests[files[name]]}  {name}" for name in sorted(files))


def stamps(found: Input) -> dict[str, "Stamp"]:
    """What tells, file by file, whether an input has changed; empty for what packages make.

    Raises:
        OSError: as `of_path`.
    """
    match found:
        case Whole(path):
            return _stamps(list(_files(path).values()))
        case Rows(path, suffix):
            return _stamps(list(storage.matching(path, suffix).values()))
        case Named(files):
            return _stamps(list(files.values()))
        case Made() | Bundled():
            return {}


def _bundled(package: str, file: str) -> str:
    """Where a package's file lies; the package, which may be slow to import, is not."""
    found = importlib.util.find_spec(package)
    assert found is not None, f"{package} is not installed"
    return str(Path(str(found.origin)).parent / file)


def _one(digest: str) -> str:
    return f"{VERSION} {_hash([digest])}" if _told_by_store(digest) else f"{SHA256} {digest}"


def _joint(lines: Iterable[str]) -> str:
    """Of the digests of several files, a line each."""
    lines = list(lines)
    return f"{VERSION if any(map(_told_by_store, lines)) else SHA256} {_hash(lines)}"


def _told_by_store(digest: str) -> bool:
    return digest.startswith(storage.ETAG)


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")).hexdigest()


# ------------------------------------------------------------------------------------------- digests of single files


def _digests(paths: Sequence[str]) -> dict[str, str]:
    """By path, sha256 in hex of local files, and of objects what their store says of their content.

    Where nothing has changed since, what was kept is taken.
    """
    stamps = _stamps(paths)
    kept = _Kept.open()
    known = kept.look_up(stamps)
    missing = [path for path in stamps if path not in known]
    progress = _Progress(sum(stamps[path].bytes for path in missing if not storage.is_remote(path)))
    for path, digest in zip(missing, storage.ahead(partial(_digest, path) for path in missing), strict=True):
        known[path] = digest
        progress.read(stamps[path].bytes, path)
    now = time.time_ns()
    settled = [path for path in missing if stamps[path].changed_ns and now - stamps[path].changed_ns > SETTLED_NS]
    again = _stamps(settled)
    kept.keep({path: (stamps[path], known[path]) for path in settled if again[path] == stamps[path]})
    return known


def _digest(path: str) -> str:
    if storage.is_remote(path):
        return storage.content_tag(path)

    def digest() -> str:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    return persistently(path, digest)


class Stamp(NamedTuple):
    """What tells without reading whether a file is still the same; times in ns, 0 where a store has none."""

    bytes: int
    changed_ns: int
    inode: int = 0
    status_ns: int = 0


def _stamps(paths: Sequence[str]) -> dict[str, Stamp]:
    """Of files; those in one folder of a store are listed together, so that many cost few requests."""
    found = {path: _local_stamp(path) for path in paths if not storage.is_remote(path)}
    folders: dict[str, list[str]] = {}
    for path in paths:
        if path not in found:
            folders.setdefault(path.rpartition("/")[0], []).append(path)
    for folder, files in folders.items():
        listed = {f"{folder}/{name}": stamp for name, stamp in storage.stamps(folder).items()} if files[1:] else {}
        for file in files:
            stamp = listed.get(file) if listed else storage.stamps(file)[""]
            found[file] = Stamp(*(stamp or (0, 0)))
    return found


def _local_stamp(path: str) -> Stamp:
    found = persistently(path, lambda: os.stat(path))
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns)


class _Progress:
    """Says how far the reading of much is."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._told = total, 0, time.monotonic()
        if total >= LARGE:
            log.info("reading %.1f GiB of inputs, once", total / LARGE)

    def read(self, count: int, path: str) -> None:
        """So many bytes more have been read."""
        self._done += count
        if self._total >= LARGE and time.monotonic() - self._told > TELL_EVERY_S:
            self._told = time.monotonic()
            log.info("read %.1f of %.1f GiB of inputs, last %s", self._done / LARGE, self._total / LARGE, path)


class _Kept:
    """The sums of local files that were read before, in a small database that processes share.

    One that is damaged is begun anew; where none can be written, that is said once, and files are read each time.
    """

    def __init__(self, place: Path, database: sqlite3.Connection | None) -> None:
        self._place, self._database = place, database

    @classmethod
    def open(cls) -> "_Kept":
        """The one in the user's cache folder."""
        cache = os.environ.get("XDG_CACHE_HOME")
        place = (Path(cache) if cache else home_folder() / ".cache") / "wuerstchen-pipeline/digests.sqlite"
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            return cls(place, _database(place))
        except (OSError, sqlite3.Error) as error:
            log.warning("%s cannot be written (%s): inputs will be read again each time", place, error)
            return cls(place, None)

    def look_up(self, stamps: Mapping[str, Stamp]) -> dict[str, str]:
        """The sums of those files that have not changed since."""
        if self._database is None:
            return {}
        paths = [path.encode("utf-8", "surrogateescape") for path in stamps]
        found: dict[str, str] = {}
        for start in range(0, len(paths), LOOK_UP):
            part = paths[start : start + LOOK_UP]
            marks = ",".join("?" * len(part))
            try:
                asked = f"select path, stamp, sha256 from digests where path in ({marks})"
                rows = self._database.execute(asked, part).fetchall()
            except sqlite3.DatabaseError as error:
                log.warning("%s cannot be read (%s): inputs will be read again; delete it", self._place, error)
                return found
            for path, stamp, digest in rows:
                name = path.decode("utf-8", "surrogateescape")
                if stamp == _text(stamps[name]):
                    found[name] = digest
        return found

    def keep(self, new: Mapping[str, tuple[Stamp, str]]) -> None:
        """Add what is known now."""
        if self._database is None:
            return
        rows = [(path.encode("utf-8", "surrogateescape"), _text(stamp), sha) for path, (stamp, sha) in new.items()]
        try:
            with closing(self._database), self._database:
                self._database.executemany("insert or replace into digests values (?, ?, ?)", rows)
        except sqlite3.Error as error:
            log.warning("%s cannot be written (%s): inputs will be read again", self._place, error)


def _database(place: Path) -> sqlite3.Connection:
    """A connection to the table of sums, made where it is missing or damaged."""
    for last in (False, True):
        database = sqlite3.connect(place, timeout=30)
        try:
            with database:
                database.execute("create table if not exists digests (path blob primary key, stamp text, sha256 text)")
            return database
        except sqlite3.OperationalError:  # locked, or on a disk that cannot: it may be whole
            database.close()
            raise
        except sqlite3.DatabaseError:
            database.close()
            if last:
                raise
            place.unlink(missing_ok=True)
    raise AssertionError


def _text(stamp: Stamp) -> str:
    return " ".join(map(str, stamp))
