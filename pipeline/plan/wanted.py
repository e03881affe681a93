"""What a config wants of a root: the steps of its targets with their states, and finished artifacts."""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.errors import NotBuilt
from pipeline.plan import dag
from pipeline.plan.dag import Planned, Step, closest, fingerprints, order
from pipeline.plan.table import table
from pipeline.settings.config import Config
from pipeline.settings.selection import Selection
from pipeline.store import earlier
from pipeline.store.artifacts import Artifact, Fingerprint, Look

Reading = Callable[[str], Any]  # a dotted key -> its value, as fingerprints use it


def reading(config: Config, look: Look, steps: Sequence[Step]) -> Reading:
    """How the values that steps read enter a root's fingerprints: by content, or as the root has called it before.

    Raises:
        DataError: the source cannot be read.
        UsageError: another input cannot be read; names its key.
    """
    called = {key: then for key, _, then in names_of_inputs(config, look, steps)}
    lookup = config.lookup
    return lambda key: called[key] if key in called else lookup(key)


def names_of_inputs(config: Config, look: Look, steps: Sequence[Step]) -> list[earlier.Name]:
    """What the root calls inputs that these steps read, where that is not their content."""
    keys = dict.fromkeys(key for step in steps for key in step.reads)
    reads = {key: [step.output for step in steps if key in step.reads] for key in keys}
    return earlier.names(look, config.lookup, reads)


def prints_of(config: Config, look: Look, steps: Sequence[Step]) -> dict[str, Fingerprint]:
    """Fingerprints in a root of steps that come parents first."""
    return fingerprints(steps, reading(config, look, steps))


def planned_steps(config: Config, look: Look, selection: Selection) -> list[Planned]:
    """What a run of this config would do with each step that its targets need."""
    steps = dag.order(table(config), config.targets)
    return dag.plan(steps, reading(config, look, steps), look, selection)


def wanted(config: Config, root: str, names: list[str], seed_word: str = "seed") -> dict[str, Artifact]:
    """The finished artifacts of exactly this config. `seed_word` is how the caller's command line sets its seed.

    Raises:
        NotBuilt: one is missing; the message lists what exists and names the nearest.
    """
    look = Look(root)
    steps = order(table(config), names)
    prints = prints_of(config, look, steps)
    found: dict[str, Artifact] = {}
    for name in names:
        artifact = look.find(name, prints[name].digest)
        if artifact is None:
            made = {step.output for step in order(table(config), config.targets)}
            override = None if name in made else f"targets=[{name}]"
            raise NotBuilt(_missing(name, look, prints[name], seed_word), override)
        found[name] = artifact
    return found


def finished(config: Config, root: str) -> dict[str, Artifact]:
    """Those of this config's artifacts that are finished, by name."""
    look, steps = Look(root), dag.order(table(config), config.targets)
    found = {name: look.find(name, print_.digest) for name, print_ in prints_of(config, look, steps).items()}
    return {name: artifact for name, artifact in found.items() if artifact}


def _missing(name: str, look: Look, wanted: Fingerprint, seed_word: str) -> str:
    others = list(look.finished(name))
    text = f"root={look.root} has no {name} of exactly this conf"
    if not others:
        return f"{text} (no {name} exists there at all)"
    listed = ", ".join(other.manifest["fingerprint"] for other in others)
    nearest, changes = closest(others, wanted)
    text += f". There are: {listed}; the nearest, {nearest.manifest['fingerprint']}, differs in {'; '.join(changes)}"
    seed = nearest.manifest["settings"].get("seed")
    return text if seed == wanted.settings.get("seed") else f"{text} (give {seed_word}={seed} for its run's seed)"
