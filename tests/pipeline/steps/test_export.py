"""The release's task does its work where our code is, and nothing else of the checkout; its licence is no other than
what it was made from has."""

import os
import pickle
import shutil
import subprocess
import sys

import pytest

from pipeline.cluster import joining
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.steps import export
from stages.weights.card import CardFacts

TASK = """
import pickle, sys
from types import SimpleNamespace
from pipeline.models import loading
from pipeline.steps import export
from stages.weights import release

assert export.__file__.startswith(sys.argv[1]), export.__file__
loading.everything = lambda *_: SimpleNamespace(compressor=())  # the card is what this is about
release.release_files = lambda *_, card, **__: [("README.md", card.encode())]
config, facts = pickle.load(sys.stdin.buffer)
print(sorted(export._write(config, {}, sys.argv[2], facts)[0]))
"""


def test_the_card_is_written_where_only_our_packages_are(tmp_path):
    sent, place = tmp_path / "sent", tmp_path / "release"
    for package in joining.code():
        shutil.copytree(package, sent / os.path.basename(package), ignore=shutil.ignore_patterns("__pycache__"))
    config = compose.load("stage_c", ["scale=micro"])
    facts = CardFacts("A model", "other", "a cat", config.sample, ["Pictures."], [], [], [])
    command = [sys.executable, "-c", TASK, str(sent), str(place)]
    environment = {**os.environ, "PYTHONPATH": str(sent)}
    payload = pickle.dumps((config, facts))
    subprocess.run(command, input=payload, cwd=tmp_path, env=environment, check=True, timeout=300)
    assert "a cat" in (place / "README.md").read_text()


@pytest.mark.parametrize(
    ("own", "bases", "found"),
    [
        ("CC BY-SA 4.0", [], "cc-by-sa-4.0"),
        ("CC BY-SA 4.0", ["cc-by-sa-4.0"], "cc-by-sa-4.0"),
        ("cc-by-4.0", ["cc-by-sa-4.0"], "other"),
        ("MIT", ["mit", None], "other"),
        (None, ["mit"], "other"),
    ],
)
def test_the_licence_is_that_of_all_that_the_model_was_made_from(own, bases, found):
    notes = {"source": "folder", "licence": {"licence": own, "attribution": "Anna"}, "licences": {}}
    notes |= {"opt_outs": {"x_robots_tag": ["noai"], "removal_list": None}}
    told = export.terms({"rows": 3, "notes": notes}, bases)
    assert told["identifier"] == found
    assert (f"Anna; {own}." in told["notice"]) == bool(own and bases), "the front matter has that of one alone"


def test_only_releases_of_what_began_as_other_weights_are_made_anew():
    tuned = compose.load("stage_c", ["scale=micro", "stage_c.weights=c.pt"])
    steps = [table(config) for config in (compose.load("stage_c", ["scale=micro"]), tuned)]
    assert [step.version for one in steps for step in one if step.name == "export"] == [2, 3]
