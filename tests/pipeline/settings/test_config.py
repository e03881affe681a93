"""The config: every combination that is committed, what is refused and in which words, and what enters fingerprints."""

import re
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.plan import cost, obstacles
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.plan.wanted import planned_steps
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.selection import Selection
from pipeline.store.artifacts import Look
from stages.anatomy import flops, parameters
from stages.settings.models import CompressorConfig
from tests.pipeline.plan.test_fingerprints import CONFS
from tests.pipeline.settings.loading import GROUPS, load


def refused(*words: str) -> str:
    """What the user is told of these words."""
    with pytest.raises(UsageError) as caught:
        load(*words)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("scale", GROUPS["scale"])
@pytest.mark.parametrize("conf", compose.names())
def test_every_conf_is_valid_at_every_scale_on_every_cluster(conf, scale):
    clusters = GROUPS["cluster"]
    for cluster in clusters if conf in CONFS else clusters[:1]:  # others only name targets: `test_fingerprints`
        assert load(f"cluster={cluster}", conf=conf, scale=scale).targets


COCO = ("eval.prompts.coco=a.json", "eval.distances.inception=i.pth", "eval.distances.references.coco=pictures")


@pytest.mark.parametrize(
    "words",
    [
        ("data=openmoji",),
        ("data=laion_aesthetic", "data.metadata=rows.parquet"),
        ("data=coco_captions", "data.coco_captions.annotations=captions.json"),
        ("data=localized_narratives", "data.localized_narratives.annotations=narratives.jsonl"),
        ("data=webdataset", "data.webdataset.path=s3://bucket/tars"),
        ("eval=local",),
        ("eval=baseline",),
        ("eval=pickscore", "eval.scorers.pickscore=w.safetensors", "eval.rivals.other=pictures"),
        ("eval=speed", "sample.ablations=[preview,without_text]"),
        ("eval=coco30k", *COCO),
        ("eval=fid_robustness", *COCO),
        ("tracking=local",),
        ("tracking=server",),
    ],
)
def test_the_options_of_the_other_groups_are_valid(words):
    load(*words)


def test_a_scale_chooses_the_data_unless_the_command_line_does():
    assert load(scale="paper").data.source == "laion_aesthetic"
    assert load("data=openmoji", scale="paper").data.source == "openmoji"
    assert load(scale="single_gpu").data.source == "openmoji"
    assert load("data=laion_aesthetic", "data.metadata=x", scale="single_gpu").data.source == "laion_aesthetic"


def test_paper_batches_divide_among_the_gpus_of_the_big_clusters():
    trainings = load("workers=64", scale="paper").trainings().values()
    assert all(phase.batch_size % 64 == 0 for training in trainings for phase in training.phases)


def test_the_paper_trains_stage_c_for_the_published_918000_steps():
    assert load(scale="paper").stage_c.train.num_steps == 918_000


# --------------------------------------------------------------------------------------------- golden numbers


def count(module: object) -> int:
    from torch import nn

    assert isinstance(module, nn.Module)
    return sum(parameter.numel() for parameter in module.parameters())


def test_scale_paper_has_the_golden_parameter_counts():
    import torch

    from stages.models.baseline import Baseline
    from stages.models.compressor import Compressor
    from stages.models.previewer import Previewer
    from stages.models.stage_a import StageA
    from stages.models.stage_b import StageB
    from stages.models.stage_c import StageC

    paper = load(scale="paper")
    bigg = load(
        "text.bigg={model: ViT-bigG-14, weights: w.safetensors}",
        "stage_c.text=bigg",
        "stage_c.model.text_width=1280",
        scale="paper",
    )
    single = load(scale="single_gpu")
    with torch.device("meta"):
        assert count(StageA(paper.stage_a.model)) == 18_406_894
        assert count(Compressor(paper.compressor.model)) == 20_198_000
        assert count(StageB(paper.stage_b.model)) == 1_055_365_280
        assert count(StageC(paper.stage_c.model)) == 993_243_680
        assert count(StageC(bigg.stage_c.model)) == 993_636_896
        assert count(StageB(single.stage_b.model)) == 251_040_928
        assert count(StageC(single.stage_c.model)) == 222_841_888
        assert count(Previewer(paper.previewer.model)) == 3_979_651
        assert count(Baseline(paper.baseline.model)) == 994_517_456
        assert count(Baseline(single.baseline.model)) == 239_867_216


def test_paper_starts_the_codes_maps_as_the_authors_do_in_the_units_of_its_code():
    paper = load(scale="paper")
    assert paper.compressor.model.batch_norm == "fixed"
    assert paper.stage_b.model.code_mapper_std == pytest.approx(0.02 / 42, rel=1e-3)


# ------------------------------------------------------------------------------------------------------ cost


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


def test_fewer_workers_are_those_that_divide_all_batches():
    words = ("workers=64", "cluster=a100x64", "data.metadata=somewhere")
    loaded = load(*words, "cluster.min_workers=16", scale="paper")
    assert loaded.worlds_of("train_b") == [64, 32, 16]
    assert loaded.worlds_of("train_c") == [64, 48, 32, 24, 16]
    assert load(*words, scale="paper").worlds_of("train_c") == [64]


def test_a_training_has_no_more_ranks_than_it_wants_and_goes_on_with_fewer_only_below_that():
    words = ("cluster=a100x64", "data.metadata=somewhere")

    def worlds(*more: str) -> list[int]:
        loaded = load(*words, *more, scale="paper")
        assert loaded.ranks_of("train_a") == max(loaded.worlds_of("train_a"))
        return loaded.worlds_of("train_a")

    assert worlds("workers=64") == [16]  # two nodes of the paper's
    assert worlds("workers=64", "stage_a.train.ranks=null") == [64]
    assert worlds("workers=4") == [4]
    assert worlds("workers=64", "cluster.min_workers=32") == [16]
    assert worlds("workers=64", "cluster.min_workers=2") == [16, 8, 4, 2]
    assert load(*words, "workers=64", scale="paper").ranks_of("train_b") == 64


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


def test_bf16_is_refused_where_a_gpu_has_none(tmp_path):
    def check(kind: str, *words: str, selection: Selection = Selection()) -> None:  # noqa: B008
        loaded = load(*words)
        obstacles.check_precision(loaded, planned_steps(loaded, Look(str(tmp_path)), selection), kind)

    words = ("stage_c.train.precision=bf16", "sample.precision=bf16")
    for kind in ("cpu", "cuda:GPU", "cuda:A100+H100"):
        check(kind, *words)
    check("cuda:V100")
    check("cuda:V100", *words, selection=Selection(until="train_b"))
    told = "V100 GPUs cannot compute in bf16; give stage_c.train.precision=fp32 sample.precision=fp32"
    with pytest.raises(UsageError, match=told):
        check("cuda:A100+V100", *words)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("stage_c.train.learnign_rate=1", "stage_c.train.learnign_rate: there is no such key (did you mean "),
        ("stage_c.train.learnign_rate=1", "stage_c.train.learning_rate?)"),
        ("stage_c.train.gradient_clp=1", "(did you mean stage_c.train.gradient_clip?)"),
        ("sclae=micro", "sclae: there is no such key (did you mean scale?)"),
        ("data.filters.min_seide=1", "(did you mean data.filters.min_side?)"),
        ("text.tiny.widht=1", "text.tiny.widht: there is no such key (did you mean text.tiny.width?)"),
        ("compressor.model.backbone.stme=8", "(did you mean compressor.model.backbone.stem?)"),
        ("seed=abc", "seed=abc: input should be a valid integer"),
        ("seed=1.5", "seed=1.5: input should be a valid integer"),
        ("seed.x=1", "seed: input should be a valid integer"),
        ("stage_c.train.learning_rate=fast", "stage_c.train.learning_rate=fast: input should be a valid number"),
        ("stage_c.train.learning_rate=-1", "stage_c.train.learning_rate=-1: input should be greater than 0"),
        ("text.tiny.width=x", "text.tiny.width=x: input should be a valid integer"),
        ("text.tiny.model=clip", "text.tiny: input tag 'clip' found"),
        ("compressor.model.backbone=b7", "compressor.model.backbone=b7: input should be 'efficientnet_v2_s' or"),
        ("compressor.model.backbone.last=x", "compressor.model.backbone.last=x: input should be a valid integer"),
        ("stage_c.train.phases=[{steps: 1}]", "stage_c.train.phases.0.batch_size: field required"),
        ("sample.width=100", "sample.width=100: input should be a multiple of 128"),
        ("cluster.device=gpu", "cluster.device=gpu: input should be 'auto', 'cpu' or 'cuda'"),
        ("scale=mirco", "scale=mirco: there is no such option (did you mean micro?); scale has "),
        ("cluster=slrum", "(did you mean slurm?)"),
        ("data=coco", "(did you mean coco_captions?)"),
        ("data.download.proxy=proxy:3128", "'proxy:3128' is no proxy that is asked by HTTP; give http://HOST:PORT"),
        ("data=laion_aesthetic", "data.metadata is not set"),
        ("eval=pickscore", "eval.scorers.pickscore: a value is needed"),
        ("stage_c.train.phases.0.size=136", "phases.0.size=136: must be a multiple of 128 px"),
        ("stage_c.train.phases.0.size=256", "size=256 is larger than the stored pictures, data.image.size=128"),
        (
            "stage_a.loss={adversarial: 0.01, crop: 64}",
            "crops of 64 px are too small for the perceptual",
        ),
        ("stage_a.loss.perceptual_heads=vgg.pth", "stage_a.loss: perceptual_heads needs perceptual_weights"),
        ("stage_c.loss.weight=p3", "'none' or 'adaptive'"),
        ("workers=3", "batch_size=8 does not divide among workers=3"),
        ("previewer.train.checkpointing=true", "previewer.train.checkpointing=true: this model has no blocks"),
        ("stage_c.text=clip", "stage_c.text names the tower 'clip', but text has tiny"),
        ("stage_c.model.text_width=64", "stage_c.model.text_width is 64, but the tower 'tiny' gives width 32"),
        ("baseline.text=clip", "baseline.text names the tower 'clip', but text has tiny"),
        ("baseline.model.text_width=64", "baseline.model.text_width is 64, but the tower 'tiny' gives width 32"),
        ("baseline.model.latent_channels=8", "baseline.model.latent_channels=8: what it works on has 4 channels"),
        ("baseline.model.patch=32", "baseline.model: patch x 2^(number of widths - 1) must divide 32"),
        ("baseline.model.groups=5", "baseline.model: groups (5) must divide every width, also 16"),
        ("baseline.train.phases.0.size=136", "baseline.train.phases.0.size=136: must be a multiple of 128 px"),
        ("previewer.model.latent_channels=8", "previewer.model.latent_channels=8: what it works on has 16 channels"),
        ("previewer.model.width=6", "previewer.model.width=6: input should be a multiple of 4"),
        ("eval.rivals.null=pictures", "eval.rivals.null: this name is that of our own pictures"),
        ("eval.rivals.reference=pictures", "eval.rivals.reference: this name is that of the real pictures"),
        ("eval=coco30k", "eval.prompts.coco: a value is needed"),
        ("eval.distances.counts=[100]", "eval.distances: counts are given and no inception"),
        (
            "eval.distances={inception: i, references: {x: d}}",
            "eval.distances.references.x: there is no such prompt set; there are training",
        ),
        ("eval.distances={inception: i, alterations: {x: {}}}", "eval.distances.alterations.x: changes nothing"),
        ("eval.prompts.held_out=held_out", "eval.prompts.held_out: nothing is held out"),
        ("eval.prompts.mine=training", "eval.prompts.mine=training: captions of the data are called what they are"),
        ("eval.rivals.x={parti: pictures}", "eval.rivals.x.parti: there is no such prompt set; there are training"),
        ("eval.scorers.aesthetic=head.pth", "eval.scorers: aesthetic is a head on clip_l, which is null"),
        ("stage_c.model.heads=5", "stage_c.model: heads (5) must divide width (32)"),
        ("stage_a.model.levels=3", "stage_a.model.levels=3: Stage B draws latents of a quarter"),
        ("stage_c.model.scaled_codes=false", "stage_c.model.scaled_codes=false: the stock pipelines"),
        ("stage_b.model.widths=[16]", "stage_b.model: blocks needs one entry for each of the 1 widths"),
        ("stage_c.train.warmup_steps=4", "stage_c.train: warmup_steps (4) must be below the 4 steps"),
        ("seed=1,2", "seed=1,2: not readable"),
        ("seed=${x}", "seed: Interpolation key 'x' not found"),
        ("+seed=1", "+seed is no key of the config"),
        ("hydra.run.dir=x", "hydra.run.dir is no key of the config"),
        ("seed", "'seed' is neither a flag nor key=value"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_key(words, told):
    assert told in refused(words)


def test_an_unknown_conf_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"conf=stage_d: there is no such conf \(did you mean stage_.\?\); there are"):
        compose.load("stage_d", [])
    with pytest.raises(UsageError, match="conf=base: there is no such conf"):
        compose.load("base", [])


def test_one_cause_is_told_once():
    assert refused("compressor.model.backbone.last=x").count("compressor.model.backbone") == 1
    assert refused("stage_c.train.phases=[{steps: 1, batch_size: 8}]") == "stage_c.train.phases.0.size: field required"


def test_a_key_that_yaml_does_not_spell_out_can_be_set():
    assert load("stage_c.train.gradient_clip=2").stage_c.train.gradient_clip == 2
    assert load("stage_c.train.phases.0.steps=7").stage_c.train.phases[0].steps == 7
    assert load("data.metadata='/a=b, (c).parquet'").data.metadata == "/a=b, (c).parquet"
    assert load("data.metadata=/a=b, (c).parquet").data.metadata == "/a=b, (c).parquet"


# ----------------------------------------------------------------------------------------------- fingerprints


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


def test_the_word_for_the_baseline_is_no_path():
    rivals = load("eval.rivals={baseline: baseline, other: p}").with_absolute_paths().eval.rivals
    assert rivals == {"baseline": "baseline", "other": str(Path("p").absolute())}


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


@pytest.mark.parametrize(
    ("conf", "word", "told"),
    [
        (
            "previewer",
            "previewer",
            "previewer.train.phases has pictures of 256 px, but it trains on the latents of stage_c",
        ),
        (
            "baseline_ldm",
            "baseline",
            "baseline.train.phases has pictures of 256 px, but it trains on the latents of stage_b",
        ),
    ],
)
def test_sizes_without_latents_are_refused_where_they_are_needed(conf, word, told):
    words = ["scale=micro", "data.image.size=256", f"{word}.train.phases.0.size=256"]
    with pytest.raises(UsageError, match=re.escape(told)):
        compose.load(conf, words)
    assert compose.load("stage_c", words)


def test_a_training_at_another_size_changes_its_latents_too():
    before = digests("data.image.size=256")
    after = digests("data.image.size=256", "stage_c.train.phases.0.size=256")
    assert {name for name, digest in after.items() if digest != before[name]} == AFTER_C | {"latents_c"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("stage_c.train=null", "stage_c.weights=c", "targets=[latents_c]"),
            "latents_c are stored for the training of",
        ),
        (
            ("stage_b.train=null", "stage_b.weights=b", "targets=[latents_a]"),
            "latents_a are stored for the training of",
        ),
        (("encode.latents_c.mode=online", "targets=[latents_c]"), "encode.latents_c.mode=online stores none"),
        (("stage_c.train=null", "stage_c.weights=c", "targets=[previewer]"), "set encode.latents_c.mode=online"),
    ],
)
def test_latents_that_nobody_would_store_are_refused(words, told):
    with pytest.raises(UsageError, match=re.escape(told)):
        load(*words)
    if "targets=[previewer]" in words:
        assert load(*words, told.removeprefix("set "))


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
