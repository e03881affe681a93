"""What a model card says of an experiment, in sentences from the document alone: no more than is known."""

from collections.abc import Mapping
from typing import Any

from pipeline.hours.paper import hours_unit
from pipeline.models.distances import EVERYTHING
from pipeline.results.scores import OTHER_SEED
from pipeline.results.trainings import TITLES
from pipeline.results.verdict import knows_by_heart
from pipeline.settings.evaluation import NULL, OURS

FEW = 10_000  # pictures, below which a card says how few they are
NAMES = {"stage_a": "Stage A", "stage_b": "Stage B", "stage_c_phases": "Stage C", "stage_c": "Stage C"}
Document = Mapping[str, Any]


def trained_on(document: Document) -> list[str]:
    """How many pictures each stage that was trained here has learned from, what of its training was left out, and how
    many were held out of all."""
    seen = {row["artifact"]: row for row in document["trainings"] if row["artifact"] in NAMES}
    parts = [f"{NAMES[name]} {row['trained_on']:,}" for name, row in seen.items() if row["trained_on"] is not None]
    found = [f"Pictures that were trained on: {', '.join(parts)}."] if parts else []
    found += [
        f"Left out of the training of {TITLES[row['name']]}: {row['left_out']}."
        for row in document["trainings"]
        if row["artifact"] in NAMES and row["left_out"]
    ]
    if held := document["data"].get("held_out"):
        found.append(f"{held:,} pictures were held out of all trainings.")
    return found


def scores(document: Document) -> list[tuple[str, float, int | None, str]]:
    """Each figure with how many it is of, and of what; of win rates and distances also what chance alone gives."""
    told = document["scores"]
    if not told:
        return []
    found = [(row["name"], row["value"], row["n"], row["set"]) for row in told["metrics"]]
    for row in told["tables"]["rows"]:
        if row["kind"] != "paper":
            name = f"{row['scorer']}: share of wins {row['label']}"
            found += [(name, line["rate"], line["n"], prompts) for prompts, line in row["cells"].items()]
    for line in told["distances"]:
        if line["whose"] in (OURS, NULL) and line["part"] == EVERYTHING:
            told_of = f" {OTHER_SEED}" if line["whose"] == NULL else ""
            values = {"fid": line["fid"], "kid": line["kid"], "is": line["inception_score"]}
            found += [
                (f"{line['called'][kind]}{told_of}", value, line["n"], line["set"])
                for kind, value in values.items()
                if value is not None
            ]
    return found


def cost(document: Document) -> list[str]:
    """Device-hours of each training, each on its own kind of device; and of all that the release stands on."""
    found = []
    for row in document["cost"]["rows"]:
        if row["step"].startswith("train_"):
            tries = f"{row['attempts']} attempts, " if row["attempts"] > 1 else ""
            failed = f"{row['failed']:.4g} of them failed, " if row["failed"] else ""
            found.append(f"{row['step']}: {row['hours']:.4g} device-hours ({tries}{failed}on {row['kind']}).")
    kinds = document["cost"]["total"]["by_kind"]
    if any(kinds.values()):
        parts = (f"{hours:.4g} {hours_unit(kind).partition(',')[0]}" for kind, hours in sorted(kinds.items()))
        found.append(f"All that it stands on, data and evaluation included: {', '.join(parts)}.")
    found += [f"{energy}."] if (energy := document["cost"]["total"]["energy"]) else []
    found += [sentence for sentence in document["cost"]["sentences"] if sentence.endswith("are not in this")]
    return found or ["What it cost is not known: the ledger has nothing of it."]


def limitations(document: Document, *, random_text: bool, existing: bool) -> list[str]:
    """What holds for this model in particular.

    Args:
        random_text: whether its text tower has random weights.
        existing: whether Stage C comes, or started, from weights that had learned before.
    """
    found = []
    if random_text:
        found.append(
            "Its text tower has random weights: it tells the captions of its training data apart and understands none."
        )
    row = next((one for one in document["trainings"] if one["name"] == "stage_c"), None)
    few = row and row["trained_on"] is not None and row["trained_on"] < FEW
    if row and few and not existing:
        found.append(f"Stage C has seen {row['trained_on']:,} pictures and no other, in {row['steps']:,} steps.")
        if knows_by_heart(document):
            found.append("It knows them by heart, as the scores on training captions show.")
    return found + [text for text in document["verdict"]["sentences"] if "that no training saw" in text]


def lineage(document: Document) -> list[str]:
    """Commit and content of each stage."""
    found = []
    for row in document["lineage"]:
        if row["name"] in NAMES and row["state"] == "done":
            commit = row["commit"]
            at = f", built at commit {commit['sha']}{' with changes' if commit['changed'] else ''}" if commit else ""
            found.append(f"{NAMES[row['name']]}: fingerprint {row['fingerprint']}, content {row['content']}{at}.")
    return found
