"""What NVML tells of a node's GPUs, sampled by its first rank: how busy, full and hot they are, power and energy.

NVML is there where `nvidia-ml-py` is installed beside a driver; without it, nothing is told, and nothing fails.
"""

import contextlib
import importlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.cluster.messages import Energy, Sampled

log = logging.getLogger(__name__)

SAMPLE_S = 30.0
TEMPERATURE = 0  # NVML's number of the GPU's own sensor


def library() -> Any:
    """NVML, ready to be asked; None where it is not there."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception as error:  # the package, the driver or the right to ask is missing
        log.info("NVML tells nothing of this node's GPUs: %s", error)
        return None
    return nvml


def figures(nvml: Any, handles: Sequence[Any], node: int) -> dict[str, float]:
    """Of each device of a node: % of the time a kernel ran, MiB, W, and degrees Celsius."""
    found: dict[str, float] = {}
    for number, handle in enumerate(handles):
        name = f"system/node_{node}/gpu_{number}"
        found |= {
            f"{name}_utilization_percentage": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            f"{name}_memory_usage_megabytes": nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20,
            f"{name}_power_usage_watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            f"{name}_temperature_celsius": float(nvml.nvmlDeviceGetTemperature(handle, TEMPERATURE)),
        }
    return found


class Meter:
    """The energy that devices have used since it was made, J.

    Their counters begin at 0 where the driver is loaded anew; what that hides is not counted.
    """

    def __init__(self, nvml: Any, handles: Sequence[Any]) -> None:
        self._nvml, self._handles = nvml, handles
        self._last = self._read()
        self.joules = 0.0

    def read(self) -> float:
        """So far."""
        now = self._read()
        self.joules += sum(max(0.0, new - old) for new, old in zip(now, self._last, strict=True))
        self._last = now
        return self.joules

    def _read(self) -> list[float]:
        return [self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000 for handle in self._handles]


@contextlib.contextmanager
def sampled(
    nvml: Any, uuids: Sequence[str], node: int, post: Callable[[Energy | Sampled], None], every_s: float = SAMPLE_S
) -> Iterator[None]:
    """Post figures and energy of devices every so often during the block, and the energy once more at its end.

    A device that does not answer ends that, with a word in the log, and nothing else.
    """
    stop = threading.Event()

    def sample() -> None:
        try:
            handles = [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
            meter, over = Meter(nvml, handles), False
            while not over:
                over = stop.wait(every_s)
                post(Energy(node, meter.read()))
                if not over:
                    post(Sampled(figures(nvml, handles, node), int(time.time() / every_s)))
        except Exception as error:  # NVML's own, of many kinds: a card may not tell of energy
            log.warning("NVML tells no more of this node's GPUs: %s", error)

    thread = threading.Thread(target=sample, name="nvml", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(every_s)
