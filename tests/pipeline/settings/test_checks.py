"""What sections ask of each other, one by one, and the ranges of their own: nonsense is refused, sense is not."""

import pytest

from pipeline.errors import UsageError
from tests.pipeline.settings.loading import load


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("data.metadata=''", "data.metadata: is blank; give a text, or null where there may be none"),
        ("tracking.experiment=' '", "tracking.experiment: is blank"),
        ("stage_c.weights=''", "stage_c.weights: is blank"),
        ("cluster.address=''", "cluster.address: is blank"),
        ("cluster.stall_s=1e-9", "cluster.stall_s=1e-09: input should be greater than or equal to 1"),
        ("data.shard_rows=1e20", "data.shard_rows=1e+20: input is far out of range"),
        ("data.shard_rows=1000000", "data.shard_rows=1000000: input should be less than or equal to 100000"),
        ("data.filters.min_side=5000", "data.filters: min_side=5000 is above max_side=4096, so that nothing passes"),
        ("data.views={all: {min_side: 2, max_side: 1}}", "data.views.all: min_side=2 is above max_side=1"),
        ("data.filters.min_words=200", "data.filters: max_characters=300 is too few for min_words=200"),
        ("data.filters={min_side: null, max_side: 64}", "data: filters.max_side=64 is below image.size=128: no"),
        ("data.openmoji.size=64", "data: openmoji.size=64 is below image.size=128"),
        ("data.image.max_pixels=100", "data.image: max_pixels=100 refuses every picture of size=128 px; raise it to"),
        ("data.openmoji.captions=[]", "data.openmoji.captions: tuple should have at least 1 item"),
        ("cluster.encoders.min=3", "cluster.encoders: min=3 is above max=2"),
        ("cluster.cache.gib=0", "cluster.cache.gib=0: input should be greater than"),
        ("stage_c.model.dropout=1", "stage_c.model.dropout=1: input should be less than 1"),
        ("stage_c.train.learning_rate=1e9", "stage_c.train.learning_rate=1000000000.0: input should be less than"),
        (
            "stage_c.train.compile=graph",
            "train.compile=graph: input should be a valid boolean (true, false) or 'graphs'",
        ),
        ("stage_c.train.checkpointing=2", "checkpointing=2: input should be a valid boolean (true, false) or 'auto'"),
        ("workers=1e9", "workers=1000000000.0: input should be less than or equal to 100000"),
        ("data.views={A b: {}}", "data.views.A b: the name should match pattern '^[a-z0-9_]+$'"),
        ("compressor.model.input_ratio=0.1", "compressor.model.input_ratio=0.1 leaves 12 px of pictures of 128 px"),
        ("stage_c.train.ema=true", "stage_c.train.ema=true: a section with keys of its own is needed here"),
        ("stage_b.train.augment.flip=0.5", "stage_b.train.augment changes pictures of which it reads stored latents; "),
        ("compressor.warmup.train.augment.hue=1", "compressor.warmup.train.augment changes pictures"),
        ("compressor.warmup.train.muon={learning_rate: 0.1}", "compressor.warmup.train.muon: this model has no blocks"),
        ("stage_c.train={muon: {learning_rate: 0.1}, shard: 2}", "muon takes whole matrices"),
        ("stage_c.train.augment.hue=2", "stage_c.train.augment.hue=2: input should be less than or equal to 1"),
        ("encode.latents_a.precision=auto", "encode.latents_a: precision=auto goes with mode=online: what is stored"),
        ("stage_b.model.widths=16", "stage_b.model.widths=16: a list is needed here, such as [one, two]"),
    ],
)
def test_nonsense_is_refused_in_a_sentence_with_its_key(word, told):
    with pytest.raises(UsageError) as caught:
        load(word)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "word",
    [
        "data.filters.max_side=null",
        "data.filters.min_side=4096",
        "data.openmoji.captions=null",
        "sample.negative=''",
        "data.limit=6000000000",
        "cluster.stall_s=1",
        "cluster.encoders={min: 2, max: 2}",
        "compressor.model.input_ratio=0.25",
        "text.CLIP-2={model: seeded}",
        "stage_a.train.augment.flip=0.5",
        "encode.latents_a={mode: online, precision: auto}",
    ],
)
def test_the_edges_of_sense_are_not(word):
    assert load(word)


def test_the_best_weights_of_the_warm_up_take_held_out_pictures_as_those_of_other_trainings():
    best = "compressor.warmup.train.validation={every: 2, keep: best}"
    with pytest.raises(UsageError, match=r"compressor\.warmup\.train\.validation\.keep=best needs pictures"):
        load(best)
    assert load(best, "data.holdout=0.1")


@pytest.mark.parametrize("name", ["stage_b", "stage_c", "baseline"])
def test_no_best_weights_by_a_loss_whose_scale_changes(name):
    words = (f"{name}.train.validation={{every: 2, keep: best}}", "data.holdout=0.1")
    with pytest.raises(UsageError, match=rf"{name}\.train\.validation\.keep=best: adaptive weights"):
        load(*words, f"{name}.loss.weight=adaptive")
    assert load(*words)


def test_other_numbers_of_workers_are_named_by_what_divides_all_batches():
    with pytest.raises(UsageError, match=r"does not divide among workers=3; use workers=2 or 4$"):
        load("workers=3")
    with pytest.raises(UsageError, match=r"does not divide among workers=9; use workers=8$"):
        load("workers=9")


def test_ranks_of_a_training_are_named_where_its_batches_do_not_divide_among_them():
    told = r"^stage_c\.train\.phases\.0\.batch_size=8 does not divide among stage_c\.train\.ranks=3; "
    with pytest.raises(UsageError, match=told + r"use stage_c\.train\.ranks=2 or 4$"):
        load("workers=8", "stage_c.train.ranks=3")
    with pytest.raises(UsageError, match=r"among stage_a\.train\.ranks=48; use stage_a\.train\.ranks=32$"):
        load("workers=60", "stage_a.train.ranks=48", scale="paper")  # 64 would be more than there are
    told = r"shard=4 does not divide stage_c\.train\.ranks=2; use stage_c\.train\.ranks=4$"
    with pytest.raises(UsageError, match=told):
        load("workers=8", "stage_c.train.ranks=2", "stage_c.train.shard=4", "stage_c.train.panel_every=null")


def test_workers_are_held_against_the_ranks_that_trainings_take_of_them():
    few = [f"{key}.ranks=2" for key in ("stage_a.train", "stage_b.train", "compressor.warmup.train", "stage_c.train")]
    load("workers=3", *few, "previewer.train.ranks=1", "baseline.train.ranks=1")
    with pytest.raises(UsageError, match=r"previewer.*does not divide among workers=3; use workers=2 or 4$"):
        load("workers=3", *few)


def test_no_pair_that_is_mixed_is_parted():
    for words in (["stage_c.train.micro_batch=1"], ["stage_c.train.ranks=8", "workers=8", "cluster.min_workers=1"]):
        assert load(*words).worlds_of("train_c")[0] == load(*words).ranks_of("train_c")
        with pytest.raises(
            UsageError, match=r"^stage_c\.loss\.mixup mixes pairs of samples: give stage_c\.train an even"
        ):
            load(*words, "stage_c.loss.mixup=0.5")
    config = load("stage_c.train.ranks=4", "workers=4", "cluster.min_workers=1", "stage_c.loss.mixup=0.5")
    assert config.worlds_of("train_c") == [4, 2, 1]
    assert load("stage_c.train.micro_batch=2", "stage_c.loss.mixup=0.5")


def test_one_step_does_its_trainings_on_as_many_ranks():
    told = r"compressor\.warmup\.train\.ranks=2 and stage_b\.train\.ranks=null differ, but one step does both"
    with pytest.raises(UsageError, match=told):
        load("workers=4", "compressor.warmup.train.ranks=2")
    assert load("workers=4", "compressor.warmup.train.ranks=2", "stage_b.train.ranks=2").ranks_of("train_b") == 2
    assert load("workers=2", "compressor.warmup.train.ranks=2").ranks_of("train_b") == 2


def test_graphs_are_for_one_worker():
    with pytest.raises(UsageError, match=r"stage_c\.train\.compile=graphs is for one worker, not workers=2; .* number"):
        load("workers=2", "stage_c.train.compile=graphs")
    assert load("stage_c.train.compile=graphs").stage_c.train.compile == "graphs"
