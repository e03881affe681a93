"""Stage A, B, C and their objectives: golden sizes, starts, losses; sampling."""

import copy
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from stages import diffusion
from stages.draws import Draws
from stages.models.compressor import Compressor, CompressorWarmup
from stages.models.geometry import BadImageSize, denormalise
from stages.models.layers import timestep_embedding
from stages.models.stage_a import StageA, StageAObjective, random_crop
from stages.models.stage_b import StageB, StageBObjective
from stages.models.stage_c import StageC, StageCObjective
from stages.models.text import seeded_tower
from stages.sampling import sample
from stages.sampling.denoising import Noise, Steps, sample_code
from stages.settings.losses import CompressorWarmupLoss, StageALoss, StageBLoss, StageCLoss
from stages.settings.models import (
    CompressorConfig,
    EfficientNetStages,
    SeededTextConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)
from stages.settings.sampling import SamplingConfig
from stages.settings.training import TrainingConfig
from stages.training import loop
from stages.training.callbacks import Callbacks
from stages.weights import convert

M = TypeVar("M", bound=nn.Module)

TINY_A = StageAConfig(bottleneck_blocks=2, hidden=16, codebook_size=32, codebook_init="normal", scale=0.7)
TINY_B = StageBConfig(
    widths=(8, 16, 32),
    blocks=(1, 2, 1),
    patterns=("CT", "CTA", "CTA"),
    heads=(0, 2, 4),
    inject_code=(False, True, True),
    cond_width=24,
    dropout=0.0,
    text_width=20,
)
TINY_C = StageCConfig(width=32, depth=3, heads=4, text_width=20, dropout=0.0)
TINY_BACKBONE = EfficientNetStages.model_validate(
    {
        "stem": 8,
        "stages": [
            {"block": "fused", "expand": 1, "stride": 1, "channels": 8, "layers": 1},
            {"block": "fused", "expand": 4, "stride": 2, "channels": 16, "layers": 1},
            {"block": "fused", "expand": 4, "stride": 2, "channels": 24, "layers": 1},
            {"block": "mb", "expand": 4, "stride": 2, "channels": 32, "layers": 1},
            {"block": "mb", "expand": 4, "stride": 2, "channels": 40, "layers": 1},
        ],
        "last": 64,
    }
)
TINY_TEXT = SeededTextConfig(width=20, layers=2, heads=2, context_length=12, seed=5)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomised(module: M, std: float = 0.2) -> M:
    """Every parameter and buffer random, so that a key in the wrong place cannot go unseen."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * std)
    return module.eval()


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("build", "count", "keys", "diffusers_keys"),
    [
        (lambda: StageA(StageAConfig()), 18_406_894, 122, 122),
        (lambda: StageB(StageBConfig()), 1_055_365_280, 814, 990),
        (lambda: StageC(StageCConfig()), 993_243_680, 520, 648),
        (lambda: StageC(StageCConfig(text_width=1280)), 993_636_896, 520, 648),
        (lambda: StageC(StageCConfig(width=1280, depth=16, heads=16)), 347_037_472, 264, 328),
    ],
    ids=["A", "B", "C", "C-bigG", "C-16"],
)
def test_full_size(build: Callable[[], nn.Module], count: int, keys: int, diffusers_keys: int) -> None:
    with torch.device("meta"):
        module = build()
    assert parameters(module) == count
    assert len(module.state_dict()) == keys
    assert len(convert.to_diffusers(module.state_dict())) == diffusers_keys


@pytest.mark.parametrize("build", [lambda: StageA(TINY_A), lambda: StageB(TINY_B), lambda: StageC(TINY_C)])
def test_conversion_has_an_inverse(build: Callable[[], nn.Module]) -> None:
    state = build().state_dict()
    back = convert.from_diffusers(convert.to_diffusers(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


# ------------------------------------------------------------------------------------------------- the starts


def test_stage_c_starts_as_the_identity() -> None:
    model, x = StageC(TINY_C), torch.randn(2, 16, 3, 3)
    torch.testing.assert_close(model(x, torch.rand(2), torch.randn(2, 7, 20)), x, rtol=1e-4, atol=1e-5)


def test_stage_b_starts_as_twice_the_identity() -> None:
    model, x = StageB(TINY_B), torch.randn(2, 4, 32, 32)
    torch.testing.assert_close(model(x, torch.rand(2), torch.randn(2, 16, 3, 3), torch.randn(2, 7, 20)), 2 * x)


def test_stage_a_blocks_start_as_the_identity() -> None:
    block = StageA(TINY_A).up_blocks[1]
    x = torch.randn(1, 4, 4, 16)
    torch.testing.assert_close(block(x), x)


def test_starting_weights_have_the_authors_scale() -> None:
    """One scaling by depth^-1/2 over Xavier, where diffusers' class scales once for each submodule."""
    model = StageB(TINY_B)
    last = model.up_blocks[0][0].channelwise[-1].weight
    xavier = (2 / (last.shape[0] + last.shape[1])) ** 0.5
    assert last.std().item() == pytest.approx(xavier * sum(TINY_B.blocks) ** -0.5, rel=0.1)
    assert model.effnet_mappers["1"].weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.down_blocks[0][1].mapper.weight.abs().max() == 0


def test_the_output_head_stays_exact_under_autocast() -> None:
    model, x = StageC(TINY_C), torch.randn(2, 16, 3, 3)
    bias = torch.rand(32)
    model.out[1].bias.data.copy_(bias)  # the weight starts at zero: a and b are the bias alone
    a, b = bias.view(1, 32, 1, 1).chunk(2, dim=1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = model(x, torch.rand(2), torch.randn(2, 7, 20))
    torch.testing.assert_close(predicted, (x - a) / ((1 - b).abs() + 1e-5))


def test_the_timestep_embedding_keeps_its_phase_under_autocast() -> None:
    t = torch.rand(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding = timestep_embedding(t, 64)
    frequencies = 10000.0 ** -(torch.arange(32, dtype=torch.float64) / 31)
    angles = 10000 * t.double()[:, None] * frequencies
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(embedding.double(), expected, rtol=0, atol=2e-3)


def test_channels_last_runs_without_a_layout_change() -> None:
    """The residual stream is contiguous in (B, H, W, C)."""
    seen: list[bool] = []
    model = StageB(TINY_B)
    for blocks in (*model.down_blocks, *model.up_blocks):
        blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output.is_contiguous()))
    model(torch.randn(2, 4, 32, 32), torch.rand(2), torch.randn(2, 16, 3, 3))
    assert seen == [True] * 6


# ------------------------------------------------------------------------------------------------- objectives


def batch_of(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "image": torch.randint(0, 256, (rows, 3, 128, 128), dtype=torch.uint8, generator=generator),
        "latents_a": torch.randn(rows, 4, 32, 32, generator=generator).half(),
        "latents_c": (42 * torch.randn(rows, 16, 3, 3, generator=generator) - 1).half(),
        "text": torch.randn(rows, 7, 20, generator=generator).half(),
    }


def tiny_compressor() -> Compressor:
    return Compressor(CompressorConfig(backbone=TINY_BACKBONE, batch_norm="fixed"))


def objectives() -> dict[str, nn.Module]:
    null = torch.zeros(7, 20)
    loss_a = StageALoss(l1=1.0, mse=1.0, colour=1.0, vq=0.25, quantised=0.5, crop=64)
    return {
        "a": StageAObjective(StageA(TINY_A), loss_a),
        "warmup": CompressorWarmup(tiny_compressor(), 16, 4, CompressorWarmupLoss(width=24)),
        "b": StageBObjective(StageB(TINY_B), tiny_compressor(), StageBLoss(), null),
        "b_without_text": StageBObjective(StageB(TINY_B), tiny_compressor(), StageBLoss(), None),
        "c": StageCObjective(StageC(TINY_C), StageCLoss(weight="p2_snr"), null),
        "warmup_colours": CompressorWarmup(  # the last: each begins with the random numbers that those before leave
            tiny_compressor(), 16, 4, CompressorWarmupLoss(width=24, predicts="colours")
        ),
    }


@pytest.mark.parametrize("name", ["a", "warmup", "warmup_colours", "b", "b_without_text", "c"])
def test_objectives_learn(name: str) -> None:
    objective = objectives()[name].train()
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for step in range(12):
        loss, parts = objective(batch_of(8), Draws(0, step % 2, 0, 8, 8))
        assert loss.dtype == torch.float32
        assert not any(part.requires_grad for part in parts.values())
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)  # as DDP wants it
        optimiser.step()
        losses.append(loss.item())
    assert losses[-2] < losses[0]
    assert losses[-1] < losses[1]


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("a", [1.448012, 1.425390, 1.398603]),
        ("warmup", [0.998734, 0.998040, 0.997439]),
        ("b", [0.948468, 0.729669, 0.616492]),
        ("c", [0.426852, 0.381457, 0.554847]),
    ],
)
def test_golden_losses(name: str, golden: list[float]) -> None:
    """The first losses of a seeded training without dropout: a change of the mathematics shows here."""
    objective = objectives()[name].train()
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    losses = []
    for step in range(3):
        loss, _ = objective(batch_of(8), Draws(0, step, 0, 8, 8))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses == pytest.approx(golden, rel=1e-3)


@pytest.mark.parametrize("name", ["b", "c"])
def test_micro_batches_add_up(name: str) -> None:
    """Without BatchNorm in training mode, the loss of a batch is the mean of its micro-batches' losses."""
    objective = objectives()[name].eval()
    batch = batch_of(8)
    whole, _ = objective(batch, Draws(3, 5, 0, 8, 8))
    parts = [
        objective({key: value[row : row + 2] for key, value in batch.items()}, Draws(3, 5, row, 2, 8))[0]
        for row in range(0, 8, 2)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-4, atol=1e-6)


def test_pairs_that_are_mixed_add_up_too() -> None:
    objective = StageCObjective(StageC(TINY_C), StageCLoss(mixup=1.0), torch.zeros(7, 20)).train()
    batch = batch_of(8)
    whole, parts = (
        [
            objective({key: value[row : row + rows] for key, value in batch.items()}, Draws(3, 5, row, rows, 8))[0]
            for row in range(0, 8, rows)
        ]
        for rows in (8, 2)
    )
    torch.testing.assert_close(torch.stack(parts).mean(), whole[0], rtol=1e-4, atol=1e-6)


def test_a_frozen_compressor_keeps_its_statistics() -> None:
    objective = StageBObjective(
        StageB(TINY_B), tiny_compressor(), StageBLoss(), torch.zeros(7, 20), train_compressor=False
    ).train()
    before = {key: value.clone() for key, value in objective.compressor.state_dict().items()}
    objective(batch_of(2), Draws(0, 0, 0, 2, 2))[0].backward()
    assert all(torch.equal(before[key], value) for key, value in objective.compressor.state_dict().items())
    assert all(parameter.grad is None for parameter in objective.compressor.parameters())


def test_codes_are_zeroed_and_diffused_at_the_released_rates() -> None:
    rows = 4000
    objective = StageBObjective(StageB(TINY_B), tiny_compressor(), StageBLoss(), None)
    code = torch.full((rows, 16, 1, 1), 42.0)
    corrupted = objective._corrupted(code, Draws(0, 0, 0, rows, rows))
    zero = (corrupted == 0).all(dim=1)
    clean = (corrupted == code).all(dim=1)
    assert zero.float().mean().item() == pytest.approx(0.05, abs=0.012)
    assert clean.float().mean().item() == pytest.approx(0.665, abs=0.025)
    noisy = corrupted[~(zero | clean).flatten()]
    assert noisy.std(dim=0).mean().item() == pytest.approx(42 * 0.5, rel=0.2)  # noise at the code's own scale


def test_random_crops_lie_inside_and_everywhere() -> None:
    rows = 500
    columns = torch.arange(40, dtype=torch.uint8).expand(rows, 3, 24, 40)
    edge = torch.tensor([0.0, 1 - 2**-24])
    crops = random_crop(columns, 16, torch.rand(rows), torch.cat([edge, torch.rand(rows - 2)]))
    assert crops.shape == (rows, 3, 16, 16)
    assert crops[0, 0, 0].tolist() == list(range(16))
    assert crops[1, 0, 0].tolist() == list(range(24, 40))
    assert set(crops[:, 0, 0, 0].tolist()) == set(range(25))


def test_a_trained_stage_c_draws_the_code_of_each_caption() -> None:
    """Four codes with a caption each, by heart: what is drawn from pure noise is nearest to the caption's own."""
    captions, codes = torch.randn(4, 3, 20), denormalise(torch.randn(4, 16, 3, 3))
    batch = {"latents_c": codes.repeat(16, 1, 1, 1).numpy(), "text": captions.repeat(16, 1, 1).numpy()}
    stage_c = StageC(StageCConfig(width=64, depth=2, heads=4, text_width=20, dropout=0.0))
    config = TrainingConfig.model_validate(
        {
            "phases": [{"steps": 120, "batch_size": 64, "size": 128}],
            "learning_rate": 0.004,
            "warmup_steps": 5,
            "schedule": "cosine",
            "precision": "fp32",
            "log_every": 120,
            "checkpoint_every": 120,
        }
    )
    loop.train(
        StageCObjective(stage_c, StageCLoss(weight="p2_snr", timesteps="uniform", text_drop=0.0), torch.zeros(3, 20)),
        lambda step: batch,
        config,
        Callbacks(),
        seed=0,
        device=torch.device("cpu"),
    )
    noise, steps = Noise(range(4), torch.device("cpu")), Steps(diffusion.sampling_times(12))
    with torch.inference_mode():
        drawn = sample_code(stage_c.eval(), captions, captions, noise, 128, 128, steps)
    distances = torch.cdist(drawn.flatten(1), codes.flatten(1))
    assert distances.argmin(dim=1).tolist() == [0, 1, 2, 3]
    assert distances.diagonal().max() < distances[~torch.eye(4, dtype=torch.bool)].min() / 2  # and not just by chance


# --------------------------------------------------------------------------------------------------- sampling


@pytest.fixture
def models() -> sample.Models:
    tower, stage_a = seeded_tower(TINY_TEXT), randomised(StageA(TINY_A), std=0.1)
    stage_a.out_block[0].weight.data *= 0.02  # few steps of random models give large latents: keep pixels in range
    stage_a.out_block[0].bias.data += 0.5
    return sample.Models(
        stage_a=stage_a,
        stage_b=randomised(StageB(TINY_B), std=0.1),
        stage_c=randomised(StageC(TINY_C), std=0.1),
        text_b=tower,
        text_c=tower,
    )


SMALL = SamplingConfig(width=128, height=128, steps_c=2, steps_b=2, guidance_c=1.5, guidance_b=1.0)


def test_a_picture_does_not_depend_on_its_batch(models: sample.Models) -> None:
    texts, seeds = ["a cat", "a dog", "a cat"], [1, 2, 1]
    together = sample.generate(models, texts, seeds, SMALL)
    alone = sample.generate(models, texts[1:2], seeds[1:2], SMALL)
    assert (together[1].int() - alone[0].int()).abs().max() <= 1
    assert (together[0].int() - together[2].int()).abs().max() <= 1
    assert (together[0].int() - together[1].int()).abs().max() > 50


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("stage_c", "the codes that Stage B is given are no finite numbers in 2 of 2 pictures"),
        ("stage_b", "Stage B's latents are no finite numbers"),
        ("stage_a", "Stage A's pixels are no finite numbers"),
    ],
)
def test_nothing_is_drawn_of_numbers_that_are_not_finite(models: sample.Models, model: str, told: str) -> None:
    """Weights may be finite, and still give none: black pictures would be scored as if they had been drawn."""
    ruined = copy.deepcopy(models)
    with torch.no_grad():
        for parameter in getattr(ruined, model).parameters():
            parameter.fill_(1e30)
    with pytest.raises(sample.NoPicture, match=told):
        sample.generate(ruined, ["a cat", "a dog"], [1, 2], SMALL)


def test_a_panel_shows_magenta_where_there_is_no_number() -> None:
    image = torch.full((1, 3, 2, 2), 0.5)
    image[0, 1, 0, 0], image[0, 2, 1, 1] = torch.nan, torch.inf
    pixels = sample.to_pixels(image)[0]
    grey, magenta = [128, 128, 128], [255, 0, 255]
    assert pixels.tolist() == [[magenta, grey], [grey, magenta]]


def test_sides_between_the_steps_are_refused(models: sample.Models) -> None:
    with pytest.raises(BadImageSize, match="height=100"):
        sample.generate(models, ["x"], [0], SMALL.model_copy(update={"height": 100}))


def test_pictures_that_stage_a_would_not_give_back_are_refused(models: sample.Models) -> None:
    with pytest.raises(BadImageSize, match="6x8 px: each side must be a multiple of 4 px"):
        sample.reconstruct_a(models.stage_a, torch.zeros(1, 3, 8, 6, dtype=torch.uint8))


def test_reconstructions_have_the_pictures_shape(models: sample.Models) -> None:
    image = batch_of(2)["image"]
    text, _ = models.text_b.encode(["a cat", "a dog"])
    compressor = tiny_compressor().eval()
    again = sample.reconstruct_b(models.stage_a, models.stage_b, compressor, image, text, [0, 1], steps=2)
    for picture in (
        sample.reconstruct_a(models.stage_a, image),
        sample.reconstruct_a(models.stage_a, image, quantised=True),
        again,
    ):
        assert picture.shape == (2, 128, 128, 3)
        assert picture.dtype == torch.uint8


# ----------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StageAConfig(levels=3, hidden=30), "hidden"),
        (lambda: StageBConfig(blocks=(1, 2)), "blocks needs one entry"),
        (lambda: StageBConfig(heads=(0, 10, 20, 7)), "heads"),
        (lambda: StageBConfig(patch=8), "must divide 32"),
        (lambda: StageCConfig(heads=7), "heads"),
        (lambda: StageBLoss(code_drop=0.8, code_noise=0.5), "code_drop"),
        (lambda: EfficientNetStages(stem=8, stages=TINY_BACKBONE.stages[:3], last=16), "total stride of 8"),
    ],
)
def test_settings_that_do_not_fit_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build()
