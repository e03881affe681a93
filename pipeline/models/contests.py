"""Contests: whose pictures are scored on a prompt set, and where each of them lies."""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from datasets import pictures
from datasets.config import DataError
from datasets.reading.rivals import Findings, Rival
from pipeline.models.score_tables import LIKENED, RIVAL
from pipeline.settings.config import Config
from pipeline.settings.evaluation import BASELINE, NULL, samples_of
from pipeline.store.artifacts import Artifact

GENERATED = "generated"


@dataclass(frozen=True)
class Place:
    """A folder of an artifact, or a rival's place outside of the root (key of the config, path)."""

    artifact: Artifact | None = None
    folder: str = GENERATED
    outside: tuple[str, str] | None = None

    def open(self) -> "Rival | Place":
        """What `pixels` are read from."""
        return Rival(self.outside[1], self.outside[0]) if self.outside else self

    def pixels(self, wanted: tuple[str, str]) -> np.ndarray:
        """uint8 (H, W, 3) of the picture of a key and prompt."""
        assert self.artifact is not None
        with Image.open(io.BytesIO(self.artifact.read(f"{self.folder}/{wanted[0]}.png"))) as image:
            return np.asarray(image.convert("RGB"))


@dataclass(frozen=True)
class Contest:
    """A prompt set with the pictures of everybody: by the column of the table of scores that each fills.

    `usable` has, for rivals from outside, the keys of the pictures that count."""

    name: str
    rows: list[dict[str, Any]]
    places: dict[str, Place]
    original: Place | None
    usable: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def takes(self, column: str, key: str) -> bool:
        """Whether there is a picture of a column for a key."""
        return column not in self.usable or key in self.usable[column]


def contest(config: Config, name: str, inputs: Mapping[str, Artifact]) -> Contest:
    """The contest on a prompt set: ours, the same with other seeds, reconstructions, the rivals that have pictures."""
    samples = inputs[samples_of(name)]
    rows = json.loads(samples.read("captions.json"))
    places = {"score": Place(samples)}
    if again := inputs.get(f"{NULL}_{samples_of(name)}"):
        places[NULL] = Place(again)
    for rival, place in config.eval.rivals.items():
        if name not in config.prompt_sets():
            continue  # the training's captions, drawn for memory alone
        if place == BASELINE:
            places[f"{RIVAL}{rival}"] = Place(inputs[f"baseline_{samples_of(name)}"])
        elif found := config.eval.rival_path(rival, name):
            places[f"{RIVAL}{rival}"] = Place(outside=(f"eval.{found[0]}", found[1]))
    has = {folder for folder in ("original", *LIKENED) if f"{folder}/{rows[0]['key']}.png" in samples.files}
    places |= {folder: Place(samples, folder) for folder in LIKENED if folder in has}
    return Contest(name, rows, places, Place(samples, "original") if "original" in has else None)


def examined(found: Contest, allowed: float) -> tuple[dict[str, frozenset[str]], dict[str, str]]:
    """The usable keys of rivals from outside, by column, and what is wrong with the others in words.

    Raises:
        DataError: more of a rival's pictures are missing or no good than the share that is allowed.
    """
    usable: dict[str, frozenset[str]] = {}
    told: dict[str, str] = {}
    wanted = [(row["key"], row["caption"]) for row in found.rows]
    for column, place in found.places.items():
        if place.outside:
            key, path = place.outside
            findings = Rival(path, key).examine(wanted)
            require(findings, key, path, found.name, len(wanted), allowed)
            usable[column] = findings.usable
            told |= {column.removeprefix(RIVAL): findings.told()} if findings.lacking else {}
    return usable, told


def usable(
    rival: Rival, wanted: list[tuple[str, str]], prompts: str, allowed: float
) -> tuple[list[tuple[str, str]], str]:
    """The pictures of a place that are good, and what is wrong with the others in words: those for some prompts, or, of
    real ones (none are wanted), all, of whatever size.

    Raises:
        DataError: more of them are missing or no good than the share that is allowed.
    """
    every = wanted or rival.everything()
    findings = rival.examine(every, one_size=bool(wanted))
    require(findings, rival.config_key, rival.path, prompts, len(every), allowed)
    return [one for one in every if one[0] in findings.usable], findings.told()


def require(findings: Findings, key: str, path: str, prompts: str, n: int, allowed: float) -> None:
    """Refuse a rival whose pictures for a prompt set lack more than the allowed share, or of which none is good."""
    if findings.lacking > allowed * n or not findings.usable:
        rest = f", or leave them out with eval.allow_missing={_above(findings.lacking / n)}" if findings.usable else ""
        raise DataError(
            f"{key}: of {n} pictures for the prompt set {prompts} at {path}, {findings.told()}; mend them{rest}"
        )


def _above(share: float) -> float:
    """Two digits of a share that are no less than it."""
    digits = 1 - math.floor(math.log10(share))
    return math.ceil(share * 10**digits) / 10**digits


def fit(picture: np.ndarray, like: np.ndarray) -> np.ndarray:
    """A picture in the size of another one, cropped to its aspect ratio; as it is where it has that size."""
    height, width = like.shape[:2]
    return picture if picture.shape == like.shape else pictures.fitted(Image.fromarray(picture), width, height)
