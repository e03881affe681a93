"""The verdict on an experiment in words: no more than its figures bear, each sentence with its figure and n."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.results.comparisons import rank
from stages.scoring.statistics import wilson_interval

SHORTS = 4  # findings in a headline: the last ones, which tell of what no training saw
SURE = 0.05  # p of the sign test below which a difference is told, where the interval leaves out a half too
KNOWN = 0.9  # share of pictures of its training captions from which a model is said to reproduce them


def section(document: Mapping[str, Any]) -> dict[str, Any]:
    """A headline, and the sentences that bear it out; of the rest of the document."""
    sentences = [*_wins(document), *_retrieval(document)]
    return {"headline": _headline(document, sentences), "sentences": [text for text, _ in sentences]}


def _headline(document: Mapping[str, Any], sentences: list[tuple[str, str]]) -> str:
    run = document["run"]
    outcome = run["outcome"] if run else "done"
    if outcome not in ("done", "running"):
        return f"Not finished: {outcome}"
    missing = [row["name"] for row in document["lineage"] if row["state"] != "done"]
    if missing:
        doing = "Still running" if outcome == "running" else "Not finished"
        return f"{doing}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there yet"
    if not document["scores"]:
        return "Finished; nothing was scored"
    shorts = [short for _, short in sentences]
    return "; ".join(shorts[-SHORTS:]) or "Finished and scored"


def _wins(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each rival on each prompt set, by the scorer that tells most; beside what chance alone gives."""
    table = (document["scores"] or {}).get("tables", {"rows": []})
    nulls = [row for row in table["rows"] if row["kind"] == "null"]
    chance = {(row["scorer"], name): line for row in nulls for name, line in row["cells"].items()}
    rivals = [row for row in table["rows"] if row["kind"] == "rival"]
    telling = min((row["scorer"] for row in rivals), key=rank, default=None)
    for row in rivals:
        for name, line in row["cells"].items():
            if row["scorer"] == telling:
                yield _against(line, row["scorer"], name, chance.get((row["scorer"], name)))


def _against(line: Mapping[str, Any], who: str, prompts: str, null: Mapping[str, Any] | None) -> tuple[str, str]:
    """A win rate in a sentence, and in few words."""
    rival = line["rival"]
    sure = line["p"] < SURE
    if sure and line["low"] > 0.5:
        judged, short = f"prefers ours to {rival}", f"better than {rival}"
    elif sure and line["high"] < 0.5:
        judged, short = f"prefers {rival} to ours", f"worse than {rival}"
    else:
        judged, short = f"cannot tell ours from {rival}", f"no difference to {rival} can be told"
    rate, low, high = (100 * line[key] for key in ("rate", "low", "high"))
    beside = f"; against itself with another seed it wins {100 * null['rate']:.1f} %" if null else ""
    share = f"{rate:.1f} % of {line['n']:,} prompts of {prompts} [{low:.1f}, {high:.1f}]"
    return f"{who} {judged}: ours wins {share}{beside}.", f"{short} by {who} on {prompts}"


def _retrieval(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How many pictures are nearest to their own originals: memory of what was trained on, and what is made of new."""
    metrics = {row["name"]: row for row in (document["scores"] or {}).get("metrics", ())}
    known, new = metrics.get("retrieval_top1"), metrics.get("retrieval_top1_heldout")
    if known and known["n"]:
        hits, n = round(known["value"] * known["n"]), known["n"]
        share = f"{hits} of {n}"
        yield (
            f"Of {n} captions that it was trained on, {_nearest(hits)} original (memory; chance would give about 1).",
            f"reproduces {share} training pictures",
        )
    if new and new["n"]:
        hits, n = round(new["value"] * new["n"]), new["n"]
        among = n + (known["n"] if known and known["n"] else 0)
        low, high = wilson_interval(hits, n)
        beyond = "more than chance" if low > 1 / among else "no more than chance can give"
        yield (
            f"Of {n} captions of pictures that no training saw, {_nearest(hits)} among {among} originals: "
            f"{100 * new['value']:.0f} % [{100 * low:.0f}, {100 * high:.0f}], {beyond} (1 in {among}).",
            f"gets {hits} of {n} held-out captions right",
        )


def _nearest(hits: int) -> str:
    return "1 picture is nearest to its own" if hits == 1 else f"{hits} pictures are nearest to their own"


def knows_by_heart(document: Mapping[str, Any]) -> bool | None:
    """Whether the pictures of its training captions are those that it was trained on; None where nobody measured it."""
    for row in (document["scores"] or {}).get("metrics", ()):
        if row["name"] == "retrieval_top1" and row["n"]:
            return bool(row["value"] >= KNOWN)
    return None
