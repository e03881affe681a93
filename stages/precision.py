"""What numbers a device computes in, and so what `precision: auto` comes to on it."""

import torch

from stages.settings.base import ChosenPrecision

_OWN = ("avx512_bf16", "amx_bf16", "bf16")  # torch's names of what x86 and ARM processors have for it


def computes_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 numbers itself; one that imitates it takes several times as long as in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(able.get(name, False) for name in _OWN)


def autocast(device: torch.device, precision: ChosenPrecision) -> torch.autocast:
    """Autocast to bf16 on a device, where `precision` asks for it."""
    enabled = computes_bf16(device) if precision == "auto" else precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
