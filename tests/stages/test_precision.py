"""What `auto` asks for on a device, and what is computed then."""

import pytest
import torch

from stages import precision
from stages.settings.base import ChosenPrecision

CPU = torch.device("cpu")


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("asked", ["fp32", "bf16", "auto"])
def test_auto_is_bf16_where_the_device_computes_in_it(
    asked: ChosenPrecision, able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "computes_bf16", lambda device: able)
    half = asked == "bf16" or (asked == "auto" and able)
    with precision.autocast(CPU, asked):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if half else torch.float32)
