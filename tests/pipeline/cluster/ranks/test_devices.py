"""NVML, asked of devices that are not there."""

from types import SimpleNamespace
from typing import Any

from pipeline.cluster.messages import Energy, Sampled
from pipeline.cluster.ranks import devices


class Nvml:
    """Two cards; the counter of the second begins anew once. It fails from the question number `fails` on."""

    def __init__(self, fails: int | None = None) -> None:
        self.readings = {"GPU-a": [1000.0, 4000.0, 9000.0], "GPU-b": [5000.0, 7000.0, 1000.0]}
        self.asked, self.fails = 0, fails

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu={"GPU-a": 90, "GPU-b": 10}[handle])

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=3 * 2**30)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 250_000

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        assert sensor == 0
        return 61

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> float:
        self.asked += 1
        if self.fails is not None and self.asked > self.fails:
            raise OSError("not supported")
        left = self.readings[handle]
        return left.pop(0) if len(left) > 1 else left[0]


def test_each_device_of_a_node_is_told_of():
    told = devices.figures(Nvml(), ["GPU-a", "GPU-b"], node=3)
    assert told["system/node_3/gpu_0_utilization_percentage"] == 90
    assert told["system/node_3/gpu_1_utilization_percentage"] == 10
    assert told["system/node_3/gpu_0_memory_usage_megabytes"] == 3 * 1024
    assert told["system/node_3/gpu_1_power_usage_watts"] == 250
    assert told["system/node_3/gpu_1_temperature_celsius"] == 61
    assert len(told) == 8


def test_energy_is_counted_from_the_start_and_never_falls():
    meter = devices.Meter(Nvml(), ["GPU-a", "GPU-b"])
    assert meter.read() == 3.0 + 2.0
    assert meter.read() == 3.0 + 2.0 + 5.0  # the other's counter began anew


def test_the_energy_is_told_at_the_end_also_of_a_short_training():
    posted: list[Energy | Sampled] = []
    with devices.sampled(Nvml(), ["GPU-a", "GPU-b"], 0, posted.append, every_s=600):
        pass
    assert [message for message in posted if isinstance(message, Energy)] == [Energy(0, 5.0)]


def test_a_card_that_does_not_tell_ends_nothing_but_that(caplog):
    posted: list[Energy | Sampled] = []
    with devices.sampled(Nvml(fails=0), ["GPU-a"], 0, posted.append, every_s=600):
        pass
    assert posted == []
    assert "NVML tells no more of this node's GPUs: not supported" in caplog.text
