"""Online equals cached: what a training encodes itself differs from what a step stored by the storage's rounding.

And what a training refuses before its workers start.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch

from datasets.files import storage
from datasets.files.fence import unfenced
from datasets.formats import shards
from datasets.formats.rounding import Int8, Rounding, rounded
from pipeline.cluster import board
from pipeline.cluster.mapping import ShardActor
from pipeline.cluster.ranks import trainings
from pipeline.cluster.ranks.checkpoints import Checkpoints
from pipeline.cluster.ranks.training_files import checkpoints_of
from pipeline.errors import ClaimLost, UsageError
from pipeline.models import loading
from pipeline.models.encoders import Encoder
from pipeline.settings import compose
from pipeline.steps import encode, train
from pipeline.store import deleting
from pipeline.store.artifacts import Artifact
from tests.pipeline.in_process import (
    ROWS,
    WORDS,
    Board,
    Root,
    download,
    weigh,
)

ARTIFACTS = {"text": "text_tiny", "latents_a": "latents_a", "latents_c": "latents_c"}
TRAININGS = {  # fields of the batches, and the tower
    "stage_b": (("image", "text", "latents_a"), "tiny"),
    "stage_c": (("text", "latents_c"), "tiny"),
    "previewer": (("image", "latents_c"), None),
    "baseline": (("text", "latents_a"), "tiny"),
}
CPU = torch.device("cpu")
ONLINE = tuple(f"encode.{field}.mode=online" for field in ARTIFACTS)
INT8 = tuple(f"encode.{field}.dtype=int8" for field in ARTIFACTS)
BF16 = ("encode.text.precision=bf16", "encode.latents_a.precision=bf16")


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
