"""The verb `study`: `study build conf=NAME out=FILE.html`, and `study tally FILE...`."""

import secrets
from collections import Counter
from collections.abc import Sequence
from functools import partial
from random import Random
from typing import Any

from rich.table import Table

from datasets.files import json_files, storage
from datasets.files.errors import StorageError, StoreAway
from pipeline.errors import UsageError
from pipeline.models.contests import Contest, contest, examined
from pipeline.plan.wanted import wanted
from pipeline.settings.config import Config
from pipeline.settings.evaluation import BASELINE, NULL, samples_of
from pipeline.settings.words import Words
from pipeline.store.artifacts import Artifact, Store
from pipeline.store.readers import reading
from pipeline.store.redact import redact_command
from pipeline.terminal import console, counted, out, print_json, print_table
from pipeline.verbs.configured import configured
from pipeline.verbs.study import ballots, page, pairs
from pipeline.verbs.study.ballots import Row
from pipeline.verbs.study.pairs import ORIGINAL, Key
from pipeline.verbs.study.tally import Preference, Tally, tallied

FOLDER = "studies"
PAIRS, MOST = 60, 1000  # more than the 51 answers that the paper asks of a rater; a page's limit


def handle(words: Words) -> None:
    match words.rest:
        case ["build"]:
            build(words)
        case ["tally"]:
            raise UsageError("study tally needs the files that raters sent: python -m pipeline study tally FILE...")
        case ["tally", *files]:
            if words.conf or words.overrides or words.own:
                raise UsageError("study tally takes files, root= and --json alone; the study's key knows the rest")
            tally(files, words.root, words.json)
        case _:
            raise UsageError("study needs one of: build conf=NAME out=FILE.html, tally FILE...")


# ----------------------------------------------------------------------------------------------------------- build


def build(words: Words) -> None:
    """Write a page of blind pairs, and into the root the key that tells whose the pictures are.

    Raises:
        UsageError: a word is missing or wrong, `out` cannot be written, or there is nobody to compare with.
        NotBuilt: pictures are not drawn yet.
        DataError: a rival's are missing or no good.
    """
    asked = _page(words.own.get("out"))
    count = words.number("n", "how many pairs the page shows", 1, MOST) or PAIRS
    config, root = configured(words)
    found = _artifacts(config, root)
    with reading(Store(root), found.values(), partial(console.print, markup=False)):
        compared = [_compared(config, name, found) for name in config.prompt_sets()]
        made_of = {name: artifact.manifest["fingerprint"] for name, artifact in found.items()}
        about = {"command": redact_command(words.same), "seed": config.seed, "artifacts": made_of}
        key = pairs.drawn(compared, count, config.seed, Random(secrets.randbits(128)), about)
        content = page.html(key.study, page.shown(key, compared))
    place = storage.join(root, FOLDER, f"{key.study}.json")
    storage.publish(key.as_json(), place)  # first: a page without its key is of no use
    try:
        storage.publish(content, storage.absolute(asked))
    except StoreAway:
        raise
    except StorageError as error:
        storage.remove(place)
        raise UsageError(f"out={asked}: cannot be written ({error.strerror or error}); give another out=") from None
    _tell_page(words, asked, key, len(content))


def _page(asked: str | None) -> str:
    if not asked:
        raise UsageError("study build needs out=FILE.html")
    if not asked.lower().endswith((".html", ".htm")):
        raise UsageError(f"out={asked}: the page is an HTML file; give out=FILE.html")
    return asked


def _artifacts(config: Config, root: str) -> dict[str, Artifact]:
    """The pictures of exactly this config: ours, the baseline's where it is a rival; ours with other seeds where there
    is nobody else to compare with."""
    ours = {name: samples_of(name) for name in config.prompt_sets()}
    theirs = [f"{BASELINE}_{samples}" for samples in ours.values() if config.eval.baseline]
    found = wanted(config, root, [*ours.values(), *theirs])
    if config.eval.rivals:
        return found
    alone = [name for name, samples in ours.items() if not _has_originals(found[samples])]
    if alone and not config.eval.compares:
        raise UsageError(
            f"eval.rivals: there is nobody to compare with on {', '.join(alone)}, whose prompts have no originals; "
            "give eval.rivals.NAME=DIR, or a scorer, with which ours are drawn with other seeds too"
        )
    return found | (wanted(config, root, [f"{NULL}_{ours[name]}" for name in alone]) if alone else {})


def _has_originals(samples: Artifact) -> bool:
    return any(name.startswith(f"{ORIGINAL}/") for name in samples.files)


def _compared(config: Config, name: str, found: dict[str, Artifact]) -> Contest:
    """The pictures of everybody for a prompt set; what rivals lack is told."""
    made = contest(config, name, found)
    usable, lacking = examined(made, config.eval.allow_missing)
    for rival, told in lacking.items():
        console.print(f"eval.rivals.{rival}, prompts {name}: {told}; these are left out", style="yellow", markup=False)
    return Contest(made.name, made.rows, made.places, made.original, usable)


def _tell_page(words: Words, asked: str, key: Key, size: int) -> None:
    kinds = Counter((pair.set, pair.rival) for name, pair in key.pairs.items() if name not in key.controls)
    if words.json:
        shown = [{"set": name, "rival": rival, "pairs": count} for (name, rival), count in kinds.items()]
        print_json({"page": asked, "study": key.study, "bytes": size, "pairs": kinds.total(), "of": shown})
        return
    for (name, rival), count in kinds.items():
        out.print(f"{counted(count, 'pair')}: ours and {rival}, prompts {name}", markup=False)
    out.print(f"{asked}: study {key.study}, {size / 2**20:.1f} MiB; open it in a browser, or send it to people")
    root = "" if words.root == "runs" else f" root={words.root}"
    out.print(f"count the files that they send back: python -m pipeline study tally FILE...{root}", markup=False)


# ----------------------------------------------------------------------------------------------------------- tally


def tally(files: Sequence[str], root: str, as_json: bool) -> None:
    """Count answers: how often ours were preferred, by whom, on which prompts.

    Raises:
        UsageError: a file is missing or none of a study's, they are of several studies, or the root lacks the key.
    """
    rows = [row for file in files for row in ballots.rows(_content(file), file)]
    key = _key(rows, root)
    found = tallied(*ballots.sifted(rows, key), key)
    if as_json:
        print_json(found.as_dict())
    else:
        _show(found)


def _content(file: str) -> bytes:
    try:
        return storage.read(storage.absolute(file))
    except StoreAway:
        raise
    except StorageError as error:
        raise UsageError(
            f"{file}: cannot be read ({error.strerror or error}); give the files that raters sent"
        ) from None


def _key(rows: Sequence[Row], root: str) -> Key:
    """The key of the study that rows are of; those of studies that the root does not know may be among them."""
    if not rows:
        raise UsageError("the files hold no answers; give those of raters who answered")
    named = [name for name, _ in ballots.studies(rows).most_common() if name]
    if not named:
        raise UsageError("no answer in the files says which study it is of; give the files that the study's page made")
    folder = storage.join(storage.absolute(root), FOLDER)
    files = set(storage.listing(folder))
    there = {name: storage.join(folder, f"{name}.json") for name in named if f"{name}.json" in files}
    known = {name: key for name, file in there.items() if (key := json_files.read(file, Key.of))}
    if len(known) > 1:
        raise UsageError(f"the files hold answers of the studies {', '.join(known)}; count those of one at a time")
    if not known:
        raise UsageError(
            f"root={root} has no key of the study {named[0]}, which the files are of; give root= of where it was built"
        )
    return next(iter(known.values()))


def _show(found: Tally) -> None:
    columns = (
        "ours against",
        "prompts",
        "by",
        "raters",
        "n",
        "ours %",
        "theirs %",
        "neither %",
        "of the decided %",
    )
    lines = Table(*columns, box=None, pad_edge=False)
    for one in found.preferences:
        counts = (one.rival, one.set, one.by, str(one.raters), str(one.n))
        lines.add_row(*counts, *(_cell(one.share(answer)) for answer in ("ours", "theirs", "neither")), _decided(one))
    print_table(lines)
    for sentence in _sentences(found):
        out.print(sentence, markup=False)


def _cell(share: dict[str, Any]) -> str:
    return f"{100 * share['share']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"


def _decided(one: Preference) -> str:
    if not (share := one.decided):
        return ""
    return f"{_cell(share)} p {share['p']:.2g}" if share["p"] >= 1e-4 else f"{_cell(share)} p <0.0001"


def _sentences(found: Tally) -> list[str]:
    """What the table has no column for."""
    answers, raters = counted(found.answers, "answer"), counted(found.raters, "rater")
    said = [f"study {found.study}: {answers} by {raters}"]
    said.append(f"controls, the same picture twice: {found.controls} answered, {found.controls_failed} failed")
    if found.preferring:
        said.append(f"a picture is preferred in {counted(found.preferring, 'answer')}, the left one in {found.left}")
    if found.dropped:
        said.append("rows left out: " + ", ".join(f"{count} {cause}" for cause, count in found.dropped.items()))
    return said
