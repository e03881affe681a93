"""What a model card says of weights that were there before: what they became, their licence and content, and what the
card that lies with them says of their training data, in which that of their own base stands."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from datasets.files import storage
from pipeline.models import known_weights
from pipeline.results.card import NAMES
from pipeline.settings.config import Config
from pipeline.settings.keys import flatten
from pipeline.settings.sections import STAGES
from pipeline.store.artifacts import Artifact
from stages.weights import card

CARD, PIPELINE = "README.md", "model_index.json"
ABOVE = 3  # folders that a pipeline's files lie below its card, at most
CONTENT = re.compile("(sha256|version) [0-9a-f]{64}")  # of `store.identity`
ENDS = {"interpolate.first": "Stage C's first end", "interpolate.second": "Stage C's second end"}


@dataclass(frozen=True)
class Base:
    """Existing weights: how a card calls them, their source where the table knows it, and the folder of their card."""

    name: str
    licence: str | None
    source: str | None
    folder: str | None
    data: str | None
    content: str | None

    def __str__(self) -> str:
        named = f"by its name {self.source}" if self.source else None
        about = filter(None, (f"licence {self.licence or 'unknown'}", self.content, named))
        return f"{self.name} ({', '.join(about)})"


def told(config: Config, artifacts: Mapping[str, Artifact]) -> tuple[list[str], list[str | None]]:
    """Sentences on the existing weights in a model, and the licence of each, as far as it is known.

    Args:
        artifacts: what the model consists of.
    """
    settings = [flatten(artifact.manifest["settings"]) for artifact in artifacts.values()]
    contents = {key: str(value) for one in settings for key, value in one.items()}
    bases = {key: _base(path, contents.get(key, "")) for key, path in config.brought().items()}
    uses = [_use(config, key, base) for key, base in bases.items()]
    return [*_between(config, bases), *uses, *_cards(bases)], [base.licence for base in bases.values()]


def _base(path: str, content: str) -> Base:
    found, source = _card(path), known_weights.source(path)
    folder, (licence, data) = found or (None, (None, None))
    above = folder.rpartition("/")[0] if folder else ""
    parts = storage.absolute(path).removeprefix(f"{above}/").split("/")
    name = "/".join(parts if folder else parts[-1:] if source else parts[-2:])
    licence = known_weights.licence(path) or licence
    return Base(name, licence, source, folder, data, content if CONTENT.fullmatch(content) else None)


def _card(path: str) -> tuple[str, tuple[str | None, str | None]] | None:
    """The folder of the card of weights, and what it says: it lies beside them, or on top of the pipeline that they are
    a part of; another one further up is of something else."""
    folder = storage.absolute(path)
    if storage.is_file(folder):
        folder = folder.rpartition("/")[0]
    for above in range(ABOVE + 1):
        file = storage.join(folder, CARD)
        if storage.exists(file) and (not above or storage.exists(storage.join(folder, PIPELINE))):
            said = card.terms(storage.read(file).decode(errors="replace"))
            return (folder, said) if said else None
        folder = folder.rpartition("/")[0]
        if not folder or folder.endswith("/"):  # the root, or a URI's scheme
            break
    return None


def _between(config: Config, bases: Mapping[str, Base]) -> list[str]:
    if config.between is None:
        return []
    first, second = (
        bases[key].name if key in bases else f"phase {side} of its training"
        for key, side in config.between.sides.items()
    )
    return [f"Stage C lies between {first} and {second}, at {config.between.share:g} of the way."]


def _use(config: Config, key: str, base: Base) -> str:
    """What weights became."""
    whose, section = _whose(key), key.rpartition(".")[0]
    if key in ENDS:
        return f"{whose} is {base}."
    if section in STAGES:
        if config.is_trained(section):
            return f"{whose}'s training started from {base}."
        return f"{whose} was not trained here: its weights are those of {base}."
    if section == "compressor":
        unless = ", unless Stage B's weights brought one along" * bool(config.stage_b.weights)
        return f"{whose} began as {base}{unless}."
    return f"{whose} has the weights of {base}."


def _whose(key: str) -> str:
    section = key.rpartition(".")[0]
    named = {**NAMES, "compressor": "The compressor"}
    return ENDS.get(key) or named.get(section) or f"The text tower {section.partition('.')[2]}"


def _cards(bases: Mapping[str, Base]) -> Iterator[str]:
    """What each card says, once, below a sentence of its own; and of what nobody says anything."""
    for base in {base.folder or base.name: base for base in bases.values()}.values():
        same = [_whose(key) for key, one in bases.items() if (one.folder or one.name) == (base.folder or base.name)]
        name = base.folder.rpartition("/")[2] if base.folder else base.name
        came = f"{name}, from which {', '.join(same)} came,"
        if base.data:
            nested = "\n".join(f"  {line}" if line else "" for line in base.data.splitlines())
            yield f"The model card of {came} says of its training data:\n{nested}"
        elif not base.source:
            yield f"What {came} was trained on is not known: no model card with it says so."
