"""The DAG engine: steps that name what they read and make, their order, and what a run has to do.

Steps meet only through artifacts. The edges follow from the names; nobody writes them by hand.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter
from typing import Any, Literal

from pipeline.errors import UsageError, nearest
from pipeline.settings.keys import flatten
from pipeline.settings.selection import Selection
from pipeline.store.artifacts import Artifact, Fingerprint, Store
from pipeline.store.deleting import begun_from, changed_inputs
from pipeline.store.redact import redact

State = Literal["done", "resume", "run", "stale"]
ABSENT = "not there"
CONTENT = re.compile("((?:sha256|version) [0-9a-f]{12})[0-9a-f]{52}")  # of `store.identity`; the start is shown


@dataclass(frozen=True)
class Step:
    """One row of the DAG's table.

    `reads` names the config keys (dotted) that determine the result; `call` is `module:function` below
    `pipeline.steps`, imported only when the step runs; `version` is raised when the step's meaning changes.
    """

    name: str
    output: str
    inputs: tuple[str, ...]
    reads: tuple[str, ...]
    call: str
    version: int = 1


@dataclass(frozen=True)
class Planned:
    """A step with its fingerprint and what a run would do with it, and why: for a stale one all `changes`, the most
    telling first."""

    step: Step
    fingerprint: Fingerprint
    state: State
    reason: str
    artifact: Artifact | None = field(default=None, repr=False)
    again: bool = False  # though a finished artifact of this fingerprint is there
    changes: tuple[str, ...] = ()


def to_do(planned: Iterable[Planned]) -> list[Step]:
    """The steps that a run would build."""
    return [item.step for item in planned if item.state != "done"]


def label(step: Step, planned: Sequence[Planned]) -> str:
    """What a step is called among those of a run: by its artifact where it makes several there."""
    return step.name if [other.step.name for other in planned].count(step.name) == 1 else step.output


def order(steps: Sequence[Step], targets: Iterable[str]) -> list[Step]:
    """The steps that the target artifacts need, parents first."""
    makers = {step.output: step for step in steps}
    assert len(makers) == len(steps), "two steps make the same artifact"
    edges: dict[str, tuple[str, ...]] = {}

    def need(output: str) -> None:
        if output not in makers:
            hint = nearest(output, makers)
            raise UsageError(f"targets: no step makes '{output}'{hint}; there are {', '.join(makers)}")
        if output not in edges:
            edges[output] = makers[output].inputs
            for name in edges[output]:
                need(name)

    for target in targets:
        need(target)
    return [makers[output] for output in TopologicalSorter(edges).static_order()]


def fingerprints(steps: Sequence[Step], settings: Callable[[str], Any]) -> dict[str, Fingerprint]:
    """Fingerprint of each step's output; `settings` looks up a dotted config key. Steps come parents first."""
    result: dict[str, Fingerprint] = {}
    for step in steps:
        result[step.output] = Fingerprint(
            step=step.name,
            version=step.version,
            settings={key: settings(key) for key in step.reads},
            parents={name: result[name].digest for name in step.inputs},
        )
    return result


def plan(steps: Sequence[Step], settings: Callable[[str], Any], store: Store, selection: Selection) -> list[Planned]:
    """What a run would do with each step, with the reason; nothing is written."""
    prints = fingerprints(steps, settings)
    planned: list[Planned] = []
    for step in steps:
        made = {item.step.output: item.artifact for item in planned if item.artifact}
        planned.append(_against(_judge(step, prints[step.output], store), made, store))
    return _select(planned, selection)


def _against(item: Planned, made: Mapping[str, Artifact], store: Store) -> Planned:
    """A step is done again, or begun again, where its inputs, built anew since, hold something else than before."""
    found = item.artifact
    if found is None and item.state != "resume":
        return item
    path = store.path(item.step.output, item.fingerprint.digest)
    others = changed_inputs(found.manifest.get("inputs", {}) if found else begun_from(path), made)
    if not others:
        return item
    told = f"with other content: {', '.join(others)}"
    if found is None:
        return replace(item, state="run", reason=f"what was begun is of another time, {told}")
    return replace(item, state="stale", reason=f"built anew since, {told}", again=True)


def _judge(step: Step, fingerprint: Fingerprint, store: Store) -> Planned:
    digest = fingerprint.digest
    artifact = store.find(step.output, digest)
    if artifact:
        return Planned(step, fingerprint, "done", "manifest found", artifact)
    if store.started(step.output, digest):
        return Planned(step, fingerprint, "resume", "an unfinished build is there")
    if others := list(store.finished(step.output)):
        _, changes = closest(others, fingerprint)
        return Planned(step, fingerprint, "stale", "; ".join(changes), changes=tuple(changes))
    return Planned(step, fingerprint, "run", "never built here")


def closest(others: list[Artifact], wanted: Fingerprint) -> tuple[Artifact, list[str]]:
    """The artifact with the fewest differences from a wanted one, the newest of several, and the differences."""
    told = ((other, differences(other.manifest, wanted)) for other in reversed(others))
    return min(told, key=lambda pair: len(pair[1]))


def differences(manifest: dict[str, Any], fingerprint: Fingerprint) -> list[str]:
    """What changed between a finished artifact and a wanted one, as `key: old -> new`.

    The most telling first: the step's version, keys with another value, keys that are new or gone, inputs.
    """
    version = f"step version: {manifest['version']} -> {fingerprint.version}"
    old, new = (flatten(redact(settings)) for settings in (manifest["settings"], fingerprint.settings))
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key, ABSENT) != new.get(key, ABSENT)]
    keys.sort(key=lambda key: not (key in old and key in new))
    before, inputs = manifest["parents"], fingerprint.parents
    changed = [name for name, digest in inputs.items() if name in before and before[name] != digest]
    changes = [
        *([version] if manifest["version"] != fingerprint.version else []),
        *(f"{key}: {_change(old.get(key, ABSENT), new.get(key, ABSENT))}" for key in keys),
        *(f"input {name} changed" for name in changed),
        *(f"input {name} is new" for name in inputs if name not in before),
        *(f"input {name} is not wanted any more" for name in before if name not in inputs),
    ]
    return changes or ["a setting changed that is not shown"]  # a secret


def _change(before: Any, after: Any) -> str:
    content = all(CONTENT.fullmatch(str(value)) for value in (before, after))
    return f"{'content changed, ' * content}{_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    text = str(value)
    if content := CONTENT.fullmatch(text):
        return content[1]
    return text if len(text) <= 40 else text[:37] + "..."


def _select(planned: list[Planned], selection: Selection) -> list[Planned]:
    """Keep the steps that the flags allow; what is left out must be done already."""
    names = list(dict.fromkeys(item.step.name for item in planned))
    for flag, name in (*selection.bounds.items(), *(("--force", name) for name in selection.force)):
        if name not in names:
            raise UsageError(f"{flag} {name}: this run has no such step; it has {', '.join(names)}")
    kept = planned
    if selection.until:
        wanted = {item.step.output for item in planned if item.step.name == selection.until}
        keep = {step.output for step in order([item.step for item in planned], wanted)}
        kept = [item for item in kept if item.step.output in keep]
    if selection.only:
        kept = [item for item in kept if item.step.name == selection.only]
    if selection.start:
        kept = _descendants(kept, selection.start)
    result: list[Planned] = []
    anew: dict[str, str] = {}  # what may come out differently: step by artifact
    for item in kept:
        sources = dict.fromkeys(anew[name] for name in item.step.inputs if name in anew)
        if item.step.name in selection.force:
            item = replace(item, state="run", reason="forced", again=item.artifact is not None)
        elif item.state == "done" and sources:
            reason = f"only if {' or '.join(sources)} comes out differently"
            item = replace(item, state="stale", reason=reason, again=True)
        if item.again:
            anew[item.step.output] = item.step.name
        result.append(item)
    inside = {item.step.output for item in result}
    states = {item.step.output: item for item in planned}
    for item in result:
        for name in item.step.inputs:
            if item.state != "done" and name not in inside and states[name].state != "done":
                raise UsageError(
                    f"{item.step.name} needs {name}, which is not built yet and which the flags leave out; "
                    f"run without --from/--only first, or with --until {states[name].step.name}"
                )
    return result


def _descendants(planned: list[Planned], start: str) -> list[Planned]:
    reached: set[str] = set()
    for item in planned:
        if item.step.name == start or reached.intersection(item.step.inputs):
            reached.add(item.step.output)
    return [item for item in planned if item.step.output in reached]
