"""What is `auto` in a training, on devices of several kinds."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.cluster.ranks import automatic
from pipeline.cluster.ranks.automatic import settled
from pipeline.plan import training_memory
from pipeline.settings import compose
from stages.precision import computes_bf16
from stages.settings.training import TrainingConfig

CPU = torch.device("cpu")


def training(**changes: object) -> TrainingConfig:
    values = {"learning_rate": 0.1, "warmup_steps": 0, "log_every": 1, "checkpoint_every": 1}
    return TrainingConfig.model_validate({"phases": [{"steps": 1, "batch_size": 1, "size": 64}], **values, **changes})


@pytest.mark.parametrize(("world", "recomputed"), [(64, False), (32, True)])
def test_whether_activations_are_recomputed_is_settled_by_the_ranks_that_there_are(world, recomputed, monkeypatch):
    """A training of 64 that has lost a node goes on with 32, each of which has twice the rows."""
    words = ["scale=paper", "data.metadata=x", "workers=64", "cluster.min_workers=32", "cluster.address=auto"]
    config = compose.load("stage_c", [*words, "stage_c.train.checkpointing=auto"])
    needs = training_memory.whole_bytes("train_c", config)
    assert (max(needs), min(needs)) == (64, 32)
    assert needs[64] < needs[32]
    card = SimpleNamespace(total_memory=(needs[64] + needs[32]) // 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(automatic, "most", lambda value, *_: value)
    train = config.stage_c.train
    assert train is not None
    found, taken = settled("stage_c", train, {}, needs[world], torch.device("cuda"), world, pytest.fail)
    assert (found.checkpointing, taken) == (recomputed, {"stage_c/checkpointing": float(recomputed)})


@pytest.mark.parametrize(
    ("asked", "others", "own", "precision", "taken", "warnings"),
    [
        ("auto", True, True, "bf16", {"stage_a/bf16": 1.0}, 0),
        ("auto", True, False, "fp32", {"stage_a/bf16": 0.0}, 0),
        ("auto", False, True, "fp32", {"stage_a/bf16": 0.0}, 0),
        ("bf16", True, True, "bf16", {}, 0),
        ("bf16", True, False, "bf16", {}, 1),
        ("fp32", False, False, "fp32", {}, 0),
    ],
)
def test_bf16_is_taken_where_every_device_computes_in_it(asked, others, own, precision, taken, warnings, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(automatic, "computes_bf16", lambda device: own)
    monkeypatch.setattr(automatic, "most", lambda value, *_: max(value, not others))
    found = settled("stage_a", training(precision=asked), {}, 0, CPU, 2, said.append)
    assert found == (training(precision=precision), taken)
    assert len(said) == warnings


@pytest.mark.parametrize("asked", ["auto", "fp32"])
@pytest.mark.parametrize("began", ["bf16", "fp32"])
def test_a_training_of_auto_goes_on_in_what_it_began_in_whatever_the_devices_are_now(began, asked, monkeypatch):
    monkeypatch.setattr(automatic, "computes_bf16", lambda device: began == "fp32")
    recipe = training(precision=began).recipe(seed=0)
    said: list[str] = []
    found, _ = settled("stage_a", training(precision=asked), recipe, 0, CPU, 1, said.append)
    assert found.precision == (began if asked == "auto" else asked)
    assert [line for line in said if "it began so elsewhere" in line] == said
    assert len(said) == (found.precision == "bf16")


@pytest.mark.parametrize(
    ("able", "computes"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),  # AMD's Zen 2 and 3, Intel's cores of laptops
        ({"avx2": True, "avx512_bf16": True}, True),  # Zen 4
        ({"amx_bf16": True}, True),  # Sapphire Rapids
        ({"neon": True, "bf16": False}, False),
        ({"neon": True, "bf16": True}, True),  # Graviton 3
    ],
)
def test_a_cpu_computes_bf16_where_it_has_instructions_for_it(able, computes, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert computes_bf16(CPU) is computes


def test_the_local_scale_leaves_the_precision_of_its_trainings_to_the_machine():
    assert "bf16" not in {training.precision for training in compose.load("stage_c", []).trainings().values()}
