"""`data retry`: pictures that were lost for a passing reason are asked for again."""

from collections import Counter

from datasets.formats import shards
from datasets.outcomes import PASSING
from pipeline.plan.dag import Planned
from pipeline.plan.wanted import planned_steps, wanted
from pipeline.repair import damage
from pipeline.run import invocation
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.selection import Selection
from pipeline.settings.words import Words
from pipeline.store.artifacts import Look, Store
from pipeline.terminal import console, out, print_json


def retry(config: Config, root: str, words: Words, command: str) -> None:
    """Download once more what was lost for a passing reason, as the next attempt, which takes over all the others.

    A download that was given up for its losses is gone on with instead: that asks again for them.

    Raises:
        UsageError: nothing is downloaded yet.
        CorruptFile: it is finished, but what says so is damaged.
    """
    look = Look(root)
    planned = planned_steps(config, look, Selection(until="download"))
    download = next(item for item in planned if item.step.output == "images")
    given_up = download.state == "resume"
    if given_up:
        damage.check_marks(Store(root).path("images", download.fingerprint.digest))
    lost, before = _downloaded(root, download) if given_up else _images(config, root)
    passing = {cause: count for cause, count in lost.items() if cause in PASSING}
    attempt, again, rows = config.data.attempt, config, before
    if passing and not given_up:
        attempt += 1
        again = compose.load(words.required_conf(), [*words.overrides, f"data.attempt={attempt}"])
        planned = planned_steps(again, look, Selection(until="download"))
    if passing or given_up:
        asked = ", ".join(f"{cause} {count:,}" for cause, count in sorted(passing.items(), key=lambda item: -item[1]))
        console.print(
            f"asking again for {sum(passing.values()):,} pictures ({asked}) with data.attempt={attempt}", markup=False
        )
        if any(item.state != "done" for item in planned):
            invocation.run(again, words.required_conf(), look, planned, command)
        _, rows = _images(again, root)
    if words.json:
        told = {"asked": passing, "gained": rows - before, "rows": rows, "attempt": attempt}
        print_json({"root": root, **told})
    elif passing or given_up:
        later = "" if given_up else f"; give data.attempt={attempt} from now on"
        out.print(f"{rows - before:,} pictures gained, {rows:,} in all{later}")
    else:
        out.print("nothing to retry: no picture was lost for a reason that may pass")


def _images(config: Config, root: str) -> tuple[dict[str, int], int]:
    """Pictures lost by cause, and how many are stored, of a finished download."""
    images = wanted(config, root, ["images"])["images"].manifest
    return images["notes"]["lost"], images["rows"]


def _downloaded(root: str, download: Planned) -> tuple[dict[str, int], int]:
    """The same of one that is not finished."""
    done = shards.finished(Store(root).path("images", download.fingerprint.digest)).values()
    lost: Counter[str] = Counter()
    for receipt in done:
        lost.update(receipt.dropped)
    return lost, sum(receipt.rows_out for receipt in done)
