"""interpolate: Stage C as the weights between two others, as the paper's released model is."""

import os
from typing import Any

from datasets import storage
from datasets.storage import FileEntry
from pipeline.build import Build, Facts
from pipeline.config import Interpolation
from stages.config import StageCConfig


def interpolate(build: Build) -> Facts:
    """Two checkpoints of Stage C -> stage_c."""
    settings = build.config.interpolate
    assert settings is not None
    entry, notes, pid = build.call(_between, settings, build.config.stage_c.model, build.path)
    files = {"stage_c.safetensors": entry}
    return Facts(files=files, rows=0, call="torch.lerp", workers=[pid], notes=notes)


def _between(settings: Interpolation, model: StageCConfig, path: str) -> tuple[FileEntry, dict[str, Any], int]:
    import safetensors.torch
    import torch

    from pipeline import models
    from stages import pretrained

    sources = {"interpolate.first": settings.first, "interpolate.second": settings.second}
    found = [models.existing("stage_c", source, key=key)["stage_c"] for key, source in sources.items()]
    for item in found:
        pretrained.require_fit(item, model)
        pretrained.require_finite(item.tensors, item.files[0])
    first, second = (item.state() for item in found)
    state = {key: torch.lerp(first[key].float(), second[key].float(), settings.share) for key in first}
    entry = storage.publish(safetensors.torch.save(state), storage.join(path, "stage_c.safetensors"))
    notes = {"first": found[0].sha256(), "second": found[1].sha256(), "share": settings.share}
    return entry, notes, os.getpid()
