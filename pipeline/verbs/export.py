"""`export`: the release of exactly this config, copied out of the root."""

from functools import partial

from datasets.files import storage
from datasets.files.storage import FileEntry
from pipeline.errors import UsageError
from pipeline.plan.wanted import wanted
from pipeline.run.delivery import deliver
from pipeline.settings.config import Config
from pipeline.settings.words import Words
from pipeline.store import readers
from pipeline.store.artifacts import Store
from pipeline.terminal import console
from pipeline.verbs.configured import configured
from pipeline.verbs.show import files

INDEX = "model_index.json"  # comes last: without it no loader takes a folder for a release


def handle(words: Words) -> None:
    loaded, root = configured(words)
    export(loaded, root, words.own.get("out"))


def export(config: Config, root: str, folder: str | None) -> None:
    """Copy the release of exactly this config to a new folder; nothing is done where just that is there.

    Raises:
        UsageError: no `out`, or one in which there is something else than what a killed call has left.
        NotBuilt: there is no such release yet.
    """
    if not folder:
        raise UsageError("export needs out=DIR")
    target = storage.absolute(folder)
    release = wanted(config, root, ["release"])["release"]
    found = storage.listing(target)
    ours = all(_is_ours(storage.join(target, name), release.files.get(name)) for name in found)
    if ours and found == sorted(release.files):
        console.print(f"{files(len(found))} are in {target} already", markup=False)
        return
    if INDEX in found or not ours:
        raise UsageError(f"out={folder}: the folder is not empty; give a new one")
    names = sorted(release.files, key=lambda name: (name.endswith(INDEX), name == INDEX))
    with readers.reading(Store(root), [release], partial(console.print, markup=False)):
        deliver(((name, partial(release.read, name)) for name in names), target)
    console.print(f"{files(len(release.files))} in {target}", markup=False)


def _is_ours(path: str, entry: FileEntry | None) -> bool:
    """Whether a killed call of the same export has put it there: a person's README may have the name of ours."""
    return entry is not None and storage.sha256(path) == entry.sha256
