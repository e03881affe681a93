"""The tables of an evaluation, from `scores.parquet` alone: means, win rates, and what chance alone would give.

set, key, prompt, category, challenge, seed   which picture
scorer, truncated                             by whom, and whether it saw only the beginning of the prompt
score, null, rival_<name>, stage_a, stage_b   ours; ours with another seed; the rivals'; reconstructions
preview, without_text                         where they are drawn: what the previewer sees in our code, by its likeness
                                              to ours; Stage B's reconstruction without the caption
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.settings.evaluation import HELD_OUT, NULL, TRAINING
from stages.scoring.statistics import WinRate, win_rate, win_rates_by

FILE, TABLES = "scores.parquet", "tables.json"
RIVAL = "rival_"
RECONSTRUCTIONS = ("stage_a", "stage_b")
PREVIEW = "preview"
ABLATIONS = (PREVIEW, "without_text")
LIKENED = (*RECONSTRUCTIONS, *ABLATIONS)  # columns of which only likeness is measured
LIKENESSES = {"psnr": 1, "ssim": 1, "lpips": -1}  # scorers that need an original: is more of it better?
EVERYTHING = "all"


@dataclass(frozen=True, kw_only=True)
class Line(WinRate):
    """A win rate of ours over a rival (`null`: ourselves with another seed) on a prompt set, or on a part of it."""

    scorer: str
    set: str
    rival: str
    part: str


def schema(rivals: Iterable[str], ablations: Iterable[str] = ()) -> pa.Schema:
    """Of the table, for rivals of these names and what is drawn beside the pictures."""
    texts = {name: pa.string() for name in ("set", "key", "prompt", "category", "challenge")}
    scored = ("score", NULL, *(f"{RIVAL}{name}" for name in sorted(rivals)), *RECONSTRUCTIONS, *ablations)
    return pa.schema(
        {**texts, "seed": pa.int64(), "scorer": pa.string(), "truncated": pa.bool_()}
        | dict.fromkeys(scored, pa.float32())
    )


def put_together(parts: Iterable[pa.Table], called: Mapping[str, str]) -> pa.Table:
    """The table of its parts, in which scorers go by their keys of the config, with what each of them is `called`.

    Decided once, of the whole: what a file may be called changes when somebody vouches for it (`weights verify`)."""
    table = pa.concat_tables(parts)
    keys = table["scorer"].to_pylist()
    place = table.schema.get_field_index("scorer")
    names = pa.array([called.get(key, key) for key in keys], pa.string())
    return table.set_column(place, table.schema.field(place), names)


def win_rates(table: pa.Table) -> list[Line]:
    """Every win rate that a table of scores holds: over all prompts of a set, and by their category and challenge."""
    rivals = [name for name in table.column_names if name.startswith(RIVAL)]
    columns = [*rivals, *([NULL] if NULL in table.column_names else [])]
    found: list[Line] = []
    for prompts, scorer, rows in _by_set_and_scorer(table):
        for column in columns:
            both = rows.filter(pc.field("score").is_valid() & pc.field(column).is_valid())
            if both.num_rows:
                found += _lines(both, scorer, prompts, column)
    return found


def _lines(rows: pa.Table, scorer: str, prompts: str, column: str) -> Iterator[Line]:
    sign = LIKENESSES.get(scorer, 1)
    ours, theirs = (sign * rows[name].to_numpy() for name in ("score", column))
    parts: dict[str, WinRate] = {EVERYTHING: win_rate(ours, theirs)}
    for kind in ("category", "challenge"):
        groups = win_rates_by(rows[kind].to_pylist(), ours, theirs)
        parts |= {f"{kind}: {name}": won for name, won in groups.items()}
    for part, won in parts.items():
        yield Line(scorer=scorer, set=prompts, rival=column.removeprefix(RIVAL), part=part, **asdict(won))


def metrics(table: pa.Table, lines: Sequence[Line]) -> dict[str, float]:
    """What a table comes to, by name. Of captions of the data: likeness to their originals, of the generated pictures
    only where they were trained on; of all sets the scorers' means and win rates, with n."""
    found: dict[str, float] = {}
    for prompts, scorer, rows in _by_set_and_scorer(table):
        suffix = {TRAINING: "", HELD_OUT: "_heldout"}.get(prompts)
        if suffix is not None:
            found[f"n_{prompts.replace('_', '')}"] = rows.num_rows
        if scorer in LIKENESSES:
            assert suffix is not None, f"{scorer} needs originals"
            rivals = {"baseline": f"{RIVAL}baseline"} if f"{RIVAL}baseline" in rows.column_names else {}
            columns = {name: name for name in LIKENED if name in rows.column_names}
            columns |= {} if suffix else {"generated": "score", **rivals}
            means = {f"{scorer}_{name}{suffix}": _mean(rows, column) for name, column in columns.items()}
            found |= {name: mean for name, mean in means.items() if mean is not None}
        else:
            mean = _mean(rows, "score")
            assert mean is not None, "ours are always scored"
            found |= {f"{scorer}/{prompts}/mean": mean, f"{scorer}/{prompts}/n": rows.num_rows}
            found[f"{scorer}/{prompts}/truncated"] = pc.sum(rows["truncated"]).as_py()
    for line in lines:
        if line.part == EVERYTHING:
            about = f"{line.scorer}/{line.set}/{line.rival}"
            facts = {"win_rate": line.rate, "win_low": line.low, "win_high": line.high, "ties": line.ties, "n": line.n}
            found |= {
                f"{about}/{name}": value for name, value in (facts | {"margin": line.margin, "p": line.p}).items()
            }
    return {name: float(value) for name, value in found.items()}


def _by_set_and_scorer(table: pa.Table) -> Iterator[tuple[str, str, pa.Table]]:
    """Rows of each prompt set and scorer, in the order in which they come."""
    pairs = table.select(["set", "scorer"]).group_by(["set", "scorer"], use_threads=False).aggregate([]).to_pylist()
    for pair in pairs:
        yield (
            pair["set"],
            pair["scorer"],
            table.filter((pc.field("set") == pair["set"]) & (pc.field("scorer") == pair["scorer"])),
        )


def _mean(rows: pa.Table, column: str) -> float | None:
    """In fp64; None where there is no value."""
    values = rows[column].drop_null().to_numpy().astype(np.float64)
    return float(values.mean()) if len(values) else None
