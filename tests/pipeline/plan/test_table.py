"""The DAG's table: which values and inputs each step reads, by the fingerprints that they change."""

import pytest

from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from tests.pipeline.settings.loading import load


def digests(*words: str) -> dict[str, str]:
    """Fingerprint of each artifact of conf=stage_c."""
    loaded = load(*words)
    steps = order(table(loaded), loaded.targets)
    return {name: found.digest for name, found in fingerprints(steps, loaded.lookup).items()}


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    return digests()


@pytest.mark.parametrize(
    "words",
    [
        ("stage_a.train.log_every=2", "stage_b.train.checkpoint_every=4", "stage_c.train.log_every=2"),
        ("compressor.warmup.train.log_every=2", "compressor.warmup.train.checkpoint_every=4"),
        ("stage_b.train.checkpointing=true", "stage_c.train.compile=true"),
        ("stage_c.train.compile=graphs",),
        ("cluster=slurm",),
        ("cluster.retries=9", "cluster.encoders.max=5", "cluster.gpu_memory_gib=80"),
        ("workers=4", "cluster.min_workers=2", "cluster.replacement_s=5"),
        ("tracking=server", "tracking.experiment=other"),
        ("workers=2",),
        ("cluster.encoders.gpus=0.5", "encode.text.batch=4", "encode.latents_a.batch=4", "encode.latents_c.batch=4"),
        ("rates.train_c=3",),
        ("sample.batch=4", "sample.compile=true", "sample.offload=true"),
        ("sample.sampler=ddpm", "sample.timesteps=uniform", "sample.precision=fp32"),
    ],
)
def test_what_cannot_change_a_result_changes_no_fingerprint(words, before):
    assert digests(*words) == before


def test_where_the_average_lies_changes_no_fingerprint():
    ema = "stage_c.train.ema={decay: 0.9, every: 1, start: 0, device: %s}"
    assert digests(ema % "cpu") == digests(ema % "model")


AFTER_A = {"stage_a", "latents_a", "stage_b", "latents_c", "stage_c", "samples", "scores", "release"}
AFTER_B = AFTER_A - {"stage_a", "latents_a"}
AFTER_C = AFTER_B - {"stage_b", "latents_c"}


@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("stage_a.train.learning_rate=0.1", AFTER_A),
        ("stage_a.loss.colour=2", AFTER_A),
        ("stage_b.train.learning_rate=0.1", AFTER_B),
        ("compressor.warmup.train.weight_decay=0", AFTER_B),
        ("stage_c.train.phases.0.steps=5", AFTER_C),
        ("stage_c.train.gradient_clip=2", AFTER_C),
        ("sample.steps_c=3", AFTER_C - {"stage_c"}),
        ("sample.sampler=ddim", AFTER_C - {"stage_c"}),
        ("text.tiny.seed=1", AFTER_B | {"text_tiny"}),
        ("data.image.quality=90", AFTER_A | {"images", "text_tiny"}),
        ("encode.text.precision=bf16", AFTER_B | {"text_tiny"}),
        ("encode.text.mode=online", AFTER_B | {"text_tiny"}),
        ("encode.latents_a.dtype=int8", AFTER_B | {"latents_a"}),
        ("encode.latents_c.dtype=int8", AFTER_C | {"latents_c"}),
    ],
)
def test_a_changed_value_changes_its_step_and_the_descendants_only(word, changed, before):
    after = digests(word)
    assert {name for name, digest in after.items() if digest != before[name]} == changed


@pytest.mark.parametrize(
    "words",
    [
        ("previewer.model.width=8", "previewer.train.learning_rate=0.1", "previewer.loss.l1=2"),
        ("baseline.model.widths=[8,16]", "baseline.train.learning_rate=0.1", "baseline.sample.steps=3"),
        ("text.other={model: seeded, width: 32, heads: 2, context_length: 16}", "baseline.text=other"),
    ],
)
def test_previewer_and_baseline_change_nothing_of_what_does_not_need_them(words, before):
    assert digests(*words) == before


def test_online_a_training_takes_the_encoder_in_place_of_its_latents(before):
    online = digests("encode.latents_c.mode=online")
    assert before.keys() - online.keys() == {"latents_c"}
    assert {name for name in online if online[name] != before[name]} == AFTER_C
    assert digests("encode.latents_c.mode=online", "encode.latents_c.dtype=int8") == online
    with_a = digests("encode.latents_a.mode=online")
    assert before.keys() - with_a.keys() == {"latents_a"}
    half = digests("encode.latents_a.mode=online", "encode.latents_a.precision=bf16")
    assert {name for name in half if half[name] != with_a[name]} == AFTER_B


def test_a_rival_is_an_input_of_the_scores_and_of_nothing_before(before):
    named = digests("eval=baseline")
    assert set(named) - set(before) == {"baseline", "baseline_samples", "null_samples"}
    assert {name for name in before if named[name] != before[name]} == {"scores", "release"}
    assert digests("eval.distances.fid_from=2") == before  # nothing takes features
    seen = digests("eval.distances.inception=w")
    features = {f"features_training-{whose}" for whose in ("ours", "null", "reference")}
    assert set(seen) - set(before) == {"null_samples", *features}
    assert {name for name in before if seen[name] != before[name]} == {"scores", "release"}
    timed = digests("eval=speed")
    assert set(timed) - set(before) == {"speed"}
    ablated = digests("sample.ablations=[preview]")
    assert set(ablated) - set(before) == {"previewer"}
    other = digests("eval.rivals.other=pictures")
    assert set(other) - set(before) == {"null_samples"}
    slower = digests("eval=baseline", "baseline.sample.steps=3")
    assert {name for name in named if slower[name] != named[name]} == {"baseline_samples", "scores", "release"}


def test_a_prompt_set_of_ones_own_is_drawn_without_the_data(tmp_path, before):
    """What it is fingerprinted by is its content, and the pictures that are in the data are none of its inputs."""
    (tmp_path / "mine.txt").write_text("a cat")
    word = f"eval.prompts.mine={tmp_path / 'mine.txt'}"
    first = digests(word)
    assert set(first) - set(before) == {"samples_mine"}
    assert {name for name in before if first[name] != before[name]} == {"scores", "release"}
    assert digests(word, "sample.limit=2")["samples_mine"] == first["samples_mine"]
    assert digests(word, "sample.steps_c=3")["samples_mine"] != first["samples_mine"]
    (tmp_path / "mine.txt").write_text("a dog")
    assert digests(word)["samples_mine"] != first["samples_mine"]


def test_held_out_captions_are_a_prompt_set_of_their_own_and_the_default(before):
    held = digests("data.held_out_captions=[red heart]")
    assert set(held) - set(before) == {"held_out", "samples_held_out"}
    assert held["images"] == before["images"]
    assert held["samples"] != before["samples"]  # which are of the captions that were trained on
    share = digests("data.holdout=0.2")
    assert share["held_out"] != held["held_out"]


def test_a_training_at_another_size_changes_its_latents_too():
    before = digests("data.image.size=256")
    after = digests("data.image.size=256", "stage_c.train.phases.0.size=256")
    assert {name for name, digest in after.items() if digest != before[name]} == AFTER_C | {"latents_c"}
