"""What a plan says of costs and of memory: from the config, by what holds it, and the keys that help."""

import re
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.plan import cost
from pipeline.plan.wanted import planned_steps
from pipeline.settings.config import Config
from pipeline.settings.selection import Selection
from pipeline.store.artifacts import Look
from stages.anatomy import flops, parameters
from stages.settings.models import CompressorConfig
from tests.pipeline.settings.loading import load


def costs(tmp_path: Path, loaded: Config) -> dict[str, dict]:
    planned = planned_steps(loaded, Look(str(tmp_path)), Selection())
    return {item.step.name: found for item, found in zip(planned, cost.estimates(planned, loaded), strict=True)}


def test_costs_of_the_paper_come_from_the_config_and_say_so(tmp_path):
    found = costs(tmp_path, load("data.limit=1000000", scale="paper"))
    assert {estimate["basis"] for estimate in found.values()} == {"config"}
    assert all("(from config)" in estimate["text"] for estimate in found.values())
    images = 864_000 * 1536 + 4_000 * 768 + 50_000 * 384
    assert found["train_c"]["work"] == images
    assert found["train_c"]["device_seconds"] == images / 16
    assert found["download"]["work"] == 1_000_000
    assert found["sample"]["work"] == 64


def test_of_the_held_out_as_many_are_drawn_as_there_are(tmp_path):
    loaded = load("data.limit=60", "data.holdout=0.1", "data.held_out_captions=[a blue square]")
    planned = planned_steps(loaded, Look(str(tmp_path)), Selection())
    work = {
        item.step.output: found["work"] for item, found in zip(planned, cost.estimates(planned, loaded), strict=True)
    }
    assert (work["samples"], work["samples_held_out"]) == (min(loaded.sample.limit, 53), min(loaded.sample.limit, 7))


def test_rows_that_only_the_metadata_knows_are_no_number(tmp_path):
    found = costs(tmp_path, load(scale="paper"))
    assert found["download"]["work"] is None
    assert found["download"]["text"] == "rows unknown before fetch"
    assert found["train_b"]["work"] == 457_000 * 512 + 300_000 * 128


def test_what_a_plan_would_store_is_told_beside_encoding_online(tmp_path):
    found = costs(tmp_path, load("data.metadata=x.parquet", "data.limit=1000000", scale="paper"))
    shards = -(-1_000_000 // 2048)
    assert found["encode_text"]["bytes"] == 1_000_000 * 77 * 1024 * 2
    assert found["encode_text"]["objects"] == 2 * shards
    assert found["encode_a"]["bytes"] == 1_000_000 * 4 * (128**2 + 256**2) * 2  # of 512 and 1024 px
    assert found["encode_c"]["bytes"] == 1_000_000 * 16 * (12**2 + 24**2 + 24**2) * 2  # 1024 px also in other aspects
    assert found["encode_c"]["objects"] == 6 * shards
    assert found["train_c"]["bytes"] is None
    seen = {512: 500_000 * 1536, 1024: 364_000 * 1536 + 4_000 * 768 + 50_000 * 384}
    small, large = (flops.encode_c(CompressorConfig(), side) for side in (384, 768))
    assert found["encode_c"]["cached_flops"] == 1_000_000 * (small + 2 * large)
    assert found["encode_c"]["online_flops"] == seen[512] * small + seen[1024] * large
    told = re.search(
        r"; by its FLOPs (\S+) A100-hours, online (\S+) A100-hours and no bytes$", found["encode_c"]["text"]
    )
    assert told
    ratio = found["encode_c"]["online_flops"] / found["encode_c"]["cached_flops"]
    assert float(told[2]) / float(told[1]) == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize(
    ("targets", "step", "more"),
    [
        ("[stage_c,previewer]", "encode_c", "previewer"),
        ("[stage_c,baseline]", "encode_a", "baseline"),
        ("[stage_c,baseline]", "encode_text", "baseline"),
    ],
)
def test_online_counts_every_training_that_would_encode(targets, step, more, tmp_path):
    words = ("data.metadata=x.parquet", "data.limit=1000")
    alone = costs(tmp_path, load(*words, "targets=[stage_c]", scale="paper"))[step]
    found = costs(tmp_path, load(*words, f"targets={targets}", scale="paper"))[step]
    loaded = load(*words, scale="paper")
    seen = {phase.size: phase.steps * phase.batch_size for phase in getattr(loaded, more).train.phases}
    flops_of = {
        "encode_c": lambda size: flops.encode_c(CompressorConfig(), size * 3 // 4),
        "encode_a": lambda size: flops.encode_a(loaded.stage_a.model, size, size),
        "encode_text": lambda size: flops.encode_text(24, 1024, 77),
    }[step]
    assert found["online_flops"] - alone["online_flops"] == sum(n * flops_of(size) for size, n in seen.items())


def test_a_training_that_no_common_gpu_holds_gets_the_keys_that_help(tmp_path):
    def told(*words: str) -> list[str]:
        loaded = load("data.metadata=x.parquet", *words, scale="paper")
        return cost.large_trainings(planned_steps(loaded, Look(str(tmp_path)), Selection()), loaded)

    steps = [sentence.split()[0] for sentence in told()]
    assert steps == ["train_b", "train_c"]  # the others recompute activations where they must
    (train_c,) = (sentence for sentence in told() if sentence.startswith("train_c"))
    (workers,) = re.findall(r"workers=(\d+)", train_c)
    assert "train_c" in " ".join(told(f"workers={int(workers) // 2}"))
    assert "train_c" not in " ".join(told(f"workers={workers}"))
    assert "stage_c.train.micro_batch=" in train_c
    assert told("workers=64") == []
    assert told("cluster.gpu_memory_gib=24") == []


def test_a_rate_of_no_step_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"rates\.trian_c: there is no such step.*train_c"):
        costs(tmp_path, load("rates.trian_c=1"))
    assert costs(tmp_path, load("rates.train_c=2"))["train_c"]["device_seconds"] == 16


def test_memory_is_told_for_the_trainings_by_what_holds_it(tmp_path):
    loaded = load("data.metadata=x.parquet", "workers=64", scale="paper")
    found = costs(tmp_path, loaded)
    assert {step for step, estimate in found.items() if estimate["memory"]} == {"train_a", "train_b", "train_c"}
    memory = found["train_c"]["memory"]
    assert memory["gradients"] == memory["average"] == 4 * 993_243_680
    assert memory["weights"] == 6 * 993_243_680  # fp32, and bf16 for the backward pass
    assert memory["moments"] == 8 * 993_243_680
    assert memory["total"] == sum(value for part, value in memory.items() if part != "total")
    assert memory["total"] < 80 * 2**30  # of the paper's A100


def test_a_warm_up_that_needs_more_than_stage_b_counts():
    small, large = load(), load("compressor.warmup.train.phases.0.batch_size=4096")
    before, after = cost.memory("train_b", small), cost.memory("train_b", large)
    assert before is not None
    assert after is not None
    assert after.activations > 100 * before.activations


def test_encoders_that_run_online_need_memory_of_the_training():
    words = [f"encode.{field}.mode=online" for field in ("text", "latents_a", "latents_c")]
    cached, online = load(scale="single_gpu"), load(*words, scale="single_gpu")
    towers = ("train_b", "train_c", "train_baseline")
    for step in ("train_a", "train_previewer", *towers):
        before, after = cost.memory(step, cached), cost.memory(step, online)
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
        cost.check_memory(planned_steps(loaded, Look(str(tmp_path)), selection), loaded)

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
    need, less = cost.memory("train_a", fewer), cost.memory("train_a", all_of_them)
    assert need
    assert less
    assert less.total < need.total < 40 * 2**30  # also of an A100 of 40 GB
    assert cost.whole_bytes("train_a", fewer) == {8: need.total}
    assert cost.memory("train_a", fewer, 64) == less


def test_a_training_of_few_ranks_that_does_not_fit_is_told_of_more_of_them(tmp_path):
    def check(*words: str) -> None:
        loaded = load("data.metadata=x", "cluster=a100x64", "cluster.gpu_memory_gib=8", *words, scale="paper")
        cost.check_memory(planned_steps(loaded, Look(str(tmp_path)), Selection(until="train_a")), loaded)

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
        cost.check_memory([item for item in planned if item.step.name == "train_c"], loaded)
    _, _, advice = str(error.value).partition("lower it with")
    assert f"stage_c.train.{told}" in advice
    assert untold not in advice
