"""A root whose steps are built in this process, of small pictures and random weights."""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets.files import storage
from datasets.files.fence import unfenced
from datasets.formats import shards
from datasets.formats.shards import Clock
from pipeline.cluster.room import Room
from pipeline.models import loading
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact, Store
from stages.models.compressor import Compressor
from stages.models.stage_a import StageA
from stages.state_dicts import Serialized

CAPTIONS = ("red heart", "", "a very long caption of " + 20 * "many words ", "Fuß über Zürich")
ROWS = (5, 3, 0, 4)  # of each shard
ALONE: Any = SimpleNamespace(fence=unfenced, raise_if_lost=lambda: None)  # the claim where nobody else builds
WORDS = ("scale=micro", "data.image.size=256", "targets=[stage_c,previewer,baseline]")


class Board:
    """What an actor sees of the driver."""

    def stopping(self) -> bool:
        return False

    def post(self, message: dict[str, Any]) -> None:
        pass


class Here:
    """A cluster that is this process."""

    room = Room(compose.load("stage_c", ["scale=micro"]).cluster, lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])
    board = Board()

    def call(self, function: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
        return function(*arguments)

    def map_shards(
        self, worker: type, arguments: tuple[Any, ...], items: list[Any], work: Any, tick: Any, at_once: int
    ) -> None:
        actor = worker(*arguments)
        if at_once > 1:
            with ThreadPoolExecutor(at_once) as pool:
                list(pool.map(actor, items))
        else:
            for item in items:  # which ends with the first that fails
                actor(item)


class Report:
    """What the user is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.logged: list[tuple[int, dict[str, float]]] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def advance(self, count: int, total: int, unit: str) -> None:
        pass

    def image(self, name: str, png: bytes, step: int) -> None:
        pass

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class Root:
    """A root with one config's artifacts, built in this process."""

    def __init__(self, path: Path, *words: str):
        self.config, self.store = compose.load("stage_c", [*WORDS, *words]), Store(str(path))
        self.steps = order(table(self.config), self.config.targets)
        self.prints = fingerprints(self.steps, self.config.lookup)
        self.report = Report()

    def build(self, output: str) -> Build:
        step = next(step for step in self.steps if step.output == output)
        return Build(
            config=self.config,
            step=step,
            path=self.store.path(output, self.prints[output].digest),
            claim=ALONE,
            inputs={name: self.artifact(name) for name in step.inputs},
            cluster=Here(),
            lease=lambda *_, **__: nullcontext(),
            report=self.report,
            stopped=lambda: None,
            forgotten=frozenset(),
        )

    def commit(self, build: Build, facts: Facts) -> Artifact:
        name = build.step.output
        return self.store.commit(name, self.prints[name], vars(facts) | {"created": "now"})

    def artifact(self, name: str) -> Artifact:
        found = self.store.find(name, self.prints[name].digest)
        return found or Artifact(name, "", {})


def picture(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def trained(make: Callable[[], torch.nn.Module], seed: int) -> Serialized:
    """Weights of a model whose every parameter matters."""
    torch.manual_seed(seed)
    module = make()
    for name, parameter in module.named_parameters():
        if name.endswith(("gammas", "bias")) or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return loading.weights(module)


def weigh(root: Root, output: str, seed: int = 0) -> Artifact:
    """Stage A, or Stage B's compressor, of random weights."""
    make, name = {
        "stage_a": (partial(StageA, root.config.stage_a.model), loading.STAGE_A),
        "stage_b": (partial(Compressor, root.config.compressor.model), loading.COMPRESSOR),
    }[output]
    build = root.build(output)
    files = {name: storage.publish(trained(make, seed), storage.join(build.path, name))}
    return root.commit(build, Facts(files, rows=0, call="", workers=[]))


def download(root: Root, tars: dict[int, tuple[bytes, int]]) -> None:
    build = root.build("images")
    made = []
    for shard, (tar, count) in tars.items():
        name = shards.image_name(shard)
        files = {name: storage.publish(tar, storage.join(build.path, name))}
        made.append(
            shards.publish_receipt(build.path, shard, rows_in=count, rows_out=count, files=files, clock=Clock())
        )
    root.commit(build, Facts({}, rows=sum(ROWS), call="", workers=[], shards={"": made}))
