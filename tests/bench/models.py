"""`python -m tests.bench.models`: Stage B and C against diffusers' modules; part of `make bench`.

Needs torch, torchvision, pydantic and this checkout, so that it runs on any GPU image. diffusers' figures are left
out where it is not installed, those of the text tower where open_clip is not. Ratios come from interleaved pairs.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages import diffusion
from stages.anatomy import flops
from stages.models.geometry import code_side, latent_side
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.sampling.denoising import Noise, Steps, sample_code, sample_latents
from stages.sampling.sample import to_pixels
from stages.settings.models import SeededTextConfig, StageAConfig, StageBConfig, StageCConfig
from stages.weights import convert
from tests.bench.figures import Line, at_least

try:
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt, WuerstchenPrior
except ImportError:
    WuerstchenDiffNeXt = WuerstchenPrior = None

PAIRS, WARM_UP = 20, 3
TOKENS = 77
SMALL_C = StageCConfig(width=512, depth=8, heads=8)
SMALL_B = StageBConfig(widths=(160, 320, 640, 640), blocks=(1, 1, 2, 1), heads=(0, 5, 10, 10))


@dataclass(frozen=True)
class Case:
    """A training to time: a model's config, the sides of what it denoises, images a step."""

    config: StageBConfig | StageCConfig
    side: int
    batch: int

    @property
    def name(self) -> str:
        stage = "B" if isinstance(self.config, StageBConfig) else "C"
        return (
            f"Stage {stage} {self.side}x{self.side}, batch {self.batch}{'' if self.config.dropout else ', no dropout'}"
        )

    @property
    def forward_flops(self) -> int:
        """Of one image."""
        count = flops.stage_b if isinstance(self.config, StageBConfig) else flops.stage_c
        return count(self.config, self.side, self.side, TOKENS)  # type: ignore[arg-type]

    def ours(self) -> nn.Module:
        return StageB(self.config) if isinstance(self.config, StageBConfig) else StageC(self.config)

    def theirs(self) -> nn.Module:
        if isinstance(self.config, StageBConfig):
            return WuerstchenDiffNeXt(**convert.arguments(self.config))
        return WuerstchenPrior(**convert.arguments(self.config))

    def inputs(self, device: torch.device) -> list[Tensor]:
        """x, t, the code (Stage B) and text of one batch."""
        generator = torch.Generator().manual_seed(0)
        channels, text = self.config.latent_channels, (TOKENS, self.config.text_width)
        shapes = [(channels, self.side, self.side), (), text]
        if isinstance(self.config, StageBConfig):
            shapes.insert(2, (self.config.code_channels, self.side * 3 // 32, self.side * 3 // 32))
        return [torch.rand(self.batch, *shape, generator=generator).to(device) for shape in shapes]


# The authors, and we, drop attention's probabilities, which on CPUs no fused kernel does; diffusers drops its output.
# Without dropout both compute the same.
CALM_C = SMALL_C.model_copy(update={"dropout": 0.0})
CPU_CASES = [Case(SMALL_C, 24, 2), Case(CALM_C, 24, 2), Case(SMALL_C, 12, 8), Case(SMALL_B, 64, 2)]
CUDA_CASES = [
    Case(StageCConfig(), 12, 64),
    Case(StageCConfig(), 24, 32),
    Case(StageBConfig(), 128, 8),
    Case(StageBConfig(), 256, 2),
]


def main() -> None:
    """Print all figures of this machine."""
    for line in lines():
        print(f"{line.what:<44} {line.figure}", flush=True)


def lines() -> Iterator[Line]:
    """What was measured and its figure, as they come."""
    if torch.cuda.is_available():
        device = torch.device("cuda")
        yield Line("card", f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        yield from trainings(CUDA_CASES, device, torch.bfloat16, PAIRS)
        yield from ratios(CUDA_CASES, device, torch.bfloat16, PAIRS)
        yield from pictures(StageAConfig(), StageBConfig(), StageCConfig(), device, 1024, (1, 2, 4, 8, 16), (60, 12))
    else:
        yield from ratios(CPU_CASES, torch.device("cpu"), torch.float32, PAIRS)


def ratios(cases: list[Case], device: torch.device, dtype: torch.dtype, pairs: int) -> Iterator[Line]:
    """Seconds of diffusers' training step over ours, in pairs that take turns; and the memory of each."""
    if WuerstchenPrior is None:
        yield Line("diffusers", "not installed: no comparison")
        return
    for case in cases:
        ours, theirs = (training_step(build(), case.inputs(device), dtype) for build in (case.ours, case.theirs))
        for step in (ours, theirs) * WARM_UP:
            step()
        times = [(seconds(ours, device), seconds(theirs, device)) for _ in range(pairs)]
        found = sorted(b / a for a, b in times)
        low, middle, high = statistics.quantiles(found, n=4)
        figure = f"min {found[0]:.2f}, quartiles {low:.2f} {middle:.2f} {high:.2f}, max {found[-1]:.2f}"
        mine = statistics.median(a for a, _ in times)
        figure += f" ({pairs} pairs; ours {mine:.3f} s a step)"
        yield at_least(f"{case.name}: diffusers / ours, lower quartile", figure, low, 1.0)
        if device.type == "cpu":
            kept = [activations(build(), case.inputs(device)) for build in (case.ours, case.theirs)]
            figure = "ours {:,.0f} MB, diffusers {:,.0f} MB".format(*(b / 1e6 for b in kept))
            yield Line("  kept for the backward pass", figure)


def trainings(cases: list[Case], device: torch.device, dtype: torch.dtype, pairs: int) -> Iterator[Line]:
    """Images a second, utilisation and peak memory of training steps, eager and compiled, ours and diffusers'."""
    rate = matrix_rate(device, dtype)
    side = ", 8192^3" if device.type == "cuda" else ""
    yield Line(f"matrix products{side}", f"{rate / 1e12:,.2f} TFLOP/s")
    for case in cases:
        builds = {"ours": case.ours} | ({} if WuerstchenPrior is None else {"diffusers": case.theirs})
        for owner, build in builds.items():
            for compiled in (False, True):
                step = training_step(build(), case.inputs(device), dtype, compiled)
                for _ in range(WARM_UP):
                    step()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                times = [seconds(step, device) for _ in range(pairs)]
                speed = case.batch / statistics.median(times)
                used = flops.utilisation(case.forward_flops, speed, rate)
                memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
                how = f"{owner}, {'compiled' if compiled else 'eager'}"
                tera = 3 * case.forward_flops * speed / 1e12
                figure = f"{speed:,.1f} images/s, {tera:,.2f} TFLOP/s, {used:.0%} of the matrix rate"
                peak = flops.PEAKS.get(torch.cuda.get_device_name()) if device.type == "cuda" else None
                mfu = f", MFU {flops.utilisation(case.forward_flops, speed, peak):.1%}" if peak else ""
                yield Line(f"{case.name}: {how}", figure + mfu + memory)
                del step
                torch._dynamo.reset()
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def pictures(
    config_a: StageAConfig,
    config_b: StageBConfig,
    config_c: StageCConfig,
    device: torch.device,
    side: int,
    batches: tuple[int, ...],
    steps: tuple[int, int],
) -> Iterator[Line]:
    """Seconds a picture of `side` px in text tower, Stage C, B and A, with guidance of C and without that of B."""
    stage_a, stage_b, stage_c = (
        model.to(device).eval() for model in (StageA(config_a), StageB(config_b), StageC(config_c))
    )
    encode = text_encoder(config_c.text_width, device)
    low_precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    for batch in batches:
        noise = Noise(range(batch), device)
        text_c = torch.randn(batch, TOKENS, config_c.text_width, device=device)
        text_b = torch.randn(batch, TOKENS, config_b.text_width, device=device)
        code = torch.randn(batch, config_b.code_channels, code_side(side), code_side(side), device=device)
        latents = torch.randn(batch, config_a.latent_channels, *[latent_side(code_side(side))] * 2, device=device)

        def draw_c(text: Tensor = text_c, noise: Noise = noise) -> None:
            sample_code(stage_c, text, text, noise, side, side, Steps(diffusion.sampling_times(steps[0]), guidance=4.0))

        def draw_b(code: Tensor = code, text: Tensor = text_b, noise: Noise = noise) -> None:
            sample_latents(stage_b, code, text, text, noise, Steps(diffusion.sampling_times(steps[1])))

        def decode(latents: Tensor = latents) -> None:
            to_pixels(stage_a.decode(latents))

        parts: dict[str, Callable[[], object]] = {"C": draw_c, "B": draw_b, "A": decode}
        if encode is not None:
            parts = {"text": lambda batch=batch: encode(["a bear in a forest"] * batch)} | parts
        figures = []
        with torch.inference_mode(), low_precision:
            for name, work in parts.items():
                work()
                figures.append(f"{name} {seconds(work, device) / batch:.3f}")
        yield Line(f"seconds a picture of {side} px, batch {batch}", ", ".join(figures))


def text_encoder(width: int, device: torch.device) -> Callable[[list[str]], object] | None:
    """A tower of CLIP-H's shape with random weights, where open_clip is installed."""
    try:
        from stages.models.text import seeded_tower
    except ImportError:
        return None
    tower = seeded_tower(SeededTextConfig(width=width, layers=24, heads=width // 64 or 1, context_length=TOKENS))
    return tower.to(device).encode


def training_step(model: nn.Module, inputs: list[Tensor], dtype: torch.dtype, compiled: bool = False) -> Callable:
    """Forward, backward and optimiser of a model in training mode, its weights in fp32."""
    device = inputs[0].device
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predicted = forward(*inputs)
        optimizer.zero_grad(set_to_none=True)
        predicted.float().square().mean().backward()
        optimizer.step()

    return step


def activations(model: nn.Module, inputs: list[Tensor]) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters left out: what decides the peak."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model.train()(*inputs)
    assert output.requires_grad
    return sum(found.values())


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: what this device reaches at best."""
    side = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def work() -> None:
        for _ in range(10):
            left @ right

    work()
    return 10 * 2 * side**3 / min(seconds(work, device) for _ in range(5))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of `work`, the device's own included."""
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    settle()
    began = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
