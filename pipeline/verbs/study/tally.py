"""What people prefer: shares with intervals, from answers that count."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.models.score_tables import EVERYTHING
from pipeline.verbs.study.ballots import Ballot
from pipeline.verbs.study.pairs import NEITHER, Key
from stages.scoring.statistics import sign_test, wilson_interval

CUTS = (30, 51)  # answers that the paper asks of a rater, on COCO's and on Parti's prompts
ALL_RATERS, PASSED = "all raters", "raters who passed the control"


@dataclass(frozen=True)
class Preference:
    """How often ours were preferred to a rival's pictures on a prompt set (`all`: on any), by which raters."""

    rival: str
    set: str
    by: str
    raters: int
    ours: int
    theirs: int
    neither: int

    @property
    def n(self) -> int:
        """Answers."""
        return self.ours + self.theirs + self.neither

    def share(self, answer: str) -> dict[str, float]:
        """Share of `ours`, `theirs` or `neither` among all answers, with its 95 % interval (Wilson)."""
        return _share(getattr(self, answer), self.n)

    @property
    def decided(self) -> dict[str, float] | None:
        """Share of ours among the answers that prefer one, with its interval, and p of the exact sign test."""
        n = self.ours + self.theirs
        return _share(self.ours, n) | {"p": sign_test(self.ours, self.theirs)} if n else None

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        shares = {f"share_{answer}": self.share(answer) for answer in ("ours", "theirs", "neither")}
        return asdict(self) | {"n": self.n, **shares, "decided": self.decided}


@dataclass(frozen=True)
class Tally:
    """The count of a study; `left` are the answers, of those that prefer one, which prefer what stood left."""

    study: str
    raters: int
    answers: int
    controls: int
    controls_failed: int
    left: int
    preferring: int
    dropped: dict[str, int]
    preferences: list[Preference]

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"preferences": [one.as_dict() for one in self.preferences]}


def tallied(ballots: Sequence[Ballot], dropped: Counter[str], key: Key) -> Tally:
    """Count them. A rater's answers are those to all pairs of the study but the control, whose right answer is
    `neither`."""
    controls = [ballot for ballot in ballots if ballot.pair in key.controls]
    answers = [ballot for ballot in ballots if ballot.pair not in key.controls]
    preferring = [ballot for ballot in answers if ballot.chosen != NEITHER]
    failed = {ballot.rater for ballot in controls if ballot.chosen != NEITHER}
    passed = {ballot.rater for ballot in controls} - failed
    given = Counter(ballot.rater for ballot in answers)
    groups = {ALL_RATERS: set(given)}
    groups |= {f"raters of {cut} answers or more": {rater for rater in given if given[rater] >= cut} for cut in CUTS}
    groups[PASSED] = passed
    found = [
        line
        for name, raters in groups.items()
        for line in _preferences([ballot for ballot in answers if ballot.rater in raters], key, name)
    ]
    return Tally(
        study=key.study,
        raters=len({ballot.rater for ballot in ballots}),
        answers=len(answers),
        controls=len(controls),
        controls_failed=len(failed),
        left=sum(ballot.chosen == ballot.left for ballot in preferring),
        preferring=len(preferring),
        dropped=dict(sorted(dropped.items())),
        preferences=found,
    )


def _preferences(answers: Iterable[Ballot], key: Key, by: str) -> list[Preference]:
    """A line for each rival and prompt set, and for each rival on all of them."""
    parts: dict[tuple[str, str], list[Ballot]] = {}
    for ballot in answers:
        pair = key.pairs[ballot.pair]
        for part in (EVERYTHING, pair.set):
            parts.setdefault((pair.rival, part), []).append(ballot)
    order = sorted(parts, key=lambda part: (part[0], part[1] != EVERYTHING, part[1]))
    return [_preference(parts[part], key, *part, by) for part in order]


def _preference(ballots: Sequence[Ballot], key: Key, rival: str, prompts: str, by: str) -> Preference:
    neither = sum(ballot.chosen == NEITHER for ballot in ballots)
    ours = sum(ballot.chosen == key.pairs[ballot.pair].ours for ballot in ballots)
    raters = len({ballot.rater for ballot in ballots})
    return Preference(rival, prompts, by, raters, ours, len(ballots) - ours - neither, neither)


def _share(count: int, n: int) -> dict[str, float]:
    low, high = wilson_interval(count, n)
    return {"share": count / n, "low": low, "high": high}
