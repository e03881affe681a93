"""Stage A's training: its discriminator, its perceptual distance, both in the one loop, and what is refused."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from pipeline.models import loading
from pipeline.steps import train as steps
from pipeline.steps.build import Facts
from stages.draws import Draws
from stages.models.discriminator import Discriminator, adversarial_loss, discriminator_loss
from stages.models.stage_a import StageA, StageAObjective
from stages.settings.losses import StageALoss
from stages.settings.models import StageAConfig
from stages.settings.training import TrainingConfig
from stages.training import checkpoint
from stages.training.loop import Outcome, train
from stages.training.perceptual import Perceptual
from tests.ranks import together
from tests.stages.training.in_memory import InMemory

SIDE = 16
TINY = StageAConfig(bottleneck_blocks=1, hidden=16, codebook_size=16, codebook_init="normal")
START = 3  # steps before the adversarial loss counts
LOSS = StageALoss(mse=1.0, vq=0.25, quantised=0.5, adversarial=0.1, adversarial_start=START)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny_discriminator() -> Discriminator:
    return Discriminator(hidden=16, depth=3)


def objective(loss: StageALoss = LOSS, **parts: Any) -> StageAObjective:
    torch.manual_seed(1)
    stage_a = StageA(TINY)
    return StageAObjective(stage_a, loss, tiny_discriminator() if loss.adversarial else None, **parts)


def images(rows: int, step: int = 0) -> np.ndarray:
    """Two-coloured pictures: a smooth edge somewhere."""
    generator = np.random.default_rng(step)
    across, place = np.linspace(0, 1, SIDE), generator.uniform(0.2, 0.8, (rows, 1))
    edge = 1 / (1 + np.exp((across - place) * 20))[:, None, None, :]
    picture = generator.uniform(size=(rows, 3, 1, 1)) * edge + generator.uniform(size=(rows, 3, 1, 1)) * (1 - edge)
    return np.broadcast_to(picture * 255, (rows, 3, SIDE, SIDE)).astype(np.uint8)


def batch(rows: int = 4) -> dict[str, Tensor]:
    return {"image": torch.from_numpy(images(rows))}


# ---------------------------------------------------------------------------------------------- discriminator


def test_the_discriminator_has_the_released_sizes() -> None:
    with torch.device("meta"):
        released = Discriminator()
    assert sum(parameter.numel() for parameter in released.parameters()) == 6_271_105
    convolutions = [layer for layer in released.encoder if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 128, 256, 512, 512, 512]
    kinds = [type(layer).__name__.removeprefix("Parametrized") for layer in released.encoder[:5]]
    assert kinds == ["Conv2d", "LeakyReLU", "Conv2d", "InstanceNorm2d", "LeakyReLU"]
    assert released.head(released.encoder(torch.empty(2, 3, 128, 128, device="meta"))).shape == (2, 1, 2, 2)


def test_spectral_norm_bounds_each_convolution() -> None:
    discriminator = tiny_discriminator()
    for _ in range(100):  # a power iteration each
        discriminator(torch.rand(1, 3, SIDE, SIDE))
    discriminator.eval()
    for layer in discriminator.encoder:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


def test_the_losses_are_the_cross_entropies_of_the_released_sigmoid() -> None:
    discriminator = tiny_discriminator().eval()
    original, reconstruction = torch.rand(2, 4, 3, SIDE, SIDE)
    real, fake = discriminator(original).double().sigmoid(), discriminator(reconstruction).double().sigmoid()
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    told = (F.binary_cross_entropy(real, ones) + F.binary_cross_entropy(fake, zeros)) / 2
    loss = discriminator_loss(discriminator, original, reconstruction)
    assert loss.item() == pytest.approx(told.item(), rel=1e-5)
    fooled = F.binary_cross_entropy(fake, ones).item()
    assert adversarial_loss(discriminator, reconstruction).item() == pytest.approx(fooled, rel=1e-5)


def test_a_sure_discriminator_gives_finite_losses() -> None:
    discriminator = tiny_discriminator()
    nn.init.constant_(discriminator.head.bias, -500.0)  # a sigmoid would be exactly 0
    image = torch.rand(2, 3, SIDE, SIDE, requires_grad=True)
    loss = adversarial_loss(discriminator, image)
    loss.backward()
    assert loss.item() == pytest.approx(500, rel=0.01)
    assert image.grad is not None
    assert image.grad.isfinite().all()


def test_each_loss_reaches_its_own_side_only() -> None:
    discriminator = tiny_discriminator()
    original = torch.rand(2, 3, SIDE, SIDE)
    reconstruction = torch.rand(2, 3, SIDE, SIDE, requires_grad=True)
    discriminator_loss(discriminator, original, reconstruction).backward()
    assert reconstruction.grad is None
    assert all(parameter.grad is not None for parameter in discriminator.parameters())

    discriminator.zero_grad(set_to_none=True)
    adversarial_loss(discriminator, reconstruction).backward()
    assert reconstruction.grad is not None
    assert reconstruction.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_the_discriminator_ignores_autocast() -> None:
    discriminator, image = tiny_discriminator().eval(), torch.rand(2, 3, SIDE, SIDE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = discriminator(image)
    assert torch.equal(inside, discriminator(image))


# -------------------------------------------------------------------------------------------------- objective


def gradients(module: StageAObjective) -> dict[str, Tensor]:
    """Gradients of the step with number START."""
    loss, parts = module.train()(batch(), Draws(0, START, 0, 4, 4))
    assert all(not part.requires_grad for part in parts.values())
    loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def test_stage_a_does_not_feel_the_discriminator_before_its_start() -> None:
    judged = objective()
    alone = gradients(objective(LOSS.model_copy(update={"adversarial": 0.0})))
    before = gradients(objective(LOSS.model_copy(update={"adversarial_start": START + 1})))
    after = gradients(judged)
    assert all(torch.equal(before[name], gradient) for name, gradient in alone.items())
    assert any(not torch.equal(after[name], gradient) for name, gradient in alone.items())
    # as DDP wants it, every parameter has a gradient in both, and the discriminator learns the same in both
    names = {name for name, _ in judged.named_parameters()}
    assert before.keys() == after.keys() == names
    own = {name for name in names if name.startswith("discriminator.")}
    assert all(torch.equal(before[name], after[name]) for name in own)
    assert all(before[name].abs().max() > 0 for name in own if name.endswith("original"))


def test_the_discriminator_stays_out_of_stage_as_weights() -> None:
    assert objective().stage_a.state_dict().keys() == StageA(TINY).state_dict().keys()
    assert len(StageA(StageAConfig(hidden=16, codebook_size=16)).state_dict()) == 122
    plain = objective(LOSS.model_copy(update={"adversarial": 0.0}))
    assert {key.partition(".")[0] for key in plain.state_dict()} == {"stage_a"}


def test_a_tiny_stage_a_overfits_with_all_losses_on(random_vgg: dict[str, Tensor]) -> None:
    loss = StageALoss(mse=1.0, perceptual=0.1, adversarial=0.01, adversarial_start=20)
    module = objective(loss, perceptual=Perceptual(random_vgg, None)).train()
    assert {key.partition(".")[0] for key in module.state_dict()} == {"stage_a", "discriminator"}  # no VGG16
    optimiser = torch.optim.AdamW(module.parameters(), lr=5e-3)
    history = []
    for step in range(40):
        total, parts = module(batch(), Draws(0, step, 0, 4, 4))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        history.append({name: part.item() for name, part in parts.items()})
    first, last = history[0], history[-1]
    assert list(first) == ["l1", "mse", "colour", "vq", "codes_in_use", "perceptual", "discriminator", "adversarial"]
    assert last["mse"] < 0.2 * first["mse"]
    assert last["perceptual"] < 0.7 * first["perceptual"]
    assert first["discriminator"] == pytest.approx(math.log(2), abs=0.2)
    assert last["discriminator"] < 0.95 * math.log(2)  # better than a guess, though Stage A has learnt too


# --------------------------------------------------------------------------------------------------- the loop


def recipe(**changes: object) -> TrainingConfig:
    values: dict[str, object] = {
        "phases": [{"steps": 6, "batch_size": 4, "size": SIDE}],
        "learning_rate": 0.003,
        "warmup_steps": 1,
        "precision": "fp32",
        "ema": {"decay": 0.5, "every": 1, "start": 2},
        "log_every": 1,
        "checkpoint_every": 1,
    }
    return TrainingConfig.model_validate(values | changes)


def run(
    module: nn.Module,
    config: TrainingConfig,
    state: bytes | None = None,
    stop_after: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> tuple[Outcome, dict[int, bytes], dict[int, dict[str, float]]]:
    """Train in memory; returns the outcome, the saved states and the log."""
    kept = InMemory(state, stop_after)

    def read(step: int) -> dict[str, np.ndarray]:
        return {"image": np.array_split(images(4, step), world)[rank]}

    outcome = train(
        module,
        read,
        config,
        kept,
        seed=0,
        device=torch.device("cpu"),
        rank=rank,
        world=world,
    )
    return outcome, kept.saved, kept.logged


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopping_and_resuming_gives_the_same_bytes(precision: str) -> None:
    config, reference = recipe(precision=precision), objective()
    _, straight, log = run(reference, config)
    keys = checkpoint.load(straight[6]).tensors.keys()
    assert {key.split(".")[1] for key in keys} == {"stage_a", "discriminator"}
    assert "model.discriminator.encoder.0.parametrizations.weight.0._u" in keys  # the power iteration's own state
    for stop in (1, START, 5):
        outcome, first, early = run(objective(), config, stop_after=stop)
        assert outcome == Outcome(stop, finished=False)
        resumed = objective()
        _, second, late = run(resumed, config, state=first[stop])
        assert second[6] == straight[6]
        assert early | late == log
        state = resumed.state_dict()
        assert all(torch.equal(state[key], value) for key, value in reference.state_dict().items())


FROZEN = [{"steps": 5, "batch_size": 4, "size": SIDE, "freeze_norm": True}]  # on CPUs BatchNorm sees a rank's own rows


def _train_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    _, _, logged = run(objective(), recipe(phases=FROZEN), rank=rank, world=2)
    if rank == 0:
        torch.save({step: values["loss"] for step, values in logged.items()}, folder / "losses.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.xdist_group("ranks")
def test_two_ranks_train_both_sides_as_one_does(tmp_path: Path) -> None:
    together(_train_rank, (tmp_path,), 2)
    both = torch.load(tmp_path / "losses.pt", weights_only=True)
    _, _, alone = run(objective(), recipe(phases=FROZEN))
    assert both == pytest.approx({step: values["loss"] for step, values in alone.items()}, rel=1e-4)


# ------------------------------------------------------------------------------------------------- perceptual


@pytest.fixture(scope="module")
def random_vgg() -> dict[str, Tensor]:
    """A state dict as torchvision's VGG16 has it, with random weights."""
    torch.manual_seed(5)
    state = {f"features.{key}": value for key, value in make_layers(cfgs["D"]).state_dict().items()}
    for value in state.values():
        if value.ndim == 1:
            value.normal_(std=0.05)
    return state | {"classifier.6.bias": torch.zeros(1000)}


def random_heads() -> dict[str, Tensor]:
    return {f"lin{n}.model.1.weight": torch.rand(1, size, 1, 1) for n, size in enumerate((64, 128, 256, 512, 512))}


def expected_distance(vgg: dict[str, Tensor], heads: dict[str, Tensor] | None, a: Tensor, b: Tensor) -> np.ndarray:
    """LPIPS by its words: the output of each of VGG16's five stacks, before its pooling, in numpy."""
    features = make_layers(cfgs["D"])
    features.load_state_dict({k.removeprefix("features."): v for k, v in vgg.items() if k.startswith("features.")})
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    stacks: list[np.ndarray] = []
    x = ((torch.cat([a, b]).permute(0, 2, 3, 1) - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        for layer in features:
            if isinstance(layer, nn.MaxPool2d):
                stacks.append(x.double().numpy())
            x = layer(x)
    distances = []
    for number, stack in enumerate(stacks):
        first, second = np.split(stack / np.sqrt((stack**2).sum(axis=1, keepdims=True)), 2)
        weight = 1.0 if heads is None else heads[f"lin{number}.model.1.weight"].double().numpy()
        distances.append((weight * (first - second) ** 2).sum(axis=1).mean(axis=(1, 2)))
    return np.sum(distances, axis=0) if heads else np.mean(distances, axis=0)


@pytest.mark.parametrize("with_heads", [True, False])
def test_the_distance_is_lpips(random_vgg: dict[str, Tensor], with_heads: bool) -> None:
    a, b = torch.rand(2, 3, 3, 32, 48)
    heads = random_heads() if with_heads else None
    found = Perceptual(random_vgg, heads)(a, b)
    assert found.shape == (3,)
    np.testing.assert_allclose(found.numpy(), expected_distance(random_vgg, heads, a, b), rtol=1e-4)


def test_the_distance_pulls_at_its_first_image_only_and_is_zero_at_its_end(random_vgg: dict[str, Tensor]) -> None:
    perceptual = Perceptual(random_vgg, None)
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    reference = torch.rand(1, 3, 16, 16, requires_grad=True)
    assert perceptual(reference, reference).item() == 0
    perceptual(image, reference).sum().backward()
    assert reference.grad is None
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert image.grad.abs().max() > 0


def test_another_file_is_refused_by_its_first_tensor(random_vgg: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"perceptual_weights: features\.0\.weight must be .* but is not there"):
        Perceptual({}, None)
    with pytest.raises(ValueError, match=r"perceptual_heads: lin1\.\S+ must be \[1, 128, 1, 1\] but is \[1, 192,"):
        Perceptual(random_vgg, random_heads() | {"lin1.model.1.weight": torch.rand(1, 192, 1, 1)})
    with pytest.raises(ValueError, match=r"perceptual_heads is damaged: its lin1\.\S+ holds values that are no finite"):
        Perceptual(random_vgg, random_heads() | {"lin1.model.1.weight": torch.full((1, 128, 1, 1), torch.nan)})


# ----------------------------------------------------------------------------------------------------- config


def test_heads_without_weights_are_refused() -> None:
    with pytest.raises(ValidationError, match="perceptual_heads needs perceptual_weights"):
        StageALoss(perceptual=0.1, perceptual_heads="vgg.pth")


def test_the_configured_files_are_read(random_vgg: dict[str, Tensor], tmp_path: Path) -> None:
    vgg, heads = tmp_path / "vgg16.pth", tmp_path / "heads.safetensors"
    torch.save(random_vgg, vgg)
    weights = random_heads()
    save_file(weights, heads)
    loss = StageALoss(perceptual=0.1, perceptual_weights=str(vgg), perceptual_heads=str(heads))
    found = loading.perceptual(loss, torch.device("cpu"))
    a, b = torch.rand(2, 1, 3, 32, 32)
    assert found is not None
    np.testing.assert_allclose(found(a, b).numpy(), expected_distance(random_vgg, weights, a, b), rtol=1e-4)
    assert loading.perceptual(StageALoss(), torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("loss", "note", "warned"),
    [
        (StageALoss(), "none", False),
        (StageALoss(perceptual=0.1), "off: stage_a.loss.perceptual_weights", True),
        (StageALoss(perceptual=0.1, perceptual_weights="v"), "without LPIPS's heads", False),
        (StageALoss(perceptual=0.1, perceptual_weights="v", perceptual_heads="h"), "LPIPS on VGG16", False),
    ],
)
def test_the_manifest_says_what_the_perceptual_loss_was(
    monkeypatch: pytest.MonkeyPatch, loss: StageALoss, note: str, warned: bool
) -> None:
    monkeypatch.setattr(steps, "_train", lambda *_, **__: Facts(files={}, rows=1, call="", workers=[]))
    told: list[str] = []
    build: Any = SimpleNamespace(
        config=SimpleNamespace(stage_a=SimpleNamespace(loss=loss)), report=SimpleNamespace(warning=told.append)
    )
    assert note in steps.train_a(build).notes["perceptual"]
    assert bool(told) == warned
    assert all(note in text for text in told)
