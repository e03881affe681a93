"""Training steps of full width on a card that is not there: their work does not grow, and `plan` knows their memory."""

from typing import Any

import pytest
import torch

from stages.settings.models import StageAConfig, StageBConfig, StageCConfig
from tests.bench import fake_step
from tests.bench.counting import Counter, Work
from tests.bench.fake_cuda import fake_cuda
from tests.bench.fake_step import COMPILED, EMA, HALF, RECOMPUTED, Case

pytestmark = pytest.mark.xdist_group("fake_step")  # of which each worker would make the steps anew

C, B, A = StageCConfig(depth=2), StageBConfig(blocks=(1, 1, 1, 1)), StageAConfig(bottleneck_blocks=2)
CASES = {  # with operations and GB of a step: raise them only on purpose
    "c": (Case("C", C, 1024, 24, HALF | EMA), 406, 23.86),
    "c, recomputed": (Case("C", C, 1024, 24, HALF | EMA | RECOMPUTED), 470, 28.83),
    "c, compiled": (Case("C", C, 1024, 24, HALF | EMA | COMPILED), 354, 18.95),
    "b": (Case("B", B, 512, 8, HALF), 2_548, 48.98),
    "a": (Case("A", A, 256, 64, {"precision": "fp32"}), 719, 76.85),
}


@pytest.fixture(scope="module")
def steps() -> dict[str, Work]:
    return {name: fake_step.step(case) for name, (case, _, _) in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_step_does_no_more_than_it_did(steps: dict[str, Work], name: str) -> None:
    _, operations, gigabytes = CASES[name]
    assert steps[name].operations <= 1.03 * operations
    assert steps[name].bytes / 1e9 <= 1.03 * gigabytes


@pytest.mark.parametrize("name", CASES)
def test_plan_knows_a_steps_memory(steps: dict[str, Work], name: str) -> None:
    """To a tenth; what is compiled keeps less, and what is recomputed is gone before gradients come: unknown to it."""
    share, training = CASES[name][0].planned / steps[name].peak, CASES[name][0].training
    assert 0.9 < share < (1.2 if training.compile or training.checkpointing else 1.1)


def test_matrix_products_are_those_of_the_architecture(steps: dict[str, Work]) -> None:
    """Three times the forward pass, and one more where it is recomputed; heads and casts are little."""
    case = CASES["c"][0]
    assert steps["c"].flops == pytest.approx(case.model_flops, rel=0.02)
    assert steps["c, compiled"].flops == steps["c"].flops
    assert steps["c, recomputed"].flops == pytest.approx(case.model_flops * 4 / 3, rel=0.1)


def test_kernels_are_counted_and_priced() -> None:
    """A product and a sum whose FLOPs and bytes can be told by hand, by CUDA's autocast."""
    with fake_cuda() as card:
        left, right = torch.empty(256, 512), torch.empty(512, 128)
        counter = Counter([left, right])
        card.listener = counter
        with torch.autocast("cuda", torch.bfloat16):
            product = left @ right
        total: Any = product.sum(dim=0)
        card.listener = None
    casts, (product_kernel, sum_kernel) = counter.work.kernels[:2], counter.work.kernels[2:]
    assert sorted(kernel.bytes for kernel in casts) == [6 * 512 * 128, 6 * 256 * 512]
    assert (product_kernel.flops, product_kernel.bits) == (2 * 256 * 512 * 128, 16)
    assert product_kernel.bytes == 2 * (256 * 512 + 512 * 128 + 256 * 128)
    assert sum_kernel.bytes == 2 * (256 * 128 + 128)
    assert (product.dtype, total.shape) == (torch.bfloat16, (128,))
    assert counter.work.seconds(1e15, 1e12) == pytest.approx(sum(k.bytes for k in counter.work.kernels) / 1e12)
    while_it_multiplies = 4 * (256 * 512 + 512 * 128) + 2 * (256 * 512 + 512 * 128 + 256 * 128)
    assert counter.work.peak == while_it_multiplies
