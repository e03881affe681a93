"""FLOPs of trainings by config: whose passes count, and at which sizes."""

import torch

from pipeline.plan.table import table
from pipeline.plan.training_flops import per_picture
from pipeline.settings import compose
from stages.anatomy import flops
from stages.models.compressor import Compressor

PAPER = ["scale=paper", "data.metadata=rows.parquet"]


def test_every_training_of_the_paper_has_its_flops_at_each_of_its_sizes() -> None:
    for conf in ("stage_c", "previewer", "baseline_ldm"):
        config = compose.load(conf, PAPER)
        steps = [step.name for step in table(config) if step.name.startswith("train_")]
        for step in steps:
            sizes = {phase.size for training in config.trainings_of(step).values() for phase in training.phases}
            for name, found in per_picture(step, config).items():
                assert set(found) == sizes
                assert all(value > 0 for value in found.values()), name


def test_frozen_parts_count_their_forward_pass_only() -> None:
    config = compose.load("stage_c", PAPER)
    model = config.compressor.model
    frozen = config.model_copy(update={"compressor": config.compressor.model_copy(update={"joint": False})})
    joint, alone = (per_picture("train_b", each)["stage_b"][1024] for each in (config, frozen))
    assert joint - alone == 2 * flops.encode_c(model, 768)
    assert joint == 3 * (flops.stage_b(config.stage_b.model, 256, 256, 77) + flops.encode_c(model, 768))
    assert per_picture("train_c", config)["stage_c"][1024] == 3 * flops.stage_c(config.stage_c.model, 24, 24, 77)
    consistent = config.stage_c.loss.model_copy(update={"consistency": 0.1})
    changed = config.model_copy(update={"stage_c": config.stage_c.model_copy(update={"loss": consistent})})
    assert per_picture("train_c", changed)["stage_c"][1024] == 4 * flops.stage_c(config.stage_c.model, 24, 24, 77)


def test_codes_have_the_compressors_own_sides() -> None:
    config = compose.load("stage_c", ["scale=micro"])
    size = max(per_picture("train_c", config)["stage_c"])
    code = Compressor(config.compressor.model).eval()(torch.rand(1, 3, size, size))
    tokens = config.text[config.stage_c.text].context_length
    assert per_picture("train_c", config)["stage_c"][size] == 3 * flops.stage_c(
        config.stage_c.model, *code.shape[-2:], tokens
    )
