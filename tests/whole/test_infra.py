"""The files of `infra/`: their command lines are planned as they stand, and what they promise about safety holds."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.__main__ import main
from pipeline.settings import compose

CHECKOUT = Path(__file__).parents[2]
INFRA = CHECKOUT / "infra"
KUBERAY = INFRA / "kuberay" / "rayjob.yaml"
SLURM = sorted((INFRA / "slurm").glob("*.sbatch"))
DOCKERFILE = INFRA / "docker" / "Dockerfile"
FILES = sorted(path for path in INFRA.rglob("*") if path.is_file())


def command(file: Path) -> list[str]:
    """The words after `python -m pipeline` in a file, with lines that go on joined."""
    (found,) = re.findall(r"python -m pipeline (run .*?)(?: &)?$", file.read_text().replace("\\\n", " "), re.MULTILINE)
    return shlex.split(found)


def value(words: list[str], key: str) -> str:
    (found,) = (word.partition("=")[2] for word in words if word.startswith(f"{key}="))
    return found


def rayjob() -> dict[str, Any]:
    return yaml.safe_load(KUBERAY.read_text())["spec"]


def pods() -> dict[str, dict[str, Any]]:
    """The pod templates of head and workers."""
    cluster = rayjob()["rayClusterSpec"]
    workers = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]["spec"], **workers}


def directive(script: Path, name: str) -> int:
    """A number from a script's #SBATCH lines."""
    (found,) = re.findall(rf"^#SBATCH --{name}=(\d+)$", script.read_text(), re.MULTILINE)
    return int(found)


# ---------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("file", [KUBERAY, *SLURM], ids=lambda file: file.name)
def test_the_command_line_can_be_planned(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    words = command(file)
    assert words[0] == "run"
    assert {"conf=stage_c", "scale=paper"} <= set(words)
    here = {"root": str(tmp_path), "data.metadata": "rows.parquet"}  # a plan looks at both; no store answers here
    others = [word for word in words[1:] if word.partition("=")[0] not in here]
    assert main(["plan", *others, *(f"{key}={value}" for key, value in here.items())]) == 0
    assert "train_c" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_kuberay_gives_each_worker_its_gpu_and_cores():
    words = command(KUBERAY)
    assert rayjob()["entrypoint"].endswith(shlex.join(words))
    (group,) = rayjob()["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert group["replicas"] * gpus == int(value(words, "workers"))
    assert gpus * cores_of_a_worker(words) <= int(container["resources"]["requests"]["cpu"])


@pytest.mark.parametrize("script", SLURM, ids=lambda file: file.name)
def test_slurm_gives_each_worker_its_gpu_and_cores(script):
    words = command(script)
    gpus = directive(script, "gpus-per-node")
    assert directive(script, "nodes") * gpus == int(value(words, "workers"))
    assert gpus * cores_of_a_worker(words) <= directive(script, "cpus-per-task")


def cores_of_a_worker(words: list[str]) -> int:
    overrides = [word for word in words[1:] if word.startswith("cluster=")]
    return compose.load("stage_c", [*overrides, "scale=micro"]).cluster.cpus_per_worker


# ------------------------------------------------------------------------------------------------------ syntax


@pytest.mark.parametrize("script", SLURM, ids=lambda file: file.name)
def test_bash_can_parse_the_scripts(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_every_yaml_file_parses():
    files = [path for path in FILES if path.suffix in (".yaml", ".yml")]
    assert KUBERAY in files
    for path in files:
        assert list(yaml.safe_load_all(path.read_text()))


def test_the_cluster_has_the_locked_version_of_ray():
    (locked,) = re.findall(r"^ray==(\S+)", (CHECKOUT / "requirements.lock").read_text(), re.MULTILINE)
    assert rayjob()["rayClusterSpec"]["rayVersion"] == locked


def test_head_and_workers_run_one_image():
    images = {container["image"] for pod in pods().values() for container in pod["containers"]}
    assert len(images) == 1
    assert images.pop() in (INFRA / "README.md").read_text()


# ------------------------------------------------------------------------------------------------------ safety


def test_nothing_listens_on_every_address():
    assert not [path for path in FILES if re.search(r"\b0\.0\.0\.0\b|\[::\]", path.read_text())]


def test_ray_wants_a_token_everywhere():
    assert rayjob()["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for script in SLURM:
        text = script.read_text()
        assert "\nexport RAY_AUTH_MODE=token" in text
        assert text.index("RAY_AUTH_MODE") < text.index("ray symmetric-run")
    assert "RAY_AUTH_MODE=token" in DOCKERFILE.read_text()


def test_nothing_runs_as_root():
    *_, user = re.findall(r"^USER (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert int(user) > 0
    for pod in pods().values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == int(user)


def test_credentials_come_from_secrets_only():
    for pod in pods().values():
        for container in pod["containers"]:
            names = [variable["name"] for variable in container.get("env", [])]
            assert not [name for name in names if re.search("KEY|SECRET|PASSWORD|TOKEN$", name)]
