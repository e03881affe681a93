"""Shared fixtures: a home of its own for every test, and one real run of the whole DAG at micro scale."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
import hypothesis
import pytest

from tests import composing
from tests.faulty_store import FaultyStore, before
from tests.object_store import ObjectStore, serving

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the workers of xdist share the cores, and threads wait

hypothesis.settings.register_profile("ours", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("ours")
hydra.compose = composing.once

CHECKOUT = Path(__file__).parent.parent
MICRO = ("conf=stage_c", "scale=micro")
CANARIES = {
    "CANARY": "canary-by-interpolation",
    "AWS_SECRET_ACCESS_KEY": "canary-of-aws",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-mlflow",
    "HF_TOKEN": "canary-of-the-hub",
}


@pytest.fixture(scope="session", autouse=True)
def _quiet_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep Ray, MLflow and the Hub's libraries away from the real home folder and from the network."""
    from pipeline.environment import quiet_environment

    quiet_environment()
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def pipeline() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m pipeline WORDS...` in a process of its own, from the checkout."""

    def call(*words: object, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", *map(str, words)]
        environment = {**os.environ, **variables}
        done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, env=environment)
        assert not check or done.returncode == 0, done.stderr
        return done

    return call


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m pipeline WORDS...` in this process, which has the libraries that a new one takes seconds for."""
    from pipeline.__main__ import main

    def call(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = main([*map(str, words)])
        said = capsys.readouterr()
        assert not check or code == 0, said.err
        return subprocess.CompletedProcess(words, code, said.out, said.err)

    return call


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of an MLflow store without runs: creating its tables takes seconds, copying them does not."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def micro_root(tmp_path_factory: pytest.TempPathFactory, pipeline: Callable[..., object]) -> Path:
    """A root in which the whole DAG has been run at micro scale, through real Ray, HTTP and MLflow; with secrets in
    the environment, and in a URL of the config, from there and from the command line."""
    root = tmp_path_factory.mktemp("micro")
    url = "https://a.invalid/?token=${oc.env:CANARY}&signature=canary-in-a-word"
    pipeline("run", *MICRO, f"root={root}", f"data.download.user_agent='test/1 ${{oc.env:CANARY}} ({url})'", **CANARIES)
    return root


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 server on loopback with the bucket `pictures`, for all tests of this process."""
    with serving(tmp_path_factory.mktemp("objects"), "pictures") as store:
        yield store


@pytest.fixture
def s3(object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """That server, seen through a proxy, where this process and its children find it."""
    from datasets.files import filesystems

    with before(object_store.url) as proxy:
        for name, value in {**object_store.environment, "AWS_ENDPOINT_URL": proxy.url}.items():
            monkeypatch.setenv(name, value)
        filesystems.forget_clients()  # which know the address that the environment had when they were made
        yield proxy
    filesystems.forget_clients()


@pytest.fixture
def s3_root(s3: FaultyStore, tmp_path: Path) -> str:
    """A prefix on it that is the test's own."""
    return f"s3://pictures/{tmp_path.name}"
