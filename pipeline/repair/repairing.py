"""Repairing: how the shards that damaged files belong to are made anew, and nothing else.

A shard that is made anew may come out otherwise: a picture is gone from the web, a model writes another caption. So
the same shard of all that was made from it shard by shard is made anew too, and the views, which name pictures.
Trainings and what was drawn stay: they were made of what was there then.

What is damaged and belongs to no shard stays as it is, such as weights. What is made from it has to wait for it: a
shard that is damaged too stays so until then; one that lacks since others were made anew is opened, but not made.

Opening an artifact takes its mark away, so a repair that is killed leaves unfinished builds, which `data repair` or the
next run goes on with. What others are made from is opened after them: until then its damage is still found.
"""

import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from datasets.files import storage
from pipeline.plan.dag import Step
from pipeline.plan.wanted import planned_steps
from pipeline.repair.damage import Damage, File
from pipeline.run import invocation, neighbours
from pipeline.settings.config import Config
from pipeline.settings.selection import Selection
from pipeline.store import claims, deleting
from pipeline.store.artifacts import REPAIR, Artifact, Look, Store, children, descendants
from pipeline.store.deleting import BY_SHARD, OF_ALL, Shard, receipt_folders, shard_of
from pipeline.store.removal_list import check_carried_out

REPAIRED = "repaired"  # what is done to an artifact meanwhile


@dataclass(frozen=True)
class Opened:
    """An artifact of which some shards are gone, to be made anew."""

    artifact: Artifact
    shards: set[Shard]


@dataclass(frozen=True)
class Repaired:
    """What a repair has done: the names of artifacts that are `made` whole and of those that `wait` for others, what
    was opened for that, and the paths of `others` among it, which another conf's next run makes."""

    made: list[str]
    wait: list[str]
    opened: list[Opened]
    others: list[str]


def repair(config: Config, conf: str, root: str, command: str, damage: Damage) -> Repaired:
    """Make anew what can be of a config's artifacts, and go on with a repair that has not come to its end."""
    store, look = Store(root), Look(root)
    opened = open_damaged(store, damage.mendable, damage.unfinished)
    planned = planned_steps(config, look, Selection())
    waiting = [item for item in planned if is_open(store, item.step.output, item.fingerprint.digest)]
    held = held_up((item.step for item in waiting), damage.beyond_repair)
    made = [item.step.output for item in waiting if item.step.output not in held]
    if made:
        ours = [item for item in planned if item.state == "done" or item.step.output in made]
        invocation.run(config, conf, look, ours, command)
    known = {(item.step.output, item.fingerprint.digest) for item in planned if item.step.output not in made}
    others = [it.artifact for it in opened if not (it.artifact.called in known or store.find(*it.artifact.called))]
    return Repaired(made, list(dict.fromkeys([*held, *damage.later])), opened, [artifact.path for artifact in others])


def open_damaged(store: Store, files: Sequence[File], unfinished: Sequence[Artifact] = ()) -> list[Opened]:
    """Make unfinished builds of all artifacts that have to be repaired; returns them, what others are made from last.

    Args:
        store: where they lie; what other configs made of the same images is opened too.
        files: the damaged files that belong to shards.
        unfinished: builds that lose the shards that were made from these.

    Raises:
        LeaseHeld: another run reads or changes one of them; those before it are opened.
    """
    own = f"repair-{uuid.uuid4().hex[:8]}"
    with claims.at_work(store.root, own):
        check_carried_out(store.root)  # whoever writes a request now sees that somebody is at work
        found = _hit(files, [*store.finished(), *unfinished])
        for opened in found:
            neighbours.check_unread(store, *opened.artifact.called, own)
        for opened in found:
            what = claims.artifact(*opened.artifact.called)
            with claims.hold(store.root, what, neighbours.tell, REPAIRED) as claim:
                if artifact := store.find(*opened.artifact.called):
                    deleting.reopen(artifact, opened.shards, claim.fence)
                else:
                    deleting.drop_shards(opened.artifact.path, sorted(opened.shards), claim.fence)
    return found


def is_open(store: Store, name: str, digest: str) -> bool:
    """Whether a repair of an artifact has begun and not come to its end."""
    return store.find(name, digest) is None and storage.exists(storage.join(store.path(name, digest), REPAIR))


def held_up(opened: Iterable[Step], beyond: Collection[str]) -> list[str]:
    """What of the steps whose artifacts are opened, parents first, cannot be made yet: from something that is `beyond`
    repair, or from one that cannot. Names of artifacts."""
    missing, held = set(beyond), list[str]()
    for step in opened:
        if missing.intersection(step.inputs):
            missing.add(step.output)
            held.append(step.output)
        else:
            missing.discard(step.output)  # it is made anew as a whole
    return held


def _hit(files: Iterable[File], every: Sequence[Artifact]) -> list[Opened]:
    """The artifacts to be opened, with the shards to be made anew; what others are made from comes after them."""
    lost: dict[str, Opened] = {}

    def lose(artifact: Artifact, shards: Iterable[Shard]) -> None:
        lost.setdefault(artifact.path, Opened(artifact, set())).shards.update(shards)

    for artifact, name in files:
        lose(artifact, filter(None, [shard_of(name)]))
    waiting = [opened for opened in lost.values() if opened.shards]
    while waiting:  # a child is looked at again when more of its shards are gone
        opened = waiting.pop()
        numbers = {shard.number for shard in opened.shards}
        for child in children(opened.artifact, every):
            before = len(lost[child.path].shards) if child.path in lost else 0
            if child.name.startswith(BY_SHARD):
                lose(child, {Shard(folder, number) for folder in receipt_folders(child) for number in numbers})
                if len(lost[child.path].shards) > before:
                    waiting.append(lost[child.path])
            elif child.name.startswith(OF_ALL):
                lose(child, ())
    made = list(lost.values())
    return [one for _, one in sorted(enumerate(made), key=lambda item: _depth(item[1], made))]


def _depth(opened: Opened, others: Sequence[Opened]) -> int:
    """How many of the others are made from an artifact, which come before it."""
    return len(descendants(opened.artifact, [other.artifact for other in others]))
