"""Rules and board: they follow the keys, name nothing that is not told, and leave nothing out that is."""

import json
import re

import pytest
import yaml

from pipeline.cluster.metrics import METRICS
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.verbs.infra import monitoring

NAME = "wuerstchen-stage-c"
SERIES = {metric.series: {"run", "step", *metric.labels} for metric in METRICS}


def config(*words: str) -> Config:
    return compose.load("stage_c", ["cluster=slurm", *words])


def files(*words: str) -> dict[str, str]:
    made = config(*words)
    assert made.cluster.job
    return dict(monitoring.files(made, made.cluster.job, NAME))


def test_thresholds_follow_the_keys():
    words = [
        "cluster.stall_s=90",
        "data.download.max_lost=0.25",
        "cluster.job.alerts={checkpoint_minutes: 5, mfu: 0.4}",
    ]
    rules = yaml.safe_load(files(*words)["rules.yaml"])["groups"][0]["rules"]
    when = {rule["alert"]: rule["expr"] for rule in rules}
    assert when["WuerstchenStalled"].endswith(" > 180")
    assert when["WuerstchenNoCheckpoint"].endswith(" > 300")
    assert " > 0.25 * " in when["WuerstchenLosingPictures"]
    assert when["WuerstchenSlow"].endswith(" < 0.4")


@pytest.mark.parametrize("platform", ["slurm", "kuberay"])
def test_all_that_is_named_is_told_and_all_that_is_told_is_shown(platform):
    text = "".join(files(f"cluster={platform}").values())
    assert set(re.findall(r"\bray_\w+", text)) == SERIES.keys()
    labels = set(re.findall(r"\{\{(\w+)\}\}|\$labels\.(\w+)", text))
    grouped = {name.strip() for found in re.findall(r"(?:by|on) \(([\w, ]+)\)", text) for name in found.split(",")}
    assert {name for pair in labels for name in pair if name} | grouped <= set().union(*SERIES.values())


def test_on_kubernetes_the_pods_are_found_by_their_label():
    monitor, rules, board = yaml.safe_load_all(files("cluster=kuberay")["monitoring.yaml"])
    assert monitor["spec"]["selector"]["matchLabels"] == monitoring.LABEL
    assert rules["spec"]["groups"][0]["rules"]
    ours = json.loads(board["data"]["board.json"])
    assert ours == json.loads(files()["board.json"])
    assert len({panel["title"] for panel in ours["panels"]}) == len(ours["panels"])
