"""export: the release, a folder that diffusers' stock Würstchen pipelines load."""

import json
import os
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from datasets.files import storage
from datasets.files.storage import FileEntry
from pipeline.models.known_weights import licence
from pipeline.results import card
from pipeline.results.document import document
from pipeline.results.subject import of_artifacts
from pipeline.settings.config import Config
from pipeline.settings.sections import STAGES
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact

if TYPE_CHECKING:  # imports torch, through the release
    from stages.weights.card import CardFacts


def export(build: Build) -> Facts:
    """stages, texts, samples, scores, metadata -> release: prior, decoder, compressor, model card."""
    files, pid = build.call(_write, build.config, build.inputs, build.path)
    return Facts(files=files, rows=0, call="safetensors.torch.save", workers=[pid], timed=["README.md"])


def _write(config: Config, inputs: dict[str, Artifact], path: str) -> tuple[dict[str, FileEntry], int]:
    import torch

    from pipeline.models import loading
    from stages.weights.card import model_card
    from stages.weights.release import release_files

    where = torch.device("cpu")
    loaded = loading.everything(config, inputs, where)
    assert loaded.compressor is not None
    written = release_files(
        loaded,
        loaded.compressor,
        stage_a_config=config.stage_a.model,
        stage_b_config=config.stage_b.model,
        stage_c_config=config.stage_c.model,
        compressor_config=config.compressor.model,
        card=model_card(_facts(config, inputs)),
    )
    files = {name: storage.publish(data, storage.join(path, name)) for name, data in written}
    return files, os.getpid()


def _facts(config: Config, inputs: dict[str, Artifact]) -> "CardFacts":
    """What the card says, from the document that the report is made of too."""
    from stages.weights.card import CardFacts, Score

    data = terms(inputs["metadata"].manifest)
    told, _ = document(of_artifacts(inputs, config=config))
    return CardFacts(
        name="Würstchen",
        license=data["identifier"],
        prompt=json.loads(inputs["samples"].read("captions.json"))[0]["caption"],
        settings=config.sample,
        sources=[data["notice"], *card.trained_on(told), *_origins(config)],
        scores=[Score(*figure) for figure in card.scores(told)],
        cost=card.cost(told),
        limitations=card.limitations(
            told,
            random_text=config.text[config.stage_c.text].model == "seeded",
            existing=bool(config.stage_c.weights or (config.between and config.between.paths)),
        ),
        lineage=card.lineage(told),
    )


def terms(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Licence of a plan's pictures, as the source states it (`other` where it does not), and a notice for the card."""
    notes = metadata["notes"]
    identifier = notes["licence"].get("licence") or "other"
    credit = notes["licence"].get("attribution") or "The licence of each picture is its owner's."
    url = f" ({notes['licence']['licence_url']})" if "licence_url" in notes["licence"] else ""
    tags = ", ".join(notes["opt_outs"]["x_robots_tag"])
    left_out = f"Left out is what its server forbids (X-Robots-Tag: {tags}; TDM-Reservation: 1)"
    if notes["opt_outs"]["removal_list"]:
        left_out += f", and {notes['opt_outs']['removed']:,} rows on a removal list"
    sentences = [f"{metadata['rows']:,} pictures planned of the source {notes['source']}", f"{credit.rstrip('.')}{url}"]
    if notes["licences"].keys() - {"not stated"}:
        named = ", ".join(f"{name}: {count:,}" for name, count in notes["licences"].items())
        sentences.append(f"Pictures by the licence that the source names: {named}")
    notice = ". ".join([*sentences, left_out]) + "."
    return {"identifier": identifier.lower().replace(" ", "-"), "notice": notice}


def _origins(config: Config) -> list[str]:
    """A sentence for each stage whose weights, or the start of whose training, came from elsewhere."""
    found = []
    for stage in STAGES:
        name, section = stage.replace("_", " ").capitalize(), getattr(config, stage)
        if config.origin(stage) == "interpolate":
            assert config.between is not None
            first, second = (
                PurePosixPath(side).name if isinstance(side, str) else f"phase {side} of its training"
                for side in config.between.sides.values()
            )
            found.append(f"{name} lies between {first} and {second}, at {config.between.share:g} of the way.")
        elif section.weights:
            source = f"{PurePosixPath(section.weights).name} (licence {licence(section.weights) or 'unknown'})"
            trained = f"{name}'s training started from {source}."
            found.append(
                trained if section.train else f"{name} was not trained here: its weights are those of {source}."
            )
    return found
