"""How long each stage takes to draw, by the clock, on a device that does nothing else (the paper's Figure 4)."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from stages.sampling.denoising import Noise
from stages.sampling.sample import Captions, Models, decode, draw_code, draw_latents
from stages.settings.sampling import SamplingConfig

STAGES = ("stage_c", "stage_b", "stage_a")  # in the order in which they draw
CAPTION = "a red heart"


def seconds_a_picture(
    models: Models,
    settings: SamplingConfig,
    batches: Sequence[int],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[tuple[int, dict[str, float]]]:
    """For each number of pictures drawn at a time, what each stage takes for one of them, captions' encoding included.

    The median of `repeats`, after one that is not counted: it compiles, and fills caches."""
    for batch in batches:
        _timed(models, settings, batch, device, clock)
        found = [_timed(models, settings, batch, device, clock) for _ in range(repeats)]
        yield batch, {stage: statistics.median(one[stage] for one in found) / batch for stage in STAGES}


@torch.inference_mode()
def _timed(
    models: Models, settings: SamplingConfig, batch: int, device: torch.device, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds that each stage takes for a batch."""
    captions, noise = Captions(models, [CAPTION] * batch, settings.negative, device), Noise(range(batch), device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels are only queued by the calls
        return clock()

    begun = now()
    code = draw_code(models, captions, settings, noise)
    after_c = now()
    latents = draw_latents(models, code, captions, settings, noise)
    after_b = now()
    decode(models, latents, device, code)
    return dict(zip(STAGES, (after_c - begun, after_b - after_c, now() - after_b), strict=True))


def device_name(device: torch.device) -> str:
    """What a device is called: a GPU by its model, a CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads != 1)}"
