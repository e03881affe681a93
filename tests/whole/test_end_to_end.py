"""The whole DAG at micro scale, once, through real Ray, HTTP and MLflow; then all that can be asked of it."""

import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datasets.fetching import rights
from datasets.files import storage
from datasets.formats import shards
from pipeline.store.artifacts import Artifact, Store

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("micro")]
MICRO = ("conf=stage_c", "scale=micro")
STEPS = {
    "metadata": "pyarrow.Table.filter",
    "images": "img2dataset.downloader.Downloader.download_shard",
    "text_tiny": "ray.data.Dataset.map_batches",
    "stage_a": "ray.train.torch.TorchTrainer.fit",
    "latents_a": "ray.data.Dataset.map_batches",
    "stage_b": "ray.train.torch.TorchTrainer.fit",
    "latents_c": "ray.data.Dataset.map_batches",
    "stage_c": "ray.train.torch.TorchTrainer.fit",
    "samples": "ray.data.Dataset.map_batches",
    "scores": "ray.data.Dataset.map_batches",
    "release": "safetensors.torch.save",
}


@pytest.fixture(scope="module")
def artifacts(micro_root) -> dict[str, Artifact]:
    return {artifact.name: artifact for artifact in Store(str(micro_root)).finished()}


def test_every_step_names_its_library_call_and_worked_outside_the_driver(artifacts):
    assert {name: artifact.manifest["call"] for name, artifact in artifacts.items()} == STEPS
    for artifact in artifacts.values():
        assert artifact.manifest["workers"]
        assert artifact.manifest["driver"]["pid"] not in artifact.manifest["workers"]
        assert artifact.manifest["device_seconds"] > 0


def test_every_file_is_in_its_manifest_and_is_what_it_says(artifacts):
    for artifact in artifacts.values():
        on_disk = {name for name in storage.listing(artifact.path) if "receipts/" not in name}
        assert on_disk == {*artifact.files, "manifest.json"}
        for name in artifact.files:
            artifact.read(name)


def test_no_file_of_a_run_holds_a_secret(micro_root):
    """Of those that `micro_root` planted; the config and the command that they stand in are told, in MLflow too."""
    contents = {
        str(file.relative_to(micro_root)): file.read_bytes() for file in micro_root.rglob("*") if file.is_file()
    }
    assert [name for name, content in contents.items() if b"canary-" in content] == []
    told = [name for name, content in contents.items() if b"https://a.invalid/?***" in content]
    assert {name.partition("/")[0] for name in told} >= {"artifacts", "invocations", "mlflow"}


def test_all_artifacts_of_the_images_share_keys_and_shards(artifacts):
    images = artifacts["images"]
    for shard in shards.finished(images.path):
        keys = [row.key for row in shards.read_images(images.read(shards.image_name(shard)))]
        assert len(keys) == 4
        families = (("text_tiny", "text", ""), ("latents_a", "latents_a", "128/"), ("latents_c", "latents_c", "128/"))
        for name, field, folder in families:
            found, values = shards.read_tensors(artifacts[name].read(folder + shards.tensor_name(shard)), field)
            assert found == keys
            assert np.isfinite(values).all()


def test_the_port_of_the_embedded_server_is_nowhere(artifacts):
    plan = pq.read_table(io.BytesIO(artifacts["metadata"].read("plan/00000.parquet")))
    assert all(url.startswith("http://openmoji.invalid/") for url in plan["url"].to_pylist())


def test_licence_and_opt_outs_go_into_the_manifest_and_from_there_into_the_card(artifacts):
    notes = artifacts["metadata"].manifest["notes"]
    assert notes["licence"]["licence"] == "CC BY-SA 4.0"
    assert notes["licences"] == {"not stated": artifacts["metadata"].manifest["rows"]}  # of single pictures
    assert notes["opt_outs"] == {"x_robots_tag": rights.OPT_OUTS, "removal_list": None, "removed": 0}
    card = artifacts["release"].read("README.md").decode()
    assert "license: cc-by-sa-4.0" in card
    assert notes["licence"]["attribution"] in card
    assert "X-Robots-Tag: noai" in card


def test_samples_keep_their_contract(artifacts):
    samples = artifacts["samples"]
    rows = pq.read_table(io.BytesIO(samples.read("samples.parquet"))).to_pylist()
    assert len(rows) == 4
    for row in rows:
        assert set(row) == {"key", "caption", "seed"}
        for folder in ("generated", "original"):
            with Image.open(io.BytesIO(samples.read(f"{folder}/{row['key']}.png"))) as picture:
                assert (picture.size, picture.mode) == ((128, 128), "RGB")


def test_scores_are_what_anybody_would_compute_from_the_samples(artifacts):
    samples = artifacts["samples"]
    rows = json.loads(samples.read("captions.json"))

    def small(folder: str, key: str) -> np.ndarray:
        with Image.open(io.BytesIO(samples.read(f"{folder}/{key}.png"))) as picture:
            pixels = np.asarray(picture, np.float64) / 255
        return pixels.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3)).ravel()

    originals = np.stack([small("original", row["key"]) for row in rows])
    hits = [
        int(np.argmin(((originals - small("generated", row["key"])) ** 2).sum(axis=1)) == place)
        for place, row in enumerate(rows)
    ]
    assert artifacts["scores"].manifest["metrics"]["retrieval_top1"] == np.mean(hits)


def test_a_second_run_has_nothing_to_do_and_says_so(micro_root, answer):
    before = {path: path.stat().st_mtime_ns for path in micro_root.rglob("*")}
    done = answer("run", *MICRO, f"root={micro_root}")
    assert "nothing to do" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in micro_root.rglob("*")} == before


def test_a_changed_training_value_makes_that_training_and_what_follows_stale(micro_root, answer):
    done = answer("plan", *MICRO, f"root={micro_root}", "stage_b.train.learning_rate=0.001", "--json")
    states = {step["artifact"]: (step["state"], step["reason"]) for step in json.loads(done.stdout)["steps"]}
    assert states["stage_b"] == ("stale", "stage_b.train.learning_rate: 0.002 -> 0.001")
    stale = {name for name, (state, _) in states.items() if state != "done"}
    assert stale == {"stage_b", "latents_c", "stage_c", "samples", "scores", "release"}


def test_sample_draws_the_picture_of_the_samples(micro_root, answer, artifacts, tmp_path):
    row = json.loads(artifacts["samples"].read("captions.json"))[0]
    words = [f"prompt={row['caption']}", f"seed={row['seed']}", f"out={tmp_path}"]
    answer("sample", *MICRO, f"root={micro_root}", *words)
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes() == artifacts["samples"].read(f"generated/{row['key']}.png")


def test_sample_takes_any_prompt(micro_root, answer, tmp_path):
    words = ["prompt=what's this, (a) Würstchen: 4k?", "n=2", "seed=7", f"out={tmp_path}"]
    answer("sample", *MICRO, f"root={micro_root}", *words)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name[:-10] for name in names] == [f"what-s-this-a-würstchen-4k-{seed}-" for seed in (7, 8)]


def test_sample_of_another_config_names_the_nearest_and_trains_nothing(micro_root, answer, tmp_path):
    words = ["stage_c.train.learning_rate=0.5", "prompt=red heart", f"out={tmp_path / 'new'}"]
    done = answer("sample", *MICRO, f"root={micro_root}", *words, check=False)
    assert done.returncode == 2
    assert "differs in stage_c.train.learning_rate: 0.002 -> 0.5" in done.stderr
    assert not (tmp_path / "new").exists()


def test_the_export_runs_in_the_stock_pipeline_and_draws_our_picture(micro_root, answer, artifacts, tmp_path):
    from diffusers import AutoPipelineForText2Image

    answer("export", *MICRO, f"root={micro_root}", f"out={tmp_path / 'release'}")
    stock = AutoPipelineForText2Image.from_pretrained(tmp_path / "release")
    stock.set_progress_bar_config(disable=True)
    import torch

    row = json.loads(artifacts["samples"].read("captions.json"))[0]
    (picture,) = stock(
        row["caption"],
        negative_prompt="",
        width=128,
        height=128,
        prior_num_inference_steps=2,
        prior_guidance_scale=1.5,
        num_inference_steps=2,
        decoder_guidance_scale=1.0,
        generator=torch.Generator().manual_seed(row["seed"]),
    ).images
    with Image.open(io.BytesIO(artifacts["samples"].read(f"generated/{row['key']}.png"))) as ours:
        difference = np.abs(np.asarray(picture, np.int16) - np.asarray(ours, np.int16))
    assert difference.max() <= 2


def test_mlflow_tells_what_was_done(micro_root, answer, artifacts):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{micro_root}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("wuerstchen")
    runs = client.search_runs([experiment.experiment_id], max_results=50)
    (parent,) = [run for run in runs if run.data.tags["wst.kind"] == "pipeline"]
    children = {run.data.tags["wst.output"]: run for run in runs if run.data.tags["wst.kind"] == "step"}
    assert set(children) == set(STEPS)
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in children.values())
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert parent.data.tags["wst.fingerprint.stage_c"] == artifacts["stage_c"].manifest["fingerprint"]
    losses = client.get_metric_history(children["stage_c"].info.run_id, "stage_c/loss")
    assert [point.step for point in losses] == [1, 2, 3, 4]
    total = json.loads(answer("report", "hours", f"root={micro_root}", "--json").stdout)["total"]
    assert parent.data.metrics["hours/total"] == pytest.approx(total, rel=1e-9)
    assert sum(child.data.metrics["hours/total"] for child in children.values()) == pytest.approx(total, rel=1e-9)
    spent = client.get_metric_history(children["stage_c"].info.run_id, "hours/so_far")
    assert [point.step for point in spent] == [1, 2, 3, 4]
    images = client.list_artifacts(children["samples"].info.run_id, "images")
    assert images
    assert experiment.artifact_location.startswith(str(micro_root))


def test_show_and_status(micro_root, answer, artifacts):
    shown = json.loads(answer("show", *MICRO, f"root={micro_root}", "artifact=scores", "--json").stdout)
    assert shown["metrics"] == artifacts["scores"].manifest["metrics"]
    assert "retrieval_top1" in answer("show", *MICRO, f"root={micro_root}", "artifact=scores").stdout
    status = json.loads(answer("status", f"root={micro_root}", "--json").stdout)
    assert status["runs"][0]["outcome"] == "done"
    assert {artifact["name"] for artifact in status["artifacts"]} == set(STEPS)


def test_data_tells_counts_bytes_and_one_pictures_way(micro_root, answer, artifacts):
    def ask(*words: str) -> Any:
        return json.loads(answer("data", *words, *MICRO, f"root={micro_root}", "--json").stdout)

    levels = {step["level"]: step for step in ask("funnel")["funnel"]}
    assert levels["read"]["rows"] == 64
    assert levels["planned"] == {"level": "planned", "rows": 16, "lost": {"limit": 48}}
    assert levels["kept"]["rows"] == levels["encoded: latents_c"]["rows"] == 16
    assert ask("verify")["damaged"] == []
    assert {row["source"] for row in ask("lost")["rows"]} <= {"plan", "openmoji"}  # nothing is lost on loopback
    assert ask("retry") == {"root": str(micro_root), "asked": {}, "gained": 0, "rows": 16, "attempt": 1}
    key = json.loads(artifacts["samples"].read("captions.json"))[0]["key"]
    told = ask("trace", key)
    assert told["download"]["status"] == "ok"
    shard = told["planned"]["shard"]
    for name, file in (
        ("images", shards.image_name(shard)),
        ("latents_c", f"128/{shards.tensor_name(shard)}"),
        ("samples", f"generated/{key}.png"),
    ):
        assert f"{artifacts[name].path}/{file}" in told["files"]


def test_gc_takes_nothing_that_the_last_run_made(micro_root, answer, artifacts):
    unwanted = json.loads(answer("gc", f"root={micro_root}", "--json").stdout)["unwanted"]
    assert not {item["path"] for item in unwanted} & {artifact.path for artifact in artifacts.values()}


def test_a_forgotten_picture_leaves_a_root_that_verifies_and_says_when(micro_root, answer, artifacts, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(micro_root, root)
    key = json.loads(artifacts["samples"].read("captions.json"))[0]["key"]
    done = json.loads(answer("data", "forget", f"keys={key}", f"root={root}", "--json").stdout)
    assert done["pictures"] == [key]
    assert done["trained"] == ["stage_a", "stage_b", "stage_c"]

    def ask(*words: str) -> Any:
        return json.loads(answer("data", *words, *MICRO, f"root={root}", "--json").stdout)

    assert ask("verify")["damaged"] == []
    assert ask("funnel")["funnel"][-1] == {"level": "encoded: latents_c", "rows": 15, "lost": {}}
    told = ask("trace", key)
    assert told["download"]["status"] == "forgotten"
    assert told["forgotten"]
    assert "files" not in told
    assert not list(root.rglob(f"{key}.png"))
    planned = json.loads(answer("plan", *MICRO, f"root={root}", "--json").stdout)
    assert planned["forgotten"] == 2  # its key and its URL
    assert {step["state"] for step in planned["steps"]} == {"done"}


def test_a_repair_makes_the_damaged_shard_anew_and_what_was_made_from_it_and_nothing_else(
    micro_root, pipeline, answer, artifacts, tmp_path
):
    """As `data verify` advises; pictures that come again as they were leave every byte as it was."""
    root = tmp_path / "root"
    shutil.copytree(micro_root, root)

    def files() -> dict[str, tuple[int, int, bytes]]:
        found = (file for file in (root / "artifacts").rglob("*") if file.is_file())
        return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) for file in found}

    below = {name: root / Path(artifact.path).relative_to(micro_root) for name, artifact in artifacts.items()}
    tar = below["images"] / shards.image_name(2)
    before = files()
    content = bytearray(tar.read_bytes())
    content[1000] ^= 1
    tar.write_bytes(content)
    told = answer("data", "verify", *MICRO, f"root={root}", check=False)
    assert told.returncode == 2
    advice = shlex.split(told.stderr.partition("mend them: python -m pipeline ")[2])
    assert advice[:2] == ["data", "repair"]
    assert "images is whole again: shards 2 were made anew" in pipeline(*advice).stdout  # it starts Ray
    after = files()
    hit = {str(tar), str(below["images"] / shards.index_name(2)), str(below["text_tiny"] / shards.tensor_name(2))}
    hit |= {str(below[name] / "128" / shards.tensor_name(2)) for name in ("latents_a", "latents_c")}
    marks = (
        "manifest.json",
        "00002.json",
        "tower.safetensors",
        "null_text.safetensors",
        "shards.parquet",
    )  # the tower is put there again
    assert {name for name in after if after[name][:2] != before[name][:2] and not name.endswith(marks)} == hit
    assert {name: after[name][2] for name in hit} == {name: before[name][2] for name in hit}
    assert "hold the bytes" in answer("data", "verify", *MICRO, f"root={root}").stdout
    planned = json.loads(answer("plan", *MICRO, f"root={root}", "--json").stdout)
    assert {step["state"] for step in planned["steps"]} == {"done"}


def test_all_pictures_lost_commits_nothing(tmp_path, pipeline):
    """Metadata that names pictures which the server does not have: the budget is exceeded, the causes are told."""
    import pyarrow as pa

    table = pa.table(
        {
            "URL": [f"http://openmoji.invalid/none{n}.png" for n in range(8)],
            "TEXT": [f"no picture {n}" for n in range(8)],
            "WIDTH": [128] * 8,
            "HEIGHT": [128] * 8,
            "similarity": [0.3] * 8,
            "punsafe": [0.0] * 8,
            "pwatermark": [0.0] * 8,
            "AESTHETIC_SCORE": [6.0] * 8,
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    root = tmp_path / "root"
    done = pipeline("run", *MICRO, f"root={root}", f"data.metadata={tmp_path / 'rows.parquet'}", check=False)
    assert done.returncode == 3
    assert "gone 8" in done.stderr
    assert [artifact.name for artifact in Store(str(root)).finished()] == ["metadata"]
    shutil.rmtree(root)
