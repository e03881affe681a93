"""interpolate: weights between two others."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.steps import interpolate
from stages.models.stage_c import StageC
from stages.weights import convert
from tests.existing_weights import STATE_C, C, building, loaded, random_state, save


@pytest.mark.parametrize("share", [0.5, 0.0, 0.3, 1.0])
def test_interpolated_weights_lie_between_two_others(share: float, tmp_path: Path) -> None:
    """Computed again in float64 from the formula (1 - share) a + share b."""
    second = random_state(StageC(C), seed=5)
    torch.save({"ema_state_dict": STATE_C}, tmp_path / "first.pt")
    save(convert.to_diffusers(second), tmp_path / "second.safetensors")
    between = f"interpolate={{first: {tmp_path}/first.pt, second: {tmp_path}/second.safetensors, share: {share}}}"
    facts = interpolate.interpolate(building(loaded(between), "stage_c", tmp_path / "out"))
    assert facts.files.keys() == {"stage_c.safetensors"}
    state = safetensors.torch.load_file(tmp_path / "out/stage_c.safetensors")
    assert state.keys() == STATE_C.keys()
    for key, value in state.items():
        expected = (1 - share) * STATE_C[key].double() + share * second[key].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
