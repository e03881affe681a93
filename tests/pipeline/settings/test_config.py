"""The config: every combination that is committed, golden numbers, what is refused and in which words."""

import re
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.settings import compose
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


@pytest.mark.parametrize("conf", ["stage_c", "previewer", "baseline_ldm"])
def test_paper_batches_divide_among_the_gpus_of_the_big_clusters(conf):
    trainings = load("workers=64", conf=conf, scale="paper").trainings().values()
    assert all(phase.batch_size % 64 == 0 for training in trainings for phase in training.phases)


def test_pictures_may_be_smaller_than_a_training_wants_that_no_target_wants():
    smaller = ["data.image.size=256", "sample.width=256", "sample.height=256", "stage_c.train.phases.0.size=256"]
    assert load(*smaller, conf="finetune_c", scale="single_gpu").data.image.size == 256
    with pytest.raises(UsageError, match=r"previewer\.train\.phases\.0\.size=512 is larger than the stored pictures"):
        load(*smaller, "targets=[previewer]", conf="finetune_c", scale="single_gpu")


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


def test_the_word_for_the_baseline_is_no_path():
    rivals = load("eval.rivals={baseline: baseline, other: p}").with_absolute_paths().eval.rivals
    assert rivals == {"baseline": "baseline", "other": str(Path("p").absolute())}


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
        (
            "eval.prompts.training=mine.txt",
            "eval.prompts.training=mine.txt: captions of the data are called so",
        ),
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
