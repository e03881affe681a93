"""time_drawing: how long each stage takes to draw a picture, some at a time, as it is and compiled."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict

from datasets.files import storage
from datasets.files.storage import FileEntry
from pipeline.models.drawing_speed import FILE, Timing
from pipeline.settings.config import Config
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact


def time_drawing(build: Build) -> Facts:
    """text, stages -> speed: seconds a picture of each stage, with device and precision."""
    entry, timed, pid = build.call(_published, build.config, build.inputs, build.device, build.path, accelerated=True)
    return Facts(files={FILE: entry}, rows=timed, call="stages.sampling.speed.seconds_a_picture", workers=[pid])


def _published(config: Config, inputs: Mapping[str, Artifact], device: str, path: str) -> tuple[FileEntry, int, int]:
    timed = [asdict(line) for line in measured(config, dict(inputs), device)]
    return storage.publish(json.dumps(timed, indent=1).encode(), storage.join(path, FILE)), len(timed), os.getpid()


def measured(config: Config, inputs: dict[str, Artifact], kind: str, backend: str = "inductor") -> list[Timing]:
    """The lines of the table, on a kind of device; `backend` is torch's compiler."""
    from pipeline.models import loading
    from stages.sampling.speed import device_name, seconds_a_picture

    asked, where = config.eval.speed, loading.device(kind)
    assert asked is not None
    if asked.compiled:
        loading.require_compiler("eval.speed.compiled")
    models, settings = loading.everything(config, inputs, where), config.sample.settings()
    found = []
    for mode in ("eager", *["compiled"] * asked.compiled):
        if mode == "compiled":
            models.compile(backend)
        for batch, seconds in seconds_a_picture(models, settings, asked.batches, asked.repeats, where):
            found.append(Timing(mode, batch, device_name(where), settings.precision, **seconds))
    return found
