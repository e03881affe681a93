"""`data forget`: which pictures are to be removed for ever, and what was done about it."""

from typing import Any

from datasets.formats import shards
from pipeline.errors import UsageError
from pipeline.store.removal_list import listed, requests
from pipeline.terminal import out, print_json
from pipeline.verbs.data import forgetting

NAMED = 10  # in a sentence


def forget(root: str, words: dict[str, str], as_json: bool) -> None:
    """Remove pictures for ever: from what is stored, and from every later download.

    Raises:
        UsageError: none is named, and no earlier removal waits to be gone on with.
    """
    names = listed(words.get("keys", ""), words.get("urls", ""), words.get("from", ""))
    if not names and all(request.done for request in requests(root)):
        raise UsageError("data forget needs keys=KEY,KEY or urls='URL URL' or from=FILE with a key or URL a line")
    done = forgetting.forget(root, names)
    if as_json:
        told: dict[str, Any] = {
            name: sorted(getattr(done, name)) for name in ("pictures", "alike", "trained", "unplanned")
        }
        told["files"] = dict(done.files)
        print_json({"root": root, **told})
        return
    out.print(
        f"stored rows forgotten: {len(done.pictures)}, with every caption and copy of the pictures that are named"
    )
    if done.unplanned:
        kept_out = "what later plans have by these names is kept out too"
        out.print(f"in no plan here: {_some(sorted(done.unplanned))}; {kept_out}")
        if any(map(shards.KEY.fullmatch, done.unplanned)):
            out.print("of a key so only its very caption: give urls= too")
    if done.alike:
        out.print(f"what looks like them, and stays: {', '.join(sorted(done.alike))}; forget them by keys= too")
    out.print(", ".join(f"{count} files {how}" for how, count in sorted((+done.files).items())) or "no file changed")
    if done.pictures or +done.files:
        out.print("not reached from here: cluster.cache.folder of nodes, MLflow at a tracking.uri, copies of a release")
    if done.trained:
        out.print(f"trained with them, and left as they are: {', '.join(sorted(done.trained))} (run --force STEP)")


def _some(names: list[str]) -> str:
    """The first of many names, and how many they are."""
    return ", ".join(names[:NAMED]) + (f", ... ({len(names):,} in all; --json has them)" if len(names) > NAMED else "")
