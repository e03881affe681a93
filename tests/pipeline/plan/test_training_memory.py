"""What trainings need of a device's memory, who is refused for it, and the keys that help."""

import re

import pytest

from pipeline.errors import UsageError
from pipeline.plan import training_memory
from pipeline.plan.wanted import planned_steps
from pipeline.settings.selection import Selection
from pipeline.store.artifacts import Look
from stages.anatomy import parameters
from tests.pipeline.settings.loading import load


def test_a_training_that_no_common_gpu_holds_gets_the_keys_that_help(tmp_path):
    def told(*words: str) -> list[str]:
        loaded = load("data.metadata=x.parquet", *words, scale="paper")
        return training_memory.large_trainings(planned_steps(loaded, Look(str(tmp_path)), Selection()), loaded)

    steps = [sentence.split()[0] for sentence in told()]
    assert steps == ["train_b", "train_c"]  # the others recompute activations where they must
    (train_c,) = (sentence for sentence in told() if sentence.startswith("train_c"))
    (workers,) = re.findall(r"workers=(\d+)", train_c)
    assert "train_c" in " ".join(told(f"workers={int(workers) // 2}"))
    assert "train_c" not in " ".join(told(f"workers={workers}"))
    assert "stage_c.train.micro_batch=" in train_c
    assert told("workers=64") == []
    assert told("cluster.gpu_memory_gib=24") == []


def test_a_warm_up_that_needs_more_than_stage_b_counts():
    small, large = load(), load("compressor.warmup.train.phases.0.batch_size=4096")
    before, after = training_memory.needed("train_b", small), training_memory.needed("train_b", large)
    assert before is not None
    assert after is not None
    assert after.activations > 100 * before.activations


def test_encoders_that_run_online_need_memory_of_the_training():
    words = [f"encode.{field}.mode=online" for field in ("text", "latents_a", "latents_c")]
    cached, online = load(scale="single_gpu"), load(*words, scale="single_gpu")
    towers = ("train_b", "train_c", "train_baseline")
    for step in ("train_a", "train_previewer", *towers):
        before, after = training_memory.needed(step, cached), training_memory.needed(step, online)
        assert before is not None
        assert after is not None
        assert before.encoders == 0
        assert after.total - before.total == after.encoders
        tower = 4 * parameters.text(online.text["clip_h"])
        assert (after.encoders > tower) == (step in towers)
        assert (after.encoders > 0) == (step != "train_a")


def test_what_cannot_fit_is_refused_with_the_keys_that_help(tmp_path):
    def check(*words: str, selection: Selection = Selection()) -> None:  # noqa: B008
        loaded = load(*words, scale="single_gpu")
        training_memory.check(planned_steps(loaded, Look(str(tmp_path)), selection), loaded)

    check()
    check("cluster.gpu_memory_gib=null", "stage_c.train.phases.0.batch_size=4096")
    with pytest.raises(UsageError, match=r"train_b needs about \d+\.\d GiB of device memory a worker \(weights 1\."):
        check("cluster.gpu_memory_gib=8")
    with pytest.raises(UsageError) as refusal:
        check("stage_c.train.phases.0.batch_size=4096")
    text = str(refusal.value)
    assert text.startswith("train_c needs about ")
    assert "but cluster.gpu_memory_gib=24; lower it with stage_c.train.micro_batch=2048" in text
    assert "stage_c.train.ema.device=cpu" in text
    assert "precision" not in text  # it is bf16 already
    check("stage_c.train.phases.0.batch_size=4096", selection=Selection(until="train_b"))
    check("stage_c.train.phases.0.batch_size=4096", "stage_c.train.micro_batch=16")


def test_memory_is_that_of_a_rank_of_as_many_as_there_are(tmp_path):
    words = ("workers=64", "cluster=a100x64", "data.metadata=somewhere")
    fewer, all_of_them = (load(*words, f"stage_a.train.ranks={n}", scale="paper") for n in ("8", "null"))
    need, less = training_memory.needed("train_a", fewer), training_memory.needed("train_a", all_of_them)
    assert need
    assert less
    assert less.total < need.total < 40 * 2**30  # also of an A100 of 40 GB
    assert training_memory.whole_bytes("train_a", fewer) == {8: need.total}
    assert training_memory.needed("train_a", fewer, 64) == less


def test_a_training_of_few_ranks_that_does_not_fit_is_told_of_more_of_them(tmp_path):
    def check(*words: str) -> None:
        loaded = load("data.metadata=x", "cluster=a100x64", "cluster.gpu_memory_gib=8", *words, scale="paper")
        training_memory.check(planned_steps(loaded, Look(str(tmp_path)), Selection(until="train_a")), loaded)

    fixed = ("stage_a.train.checkpointing=false", "workers=64", "stage_a.train.ranks=8")
    with pytest.raises(UsageError, match=r"with stage_a\.train\.ranks=8, but .*, stage_a\.train\.ranks=16$"):
        check(*fixed)
    check(*fixed, "stage_a.train.ranks=16")
    with pytest.raises(UsageError, match=r"with workers=8, but (?!.*(workers|ranks)=\d+$)"):
        check(*fixed, "workers=8")  # more workers alone would not be taken


@pytest.mark.parametrize(
    ("words", "told", "untold"),
    [
        (["stage_c.train.muon={learning_rate: 0.1}"], "micro_batch=", "shard="),
        ([], "micro_batch=", "shard="),  # as the paper's shows panels
        (["stage_c.train.panel_every=null", "stage_c.train.phases.0.reduce=null"], "shard=", "ranks="),
    ],
)
def test_what_does_not_go_with_a_training_is_not_advised(tmp_path, words, told, untold):
    given = ("data.metadata=x", "cluster=a100x64", "cluster.gpu_memory_gib=12", "stage_c.train.checkpointing=false")
    loaded = load(*given, "workers=8", *words, scale="paper")
    planned = planned_steps(loaded, Look(str(tmp_path)), Selection(until="train_c"))
    with pytest.raises(UsageError) as error:
        training_memory.check([item for item in planned if item.step.name == "train_c"], loaded)
    _, _, advice = str(error.value).partition("lower it with")
    assert f"stage_c.train.{told}" in advice
    assert untold not in advice
