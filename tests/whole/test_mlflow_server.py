"""The MLflow server that `infra/kuberay/mlflow.yaml` starts, on a real Postgres and a real object store."""

import base64
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import postgres
from tests.conftest import MICRO
from tests.faulty_store import FaultyStore
from tests.postgres import free_port, wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.cluster,
    pytest.mark.skipif(postgres.lacking() is not None, reason=str(postgres.lacking())),
]
MANIFEST = Path(__file__).parents[2] / "infra" / "kuberay" / "mlflow.yaml"
SECRET = {
    "POSTGRES_PASSWORD": postgres.PASSWORD,
    "MLFLOW_AUTH_ADMIN_PASSWORD": "a" * 24,
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "s",
}


def container() -> dict[str, Any]:
    (found,) = (
        tree["spec"]["template"]["spec"]["containers"][0]
        for tree in yaml.safe_load_all(MANIFEST.read_text())
        if tree["kind"] == "Deployment"
    )
    return dict(found)


def environment(database: int, folder: Path, destination: str) -> dict[str, str]:
    """What Kubernetes makes of the container's `env`, with addresses of this machine."""
    here = {
        "HOST": "127.0.0.1",
        "LISTEN": "127.0.0.1",
        "DESTINATION": destination,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
    }
    values: dict[str, str] = {}
    for variable in container()["env"]:
        name, source = variable["name"], variable.get("valueFrom", {}).get("secretKeyRef")
        text = SECRET[source["key"]] if source else here.get(name, variable.get("value"))
        values[name] = re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], text)
    values["MLFLOW_BACKEND_STORE_URI"] = values["MLFLOW_BACKEND_STORE_URI"].replace(
        "@mlflow-postgres/", f"@127.0.0.1:{database}/"
    )
    return values


@contextmanager
def mlflow(folder: Path, variables: dict[str, str]) -> Iterator[str]:
    """The container's own command, which listens on a free port; its address."""
    script, port = container()["args"][0], free_port()
    assert script.count("5000") == 5
    script = script.replace("python -m mlflow", f"{sys.executable} -m mlflow").replace("5000", str(port))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    log = folder / "mlflow.log"
    with log.open("wb") as told:
        process = subprocess.Popen(
            [*container()["command"], script],
            env={**os.environ, **variables, "PATH": path},
            stdout=told,
            stderr=told,
            cwd=folder,
        )
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health") == 200, process)
        yield f"http://127.0.0.1:{port}"
    except AssertionError:
        print(log.read_text()[-4000:])
        raise
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code
    except OSError:
        return 0


def test_a_run_tells_the_server_of_the_manifest_what_it_does(
    tmp_path_factory, pipeline, s3: FaultyStore, s3_root: str, monkeypatch
):
    with postgres.serving() as database:
        variables = environment(database, tmp_path_factory.mktemp("server"), f"{s3_root}/mlflow")
        with mlflow(tmp_path_factory.mktemp("mlflow"), variables) as url:
            user = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_URI": url}
            words = ["run", *MICRO, "targets=[metadata]", f"root={s3_root}", "tracking=server"]
            refused = pipeline(*words, check=False, **user, MLFLOW_TRACKING_PASSWORD="wrong")
            assert "the server refuses this user" in refused.stderr
            password = SECRET["MLFLOW_AUTH_ADMIN_PASSWORD"]
            for _ in range(3):  # a busy server has not taken all by the end of a run: the next one sends the rest
                done = pipeline(*words, "--force", "fetch", **user, MLFLOW_TRACKING_PASSWORD=password)
                if "did not take" not in done.stderr:
                    break
            assert "refuses" not in done.stderr
            for name, value in {**user, "MLFLOW_TRACKING_PASSWORD": password}.items():
                monkeypatch.setenv(name, value)
            from mlflow import MlflowClient

            client = MlflowClient(url)
            (experiment,) = (one for one in client.search_experiments() if one.name == "wuerstchen")
            runs = client.search_runs([experiment.experiment_id])
            assert {run.data.tags["wst.kind"] for run in runs} == {"pipeline", "step"}
            parents = [run for run in runs if run.data.tags["wst.kind"] == "pipeline"]
            assert len(parents) > 1  # what the server refused has come too
            assert all(run.data.metrics["hours/total"] > 0 for run in parents)
            assert all(client.list_artifacts(run.info.run_id) for run in parents)
            asked = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
            known = {"Authorization": "Basic " + base64.b64encode(f"admin:{password}".encode()).decode()}
            assert answers(asked) == 401
            assert answers(asked, **known) == 200
            assert answers(asked, **known, Host="elsewhere.example") == 403
