"""`export`: the release of exactly this config, copied out of the root."""

from functools import partial

from datasets.files import storage
from pipeline.errors import UsageError
from pipeline.plan.wanted import wanted
from pipeline.settings.config import Config
from pipeline.settings.words import Words
from pipeline.store import readers
from pipeline.store.artifacts import Store
from pipeline.terminal import console
from pipeline.verbs.configured import configured
from pipeline.verbs.show import files


def handle(words: Words) -> None:
    loaded, root = configured(words)
    export(loaded, root, words.own.get("out"))


def export(config: Config, root: str, folder: str | None) -> None:
    """Copy the release of exactly this config to a folder."""
    if not folder:
        raise UsageError("export needs out=DIR")
    target = storage.absolute(folder)
    if storage.listing(target):
        raise UsageError(f"out={folder}: the folder is not empty; give a new one")
    release = wanted(config, root, ["release"])["release"]
    with readers.reading(Store(root), [release], partial(console.print, markup=False)):
        for name in release.files:
            storage.publish(release.read(name), storage.join(target, name))
    console.print(f"{files(len(release.files))} in {target}", markup=False)
