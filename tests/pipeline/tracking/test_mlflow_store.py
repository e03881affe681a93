"""MLflow's local store: where it is, in roots of any name, and in roots that were moved or copied."""

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Dataset, DatasetInput
from PIL import Image

from pipeline.errors import UsageError
from pipeline.tracking.mlflow_records import drop_pictures
from pipeline.tracking.mlflow_runs import rebuild_hours
from pipeline.tracking.mlflow_store import connect, folder_of, locate_store, relocate, why_silent

NAMES = ["a%20b", "a?b=c&d", "a#b", "a[x]b", "a b", "Würstchen", "100%", "a?b=c&d#e[x] %20 ü"]


def recorded(root: Path, client: Any, experiment: str) -> str:
    """A run with a text and a picture; its id."""
    run = client.create_run(experiment, tags={"wst.artifact": f"{root}/artifacts/stage_a/0123"})
    client.log_text(run.info.run_id, "hello", "config.yaml")
    client.log_image(run.info.run_id, Image.new("RGB", (4, 4)), key="picture", step=0)
    return str(run.info.run_id)


def files(root: Path) -> list[str]:
    return sorted({path.relative_to(root).parts[0] for path in root.rglob("*") if path.is_file()})


@pytest.fixture
def made(tmp_path: Path, empty_mlflow: Path) -> Any:
    """Makes a root in which a run was recorded."""

    def make(name: str) -> tuple[Path, str]:
        root = tmp_path / name
        (root / "mlflow").mkdir(parents=True)
        shutil.copy(empty_mlflow, root / "mlflow/mlflow.db")
        client, experiment = connect(locate_store(str(root), None), "wuerstchen")
        return root, recorded(root, client, experiment)

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_root_may_have_any_name(tmp_path, made, name):
    root, run = made(name)
    store = locate_store(str(root), None)
    assert store.database == root / "mlflow/mlflow.db"
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing beside it
    assert files(root) == ["mlflow"]
    assert len(list((root / "mlflow/artifacts").glob(f"{run}/artifacts/images/*.png"))) == 1
    client, _ = connect(store, "wuerstchen")
    assert {file.path for file in client.list_artifacts(run)} == {"config.yaml", "images"}


def test_a_plain_name_is_written_as_it_is(tmp_path):
    store = locate_store(str(tmp_path), None)
    assert store.uri == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert store.location == str(store.artifacts) == f"{tmp_path}/mlflow/artifacts"


@pytest.mark.parametrize("new", ["moved", "moved to a%20b?"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_root_that_was_moved_or_copied_has_its_files_where_it_lies(tmp_path, made, new, copied):
    old, run = made("old ü")
    client, _ = connect(locate_store(str(old), None), "wuerstchen")
    client.set_tag(run, "mlflow.note.content", f"made in `{old}/artifacts/stage_a/0123`\n\nroot={old}")
    source = json.dumps({"uri": f"{old}/artifacts/images/4567"})
    client.log_inputs(run, [DatasetInput(Dataset("images", "0", "local", source), [])])
    client.create_registered_model("model")
    client.create_model_version("model", f"{old}/artifacts/release/89ab", run)
    there = tmp_path / new
    (shutil.copytree if copied else shutil.move)(old, there)
    client, experiment = connect(locate_store(str(there), None), "wuerstchen")
    info = client.get_run(run)
    assert info.data.tags["wst.artifact"] == f"{there}/artifacts/stage_a/0123"
    note, (dataset,) = info.data.tags["mlflow.note.content"], info.inputs.dataset_inputs
    assert note == f"made in `{there}/artifacts/stage_a/0123`\n\nroot={old}"
    assert json.loads(dataset.dataset.source) == {"uri": f"{there}/artifacts/images/4567"}
    assert client.get_model_version("model", "1").source == f"{there}/artifacts/release/89ab"
    assert {file.path for file in client.list_artifacts(run)} == {"config.yaml", "images"}
    again = recorded(there, client, experiment)
    assert len(list((there / "mlflow/artifacts").glob(f"{again}/artifacts/images/*.png"))) == 1
    assert old.exists() == copied
    if copied:  # whose runs stay its own
        assert not list(old.rglob(f"{again}*"))
        client, _ = connect(locate_store(str(old), None), "wuerstchen")
        assert client.get_run(run).data.tags["wst.artifact"] == f"{old}/artifacts/stage_a/0123"
    assert drop_pictures(folder_of(str(there))) == 4  # a picture and a smaller one, of two runs
    assert not list((there / "mlflow").rglob("*.png"))


def test_other_places_are_left_alone(made):
    root, _ = made("root")
    store = locate_store(str(root), None)
    client, _ = connect(store, "wuerstchen")
    elsewhere = client.create_experiment("by somebody", "s3://bucket/pictures")
    relocate(store)
    assert client.get_experiment(elsewhere).artifact_location == "s3://bucket/pictures"
    assert client.get_experiment_by_name("wuerstchen").artifact_location == f"{root}/mlflow/artifacts"


def test_a_damaged_database_is_told_with_the_remedy(tmp_path):
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow/mlflow.db").write_bytes(b"no database" * 1000)
    store = locate_store(str(tmp_path), None)
    for use in (lambda: relocate(store), lambda: rebuild_hours(store, "wuerstchen", str(tmp_path))):
        with pytest.raises(UsageError, match=r"^MLflow's database \S+mlflow.db cannot be used .* or move it away"):
            use()


def test_hours_that_mlflow_does_not_take_are_told_in_a_sentence(tmp_path, made):
    root, _ = made("root")
    store = locate_store(str(root), None)
    client, experiment = connect(store, "wuerstchen")
    client.delete_experiment(experiment)
    with pytest.raises(UsageError, match=r"^the experiment wuerstchen was deleted; bring it back with: "):
        rebuild_hours(store, "wuerstchen", str(root))
    away = locate_store(str(root), "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"^MLflow at http://127.0.0.1:9 does not take the hours \(.*refused\); call"):
        rebuild_hours(away, "wuerstchen", str(root))


def test_what_is_no_store_yet_is_not_mended(tmp_path):
    relocate(locate_store(str(tmp_path), None))
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow/mlflow.db").touch()
    relocate(locate_store(str(tmp_path), None))
    assert (tmp_path / "mlflow/mlflow.db").read_bytes() == b""


@pytest.mark.parametrize(("folder", "file"), [(0o2775, 0o664), (0o755, 0o644)])
def test_a_database_is_the_groups_as_its_folder_is(tmp_path, empty_mlflow, folder, file):
    store = locate_store(str(tmp_path), None)
    store.database.parent.mkdir()
    store.database.parent.chmod(folder)
    shutil.copy(empty_mlflow, store.database)
    store.database.chmod(0o644)
    connect(store, "wuerstchen")
    assert stat.S_IMODE(store.database.stat().st_mode) == file


def test_who_may_only_read_a_store_reads_it_and_leaves_no_file(made, monkeypatch):
    root, run = made("root")
    (root / "mlflow/mlflow.lock").unlink()
    before = files(root)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    client, _ = connect(locate_store(str(root), None), "wuerstchen")
    assert client.get_run(run).info.run_id == run
    assert files(root) == before
    assert not (root / "mlflow/mlflow.lock").exists()


def test_an_address_of_no_host_does_not_answer():
    assert why_silent("http://mlflow..example:5000")


@pytest.mark.parametrize(
    ("root", "uri", "expected"),
    [
        ("/shared/runs", None, "sqlite:////shared/runs/mlflow/mlflow.db"),
        ("/shared/runs", "sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
        ("s3://bucket/runs", "sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
        ("s3://bucket/runs", "http://mlflow:5000", "http://mlflow:5000"),
    ],
)
def test_where_runs_are_kept(root: str, uri: str | None, expected: str) -> None:
    store = locate_store(root, uri)
    assert store.uri == expected
    assert store.artifacts == (None if uri and uri.startswith("http") else store.database.parent / "artifacts")


@pytest.mark.parametrize(
    ("root", "uri", "message"),
    [
        ("s3://bucket/runs", None, r"give tracking\.uri=http://.* MLFLOW_TRACKING_URI"),
        ("/shared/runs", "file:./mlruns", r"tracking\.uri=file:\./mlruns"),
        ("/shared/runs", "https://me:secret@mlflow", r"tracking\.uri.*MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_where_runs_cannot_be_kept(root: str, uri: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refusal:
        locate_store(root, uri)
    assert "me:secret" not in str(refusal.value)
