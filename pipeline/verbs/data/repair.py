"""`data verify` and `data repair`: whether the bytes are still those of the manifests, and made anew where not."""

from datasets.files.storage import CorruptFile
from pipeline.errors import UsageError
from pipeline.plan.dag import order
from pipeline.plan.table import table
from pipeline.plan.wanted import prints_of
from pipeline.repair import damage, repairing
from pipeline.repair.damage import Damage
from pipeline.settings.config import Config
from pipeline.settings.words import Words
from pipeline.store.artifacts import Look, Store
from pipeline.store.removal_list import check_carried_out
from pipeline.terminal import out, print_json


def verify(config: Config, root: str, words: Words) -> None:
    """Read every file of this config's finished artifacts again and compare it with its manifest.

    Raises:
        CorruptFile: some are missing or hold other bytes; the first of them are named. Or manifests are damaged, or a
            repair has not ended.
    """
    found, waiting = _examined(config, root)
    count = sum(len(artifact.files) for artifact in found.artifacts.values())
    if words.json:
        print_json({"root": root, "files": count, "damaged": found.paths})
    told = [sentence for marks in found.marks.values() for sentence in marks.values()]
    if found.files:
        first = f"{len(found.files)} of {count} files are missing or damaged: {damage.shown(found.files)}"
        told.insert(0, f"{first}; mend them: python -m pipeline data repair {words.same}")
    if waiting:
        told.append(
            f"the repair of {', '.join(waiting)} has not come to its end; go on with it: "
            f"python -m pipeline data repair {words.same}"
        )
    if told:
        raise CorruptFile("; ".join(told))
    if not words.json:
        out.print(f"all {count} files hold the bytes that their manifests name")


def repair(config: Config, root: str, words: Words, command: str) -> None:
    """Make the damaged shards of this config's artifacts anew, with what was made from them shard by shard.

    Raises:
        CorruptFile: manifests are damaged, or other files that belong to no shard; says what to do about them, and what
            waits for that.
    """
    check_carried_out(root)
    found, _ = _examined(config, root)
    done = repairing.repair(config, words.required_conf(), root, command, found)
    shards_of = {it.artifact.name: sorted({shard.number for shard in it.shards}) for it in done.opened}
    if words.json:
        left = found.left(done.made)
        told = {"repaired": done.made, "shards": shards_of, "others": done.others, "left": left, "waiting": done.wait}
        print_json({"root": root, **told})
    else:
        for name in done.made:
            out.print(f"{name} is whole again{_numbered(shards_of.get(name, []))}")
        if done.others:
            paths = ", ".join(done.others)
            out.print(f"made from the same pictures by another conf, whose next run mends them: {paths}")
        if not (done.made or found.paths):
            out.print("nothing to repair: all files hold the bytes that their manifests name")
    remedies = list(found.remedies(words.same, done.made))
    if done.wait:
        again = f"python -m pipeline data repair {words.same}"
        remedies.append(f"{'then ' if remedies else ''}go on with {', '.join(done.wait)}, which had to wait: {again}")
    if remedies:
        raise CorruptFile("; ".join(remedies))


def _numbered(shards: list[int]) -> str:
    """Which shards were made anew, the first of many, in words."""
    named = ", ".join(map(str, shards[:10]))
    return f": shards {named}{', ...' if len(shards) > 10 else ''} were made anew" if shards else ""


def _examined(config: Config, root: str) -> tuple[Damage, list[str]]:
    """What is damaged of a config's artifacts, and names of those whose repair has begun and not come to its end."""
    store, steps = Store(root), order(table(config), config.targets)
    prints = prints_of(config, Look(root), steps)
    found = damage.examine(store, prints)
    waiting = [name for name, print_ in prints.items() if repairing.is_open(store, name, print_.digest)]
    if not (found.artifacts or found.marks or waiting):
        raise UsageError(f"root={root} has no finished artifact of this conf yet")
    return found, waiting
