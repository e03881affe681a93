"""Online equals cached: what a training encodes itself differs from what a step stored by the storage's rounding.

And what a training refuses, and catches up on, before its workers start.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.files import storage
from datasets.files.fence import unfenced
from datasets.formats import shards
from datasets.formats.rounding import Int8, Rounding, rounded
from datasets.formats.shards import Clock, ImageRow
from pipeline.cluster import board
from pipeline.cluster.mapping import ShardActor
from pipeline.cluster.ranks import trainings
from pipeline.cluster.ranks.checkpoints import Checkpoints
from pipeline.cluster.ranks.job import Job
from pipeline.cluster.ranks.rank import Rank
from pipeline.cluster.ranks.training_files import checkpoints_of, log_of, result
from pipeline.cluster.room import Room
from pipeline.errors import ClaimLost, UsageError
from pipeline.models import loading
from pipeline.models.encoders import Encoder
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.steps import encode, train
from pipeline.steps.build import Build, Facts
from pipeline.store import deleting
from pipeline.store.artifacts import Artifact, Store
from stages.models.compressor import Compressor
from stages.models.stage_a import StageA
from stages.state_dicts import Serialized

CAPTIONS = ("red heart", "", "a very long caption of " + 20 * "many words ", "Fuß über Zürich")
ROWS = (5, 3, 0, 4)  # of each shard
ARTIFACTS = {"text": "text_tiny", "latents_a": "latents_a", "latents_c": "latents_c"}
TRAININGS = {  # fields of the batches, and the tower
    "stage_b": (("image", "text", "latents_a"), "tiny"),
    "stage_c": (("text", "latents_c"), "tiny"),
    "previewer": (("image", "latents_c"), None),
    "baseline": (("text", "latents_a"), "tiny"),
}
CPU = torch.device("cpu")
ALONE: Any = SimpleNamespace(fence=unfenced, raise_if_lost=lambda: None)  # the claim where nobody else builds
WORDS = ("scale=micro", "data.image.size=256", "targets=[stage_c,previewer,baseline]")
ONLINE = tuple(f"encode.{field}.mode=online" for field in ARTIFACTS)
INT8 = tuple(f"encode.{field}.dtype=int8" for field in ARTIFACTS)
BF16 = ("encode.text.precision=bf16", "encode.latents_a.precision=bf16")


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


@pytest.fixture(scope="module")
def tars() -> dict[int, tuple[bytes, int]]:
    """Shards of pictures by number, and the rows of each."""
    numbers = iter(range(sum(ROWS)))
    return {
        shard: (
            shards.write_images(
                ImageRow(row, f"{number:032x}", "u", CAPTIONS[number % len(CAPTIONS)], "png", picture(number))
                for row, number in zip(range(count), numbers, strict=False)
            ),
            count,
        )
        for shard, count in enumerate(ROWS)
    }


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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tars) -> Iterator[Callable[..., Root]]:
    """A root with pictures, Stage A, a compressor, and all that the config wants encoded."""
    steps = {"text_tiny": encode.encode_text, "latents_a": encode.encode_a, "latents_c": encode.encode_c}

    @cache
    def prepare(*words: str) -> Root:
        root = Root(tmp_path_factory.mktemp("root"), *words)
        download(root, tars)
        for output in ("text_tiny", "stage_a", "latents_a", "stage_b", "latents_c"):
            if output.startswith("stage"):
                weigh(root, output)
            elif output in root.prints:
                build = root.build(output)
                root.commit(build, steps[output](build))
        return root

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board, "BoardClient", lambda given: given)
        yield prepare


def batch(root: Root, output: str) -> dict[str, np.ndarray]:
    """Seven samples as the training of an artifact reads them."""
    fields, tower = TRAININGS[output]
    build = root.build(output)
    reading = train._reading(build, fields, tower)
    *_, training = build.config.trainings_of(build.step.name).values()
    (batches,) = reading.data(training, reading.loaded(CPU)).batches.values()
    assert batches.rows == sum(ROWS)
    return batches.read(2, 7)


@pytest.mark.parametrize("words", [(), INT8, BF16], ids=["fp16", "int8", "bf16"])
def test_online_equals_cached_but_for_the_rounding_of_what_is_stored(prepared, words):
    dtype = "int8" if words == INT8 else "fp16"
    cached, online = prepared(*words), prepared(*words, *ONLINE)
    noise = 2e-2 if words == BF16 else 1e-5  # of the largest value: kernels differ by the rows of a batch
    for output in TRAININGS:
        stored, encoded = batch(cached, output), batch(online, output)
        assert stored.keys() == encoded.keys()
        for field in stored:
            if field in ("key", "image"):
                np.testing.assert_array_equal(stored[field], encoded[field])
                continue
            assert encoded[field].dtype == np.float32
            assert stored[field].dtype == (np.float32 if dtype == "int8" else np.float16)
            assert len(np.unique(encoded[field].round(4))) > 100  # the models tell pictures and captions apart
            kept = rounded(encoded[field], dtype, encode.CHANNEL[field])
            step = kept.scales if isinstance(kept, Int8) else np.spacing(np.abs(kept)).astype(np.float32)
            slack = noise * np.abs(encoded[field]).max()
            assert (np.abs(stored[field] - encoded[field]) <= step / 2 + slack).all(), (output, field)
            told = cached.artifact(ARTIFACTS[field]).manifest["notes"]["rounding"]
            assert np.abs(stored[field] - encoded[field]).max() <= told["max_abs"] + slack
            assert told["relative_rms"] < (0.02 if dtype == "int8" else 0.0005)


@pytest.mark.parametrize(
    ("words", "warmed"),
    [
        (ONLINE, ["image", "key", "latents_a"]),
        ((*ONLINE, "compressor.warmup.loss.predicts=colours"), ["image", "key"]),
        (("compressor.warmup.loss.predicts=colours",), ["image", "key"]),
    ],
)
def test_stage_b_and_its_warmup_share_the_encoders(prepared, monkeypatch, words, warmed):
    """Each is loaded once, and the warm-up has no more read or made than it takes."""
    build = prepared(*words).build("stage_b")
    order = train._order(build, build.config.stage_b, *TRAININGS["stage_b"])
    loaded, seen = list[str](), list[list[str]]()
    load = Encoder.load
    monkeypatch.setattr(Encoder, "load", lambda self, where: loaded.append(self.field) or load(self, where))

    class Short:
        """A rank that is stopped in its second training."""

        device = CPU

        def __init__(self, *_: Any):
            pass

        def train(self, _name: str, _objective: Any, _config: Any, data: Any, *_: Any) -> bool:
            seen.append(sorted(next(iter(data.batches.values())).read(0, 2)))
            return len(seen) == 1

        def logged(self) -> AbstractContextManager[None]:
            return nullcontext()

        def sampled(self) -> AbstractContextManager[None]:
            return nullcontext()

    unused: Any = None
    monkeypatch.setattr(trainings, "Rank", Short)
    trainings.run(order, unused, unused)
    assert seen == [warmed, ["image", "key", "latents_a", "text"]]
    assert sorted(loaded) == (["latents_a", "text"] if "encode.text.mode=online" in words else [])


def test_bf16_is_what_it_says(prepared):
    exact, half = (batch(prepared(*words), "stage_b") for words in (ONLINE, (*BF16, *ONLINE)))
    for field in ("text", "latents_a"):
        error = np.abs(exact[field] - half[field]).max() / np.abs(exact[field]).max()
        assert 1e-4 < error < 0.05, field


def test_an_encoder_online_stores_nothing_but_tokens(prepared):
    root = prepared(*ONLINE)
    assert not {"latents_a", "latents_c"} & root.prints.keys()
    text = root.artifact("text_tiny")
    _, tokens = shards.read_tensors(text.read(shards.tensor_name(0)), "tokens")
    assert [(row.shape, row.dtype) for row in tokens] == [((16,), np.uint16)] * ROWS[0]
    stored = prepared().artifact("text_tiny")
    for name in (loading.TOWER, loading.NULL_TEXT):  # sampling and trainings find them as ever
        assert text.read(name) == stored.read(name)
    assert text.manifest["notes"]["truncated_captions"] == stored.manifest["notes"]["truncated_captions"] == 3
    assert "3 of 12 captions have more than the 16 tokens" in root.report.warnings[0]


def test_the_spec_names_what_the_tensors_depend_on(prepared):
    root, other = prepared(), prepared(*INT8)
    for name, source, file in (
        ("text_tiny", "text_tiny", loading.TOWER),
        ("latents_a", "stage_a", loading.STAGE_A),
        ("latents_c", "stage_b", loading.COMPRESSOR),
    ):
        spec, changed = (found.artifact(name).manifest["notes"]["spec"] for found in (root, other))
        assert spec["weights"] == root.artifact(source).files[file].sha256
        assert spec.keys() == {"weights", "layer", "precision", "dtype", "hash"} | (
            spec.keys() & {"resize", "tokenizer"}
        )
        assert (spec["dtype"], changed["dtype"]) == ("fp16", "int8")
        assert spec["hash"] != changed["hash"]


def test_codes_of_another_compressor_than_stage_bs_are_refused(prepared, tars):
    root = prepared("seed=7")  # a root of its own
    stored = root.artifact("latents_c").manifest["notes"]["spec"]["weights"]
    assert train._compressor(root.build("stage_c")) == stored
    deleting.discard(root.store.path("stage_b", root.prints["stage_b"].digest), unfenced)
    rebuilt = weigh(root, "stage_b", seed=1)  # under the same fingerprint, as --force train_b on a GPU may
    with pytest.raises(UsageError, match=r"latents_c was made with another compressor .* --force encode_c"):
        train._compressor(root.build("stage_c"))
    learned = Artifact("stage_c", "", {"notes": {"compressor": stored}})
    with pytest.raises(UsageError, match="stage_c was made with another compressor"):
        loading.everything(root.config, {"stage_b": rebuilt, "stage_c": learned}, CPU)


def test_int8_is_off_by_half_a_scale_at_most():
    tensors = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32) * [1e-3, 1, 1, 1e3]
    tensors[1, :, 2] = 0
    kept = Int8.of(tensors.astype(np.float32), channel=2)
    assert kept.values.dtype == np.int8
    assert kept.scales.shape == (3, 1, 4)
    assert (np.abs(kept[:] - tensors) <= kept.scales / 2 * (1 + 1e-5)).all()
    np.testing.assert_array_equal(kept[2], kept[:][2])
    assert not kept[1][:, 2].any()


def test_rounding_is_the_error_of_all_rows_together():
    exact = np.array([[3.0, 4.0], [0.0, 0.0], [5.0, 0.0]], np.float32)
    parts = [Rounding.of(exact[part], exact[part] + np.float32(0.5)) for part in (slice(2), slice(2, 3))]
    total = sum(parts, Rounding(0.0, 0.0, 0.0))
    assert total == Rounding.of(exact, exact + np.float32(0.5))
    assert total.max_abs == 0.5
    assert total.relative_rms == pytest.approx((6 * 0.25 / 50) ** 0.5)


@pytest.mark.parametrize(("dtype", "value"), [("fp16", 7e4), ("fp16", np.nan), ("int8", np.inf)])
def test_what_does_not_fit_is_not_stored(dtype, value):
    with pytest.raises(OverflowError, match=f"do not fit into {dtype}"):
        rounded(np.array([[1.0, value]], np.float32), dtype, 1)


def test_what_stays_on_the_device_is_what_is_stored_and_a_training_can_learn_from_it():
    layer = torch.nn.Linear(3, 2).requires_grad_(False)
    loaded = Encoder("text", "tokens", lambda _: lambda tokens: layer(tokens.float()), "fp32", 2, "", {}).load(CPU)
    tokens = np.arange(15, dtype=np.int32).reshape(5, 3)
    there = loaded.there(torch.from_numpy(tokens))
    np.testing.assert_array_equal(loaded(tokens), there)
    assert not there.requires_grad
    torch.nn.Linear(2, 1)(there).sum().backward()  # which keeps its input


def test_the_previewer_needs_no_stored_size_where_it_encodes_itself():
    words = ["scale=micro", "data.image.size=256", "previewer.train.phases.0.size=256"]
    with pytest.raises(UsageError, match="previewer"):
        compose.load("previewer", words)
    assert compose.load("previewer", [*words, "encode.latents_c.mode=online"])


def test_a_batch_larger_than_the_data_is_refused_before_any_worker_starts(prepared, monkeypatch):
    root = prepared()
    monkeypatch.setattr(root, "config", compose.load("stage_c", [*WORDS, "stage_c.train.phases.0.batch_size=64"]))
    with pytest.raises(UsageError, match=r"train_c: a batch of 64 is larger than the data, which has 12 rows"):
        train.train_c(root.build("stage_c"))


def test_a_checkpoint_of_another_training_is_refused_before_any_worker_starts(prepared):
    build = prepared().build("stage_c")
    (training,) = build.config.trainings_of("train_c").values()
    states = Checkpoints(checkpoints_of(build.building, "stage_c"), warn=print)
    states.save(1, b"a state", training.recipe(build.config.seed))
    train._check_checkpoints(build)
    states.save(2, b"a state", training.recipe(build.config.seed) | {"learning_rate": 7.0})
    with pytest.raises(UsageError, match=rf"train_c: .* with learning_rate = 7.0, this .*; remove {states.folder} to"):
        train.train_c(build)


@pytest.mark.parametrize("settled", ["bf16", "fp32"])
def test_a_checkpoint_of_what_auto_came_to_is_of_the_same_training(prepared, monkeypatch, settled):
    root = prepared()
    monkeypatch.setattr(root, "config", compose.load("stage_c", [*WORDS, "stage_c.train.precision=auto"]))
    build = root.build("stage_c")
    (training,) = build.config.trainings_of("train_c").values()
    recipe = training.recipe(build.config.seed) | {"precision": settled}
    states = Checkpoints(checkpoints_of(build.building, "stage_c"), warn=print)
    shutil.rmtree(states.folder, ignore_errors=True)  # of the test before, in the same root
    states.save(1, b"a state", recipe)
    train._check_checkpoints(build)
    states.save(2, b"a state", recipe | {"learning_rate": 7.0})
    with pytest.raises(UsageError, match=r"learning_rate = 7.0"):
        train._check_checkpoints(build)


def test_trainings_read_through_the_cluster_s_cache(prepared, monkeypatch, tmp_path):
    root = prepared()
    words = [*WORDS, f"cluster.cache.folder={tmp_path}/kept", "cluster.cache.gib=0.5"]
    monkeypatch.setattr(root, "config", compose.load("stage_c", words))
    build = root.build("stage_c")
    reading = train._reading(build, ("latents_c",), None)
    data = reading.data(build.config.trainings_of("train_c")["stage_c"], [])
    data.largest.first(1)
    kept = [path for path in (tmp_path / "kept").glob("*/*") if path.is_file()]
    assert kept
    assert reading.cache.gib == 0.5


def test_what_was_logged_after_the_driver_was_killed_is_caught_up_on_once(tmp_path):
    root = Root(tmp_path, "stage_c.train.log_every=1")
    build = root.build("stage_c")
    build.interruptions.reached["stage_c"] = 9
    for saved in (8, 10, 12):
        log = {step: {"stage_c/loss": step / 10} for step in (saved - 1, saved)}
        storage.publish(json.dumps(log).encode(), storage.join(log_of(build.building, "stage_c"), f"{saved}.json"))
    train._catch_up(build)
    train._catch_up(build)
    assert root.report.logged == [(step, {"stage_c/loss": step / 10}) for step in (10, 11, 12)]
    assert build.interruptions.resumed("stage_c", 12) == 0


def test_a_training_counts_as_finished_while_the_files_are_there_that_it_says_it_has_published(tmp_path):
    """A deletion may have been killed after some of them: it goes on from its last checkpoint."""
    root = Root(tmp_path)
    build = root.build("stage_c")
    assert train._published(build) is None
    files = {"stage_c.safetensors": vars(storage.publish(b"weights", f"{build.path}/stage_c.safetensors"))}
    told = {"files": files, "rows": 1, "pids": [1], "metrics": {}}
    storage.publish(json.dumps(told).encode(), f"{build.path}/building/result.json")
    assert train._published(build) == told == result(build.path)
    assert root.report.warnings == []
    storage.publish(b"cut", f"{build.path}/stage_c.safetensors")
    assert train._published(build) is None
    assert result(build.path) is None
    (warning,) = root.report.warnings
    assert "1 of 1 files in" in warning
    assert "are missing or cut short: stage_c.safetensors; it goes on from its last checkpoint" in warning


def test_a_rank_whose_run_has_lost_its_claim_publishes_nothing(tmp_path):
    def closed() -> None:
        raise ClaimLost("gone")

    one = object.__new__(Rank)
    one.job = Job(str(tmp_path), "", closed, "", seed=0, stall_s=60.0, flops={}, bytes={})
    one.rank, one.files, one.metrics, one.pids = 0, {}, {}, [1]
    with pytest.raises(ClaimLost):
        one.publish("stage_c.safetensors", lambda: b"weights")
    with pytest.raises(ClaimLost):
        one.finish(rows=1)
    assert storage.listing(str(tmp_path)) == []
    one.job = replace(one.job, fence=unfenced)
    one.publish("stage_c.safetensors", lambda: b"weights")
    one.finish(rows=1)
    assert storage.listing(str(tmp_path)) == ["building/result.json", "stage_c.safetensors"]


def test_a_shard_whose_run_has_lost_its_claim_gets_no_receipt(prepared):
    def closed() -> None:
        raise ClaimLost("gone")

    root = prepared()
    images, path = root.artifact("images"), root.store.path("latents_c", "lost")
    read = partial(encode._pictures, root.config.frames_of("train_c")[0])
    encoder = Encoder("latents_c", "image", lambda _: pytest.fail("online"), "fp32", 2, "", {})
    arguments = (encoder, None, read, "cpu")
    actor = ShardActor(encode.ShardEncoder, arguments, sum(ROWS), "images", path, closed, Board())
    with pytest.raises(ClaimLost):
        actor((0, encode.Work(images.shards()[0])))
    assert shards.finished(path) == {}


def test_where_shards_are_made_anew_of_other_captions_the_tower_stays_that_of_the_others(tmp_path, tars, monkeypatch):
    """A repair of images may lose a picture; a tower centred on what is left would not fit the shards that stay."""
    monkeypatch.setattr(board, "BoardClient", lambda given: given)

    def encoded(root: Root) -> Artifact:
        build = root.build("text_tiny")
        return root.commit(build, encode.encode_text(build))

    def with_images(name: str, stored: dict[int, tuple[bytes, int]]) -> Root:
        root = Root(tmp_path / name, "data.image.size=128")
        download(root, stored)
        return root

    root = with_images("root", tars)
    before = encoded(root)
    files = {name: before.read(name) for name in before.files}
    fewer = shards.write_images(list(shards.read_images(tars[0][0]))[:1])
    less = tars | {0: (fewer, 1)}
    afresh = encoded(with_images("afresh", less))
    assert afresh.read(loading.TOWER) != files[loading.TOWER]

    images = root.artifact("images")
    for artifact in (before, images):
        deleting.reopen(artifact, [deleting.Shard("", 0)], lambda: None)
    download(root, less)
    after = encoded(root)
    assert after.manifest["content"] == before.manifest["content"]
    for name in (loading.TOWER, loading.NULL_TEXT, shards.tensor_name(1)):
        assert after.read(name) == files[name]
    (keys, anew), (_, was) = (
        shards.read_tensors(content, "text")
        for content in (after.read(shards.tensor_name(0)), files[shards.tensor_name(0)])
    )
    assert keys == [f"{0:032x}"]
    np.testing.assert_allclose(anew[0], was[0], atol=2e-3)  # a batch of another size rounds otherwise

    deleting.reopen(after, [deleting.Shard("", 0)], lambda: None)
    storage.publish(b"damaged", storage.join(after.path, loading.TOWER))
    assert encoded(root).read(loading.TOWER) == afresh.read(loading.TOWER)  # all that can be done
