"""Of what a document is: all that fingerprints name, with all that it was made from."""

from pathlib import Path

from datasets.files import storage
from pipeline.results.subject import of_artifacts, of_prints
from tests.experiment import experiment


def test_ancestors_belong_to_it(tmp_path: Path) -> None:
    of = experiment(tmp_path)
    named = {"scores": of.artifacts["scores"].manifest["fingerprint"]}
    found = of_prints(of.root, "stage_c", named)
    assert found.artifacts.keys() == of.artifacts.keys()
    assert found.prints == {name: one.manifest["fingerprint"] for name, one in of.artifacts.items()}
    assert of_artifacts({"scores": of.artifacts["scores"]}).artifacts.keys() == of.artifacts.keys()


def test_what_is_not_finished_is_told_apart_from_what_is_not_there(tmp_path: Path) -> None:
    of = experiment(tmp_path)
    prints = {"stage_b": "0" * 16, "latents_c": "1" * 16, "stage_a": of.artifacts["stage_a"].manifest["fingerprint"]}
    storage.publish(b"x", f"{of.store.path('stage_b', '0' * 16)}/building/file")
    found = of_prints(of.root, "stage_c", prints)
    assert {name: found.state(name) for name in prints} == {
        "stage_b": "unfinished",
        "latents_c": "missing",
        "stage_a": "done",
    }
