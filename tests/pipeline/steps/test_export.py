"""The release's task does its work where our code is, and nothing else of the checkout."""

import os
import pickle
import shutil
import subprocess
import sys

from pipeline.cluster import joining
from pipeline.settings import compose
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
