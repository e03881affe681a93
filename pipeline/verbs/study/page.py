"""The page of a study: one HTML file with all pictures in it, which asks no server for anything and sends nothing."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.models import contests
from pipeline.models.contests import Contest
from pipeline.verbs.study.pairs import CONTROL, Key, opponents

TEMPLATE = Path(__file__).with_name("page.html")
DATA = "{{STUDY}}"
SIDE = 512  # px, the longest that is shown: two stand beside each other on a screen
QUALITY = 90  # of JPEG, at which nobody tells the pictures from the PNGs that they were


def shown(key: Key, compared: Sequence[Contest]) -> list[dict[str, str]]:
    """Each pair as the page has it: its name, the prompt, pictures `a` and `b` in the same size; nothing of whose
    they are."""
    found = {contest.name: contest for contest in compared}
    prompts = {(contest.name, row["key"]): row["caption"] for contest in compared for row in contest.rows}
    places = {
        (contest.name, rival): place.open() for contest in compared for rival, place in opponents(contest).items()
    }
    entries = []
    for name, pair in key.pairs.items():
        wanted = (pair.key, prompts[pair.set, pair.key])
        ours = found[pair.set].places["score"].pixels(wanted)
        theirs = ours if pair.ours == CONTROL else contests.fit(places[pair.set, pair.rival].pixels(wanted), ours)
        a, b = (theirs, ours) if pair.ours == "b" else (ours, theirs)
        entries.append({"id": name, "prompt": wanted[1], "a": address(a), "b": address(b)})
    return entries


def address(picture: np.ndarray) -> str:
    """A uint8 picture (H, W, 3) as a small JPEG in an address of its own."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    image.save(buffer, "JPEG", quality=QUALITY, subsampling="4:4:4", optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def html(study: str, entries: Sequence[dict[str, Any]]) -> bytes:
    """The page. Prompts may hold anything: nothing in them ends the script that they stand in."""
    data = json.dumps({"study": study, "pairs": list(entries)}, ensure_ascii=False).replace("<", "\\u003c")
    before, after = TEMPLATE.read_text("utf-8").split(DATA)
    return f"{before}{data}{after}".encode()
