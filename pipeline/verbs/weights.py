"""`weights`: getting weights by others that a run may use, and whether they are still what they were.

They lie in one folder (`weights/`); a file's sha256 is kept beside it as `<file>.sha256`, in the format of `sha256sum`.
"""

import contextlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table

from datasets.files import storage
from pipeline.environment import quiet_environment
from pipeline.errors import RetriesExhausted, UsageError
from pipeline.models import known_weights
from pipeline.models.known_weights import FOLDER, Hub, Row, Torchvision, Url, how_to_get, named
from pipeline.settings.words import Words
from pipeline.terminal import console, print_json, print_table

PATIENCE = 5  # seconds for a source to answer at all; once it has, its library tries again for much longer
HUB_NOTES = ".cache"  # where the Hub's library keeps its own, and what it cannot use again
UNRECORDED: Literal["unrecorded"] = "unrecorded"
State = Literal["ok", "unrecorded", "pinned", "missing", "changed"]


def handle(words: Words) -> None:
    weights(words.rest, words.own.get("out", FOLDER), words.json)


@dataclass(frozen=True)
class Verdict:
    """What `verify` found of one row: `unrecorded` files are there, but nobody knows their sha256;
    `pinned` ones are kept to what they are now."""

    name: str
    state: State
    detail: str


def weights(words: Sequence[str], out: str, as_json: bool) -> None:
    """`weights list | get NAME... | verify [NAME...]` on the folder `out`; without a name, all that are there.

    Raises:
        UsageError: another word, an unknown name, no folder, or files that are not what they were.
    """
    if not out:
        raise UsageError("out= is empty; give the folder for the weights")
    if storage.is_remote(out):
        match list(words):
            case ["get", _, *_]:
                for row in [named(name) for name in words[1:]]:
                    console.print(put(row, out), markup=False)
                return
        raise UsageError(f"out={out}: of weights, only get puts them into a store; list and verify look at a folder")
    folder = Path(storage.absolute(out))
    match list(words):
        case ["list"]:
            _list(folder, as_json)
        case ["get", _, *_]:
            for row in [named(name) for name in words[1:]]:
                console.print(str(get(row, folder)), markup=False)
        case ["verify", *names]:
            _verify([named(name) for name in names] or list(known_weights.table()), folder, as_json, wanted=bool(names))
        case _:
            raise UsageError("weights knows: list, get NAME..., verify [NAME...]")


def _list(folder: Path, as_json: bool) -> None:
    found = [
        {
            "name": row.name,
            "use": row.use,
            "path": str(folder / row.file),
            "present": (folder / row.file).exists(),
            "bytes": row.bytes,
            "sha256": row.sha256 or _recorded(row, folder),
            "licence": row.licence,
            "source": str(row.source),
        }
        for row in known_weights.table()
    ]
    if as_json:
        print_json({"folder": str(folder), "weights": found})
        return
    lines = Table("name", "there", "use", "sha256", "licence", "source", box=None, pad_edge=False)
    for row in found:
        there, digest = "yes" if row["present"] else "-", str(row["sha256"] or "?")[:8]
        cells = (str(row["use"]), digest, str(row["licence"] or "?"), str(row["source"]))
        lines.add_row(str(row["name"]), there, *cells)
    print_table(lines)


def _verify(rows: list[Row], folder: Path, as_json: bool, wanted: bool) -> None:
    verdicts = [verify(row, folder) for row in rows]
    if wanted:  # whoever names weights says that they are the right ones
        verdicts = [
            _pinned(row, folder) if told.state == UNRECORDED else told for row, told in zip(rows, verdicts, strict=True)
        ]
    if as_json:
        print_json({"folder": str(folder), "weights": [vars(verdict) for verdict in verdicts]})
    else:
        for verdict in verdicts:
            print(f"{verdict.name:18} {verdict.state:11} {verdict.detail}".rstrip())
    bad = [verdict for verdict in verdicts if verdict.state == "changed" or (wanted and verdict.state == "missing")]
    if bad:
        raise UsageError("; ".join(f"{verdict.name}: {verdict.detail}" for verdict in bad))


def get(row: Row, folder: Path) -> Path:
    """Download weights into a folder unless they are there; returns their path. A connection that breaks off is
    taken up again, and the files of a repository that have come need not come again at the next call.

    Raises:
        UsageError: what is there, or what came, has another sha256 than published or than the first time.
        RetriesExhausted: the source cannot be reached or breaks off.
    """
    target = folder / row.file
    if not target.exists():
        console.print(f"{row.name}: from {row.source}", markup=False)
        new = [place for place in (folder, *folder.parents) if not place.exists()]
        partial = folder / ".partial" / row.name
        partial.mkdir(parents=True, exist_ok=True)
        try:
            _fetch(row, folder, partial)
        finally:
            _drop_unless_begun(partial, new)
        return target
    verdict = verify(row, folder)
    if verdict.state == "changed":
        raise UsageError(f"weights get {row.name}: {verdict.detail}; delete {target} and get it again")
    return target


def put(row: Row, out: str) -> str:
    """Download weights into a store unless they are there, by way of this machine's disk; returns their URI.

    Their sha256 comes last: what an interrupted call has left counts as nothing.

    Raises:
        UsageError, RetriesExhausted: as `get`.
    """
    target = storage.join(out, row.file)
    mark = f"{target}.sha256"
    if not storage.exists(mark):
        with tempfile.TemporaryDirectory() as folder:
            came = get(row, Path(folder))
            for file in [came] if came.is_file() else sorted(path for path in came.rglob("*") if path.is_file()):
                storage.publish(file, storage.join(out, file.relative_to(folder).as_posix()))
            storage.publish(_record(row, Path(folder)), mark)
    return target


def _fetch(row: Row, folder: Path, partial: Path) -> None:
    came = _download(row, partial)
    sums = _sums(came, row.file)
    problem = _problem(row, folder, sums)
    if problem:
        shutil.rmtree(partial)
        raise UsageError(f"weights get {row.name}: {problem}; what came was deleted")
    if not _record(row, folder).exists():
        _put_record(row, folder, sums)
    os.replace(came, folder / row.file)


def _drop_unless_begun(partial: Path, new: list[Path]) -> None:
    """Delete the folder of a download in which no file has come yet, and then of the new folders the empty ones."""
    came = [file.relative_to(partial).parts for file in partial.rglob("*") if file.is_file()]
    if all(HUB_NOTES in parts for parts in came):
        shutil.rmtree(partial, ignore_errors=True)
    for place in (partial.parent, *new):
        with contextlib.suppress(OSError):  # it is not empty
            place.rmdir()


def verify(row: Row, folder: Path) -> Verdict:
    """Compute the sha256 of what is there again, and hold it against the published and the recorded one."""
    target = folder / row.file
    if not target.exists():
        return Verdict(row.name, "missing", f"there is nothing at {target}; {how_to_get(f'{folder}/{row.file}')}")
    problem = _problem(row, folder, _sums(target, row.file))
    if problem:
        return Verdict(row.name, "changed", problem)
    known = _record(row, folder).exists() or (row.sha256 is not None and len(row.sha256) == 64)
    if known:
        return Verdict(row.name, "ok", "")
    return Verdict(
        row.name,
        UNRECORDED,
        f"its sha256 is not published, and `weights get` did not bring it; `weights verify {row.name}` "
        "takes it as it is from now on",
    )


def _pinned(row: Row, folder: Path) -> Verdict:
    """Weights of an unknown sha256 that their owner vouches for: what is there now is what they are to stay."""
    sums = _sums(folder / row.file, row.file)
    _put_record(row, folder, sums)
    return Verdict(row.name, "pinned", f"sha256 of {len(sums)} files kept in {_record(row, folder)}")


def _put_record(row: Row, folder: Path, sums: dict[str, str]) -> None:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    storage.publish(lines.encode(), str(_record(row, folder)))


def _record(row: Row, folder: Path) -> Path:
    return known_weights.record(folder / row.file)


def _recorded(row: Row, folder: Path) -> str | None:
    """The sha256 of a file's first download; of a whole repository there are many."""
    return known_weights.recorded(folder / row.file)


def _problem(row: Row, folder: Path, sums: dict[str, str]) -> str | None:
    """How files' sums differ from the published or the recorded ones, if they do."""
    if row.sha256 and not sums[row.file].startswith(row.sha256):
        return f"{row.file} has sha256 {sums[row.file]}, published is {row.sha256}"
    record = _record(row, folder)
    if record.exists():
        for line in record.read_text("utf-8").splitlines():
            digest, _, name = line.partition("  ")
            if sums.get(name) != digest:
                return f"{name} has sha256 {sums.get(name, 'none: it is gone')}, at its first download it was {digest}"
    return None


def _sums(path: Path, name: str) -> dict[str, str]:
    """sha256 in hex of a file, or of each file below a folder, by the name that it has below the weights' folder."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {
        name + ("" if file == path else f"/{file.relative_to(path).as_posix()}"): storage.sha256(str(file))
        for file in files
    }


def _download(row: Row, partial: Path) -> Path:
    """Fetch into a folder of its own, where the next call finds what an interrupted one has left."""
    quiet_environment()
    from huggingface_hub import constants

    try:
        if isinstance(row.source, Hub):
            _require_answer(constants.ENDPOINT)
            return _from_hub(row.source, partial)
        url = _address(row.source)
        _require_answer(url)
        return _from_url(url, partial / row.file)
    except (OSError, RuntimeError) as error:
        raise RetriesExhausted(f"weights get {row.name}: {_reason(row, error)} call it again") from error


def _reason(row: Row, error: BaseException) -> str:
    """Why nothing came, and what to do before the next try."""
    from huggingface_hub import constants

    if isinstance(row.source, Hub) and constants.HF_HUB_OFFLINE:
        return f"{row.source} is not asked while HF_HUB_OFFLINE is set; unset it and"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror | ConnectionError | TimeoutError):
            return f"{row.source} cannot be reached ({cause}); connect this machine to the network and"
        cause = cause.__cause__ or cause.__context__
    return f"{row.source} did not come ({type(error).__name__}: {str(error).splitlines()[0]});"


def _require_answer(url: str) -> None:
    """Raise OSError unless something answers soon, whatever it says; through a proxy where one is configured."""
    from huggingface_hub.errors import HTTPError  # its HTTP library's, which changes with its version
    from huggingface_hub.utils import get_session

    try:
        get_session().head(url, timeout=PATIENCE)
    except HTTPError as error:
        raise OSError(str(error)) from error


def _from_hub(source: Hub, partial: Path) -> Path:
    from huggingface_hub import hf_hub_download, model_info, snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        if source.path:
            return Path(hf_hub_download(source.repo, source.path, local_dir=partial))
        folder, info = partial / "files", model_info(source.repo)
        snapshot_download(source.repo, revision=info.sha, local_dir=folder)
        lacking = [file.rfilename for file in info.siblings or () if not (folder / file.rfilename).is_file()]
        if lacking:  # without a connection, the library is content with what an earlier call has left
            raise OSError(f"{', '.join(lacking[:3])} did not come")
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        return folder
    except HTTPError as error:
        raise OSError(str(error)) from error


def _address(source: Torchvision | Url) -> str:
    if isinstance(source, Url):
        return source.url
    from stages.weights.pretrained import torchvision_url

    return torchvision_url(source.torchvision)


def _from_url(url: str, target: Path) -> Path:
    import torch

    torch.hub.download_url_to_file(url, str(target), progress=sys.stderr.isatty())
    return target
