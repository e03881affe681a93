"""The command line's grammar: a verb, `key=value` words, and flags.

A verb's own words (`prompt=`, `out=`, `root=`, ...) are taken literally after the first `=`, before anything reaches
Hydra, so that a prompt may hold commas, quotes and parentheses; every other `key=value` is a Hydra override.
"""

import difflib
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

from datasets.files.filesystems import is_hollow
from pipeline.errors import UsageError, nearest
from pipeline.settings.compose import check_no_password, groups, names
from pipeline.settings.config import Config
from pipeline.settings.selection import Selection

RUN_FLAGS = ("--from", "--until", "--only", "--force", "--json")
STEP_FLAGS = ("--from", "--until", "--only", "--force", "--why")  # each takes the name of a step
WITH_VALUE = (*STEP_FLAGS, "--rank")
LONGEST_NUMBER = 10  # digits
NAMELESS = re.compile(r"(?!file:)\w+:/{2,}|(s3|gs):///.*")  # URIs of a store, but of nothing in it
FREE_TEXTS = ("prompt", "negative", "urls")  # what is drawn, and pictures to be forgotten, wherever they lay
SAMPLE_WORDS = (
    "prompt", "negative", "seed", "n", "width", "height", "steps_c", "steps_b", "guidance_c", "guidance_b",
    "image", "strength", "preview", "from", "run_seed", "out",
)  # fmt: skip


@dataclass(frozen=True)
class Verb:
    """A verb with the words and flags that it takes beside `root` and, where `config`, `conf` and overrides.

    `bare` says whether it also takes words without `=`, such as `logs STEP`; `does`, which of these may be the first.
    """

    help: str
    words: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    config: bool = True
    bare: bool = False
    does: tuple[str, ...] = ()


VERBS: dict[str, Verb] = {
    "run": Verb("build the targets and whatever is missing before them", flags=RUN_FLAGS),
    "plan": Verb("what a run would do, with reasons and estimated cost", flags=(*RUN_FLAGS, "--why")),
    "status": Verb(
        "last runs with how far they are, artifacts with sizes, where each step's log lies; --follow: as they go on",
        flags=("--json", "--follow"),
        config=False,
    ),
    "logs": Verb(
        "`logs STEP`: what its last run said; --rank N: of its trainings' rank; --follow: as it goes on; run=ID",
        ("run",),
        ("--rank", "--follow"),
        config=False,
        bare=True,
    ),
    "show": Verb(
        "artifact=NAME: its manifest; for scores and samples their table; run=ID: as that run made it",
        ("artifact", "run"),
        ("--json",),
    ),
    "config": Verb(
        "the composed config with its comments; `config list`: confs, groups, values; `config reference`: every key",
        bare=True,
    ),
    "sample": Verb(
        'prompt="..." or image=PATH, out=DIR: draw pictures; from=DIR with a release\'s models', SAMPLE_WORDS
    ),
    "export": Verb("out=DIR: the release folder (diffusers, safetensors, model card)", ("out",)),
    "import": Verb("from=DIR|FILE: existing weights (dome272's, diffusers', our own) as artifacts", ("from",)),
    "weights": Verb(
        "`weights list`, `weights get NAME...`, `weights verify [NAME...]`: weights by others, in out=weights",
        ("out",),
        ("--json",),
        config=False,
        bare=True,
        does=("list", "get", "verify"),
    ),
    "report": Verb(
        "out=FILE.html: the experiment of conf=NAME or run=ID as one page; `report hours`: device-hours",
        ("out", "run"),
        flags=("--json", "--rebuild-mlflow"),
        bare=True,
    ),
    "study": Verb(
        "`study build out=FILE.html`: blind pairs for people to choose from; `study tally FILE...`: what they prefer",
        ("out", "n"),
        ("--json",),
        bare=True,
        does=("build", "tally"),
    ),
    "data": Verb(
        "`data funnel`, `lost`, `verify`, `repair`, `trace KEY`, `retry`, `dedup`, `forget` (keys= urls= from=FILE)",
        ("keys", "urls", "from"),
        ("--json",),
        bare=True,
        does=("funnel", "lost", "verify", "repair", "trace", "retry", "dedup", "forget"),
    ),
    "gc": Verb(
        "artifacts that no run wants any more, and leftovers; `gc --yes` deletes them; days=N: older runs want nothing",
        ("days",),
        ("--json", "--yes"),
        config=False,
    ),
    "ui": Verb("open the MLflow UI of this root, print its URL once it answers", ("port",)),
    "doctor": Verb(
        "check versions, devices, disk, storage, memory; with conf=NAME for that, its cluster and MLflow too; "
        "--no-devices: what a run finds on any machine",
        flags=("--json", "--no-devices"),
    ),
    "infra": Verb(
        "`infra render` cluster=NAME out=DIR: the files that hand a run to KubeRay, Slurm, AWS or plain hosts",
        ("out",),
        bare=True,
        does=("render",),
    ),
}


@dataclass(frozen=True)
class Words:
    """A parsed command line."""

    verb: str
    conf: str | None = None
    root: str = "runs"
    own: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    selection: Selection = field(default_factory=Selection)
    why: str | None = None
    json: bool = False
    yes: bool = False
    rebuild_mlflow: bool = False
    devices: bool = True
    rank: int | None = None
    follow: bool = False

    def number(self, key: str, meaning: str, least: int, most: int) -> int | None:
        """The whole number that one of the verb's own words gives; None where it is not given."""
        if (text := self.own.get(key)) is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER and least <= int(text) <= most):
            raise UsageError(f"{key}={text}: {meaning}; give a number from {least} to {most}")
        return int(text)

    def required_conf(self) -> str:
        """The conf's name; the verb cannot do without it."""
        if self.conf is None:
            release = ", or from=DIR with a release" if self.verb == "sample" else ""
            example = f"python -m pipeline {self.verb} conf=stage_c"
            raise UsageError(f"{self.verb} needs conf=NAME{release}, for example: {example}")
        return self.conf

    @property
    def same(self) -> str:
        """The words of a run with the same conf, root and overrides, for a shell."""
        root = [] if self.root == "runs" else [f"root={self.root}"]
        seed = [f"seed={self.own['run_seed']}"] if "run_seed" in self.own else []
        return " ".join(shlex.quote(word) for word in (f"conf={self.conf}", *root, *self.overrides, *seed))


def parse(arguments: list[str]) -> Words:
    """Parse the words after `python -m pipeline`; `UsageError` names the word that does not fit."""
    name, *words = arguments
    if name not in VERBS:
        raise UsageError(f"there is no verb '{name}'{nearest(name, VERBS)}; there are {', '.join(VERBS)}")
    taken = _Taken(name, VERBS[name])
    queue = iter(words)
    for word in queue:
        key, separator, value = word.partition("=")
        if word.startswith("--"):
            taken.flag(key, value if separator else None, queue)
        elif separator:
            taken.pair(key, value)
        else:
            taken.bare(word)
    return taken.words()


@dataclass
class _Taken:
    """The words of a verb that were taken so far, each where it belongs."""

    name: str
    verb: Verb
    own: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    said: set[str] = field(default_factory=set)
    """Flags that say all by being there."""
    steps: dict[str, list[str]] = field(default_factory=dict)
    """By flag, the names of steps, or numbers of ranks, that it was given with."""

    @property
    def known(self) -> tuple[str, ...]:
        """Words that are taken literally."""
        return ("root", *(("conf",) if self.verb.config else ()), *self.verb.words)

    def flag(self, key: str, value: str | None, following: Iterator[str]) -> None:
        """A flag with the value behind its `=`; where there is none, a flag of steps takes the next word."""
        if key not in self.verb.flags:
            flags = ", ".join(self.verb.flags) or "none"
            raise UsageError(f"{self.name} has no flag {key}{nearest(key, self.verb.flags)}; it takes {flags}")
        if key not in WITH_VALUE:
            self.said.add(key)
            return
        given = next(following, "") if value is None else value
        if key == "--rank" and not (given.isdecimal() and len(given) <= LONGEST_NUMBER):
            raise UsageError(f"--rank needs the number of a rank, for example --rank 0, not '{given}'")
        if not given:
            raise UsageError(f"{key} needs a step's name, for example {key} train_c")
        self.steps.setdefault(key, []).append(given)

    def pair(self, key: str, value: str) -> None:
        """A word `key=value`: one of the verb's own, or an override."""
        if key not in FREE_TEXTS:
            check_no_password(key, value)
        if key in self.known:
            if key in self.own:
                raise UsageError(f"{key}= is given twice")
            self.own[key] = value
        elif self.verb.config:
            _check_no_typo(key, self.known)
            self.overrides.append(f"{key}={value}")
        else:
            taken = ", ".join(f"{other}=" for other in self.known)
            raise UsageError(f"{key}={value}: {self.name} takes no {key}={nearest(key, self.known)}; it takes {taken}")

    def bare(self, word: str) -> None:
        """A word without `=`."""
        if not self.verb.bare:
            raise UsageError(f"'{word}' is neither a flag nor key=value{nearest(word, self.verb.flags)}")
        if (does := self.verb.does) and not self.rest and word not in does:
            raise UsageError(f"{self.name} does no '{word}'{nearest(word, does)}; it does {', '.join(does)}")
        self.rest.append(word)

    def words(self) -> Words:
        """All of them; refuses what is given too often or empty."""
        start, until, only, why, rank = map(self._given, ("--from", "--until", "--only", "--why", "--rank"))
        own = dict(self.own)
        root, conf = own.pop("root", "runs"), own.pop("conf", None)
        if not root:
            raise UsageError("root= is empty; give a folder or a URI")
        if os.fsencode(root).decode(errors="ignore") != root:
            raise UsageError(f"root={root!a}: its name is no UTF-8, which stores and MLflow want; give another name")
        if NAMELESS.fullmatch(root):
            raise UsageError(f"root={root} names no bucket; give a folder, or a URI such as s3://bucket/prefix")
        if is_hollow(root):
            raise UsageError(f"root={root} has two slashes in a row, which is no path for Arrow; leave one out")
        if conf == "":
            raise UsageError(f"conf= is empty; name one of {', '.join(names())}")
        return Words(
            verb=self.name,
            conf=conf,
            root=root,
            own=own,
            overrides=self.overrides,
            rest=self.rest,
            selection=Selection(start, until, only, tuple(self.steps.get("--force", ()))),
            why=why,
            json="--json" in self.said,
            yes="--yes" in self.said,
            rebuild_mlflow="--rebuild-mlflow" in self.said,
            devices="--no-devices" not in self.said,
            rank=None if rank is None else int(rank),
            follow="--follow" in self.said,
        )

    def _given(self, flag: str) -> str | None:
        steps = self.steps.get(flag, [])
        if len(steps) > 1:
            raise UsageError(f"{flag} is given twice")
        return steps[0] if steps else None


def _check_no_typo(key: str, words: tuple[str, ...]) -> None:
    """Refuse what is no key of the config, but like a word of the verb."""
    keys = {*Config.model_fields, *groups()}
    near = difflib.get_close_matches(key, [*words, *keys], n=1)
    if "." not in key and key not in keys and near and near[0] in words:
        raise UsageError(f"{key}: there is no such word or key (did you mean {near[0]}?)")


def usage() -> str:
    """The help text: every verb on a line."""
    lines = ["python -m pipeline VERB conf=NAME [key=value ...] [flags]", ""]
    lines += [f"  {name:8} {verb.help}" for name, verb in VERBS.items()]
    lines += [
        "",
        "Example: python -m pipeline run conf=stage_c",
        "Flags of run and plan: --from --until --only --force STEP; of plan, the whole reason of a step: --why STEP",
        "Docs: docs/README.md; every verb with its words, flags and exit codes: docs/reference/verbs.md",
    ]
    return "\n".join(lines)
