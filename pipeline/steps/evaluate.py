"""evaluate: what the samples are worth, each picture by each scorer, and against the rivals' pictures."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets.config import DataError
from datasets.files import storage
from datasets.files.storage import FileEntry
from datasets.formats import shards
from pipeline.cluster.mapping import Made, chunked
from pipeline.models import contests, distances, drawing_speed, score_tables
from pipeline.models.contests import Contest
from pipeline.models.score_tables import LIKENED, PREVIEW, RIVAL
from pipeline.settings.config import Config
from pipeline.settings.evaluation import HELD_OUT, TRAINING, samples_of
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact
from stages.sampling.grid import grid

CHUNK = 64  # prompts between two receipts
MOST_RETRIEVED = 4096  # pictures: each is compared with all originals
Wanted = tuple[str, str]  # key and caption of a prompt
Pictures = Mapping[Wanted, np.ndarray]
COLUMNS = {
    "original": "original",
    "stage_a": "Stage A alone",
    "stage_b": "Stages B + A",
    "score": "from its caption",
    "preview": "its code, previewed",
}


def evaluate(build: Build) -> Facts:
    """samples of each prompt set, and of rivals -> scores: a table with a row a prompt and scorer, and its sums.

    With the features of such sets, and the times that drawing took, where these were asked for."""
    config, building = build.config, storage.join(build.building, "scores")
    found, notes = build.call(_prepare, config, build.inputs)
    chunks = [(contest.name, rows) for contest in found for rows in chunked(contest.rows, CHUNK).values()]
    arguments = (config, {contest.name: replace(contest, rows=[]) for contest in found}, build.device)
    total = sum(len(contest.rows) for contest in found)
    receipts = build.map_shards(Marker, arguments, dict(enumerate(chunks)), total, "pictures", building)
    parts = [storage.join(building, name) for receipt in receipts for name in receipt.files]
    files, rows, metrics, pid = build.call(_publish, config, build.inputs, found, parts, build.path)
    build.report.metrics(metrics, 0)
    return Facts(
        files=files,
        rows=rows,
        call="ray.data.Dataset.map_batches",
        workers=sorted({pid, *(receipt.pid for receipt in receipts)}),
        metrics=metrics,
        notes=notes,
    )


def _prepare(config: Config, inputs: Mapping[str, Artifact]) -> tuple[list[Contest], dict[str, Any]]:
    """Who contends on each prompt set, and what there is to say of it.

    Raises:
        DataError: a rival's pictures are missing or no good.
    """
    found, sets = [], {}
    for name in config.drawn_sets():
        contest = contests.contest(config, name, inputs)
        usable, told = contests.examined(contest, config.eval.allow_missing)
        found.append(replace(contest, usable=usable))
        about = inputs[samples_of(name)].manifest["notes"].get("prompts", {"set": name, "n": len(contest.rows)})
        sets[name] = about | ({"rivals": told} if told else {})
    notes = {
        "prompts": sets,
        "retrieval_top1": "memory: share of the pictures for captions that were trained on whose nearest original (L2 "
        "of RGB at 32x32) is their own; _heldout: the same of pictures that no training saw, among all originals",
    }
    return found, notes


class Marker:
    """Scores the pictures of everybody for one chunk of a set's prompts: rows of the table.

    found: the contest on each set, by its name, without rows.
    """

    def __init__(self, config: Config, found: Mapping[str, Contest], device: str):
        from pipeline.models import loading, scorers

        self.contests, self.batch = found, config.eval.batch
        self.places = {
            name: {column: place.open() for column, place in contest.places.items()} for name, contest in found.items()
        }
        self.scorers = scorers.load(config, str(loading.device(device)))
        self.schema = score_tables.schema(config.eval.rivals, config.sample.ablations)

    def __call__(self, number: int, chunk: tuple[str, Sequence[dict[str, Any]]]) -> Made:
        name, rows = chunk
        lines = [line for part in chunked(rows, self.batch).values() for line in self.marked(name, part)]
        return Made(len(rows), {shards.tensor_name(number): shards.table_bytes(lines, self.schema)})

    def marked(self, of: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The table's rows of a batch of a set's prompts: one for each prompt and scorer, prompt by prompt."""
        contest = self.contests[of]
        wanted = [(row["key"], row["caption"]) for row in rows]
        original = contest.original
        originals = {one: original.pixels(one) for one in wanted} if original else {}
        taken = {name: scorer for name, scorer in self.scorers.items() if originals or not scorer.wants_originals}
        marks: dict[str, dict[str, dict[Wanted, float]]] = {name: {} for name in taken}
        for column, place in self.places[of].items():
            pictures = {one: place.pixels(one) for one in wanted if contest.takes(column, one[0])}
            for name, scorer in taken.items():
                if pictures and (scorer.wants_originals or column not in LIKENED):
                    like = self._drawn_like(of, pictures) if column == PREVIEW else originals
                    marks[name][column] = self._scores(scorer, (name, of), pictures, like)
        about = [{"set": of, "prompt": row["caption"], **row} for row in rows]
        return [
            {name: row.get(name) for name in self.schema.names}
            | {"scorer": scorer, "truncated": taken[scorer].is_truncated(row["prompt"])}
            | {column: scores.get(one) for column, scores in columns.items()}
            for one, row in zip(wanted, about, strict=True)
            for scorer, columns in marks.items()
        ]

    def _drawn_like(self, of: str, previews: Pictures) -> Pictures:
        """Our own pictures in the size of their previews: how much of each the code decides."""
        ours = self.places[of]["score"]
        return {one: contests.fit(ours.pixels(one), preview) for one, preview in previews.items()}

    def _scores(self, scorer: Any, of: tuple[str, str], pictures: Pictures, originals: Pictures) -> dict[Wanted, float]:
        like = [originals[one] for one in pictures] if originals else None
        shown = [*pictures.values()]
        if like and scorer.wants_originals:
            shown = [contests.fit(picture, other) for picture, other in zip(shown, like, strict=True)]
        scores = scorer(shown, [caption for _, caption in pictures], like)
        for (key, _), score in zip(pictures, scores, strict=True):
            if not np.isfinite(score):
                name, prompts = of
                raise DataError(f"{name} gives {score} to the picture {key} of {prompts}; look at its weights")
        return {one: float(score) for one, score in zip(pictures, scores, strict=True)}


def _publish(
    config: Config, inputs: Mapping[str, Artifact], found: Sequence[Contest], parts: Sequence[str], path: str
) -> tuple[dict[str, FileEntry], int, dict[str, float], int]:
    """Put the parts of the table together, and write what it comes to."""
    from pipeline.models import scorers

    read = (pq.read_table(pa.BufferReader(storage.read(part))) for part in parts)
    table = score_tables.put_together(read, scorers.names(config))
    lines, apart, timed = score_tables.win_rates(table), distances.measured(config, inputs), drawing_speed.read(inputs)
    metrics = _retrieval(found) | score_tables.metrics(table, lines)
    metrics |= distances.metrics(apart) | drawing_speed.metrics(timed)
    tables: dict[str, Sequence[Any]] = {score_tables.TABLES: lines, distances.FILE: apart, drawing_speed.FILE: timed}
    contents = {score_tables.FILE: shards.parquet_bytes(table)} | {
        name: json.dumps([asdict(line) for line in rows], indent=1, ensure_ascii=False).encode()
        for name, rows in tables.items()
        if rows or name == score_tables.TABLES
    }
    if sheet := _sheet(found):
        contents["grid.png"] = sheet
    files = {name: storage.publish(content, storage.join(path, name)) for name, content in contents.items()}
    return files, table.num_rows, metrics, os.getpid()


def _retrieval(found: Sequence[Contest]) -> dict[str, float]:
    """Whether the nearest original is a picture's own, where there are originals, and few enough to compare all."""
    from stages.scoring.metrics import retrieved, thumbnail

    metrics: dict[str, float] = {}
    others: list[np.ndarray] = []  # the training's originals, among which held-out pictures have to be told too
    for contest in sorted(found, key=lambda contest: contest.name != TRAINING):
        if contest.original is None or len(contest.rows) + len(others) > MOST_RETRIEVED:
            continue
        wanted = [(row["key"], row["caption"]) for row in contest.rows]
        originals = [thumbnail(contest.original.pixels(one)) for one in wanted]
        columns = {"": "score", "_stage_b": "stage_b"}
        trained = contest.places.get(f"{RIVAL}baseline")
        columns |= {"_baseline": f"{RIVAL}baseline"} if trained and not trained.outside else {}
        for name, column in columns.items():
            place = contest.places[column].open()
            hits = retrieved([thumbnail(place.pixels(one)) for one in wanted], [*originals, *others])
            metrics[f"retrieval_top1{name}{'_heldout' * (contest.name == HELD_OUT)}"] = float(hits.mean())
        others = originals if contest.name == TRAINING else others
    return metrics


def _sheet(found: Sequence[Contest]) -> bytes | None:
    """PNG of held-out captions, labelled, above some that were trained on; None where none are held out."""
    by_name = {contest.name: contest for contest in found}
    if HELD_OUT not in by_name or by_name[HELD_OUT].original is None:
        return None
    rows = []
    for contest, label in ((by_name[HELD_OUT], "held out: "), (by_name[TRAINING], "")):
        for row in contest.rows[:32]:
            wanted = (row["key"], row["caption"])
            assert contest.original is not None
            places = {"original": contest.original, **contest.places}
            columns = {column: title for column, title in COLUMNS.items() if column in places}
            rows.append((label + row["caption"], [places[column].open().pixels(wanted) for column in columns]))
    return grid(tuple(columns.values()), rows, blocks=2)
