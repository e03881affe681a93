"""`python -m tests.bench.drawing`: a picture by diffusers' stock pipeline and by ours, the same weights, taking turns.

Part of `make bench`. Both draw from one release folder; reading it and the first picture are start-up, told apart. Ours
gets the same number of captions at a time; the stock pipeline takes one caption and draws so many pictures of it.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from stages.models.compressor import Compressor
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.sampling.sample import Models, draw
from stages.settings.models import CompressorConfig, SeededTextConfig, StageAConfig, StageBConfig, StageCConfig
from stages.settings.sampling import SamplingConfig
from stages.weights import release
from stages.weights.card import CardFacts, model_card
from tests.bench.figures import Line, at_most

PAIRS, BATCHES, BAR = 8, (1, 4), 0.7
CAPTION = "a blue house with three windows"
SETTINGS = SamplingConfig(width=256, height=256, steps_c=12, steps_b=6, guidance_c=4.0, guidance_b=1.0)
TEXT = SeededTextConfig(width=256, layers=4, heads=4, context_length=77, seed=0)
A = StageAConfig(hidden=96, bottleneck_blocks=4, codebook_size=512)
B = StageBConfig(
    widths=(64, 128, 256), blocks=(1, 1, 2), patterns=("CT", "CTA", "CTA"), heads=(0, 4, 8),
    inject_code=(False, True, True), cond_width=256, text_width=256,
)  # fmt: skip
C = StageCConfig(width=256, depth=6, heads=4, text_width=256)
SHORT = {
    "stem": 8,
    "stages": [{"block": "fused", "expand": 2, "stride": 2, "channels": 8, "layers": 1}] * 4,
    "last": 16,
}
COMPRESSOR = CompressorConfig.model_validate({"backbone": SHORT, "batch_norm": "fixed"})


def main() -> None:
    """Print all figures of this machine."""
    for line in lines():
        print(f"{line.what:<58} {line.figure}", flush=True)


def lines(pairs: int = PAIRS, batches: tuple[int, ...] = BATCHES) -> Iterator[Line]:
    """Start-up of both, then for each batch the ratio of seconds a picture."""
    try:
        from diffusers import AutoPipelineForText2Image
    except ImportError:
        yield Line("drawing", "diffusers is not installed: no comparison")
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(folder)

        def stock() -> Callable[[int], object]:
            pipeline = AutoPipelineForText2Image.from_pretrained(folder)
            pipeline.set_progress_bar_config(disable=True)
            return lambda batch: by_stock(pipeline, batch)

        def own() -> Callable[[int], object]:
            models = release.load(folder)
            return lambda batch: by_ours(models, batch)

        painters, starts = {}, {}
        for name, make in {"ours": own, "diffusers": stock}.items():
            began = time.perf_counter()
            painters[name] = make()
            painters[name](1)
            starts[name] = time.perf_counter() - began
    yield Line("drawing, start-up and first picture", ", ".join(f"{n} {s:.1f} s" for n, s in starts.items()))
    for batch in batches:
        times = [tuple(timed(paint, batch) for paint in painters.values()) for _ in range(pairs + 1)][1:]
        found = [mine / theirs for mine, theirs in times]
        middle, mine = statistics.median(found), statistics.median(time for time, _ in times) / batch
        figure = f"{middle:.2f} (least {min(found):.2f}, most {max(found):.2f}; {pairs} pairs; ours {mine:.2f} s)"
        yield at_most(f"seconds a picture, batch {batch}: ours / diffusers", figure, middle, BAR)


def timed(paint: Callable[[int], object], batch: int) -> float:
    """Seconds that a batch takes."""
    began = time.perf_counter()
    paint(batch)
    return time.perf_counter() - began


def by_ours(models: Models, batch: int) -> object:
    """As many pictures of a caption."""
    return draw(models, [CAPTION] * batch, **SETTINGS.model_dump())


def by_stock(pipeline: Any, batch: int) -> object:
    """The same by the stock pipeline, with the same steps and guidance."""
    return pipeline(
        CAPTION,
        num_images_per_prompt=batch,
        width=SETTINGS.width,
        height=SETTINGS.height,
        prior_num_inference_steps=SETTINGS.steps_c,
        num_inference_steps=SETTINGS.steps_b,
        prior_guidance_scale=SETTINGS.guidance_c,
        decoder_guidance_scale=SETTINGS.guidance_b,
        generator=torch.Generator().manual_seed(0),
    ).images


def write(folder: Path) -> None:
    """A release of random weights."""
    from stages.models.text import seeded_tower

    torch.manual_seed(0)
    tower = seeded_tower(TEXT)
    models = Models(StageA(A).eval(), StageB(B).eval(), StageC(C).eval(), tower, tower, settings=SETTINGS)
    card = model_card(CardFacts("bench", "cc0-1.0", CAPTION, SETTINGS, [], [], [], []))
    compressor = Compressor(COMPRESSOR).eval()
    configs: dict[str, Any] = {"stage_a_config": A, "stage_b_config": B, "stage_c_config": C}
    for name, content in release.release_files(models, compressor, **configs, compressor_config=COMPRESSOR, card=card):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(content))


if __name__ == "__main__":
    main()
