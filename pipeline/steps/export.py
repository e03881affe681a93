"""export: the release, a folder that diffusers' stock Würstchen pipelines load."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from datasets.config import DataConfig
from datasets.files import storage
from datasets.files.storage import FileEntry
from pipeline.results import card, origins
from pipeline.results.data import sources
from pipeline.results.document import document
from pipeline.results.subject import of_artifacts
from pipeline.settings.config import Config
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact
from stages.weights.card import CardFacts, Score, model_card


def export(build: Build) -> Facts:
    """stages, texts, samples, scores, metadata -> release: prior, decoder, compressor, model card."""
    facts = _facts(build.config, build.inputs)  # here: they take confs, which our code is sent without
    files, pid = build.call(_write, build.config, build.inputs, build.path, facts)
    return Facts(files=files, rows=0, call="safetensors.torch.save", workers=[pid], timed=["README.md"])


def _write(
    config: Config, inputs: dict[str, Artifact], path: str, facts: CardFacts
) -> tuple[dict[str, FileEntry], int]:
    import torch

    from pipeline.models import loading
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
        card=model_card(facts),
    )
    files = {name: storage.publish(data, storage.join(path, name)) for name, data in written}
    return files, os.getpid()


def _facts(config: Config, inputs: dict[str, Artifact]) -> CardFacts:
    """What the card says, from the document that the report is made of too."""
    bases, licences = origins.told(config, inputs)
    data = terms(inputs["metadata"].manifest, licences)
    told, _ = document(of_artifacts(inputs, config=config))
    return CardFacts(
        name="Würstchen",
        license=data["identifier"],
        prompt=json.loads(inputs["samples"].read("captions.json"))[0]["caption"],
        settings=config.sample,
        sources=[data["notice"], *card.trained_on(told), *_captions(config.data), *bases],
        scores=[Score(*figure) for figure in card.scores(told)],
        cost=card.cost(told),
        limitations=card.limitations(
            told,
            random_text=config.text[config.stage_c.text].model == "seeded",
            existing=bool(config.stage_c.weights or (config.between and config.between.paths)),
        ),
        lineage=card.lineage(told),
    )


def terms(metadata: Mapping[str, Any], bases: Sequence[str | None] = ()) -> dict[str, str]:
    """The licence that a plan's sources and the weights that a model began as have in common (`other` where one has
    none, or another), and a notice on the pictures for the card."""
    opt_outs, told = metadata["notes"]["opt_outs"], sources(metadata)
    named = [*(source["licence"].get("licence") for source in told), *bases]
    stated = {(licence or "other").lower().replace(" ", "-") for licence in named}
    identifier = stated.pop() if len(stated) == 1 else "other"
    tags = ", ".join(opt_outs["x_robots_tag"])
    left_out = f"Left out is what its server forbids (X-Robots-Tag: {tags}; TDM-Reservation: 1)"
    if opt_outs["removal_list"]:
        left_out += f", and {opt_outs['removed']:,} rows on a removal list"
    sentences = [sentence for source in told for sentence in _source(source, single=len(named) == 1)]
    notice = ". ".join([*sentences, left_out]) + "."
    return {"identifier": identifier, "notice": notice}


def _source(source: Mapping[str, Any], single: bool) -> list[str]:
    """Sentences on a source: its rows, whom to credit, the licences of its pictures."""
    terms = source["licence"]
    credit = terms.get("attribution") or "The licence of each picture is its owner's."
    licence = f"; {terms['licence']}" if terms.get("licence") and not single else ""  # of one it is the release's
    url = f" ({terms['licence_url']})" if "licence_url" in terms else ""
    found = [f"{source['planned']:,} pictures planned of the source {source['name']}"]
    found.append(f"{credit.rstrip('.')}{licence}{url}")
    if source["licences"].keys() - {"not stated"}:
        named = ", ".join(f"{name}: {count:,}" for name, count in source["licences"].items())
        found.append(f"Pictures by the licence that the source names: {named}")
    return found


def _captions(data: DataConfig) -> list[str]:
    """A sentence on the captions, where not each is a row of its own: whose they are, and how often they are drawn."""
    if not data.captions:
        return []
    whose = dict.fromkeys(data.recaps, "from a table")
    whose |= {name: f"by the model {PurePosixPath(made.weights).name}" for name, made in data.captioners.items()}
    parts = [f"{name} ({whose.get(name, 'of the source')}) {data.captions[name]:g}" for name in sorted(data.captions)]
    return [f"Of several captions of a picture one is drawn in each pass, by weights: {', '.join(parts)}."]
