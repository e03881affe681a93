"""import_a, import_b, import_c: existing weights as the artifact that a training would have made."""

import os
from typing import Any

from datasets.files import storage
from datasets.files.storage import FileEntry
from pipeline.models.known_weights import licence
from pipeline.settings.config import Config
from pipeline.steps.build import Build, Facts


def bring(build: Build) -> Facts:
    """A public or own checkpoint -> stage_a, stage_b (with its compressor) or stage_c."""
    files, notes, pid = build.call(_convert, build.config, build.step.output, build.path)
    section = getattr(build.config, build.step.output)
    notes = {"source": section.weights, "licence": licence(section.weights), "models": notes}
    return Facts(files=files, rows=0, call="torch.nn.Module.load_state_dict", workers=[pid], notes=notes)


def _convert(config: Config, stage: Any, path: str) -> tuple[dict[str, FileEntry], dict[str, Any], int]:
    """Publish each model's weights under our names; what they came from: layout and sha256 by file."""
    import safetensors.torch

    from pipeline.models import loading
    from stages.weights import pretrained

    files: dict[str, FileEntry] = {}
    notes: dict[str, Any] = {}
    for name, found in loading.existing(stage, getattr(config, stage).weights, config.compressor.weights).items():
        pretrained.require_fit(found, getattr(config, name).model)
        pretrained.require_finite(found.tensors, found.files[0])
        state = {key: value.float() if value.is_floating_point() else value for key, value in found.state().items()}
        data = safetensors.torch.save({key: value.contiguous() for key, value in state.items()})
        files[f"{name}.safetensors"] = storage.publish(data, storage.join(path, f"{name}.safetensors"))
        notes[name] = {"layout": found.layout, "sha256": found.sha256()}
    return files, notes, os.getpid()
