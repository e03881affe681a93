"""The table of a root: parents first, with totals, what each stands on, and what is lost of the ledger."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from datasets.files import storage
from pipeline.hours.table import beside_paper, sentences, table
from pipeline.settings.words import parse
from pipeline.store.artifacts import Fingerprint, Store
from pipeline.store.ledger import About, Writer
from pipeline.verbs.report import command as report


def build(root: Path, step: str, output: str, parents: dict[str, str], settings: Any = None, **facts: Any) -> Any:
    """An artifact with some hours."""
    fingerprint = Fingerprint(step, 1, settings or {}, parents)
    about = About(build=f"build of {output}", output=output, parents=parents, price=2.0)
    with Writer(str(root), f"{output}-run").lease(step, fingerprint.digest, 8, "cuda:A100", about):
        time.sleep(0.002)  # the ledger counts milliseconds
    store = Store(str(root))
    entry = storage.publish(b"x", f"{store.path(output, fingerprint.digest)}/file")
    told = {"files": {"file": entry}, "timed": [], "rows": 1, "created": "2026-01-01", "metrics": {}, **facts}
    return store.commit(output, fingerprint, told)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three steps, begun in an order that neither the alphabet nor the DAG has."""
    images = Fingerprint("download", 1, {}, {}).digest
    stage_a = Fingerprint("train_a", 1, {}, {"images": images}).digest
    build(tmp_path, "train_b", "stage_b", {"images": images, "stage_a": stage_a}, {"stage_b": {"weights": "b.pth"}})
    build(tmp_path, "train_a", "stage_a", {"images": images})
    build(tmp_path, "download", "images", {})
    return tmp_path


def test_steps_stand_below_what_they_are_made_from(root):
    assert [row.hours.step for row in table(str(root)).rows] == ["download", "train_a", "train_b"]


def test_a_lineage_is_the_step_and_all_that_it_stands_on(root):
    found = table(str(root))
    images, stage_a, stage_b = (row.spent.total for row in found.rows)
    assert [row.lineage.total for row in found.rows] == pytest.approx(
        [images, images + stage_a, images + stage_a + stage_b]
    )
    assert found.total.total == pytest.approx(images + stage_a + stage_b)
    assert [row.foreign for row in found.rows] == [False, False, True]


def test_a_lineage_is_known_also_where_manifests_are_gone(root):
    before = [row.lineage.total for row in table(str(root)).rows]
    for manifest in root.rglob("manifest.json"):
        manifest.unlink()
    assert [row.lineage.total for row in table(str(root)).rows] == before


def test_artifacts_of_one_fingerprint_share_a_row_that_names_them_all(root):
    for output in ("samples", "samples_held_out"):
        build(root, "sample", output, {})
    (row,) = (row for row in table(str(root)).rows if row.hours.step == "sample")
    assert row.output == "samples, samples_held_out"


@pytest.mark.parametrize(("second", "foreign"), [(4, False), ("c.safetensors", True)])
def test_weights_between_others_cost_what_their_own_phases_did_and_more_where_one_is_given(tmp_path, second, foreign):
    phases = Fingerprint("train_c", 1, {}, {}).digest
    build(tmp_path, "train_c", "stage_c_phases", {})
    settings = {"interpolate": {"first": 3, "second": second, "share": 0.5}}
    build(tmp_path, "interpolate", "stage_c", {"stage_c_phases": phases}, settings)
    trained, between = table(str(tmp_path)).rows
    assert between.lineage.total == pytest.approx(trained.spent.total + between.spent.total)
    assert (trained.foreign, between.foreign) == (False, foreign)
    said = "interpolate: it starts from weights whose hours are not in this"
    assert (said in sentences([trained, between])) == foreign


def test_existing_weights_are_no_share_of_the_papers(root):
    (comparison,) = (row.comparison for row in table(str(root)).rows if row.comparison)
    assert (comparison.step, comparison.ratio) == ("train_b", None)
    assert comparison.why_not == "it starts from weights whose hours are not in this"
    assert beside_paper(str(root), Store(str(root)).finished()) == []


def test_the_json_adds_up_and_torn_lines_are_told(root, capsys):
    with open(next((root / "ledger").iterdir()), "a") as stream:
        stream.write('{"event": "heartb')
    report.handle(parse(["report", "hours", "--json", f"root={root}"]))
    told = json.loads(capsys.readouterr().out)
    assert told["total"] == pytest.approx(sum(row["device_seconds"] for row in told["hours"]) / 3600)
    assert told["cost"] == pytest.approx(2 * told["total"])
    assert told["kg_co2_as_in_the_paper"] == pytest.approx(told["total"] * 0.25 * 0.37)
    assert told["torn_lines"] == 1
    report.handle(parse(["report", "hours", f"root={root}"]))
    said = capsys.readouterr().out
    assert "1 lines of the ledger are cut off" in said
    assert "train_b: it starts from weights whose hours are not in this" in said


def test_the_share_of_the_peak_is_of_all_the_time_that_devices_were_held(tmp_path):
    build(tmp_path, "train_a", "stage_a", {}, metrics={"model_flops": 3e12})
    build(tmp_path, "train_b", "stage_b", {})  # whose FLOPs nobody counted
    found = {row.output: row for row in table(str(tmp_path)).rows}
    assert found["stage_a"].mfu == pytest.approx(3e12 / 312e12 / found["stage_a"].spent.total)  # an A100's, dense bf16
    assert found["stage_b"].mfu is None


def test_an_empty_root_has_a_table_of_nothing(tmp_path):
    found = table(str(tmp_path))
    assert (found.rows, found.total.total, found.torn_lines) == ([], 0, 0)
