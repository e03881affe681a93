"""Fine-tuning: a base model, some pictures of one's own in a folder, and what it gains on others of their kind."""

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from datasets import pictures
from datasets.config import ImageConfig
from datasets.left_out import LeftOut
from datasets.source_settings import FolderConfig
from datasets.sources import folder
from pipeline.plan import training_memory
from pipeline.plan.table import table
from pipeline.settings import compose
from stages.anatomy import flops
from stages.anatomy.memory_estimate import GIB
from stages.draws import Draws
from stages.models.compressor import Compressor
from stages.models.layers import to_unit_range
from stages.models.stage_c import StageC, StageCObjective
from stages.models.text import seeded_tower
from stages.settings.losses import StageCLoss
from stages.settings.models import CompressorConfig, SeededTextConfig, StageCConfig
from stages.settings.training import TrainingConfig
from stages.training.callbacks import Callbacks
from stages.training.loop import train

SIZE, BATCH = 128, 16
TINY = {
    "stem": 8,
    "stages": [{"block": "fused", "expand": 1, "stride": 2, "channels": 16, "layers": 1}] * 4,
    "last": 64,
}
CPU = torch.device("cpu")
Batch = dict[str, Tensor]


def draw(path: Path, kind: str, count: int) -> Path:
    """A folder of pictures, discs on white or stripes in the dark, with captions beside them."""
    path.mkdir()
    numbers = np.random.default_rng(len(kind))
    down, along = np.mgrid[:SIZE, :SIZE]
    for number in range(count):
        colour, middle = numbers.integers(0, 256, 3), numbers.integers(40, SIZE - 40, 2)
        if kind == "disc":
            inside = (down - middle[0]) ** 2 + (along - middle[1]) ** 2 < 30**2
            pixels = np.where(inside[..., None], colour, 255)
        else:
            inside = (down * middle[0] + along * middle[1]) // 700 % 2 == 0
            pixels = np.where(inside[..., None], colour // 2, 0)
        Image.fromarray(pixels.astype(np.uint8)).save(path / f"{kind} {number:02}.png")
        red, green, blue = colour // 64
        (path / f"{kind} {number:02}.txt").write_text(f"{kind} of red {red} green {green} blue {blue}")
    return path


def read(path: Path) -> tuple[Tensor, list[str]]:
    """Pictures (B, 3, H, W) uint8 and captions of a folder, as its server gives them out."""
    config, image = FolderConfig(path=str(path)), ImageConfig(size=SIZE, format="png")
    table = pa.concat_tables(folder.tables(config, LeftOut()))
    stored = []
    with folder.serve(config.path, folder.KEY) as (host, port):
        for url in table["URL"].to_pylist():
            body = urllib.request.urlopen(url.replace(folder.HOST, f"{host}:{port}")).read()
            stored.append(pictures.pixels(pictures.stored(body, image).content))
    captions = [text.decode() for text in table["TEXT"].to_pylist()]
    return torch.from_numpy(np.stack(stored)).permute(0, 3, 1, 2), captions


@contextmanager
def fresh_batch_norm(module: nn.Module) -> Iterator[None]:
    """Measure BatchNorm statistics anew: they become the plain average over all batches that pass meanwhile.

    Everything but BatchNorm is in evaluation mode, and the whole module is so afterwards.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        with torch.no_grad():
            yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        module.eval()


@torch.no_grad()
def encoded(sets: dict[str, tuple[Tensor, list[str]]]) -> tuple[dict[str, Batch], Tensor]:
    """What Stage C trains on, for each set, and the empty caption's states: of a fixed compressor and text tower."""
    torch.manual_seed(0)
    compressor = Compressor(CompressorConfig.model_validate({"backbone": TINY, "batch_norm": "fixed"}))
    tower = seeded_tower(SeededTextConfig(width=32, layers=1, heads=2))
    with fresh_batch_norm(compressor):
        compressor(to_unit_range(torch.cat([images for images, _ in sets.values()])))
    batches = {
        name: {"latents_c": compressor(to_unit_range(images)), "text": tower.encode(captions)[0]}
        for name, (images, captions) in sets.items()
    }
    return batches, tower.encode([""])[0][0]


def trained(objective: StageCObjective, samples: Batch, steps: int, rate: float) -> None:
    """Train in place through the loop that trains every stage."""
    config = TrainingConfig.model_validate(
        {
            "phases": [{"steps": steps, "batch_size": BATCH, "size": SIZE}],
            "learning_rate": rate,
            "warmup_steps": 5,
            "precision": "fp32",
            "ema": {"decay": 0.5, "every": 5, "start": 10, "device": "cpu"},
            "log_every": steps,
            "checkpoint_every": steps,
        }
    )

    def batch(step: int) -> dict[str, np.ndarray]:
        rows = np.random.default_rng(step).choice(len(samples["text"]), BATCH, replace=False)
        return {name: values.numpy()[rows] for name, values in samples.items()}

    train(
        objective,
        batch,
        config,
        Callbacks(),
        seed=0,
        device=CPU,
    )


@torch.no_grad()
def loss(objective: StageCObjective, samples: Batch, draws: int = 20) -> float:
    """Mean loss over the same timesteps and noise for every model."""
    objective.eval()
    count = len(samples["text"])
    return float(np.mean([float(objective(samples, Draws(1, n, 0, count, count, CPU))[0]) for n in range(draws)]))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Batch], Tensor]:
    root = tmp_path_factory.mktemp("folders")
    known = read(draw(root / "discs", "disc", 32))
    images, captions = read(draw(root / "stripes", "stripe", 48))
    return encoded({"base": known, "own": (images[:32], captions[:32]), "new": (images[32:], captions[32:])})


def test_fifty_steps_on_ones_own_pictures_lower_the_loss_on_new_ones(samples):
    batches, null_text = samples
    torch.manual_seed(0)
    objective = StageCObjective(
        StageC(StageCConfig(width=32, depth=2, heads=2, text_width=32)), StageCLoss(), null_text
    )
    untrained = {name: loss(objective, batches[name]) for name in ("base", "new")}
    trained(objective, batches["base"], steps=100, rate=3e-3)
    base = loss(objective, batches["new"])
    assert loss(objective, batches["base"]) < untrained["base"]
    trained(objective, batches["own"], steps=50, rate=1e-3)
    tuned = loss(objective, batches["new"])
    assert tuned < 0.75 * base
    assert tuned < 0.9 * untrained["new"]  # it has not only forgotten the base


def test_the_conf_is_the_same_at_every_scale():
    """No scale's from-scratch values come through: not in the models, the training, or the rates of `plan`."""
    found = [
        compose.load("finetune_c", ["data.folder.path=pictures", f"scale={scale}"])
        for scale in compose.groups()["scale"]
    ]
    assert len(found) > 3
    for other in found[1:]:
        assert other.stage_c == found[0].stage_c
        assert other.rates["train_c"] == found[0].rates["train_c"]
        for name in ("stage_a", "stage_b", "compressor"):
            assert getattr(other, name).model == getattr(found[0], name).model
    assert found[0].stage_c.train.learning_rate == 1e-5


def test_plans_rate_is_the_papers_flops_a_second():
    paper = compose.load("stage_c", ["scale=paper", "data=openmoji"])
    loaded = compose.load("finetune_c", ["data.folder.path=pictures"])

    def work(config, size):
        return flops.stage_c(config.stage_c.model, size * 24 // 1024, size * 24 // 1024, 77)

    images = [(phase.steps * phase.batch_size, phase.size) for phase in paper.stage_c.train.phases]
    mean = sum(count * work(paper, size) for count, size in images) / sum(count for count, _ in images)
    assert loaded.rates["train_c"] == pytest.approx(paper.rates["train_c"] * mean / work(loaded, 1024), rel=0.01)


def test_the_conf_trains_the_released_stage_c_within_its_card():
    loaded = compose.load("finetune_c", ["data.folder.path=pictures"])
    assert {step.name for step in table(loaded)} & {"import_a", "import_b", "train_a", "train_b", "train_c"} == {
        "import_a",
        "import_b",
        "train_c",
    }
    need = training_memory.needed("train_c", loaded)
    assert need is not None
    assert need.gradients == 4 * 993_636_896  # trained from bigG's text
    assert need.average == 0
    assert loaded.cluster.gpu_memory_gib == 24
    assert need.total < 0.9 * 24 * GIB
    greedy = compose.load("finetune_c", ["data.folder.path=pictures", "stage_c.train.checkpointing=false"])
    more = training_memory.needed("train_c", greedy)
    assert more is not None
    assert more.total > 24 * GIB
