"""What Prometheus sees of a real run on a small cluster, and what rules and board ask for."""

import os
import re
import subprocess
import sys
import time
import urllib.request

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


def test_every_series_that_rules_and_board_name_is_in_a_scrape_of_a_run(tmp_path):
    if not CLUSTER_PACKAGES.is_dir():
        pytest.skip("Ray tells no metrics without the packages of clusters: make test-cluster puts them there")
    words = ["run", "conf=stage_a", "scale=micro", f"root={tmp_path}", "workers=1"]
    seen: set[str] = set()
    with Raylets(1) as nodes:
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
