"""The files of `infra/`: rendered from the config, valid for their platforms, and safe."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.__main__ import main
from pipeline.environment import QUIET
from pipeline.plan.dag import order
from pipeline.plan.table import table, work_of
from pipeline.settings import compose
from pipeline.verbs.infra import phases

CHECKOUT = Path(__file__).parents[2]
INFRA = CHECKOUT / "infra"
KUBERAY = INFRA / "kuberay" / "rayjob.yaml"
CHECK = INFRA / "kuberay" / "check.yaml"
SLURM = INFRA / "slurm" / "job.sbatch"
AWS = INFRA / "aws" / "cluster.yaml"
DOCKERFILE = INFRA / "docker" / "Dockerfile"
FILES = sorted(path for path in INFRA.rglob("*") if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix in (".sh", ".sbatch")]
PLATFORMS = ("kuberay", "slurm", "aws", "hosts")
SEEN_ELSEWHERE = "SC1091,SC2016,SC2329"  # .venv is not there yet; $ for another shell; a function that a trap calls


def commands() -> dict[str, list[str]]:
    """The words after `infra render` of each command in infra/README.md, by platform."""
    text = (INFRA / "README.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^python -m pipeline (infra render .*)$", text, re.MULTILINE)
    found = {value(words, "cluster"): words for words in map(shlex.split, lines)}
    assert sorted(found) == sorted(PLATFORMS)
    return found


def value(words: list[str], key: str) -> str:
    (found,) = (word.partition("=")[2] for word in words if word.startswith(f"{key}="))
    return found


def rayjob() -> dict[str, Any]:
    return yaml.safe_load(KUBERAY.read_text())["spec"]


def pods() -> dict[str, dict[str, Any]]:
    """The pod templates of head, workers and check."""
    cluster = rayjob()["rayClusterSpec"]
    workers = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    check = yaml.safe_load(CHECK.read_text())["spec"]["template"]["spec"]
    return {"head": cluster["headGroupSpec"]["template"]["spec"], "check": check, **workers}


# --------------------------------------------------------------------------------------------------- rendering


@pytest.fixture(autouse=True)
def tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")


def rendered(folder: Path, words: list[str]) -> dict[str, str]:
    """What a command of the README makes in a folder, with further words."""
    here = [word for word in words if not word.startswith("out=")]
    assert main([*here, f"out={folder}"]) == 0
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_lies_here_is_what_the_readme_s_command_makes(platform, tmp_path):
    golden = {path.name: path.read_text() for path in (INFRA / platform).iterdir()}
    assert rendered(tmp_path, commands()[platform]) == golden


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_run_can_be_planned(platform, tmp_path, capsys):
    here = {"root": str(tmp_path), "data.metadata": "rows.parquet"}  # a plan looks at both; no store answers here
    words = [word for word in commands()[platform][2:] if word.partition("=")[0] not in {*here, "out"}]
    words = [word for word in words if ".weights=" not in word]
    assert main(["plan", *words, *(f"{key}={value}" for key, value in here.items())]) == 0
    assert "train_c" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_everything_about_a_platform_follows_its_keys(tmp_path):
    words = [
        *commands()["kuberay"],
        "workers=32",
        "cluster.nodes={count: 4, gpus: 8, cpus: 80, memory_gib: 500, kind: NVIDIA-H100-80GB-HBM3}",
        "cluster.job={platform: kuberay, image: 'registry.example/w:2', hours: 1.5, save_s: 60, restarts: 3, "
        "secret_name: null, queue: research, priority: low, pull_secret_name: key, fabric: {rdma/hca: 8}}",
    ]
    words.remove("workers=64")
    files = rendered(tmp_path, words)
    job = yaml.safe_load(files["rayjob.yaml"])
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    assert (job["spec"]["backoffLimit"], job["spec"]["activeDeadlineSeconds"]) == (3, 5400)
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 4
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert pod["terminationGracePeriodSeconds"] == 60
    assert pod["priorityClassName"] == "low"
    assert pod["imagePullSecrets"] == [{"name": "key"}]
    assert "envFrom" not in container
    assert container["image"] == "registry.example/w:2"
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    wanted = {"cpu": "80", "memory": "500Gi", "nvidia.com/gpu": "8", "rdma/hca": "8", "hugepages-2Mi": "5120Mi"}
    assert container["resources"] == {"requests": wanted, "limits": wanted}
    kubernetes_validate.validate(yaml.safe_load(files["check.yaml"]), "1.31", strict=True)


POOL = "cluster.pools={data: {work: [data], nodes: {count: 3, gpus: 0, cpus: 60, memory_gib: 240, kind: m6i.16xlarge}}}"


def test_a_pool_of_kuberay_starts_at_none_and_is_found_by_its_label(tmp_path):
    job = yaml.safe_load(
        rendered(tmp_path, [*commands()["kuberay"], POOL, "cluster.job.fabric={rdma/hca: 8}"])["rayjob.yaml"]
    )
    cluster = job["spec"]["rayClusterSpec"]
    assert (cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]["version"]) == (True, "v2")
    assert [
        (group["groupName"], group["minReplicas"], group["maxReplicas"], group["labels"])
        for group in cluster["workerGroupSpecs"]
    ] == [("workers", 0, 8, {"wuerstchen-pool": "workers"}), ("data", 0, 3, {"wuerstchen-pool": "data"})]
    (first,), (second,) = (group["template"]["spec"]["containers"] for group in cluster["workerGroupSpecs"])
    assert first["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert second["resources"]["limits"] == {"cpu": "60", "memory": "240Gi"}
    for group in cluster["workerGroupSpecs"]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)
    assert "enableInTreeAutoscaling" not in rayjob()["rayClusterSpec"]


def test_a_pool_of_aws_starts_at_none_and_has_no_gpus_nor_network_cards(tmp_path):
    tree = yaml.safe_load(rendered(tmp_path, [*commands()["aws"], POOL])["cluster.yaml"])
    validate_config(prepare_config(tree))
    types = tree["available_node_types"]
    assert {
        name: (kind["min_workers"], kind["max_workers"], kind["labels"])
        for name, kind in types.items()
        if name != "head"
    } == {
        "workers": (0, 8, {"wuerstchen-pool": "workers"}),
        "data": (0, 3, {"wuerstchen-pool": "data"}),
    }
    assert tree["max_workers"] == 11
    assert "docker" in types["workers"]
    assert not {"docker", "NetworkInterfaces"} & (types["data"].keys() | types["data"]["node_config"].keys())


@pytest.mark.parametrize(
    ("hours", "told"), [("1.995", "2:00:00"), ("0.005", "0:01:00"), ("24", "24:00:00"), ("1.25", "1:15:00")]
)
def test_slurm_is_told_whole_minutes_and_never_fewer(tmp_path, hours, told):
    """1:60:00 is no time, and 0:00:00 none at all."""
    files = rendered(tmp_path, [*commands()["slurm"], f"cluster.job.hours={hours}"])
    assert f"#SBATCH --time={told}\n" in files["job.sbatch"]


def test_on_slurm_a_pool_is_a_job_before_the_trainings(tmp_path):
    files = rendered(tmp_path, [*commands()["slurm"], POOL])
    first, second = files["data.sbatch"], files["job.sbatch"]
    assert "#SBATCH --nodes=3\n" in first
    assert "--gpus-per-node" not in first
    assert '\nset -- "$@" \'targets=[metadata,images' in first
    assert "]' cluster.device=cpu\n" in first
    assert "stage_" not in re.search(r"targets=\[(.*)\]'", first)[1]  # type: ignore[index]
    assert 'set -- "$@"' not in second
    assert "#SBATCH --gpus-per-node=8\n" in second
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "$@" >>"$0.said"\necho 7\n')
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    subprocess.run(["bash", str(tmp_path / "submit.sh"), "conf=stage_a"], check=True, env={"PATH": path}, timeout=60)
    assert (tmp_path / "sbatch.said").read_text().splitlines() == [
        f"--parsable --kill-on-invalid-dep=yes {tmp_path}/data.sbatch conf=stage_a",
        f"--parsable --kill-on-invalid-dep=yes --dependency=afterok:7 {tmp_path}/job.sbatch conf=stage_a",
    ]
    tool = shutil.which("shellcheck", path=Path(sys.executable).parent)
    scripts = [str(tmp_path / name) for name in ("data.sbatch", "submit.sh")]
    found = subprocess.run(
        [str(tool), "--shell=bash", f"--exclude={SEEN_ELSEWHERE}", *scripts], capture_output=True, text=True
    )
    assert found.stdout == ""


def test_a_part_of_a_run_needs_nothing_of_the_others():
    ((name, words),) = phases.parts(compose.load("stage_c", ["cluster=slurm", POOL])).items()
    assert name == "data"
    part = compose.load("stage_c", ["cluster=slurm", *shlex.split(words)])
    assert {work_of(step) for step in order(table(part), part.targets)} == {"data"}
    text = compose.load("stage_c", ["cluster=slurm", POOL.replace("work: [data]", "work: [data, text]")])
    assert "text_" in phases.parts(text)["data"]
    with pytest.raises(ValueError, match=r"cluster.pools.late: no step of this run"):
        phases.parts(
            compose.load("stage_c", ["cluster=slurm", POOL.replace("data: {work: [data]", "late: {work: [evaluate]")])
        )


@pytest.mark.parametrize(
    ("platform", "words", "told"),
    [
        ("kuberay", [POOL, "cluster.job.queue=research"], "Kueue admits a whole cluster at once"),
        ("hosts", [POOL], "plain hosts are there anyway"),
        ("slurm", [POOL.replace("data: {work", "Data: {work")], "cluster.pools.Data"),
        ("kuberay", ["root=runs"], "root=runs: the nodes of kuberay share no such folder; give a URI"),
        ("kuberay", ["root=/shared"], "root=/shared: the nodes of kuberay share no such folder; give a URI"),
        ("slurm", ["root=runs"], "root=runs: the nodes of slurm share no such folder; give an absolute path"),
        ("slurm", ["data.metadata=laion"], "data.metadata=laion lies on this machine; give data.metadata=/shared/"),
        ("slurm", ["compressor.weights=weights/efficientnet_v2_s-dd5fe13b.pth"],
         "get it with: python -m pipeline weights get efficientnet_v2_s out=/shared/wuerstchen/weights"),
        ("slurm", ["workers=65"], "workers=65: cluster.nodes has room for 64, 8 on each of 8; lower workers"),
        ("slurm", ["cluster.cpus_per_worker=9"], "the 8 ranks of a node want 72 cores, cluster.nodes.cpus=64"),
        ("slurm", ["cluster=local", "workers=1"], "cluster.job and cluster.nodes say to what a run is handed"),
        ("slurm", ["cluster.job.platform=pbs"], "cluster.job.platform"),
        ("slurm", ["stage_c.trian=null"], "stage_c.trian"),
        ("slurm", ["out="], "infra render needs out=DIR"),
    ],
)  # fmt: skip
def test_what_could_not_run_is_not_rendered(platform, words, told, tmp_path, capsys):
    new = {word.partition("=")[0] for word in words}
    kept = [word for word in commands()[platform] if word.partition("=")[0] not in {*new, "out"}]
    assert main([*kept, *([] if "out" in new else [f"out={tmp_path / 'new'}"]), *words]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_each_worker_has_its_gpu_and_cores():
    (group,) = rayjob()["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert group["replicas"] * gpus == int(value(commands()["kuberay"], "workers"))
    assert gpus * compose.load("stage_c", ["cluster=kuberay"]).cluster.cpus_per_worker <= 90


def test_neither_ray_nor_mlflow_reports_to_its_makers():
    """Where they are started beside our own processes, which have all switches."""
    ray, mlflow = (f"{name}={QUIET[name]}" for name in ("RAY_USAGE_STATS_ENABLED", "MLFLOW_DISABLE_TELEMETRY"))
    recipe, image = (INFRA / "README.md").read_text(), DOCKERFILE.read_text()
    for switch in (ray, mlflow):
        assert switch in recipe
        assert switch in image  # in which KubeRay and the MLflow server of a manifest are
    starts = re.compile("^[^#]*ray (up|start|symmetric-run)", re.MULTILINE)
    scripts = {path: found for path in SCRIPTS if (found := starts.search(path.read_text()))}
    assert scripts.keys() == {INFRA / "hosts" / "run.sh", INFRA / "aws" / "submit.sh", SLURM}
    for path, found in scripts.items():
        assert ray in path.read_text()[: found.end()]


# ------------------------------------------------------------------------------------------------------ syntax


def test_shellcheck_finds_nothing_in_the_scripts():
    tool = shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert tool
    assert len(SCRIPTS) == 5
    command = [tool, "--shell=bash", f"--exclude={SEEN_ELSEWHERE}", *map(str, SCRIPTS)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.stdout == ""
    typo = subprocess.run([tool, "--shell=bash", "-"], input="for x in *; do cat $x\n", capture_output=True, text=True)
    assert typo.returncode == 1


def test_hadolint_finds_nothing_in_the_image():
    tool = shutil.which("hadolint", path=Path(sys.executable).parent)
    assert tool
    assert subprocess.run([tool, str(DOCKERFILE)], capture_output=True, text=True).stdout == ""


def test_base_and_image_may_be_named_by_digest(tmp_path):
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert re.fullmatch(r"python:3\.12\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)
    pushed = f"registry.example/wuerstchen@sha256:{'0123456789abcdef' * 4}"
    postgres = f"postgres@sha256:{'fedcba9876543210' * 4}"
    images = [f"cluster.job.image={pushed}", f"cluster.job.postgres_image={postgres}"]
    files = rendered(tmp_path, [*commands()["kuberay"], *images])
    for name in ("rayjob.yaml", "check.yaml", "mlflow.yaml"):
        named = re.findall(r"^ *image: (.*)$", files[name], re.MULTILINE)
        assert pushed in named
        assert set(named) == ({pushed, postgres} if name == "mlflow.yaml" else {pushed})
        assert list(yaml.safe_load_all(files[name]))


def test_every_yaml_file_parses():
    files = [path for path in FILES if path.suffix in (".yaml", ".yml")]
    assert KUBERAY in files
    for path in files:
        assert list(yaml.safe_load_all(path.read_text()))


def test_pods_are_what_kubernetes_takes():
    kubernetes_validate.validate(yaml.safe_load(CHECK.read_text()), "1.31", strict=True)
    for name, spec in pods().items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        kubernetes_validate.validate(pod, "1.31", strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**pod, "spec": {**spec, "tolleration": []}}, "1.31", strict=True)


def test_the_mlflow_server_is_what_kubernetes_takes():
    trees = list(yaml.safe_load_all((INFRA / "kuberay" / "mlflow.yaml").read_text()))
    assert [tree["kind"] for tree in trees] == ["Service", "Deployment", "Service", "StatefulSet"]
    for tree in trees:
        kubernetes_validate.validate(tree, "1.31", strict=True)


def test_ray_s_launcher_takes_its_file():
    tree = yaml.safe_load(AWS.read_text())
    validate_config(prepare_config(tree))
    with pytest.raises(Exception, match="max_wrkers"):
        validate_config(prepare_config({**tree, "max_wrkers": 1}))


def test_the_cluster_has_the_locked_version_of_ray():
    for lock in ("requirements.lock", "requirements-cluster.lock"):
        (locked,) = re.findall(r"^ray(?:\[default\])?==(\S+)", (CHECKOUT / lock).read_text(), re.MULTILINE)
        assert rayjob()["rayClusterSpec"]["rayVersion"] == locked


def test_the_image_has_what_runs_need_at_the_versions_that_are_tested():
    tested, image = (
        dict(re.findall(r"^([a-z0-9._-]+)(?:\[.*\])?==(\S+)", (CHECKOUT / lock).read_text(), re.MULTILINE))
        for lock in ("requirements.lock", "requirements-cluster.lock")
    )
    assert {name: image[name] for name in tested if name in image} == {
        name: tested[name] for name in tested if name in image
    }
    assert {"torch", "mlflow", "img2dataset", "ray", "transformers"} <= image.keys()
    assert not {"pytest", "ruff", "mypy", "moto", "diffusers"} & image.keys()


def test_head_workers_and_check_run_one_image():
    images = {container["image"] for pod in pods().values() for container in pod["containers"]}
    assert len(images) == 1
    assert images.pop() in (INFRA / "README.md").read_text()


# -------------------------------------------------------------------------------------------- what is not repeated


@pytest.mark.parametrize(("code", "then"), [(0, 0), (1, 1), (2, 0), (3, 0), (4, 0), (5, 5), (6, 0), (130, 130)])
def test_what_another_try_cannot_mend_ends_as_done(code, then):
    command = ["bash", str(INFRA / "final.sh"), "bash", "-c", f"exit {code}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == then
    assert ("not started again" in ended.stderr) == (code in (2, 3, 4, 6))


def test_a_signal_reaches_the_command_which_ends_in_its_own_time():
    script = "trap 'sleep 0.3; echo saved; exit 143' TERM; echo ready; while :; do sleep 0.05; done"
    command = ["bash", str(INFRA / "final.sh"), "bash", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        assert running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGTERM)
        assert running.stdout.read() == "saved\n"
        assert running.wait() == 143


# ------------------------------------------------------------------------------------------------------ safety


def test_nothing_listens_on_every_address():
    """Of a machine: a pod's are its own."""
    everywhere = [path for path in FILES if re.search(r"\b0\.0\.0\.0\b|\[::\]", path.read_text())]
    assert everywhere == [INFRA / "kuberay" / "mlflow.yaml"]
    service, *_ = yaml.safe_load_all(everywhere[0].read_text())
    assert "type" not in service["spec"]  # reached from within the cluster alone


def test_ray_wants_a_token_everywhere():
    assert rayjob()["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for path in (SLURM, INFRA / "hosts" / "run.sh"):
        text = path.read_text()
        assert re.search("^export RAY_AUTH_MODE=token", text, re.MULTILINE)
        assert text.index("RAY_AUTH_MODE") < re.search("ray (symmetric-run|start)", text).start()  # type: ignore[union-attr]
    starts = [
        line for key in ("head", "worker") for line in yaml.safe_load(AWS.read_text())[f"{key}_start_ray_commands"]
    ]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
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
