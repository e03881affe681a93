"""interpolate: Stage C as the weights between two others, as the paper's released model is."""

import os
from typing import Any

from datasets.files import storage
from datasets.files.storage import FileEntry
from pipeline.cluster.ranks.training_files import phase_file
from pipeline.errors import UsageError
from pipeline.settings.sections import Interpolation
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact
from stages.settings.models import StageCConfig

WEIGHTS = "stage_c.safetensors"


def interpolate(build: Build) -> Facts:
    """Two checkpoints of Stage C, or phases of its own training (stage_c_phases) -> stage_c."""
    settings, trained = build.config.between, build.inputs.get("stage_c_phases")
    assert settings is not None
    sources = settings.paths
    if trained:
        assert build.config.stage_c.train
        last = len(build.config.stage_c.train.phases)
        sources |= {key: _after(trained, key, number, last) for key, number in settings.phases.items()}
    entry, notes, pid = build.call(_between, sources, settings, build.config.stage_c.model, build.path)
    if trained:
        notes["compressor"] = trained.manifest["notes"]["compressor"]
    return Facts(files={WEIGHTS: entry}, rows=0, call="torch.lerp", workers=[pid], notes=notes)


def _after(trained: Artifact, key: str, number: int, last: int) -> str:
    """Path of the weights after a phase."""
    name = WEIGHTS if number == last else phase_file("stage_c", number)
    if name not in trained.files:
        raise UsageError(f"{key}={number}: {trained.path} has no weights after that phase; train again, or give a path")
    return storage.join(trained.path, name)


def _between(
    sources: dict[str, str], settings: Interpolation, model: StageCConfig, path: str
) -> tuple[FileEntry, dict[str, Any], int]:
    import safetensors.torch
    import torch

    from pipeline.models import loading
    from stages.weights import pretrained

    found = {key: loading.existing("stage_c", source, key=key)["stage_c"] for key, source in sources.items()}
    for item in found.values():
        pretrained.require_fit(item, model)
        pretrained.require_finite(item.tensors, item.files[0])
    first, second = (found[key] for key in settings.sides)
    ends = first.state(), second.state()
    state = {key: torch.lerp(ends[0][key].float(), ends[1][key].float(), settings.share) for key in ends[0]}
    entry = storage.publish(safetensors.torch.save(state), storage.join(path, WEIGHTS))
    notes = {"first": first.sha256(), "second": second.sha256(), "share": settings.share}
    return entry, notes, os.getpid()
