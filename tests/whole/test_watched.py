"""What Prometheus sees of a real run on a small cluster, and what rules and board ask for."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from pipeline.cluster.metrics import METRICS, MFU
from tests.raylets import CHECKOUT, CLUSTER_PACKAGES, Raylets

pytestmark = [pytest.mark.ray, pytest.mark.cluster]
PATIENCE_S = 300


def asked() -> set[str]:
    """The series that any rule or board names."""
    text = "".join((CHECKOUT / "infra/slurm" / name).read_text() for name in ("rules.yaml", "board.json"))
    return set(re.findall(r"\bray_\w+", text))


def scraped(port: str) -> str:
    """What a node tells."""
    for address in {address.address for cards in psutil.net_if_addrs().values() for address in cards}:
        if re.fullmatch(r"[\d.]+", address):
            try:
                with urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=5) as answer:
                    return answer.read().decode()
            except OSError:
                continue
    return ""


def doctor(root: Path, nodes: Raylets, *words: str, **variables: str) -> tuple[int, list[tuple[str, str, str]]]:
    """How it ends, and what it finds: checks, states and words."""
    command = [sys.executable, "-m", "pipeline", "doctor", "conf=stage_a", "scale=micro", f"root={root}"]
    environment = os.environ | nodes.environment | variables
    done = subprocess.run(
        [*command, *nodes.words, *words, "--json"], cwd=CHECKOUT, env=environment, capture_output=True, text=True
    )
    assert done.stdout, done.stderr
    return done.returncode, [tuple(finding.values()) for finding in json.loads(done.stdout)["findings"]]


def test_doctor_tells_of_each_node_and_a_wrong_token_is_a_sentence(tmp_path):
    with Raylets(1, 1) as nodes:
        code, found = doctor(tmp_path / "root", nodes, "workers=2")
        assert code == 0, found
        lines = [words for check, _, words in found if check.startswith("node ")]
        assert len(lines) == 2
        for line in lines:
            assert re.fullmatch(
                r"(\d+ GiB free in \S+, .*; )?1 CPUs, 0 GPUs, (\d+ GiB free, )?clock [+-]0\.\d+ s, "
                r"root \d+ MB/s written, \d+ read",
                line,
            )
        (ranks,) = [words for check, _, words in found if check == "ranks"]
        assert re.fullmatch(r"2 ranks add up 67 MB at \d+ MB/s \(gloo\)", ranks)
        assert not (tmp_path / "root").exists()
        code, found = doctor(tmp_path / "root", nodes, RAY_AUTH_TOKEN="0" * 64)
        assert code == 2
        (refusal,) = [words for check, state, words in found if (check, state) == ("nodes", "failed")]
        assert "another token" in refusal


def test_every_series_that_rules_and_board_name_is_in_a_scrape_of_a_run(tmp_path):
    if not CLUSTER_PACKAGES.is_dir():
        pytest.skip("Ray tells no metrics without the packages of clusters: make test-cluster puts them there")
    words = ["run", "conf=stage_a", "scale=micro", f"root={tmp_path}", "workers=1"]
    seen: set[str] = set()
    with Raylets(1, watched=True) as nodes:
        command = [sys.executable, "-m", "pipeline", *words, *nodes.words]
        driver = subprocess.Popen(
            command, cwd=CHECKOUT, env=os.environ | nodes.environment, stderr=subprocess.PIPE, text=True
        )
        try:
            deadline = time.monotonic() + PATIENCE_S
            while driver.poll() is None:
                assert time.monotonic() < deadline
                for port in nodes.tell("metrics"):
                    seen |= set(re.findall(r"^(ray_wuerstchen_\w+)\{", scraped(port), re.MULTILINE))
                time.sleep(0.3)
            said = driver.communicate()[1]
        finally:
            driver.kill()
    assert driver.returncode == 0, said
    ours = {metric.series for metric in METRICS}
    assert seen == ours - {MFU.series}  # nobody knows the peak of a CPU
    assert asked() == ours
