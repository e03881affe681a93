"""Which pictures a study shows beside each other, and the key that tells whose they are."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from random import Random
from typing import Any

from pipeline.errors import UsageError
from pipeline.models.contests import Contest, Place
from pipeline.models.score_tables import RIVAL
from pipeline.settings.evaluation import NULL

SIDES = ("a", "b")
NEITHER = "neither"
ORIGINAL = "original"
CONTROL = "both"  # in place of the side that is ours: the same picture twice


@dataclass(frozen=True)
class Pair:
    """Two pictures for a prompt: of which prompt set, by which rival, for which key, and on which side ours is."""

    set: str
    rival: str
    key: str
    ours: str


@dataclass(frozen=True)
class Key:
    """What only who counts the answers may know: whose pictures each pair of a study has, and what it was made of."""

    study: str
    pairs: Mapping[str, Pair]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def controls(self) -> frozenset[str]:
        """Pairs of the same picture twice."""
        return frozenset(name for name, pair in self.pairs.items() if pair.ours == CONTROL)

    def as_json(self) -> bytes:
        """The file of the key."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False).encode()

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Key":
        """The key that a file holds."""
        pairs = {str(name): Pair(**pair) for name, pair in told["pairs"].items()}
        return cls(str(told["study"]), pairs, told["about"])


def opponents(contest: Contest) -> dict[str, Place]:
    """Whom ours are shown beside: the rivals; without any the originals, or else the same model with other seeds."""
    if rivals := {name: place for name, place in contest.places.items() if name.startswith(RIVAL)}:
        return {name.removeprefix(RIVAL): place for name, place in rivals.items()}
    if contest.original:
        return {ORIGINAL: contest.original}
    return {NULL: contest.places[NULL]} if NULL in contest.places else {}


def drawn(contests: Sequence[Contest], count: int, seed: int, chance: Random, about: Mapping[str, Any]) -> Key:
    """At most `count` pairs, as many of each prompt set and rival as there are, and a control.

    Which prompts they are of follows from `seed`; each rival has others where there are enough: who met the same
    picture again and again would know whose it is. Names, sides and order are `chance`'s, so that nothing tells.

    Raises:
        UsageError: nobody has pictures to compare with.
    """
    queues = [
        [(contest.name, rival, key) for key in _order(contest, rival, seed)]
        for contest in contests
        for rival in opponents(contest)
    ]
    taken = list(islice(_in_turn(queues), count))
    if not taken:
        raise UsageError("eval.rivals: none of them has a picture for the prompt sets; give one that has")
    used = {(name, key) for name, _, key in taken}
    every = [(contest.name, key) for contest in contests for key in _order(contest, CONTROL, seed)]
    name, key = next((one for one in every if one not in used), every[0])
    pairs = [Pair(*one, ours=chance.choice(SIDES)) for one in taken] + [Pair(name, CONTROL, key, CONTROL)]
    chance.shuffle(pairs)
    return Key(_token(chance), {_token(chance): pair for pair in pairs}, about)


def _order(contest: Contest, rival: str, seed: int) -> list[str]:
    """The keys for which a rival has a usable picture, as the seed draws them."""

    def place(key: str) -> bytes:
        return hashlib.sha256(f"{seed}\0{contest.name}\0{rival}\0{key}".encode()).digest()

    return sorted((row["key"] for row in contest.rows if contest.takes(f"{RIVAL}{rival}", row["key"])), key=place)


def _in_turn(queues: Sequence[Sequence[tuple[str, str, str]]]) -> Iterator[tuple[str, str, str]]:
    """One of each in turn, of prompts that were not shown yet while there are such, until all are used up."""
    left = [list(queue) for queue in queues if queue]
    seen: set[tuple[str, str]] = set()
    while left:
        for queue in left:
            fresh = (at for at, (name, _, key) in enumerate(queue) if (name, key) not in seen)
            name, rival, key = queue.pop(next(fresh, 0))
            seen.add((name, key))
            yield name, rival, key
        left = [queue for queue in left if queue]


def _token(chance: Random) -> str:
    return chance.randbytes(8).hex()
