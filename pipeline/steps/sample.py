"""sample: draw a picture for each caption, and beside it what each stage alone could do; sample_baseline: its rival."""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from datasets import shards, storage
from datasets.storage import FileEntry
from pipeline.artifacts import Artifact
from pipeline.build import Build, Facts
from pipeline.config import Config
from pipeline.sampling import caption_seed

CHUNK = 8  # captions between two receipts
GRID_ROWS = 64
Prompt = dict[str, Any]  # key, caption, seed, shard
# A prompt and its original -> pictures uint8 (H, W, 3) by their folder in the artifact.
Draw = Callable[[Prompt, np.ndarray], dict[str, np.ndarray]]


def sample(build: Build) -> Facts:
    """images, text, stage_a, stage_b, stage_c -> samples: `generated/<key>.png` etc., `samples.parquet`."""
    titles = {
        "original": "original",
        "stage_a": "Stage A alone",
        "stage_b": "Stages B + A",
        "generated": "from its caption",
    }
    return _paint(build, _stages, titles)


def sample_baseline(build: Build) -> Facts:
    """images, text, stage_a, baseline -> baseline_samples: the same captions, seeds and sizes as in samples."""
    return _paint(build, _baseline, {"original": "original", "generated": "by the baseline"})


def _paint(build: Build, make: Callable[..., Draw], titles: dict[str, str]) -> Facts:
    """Draw all prompts with `make(config, inputs, device)`; titles of the grid's columns by the artifact's folders."""
    config = build.config
    prompts = build.call(_prompts, build.inputs["images"], config.sample.limit, config.seed)
    chunks = list(range(-(-len(prompts) // CHUNK)))
    arguments = (make, config, build.inputs, prompts, build.cluster.device)
    receipts = build.map_shards(Painter, arguments, chunks, len(prompts), "pictures")
    files = {name: entry for receipt in receipts for name, entry in receipt.files.items()}
    files |= build.call(_tables, build.path, prompts, files, titles)
    build.report.image(build.step.output, storage.read(storage.join(build.path, "grid.png")), 0)
    return Facts(
        files=files,
        rows=len(prompts),
        call="ray.data.Dataset.map_batches",
        workers=sorted({receipt.pid for receipt in receipts}),
    )


def _prompts(images: Artifact, limit: int, seed: int) -> list[Prompt]:
    """The first captions of the images: key, caption, seed, shard."""
    prompts = []
    for shard in sorted(shards.finished(images.path)):
        for row in shards.read_images(images.read(shards.image_name(shard))):
            prompts.append(
                {"key": row.key, "caption": row.caption, "seed": caption_seed(seed, row.caption), "shard": shard}
            )
            if len(prompts) == limit:
                return prompts
    return prompts


class Painter:
    """An actor that draws one chunk of prompts at a time; `make` runs in it and loads the models."""

    def __init__(
        self,
        make: Callable[..., Draw],
        config: Config,
        inputs: dict[str, Artifact],
        prompts: list[Prompt],
        device: str,
        path: str,
        board: Any,
    ):
        from pipeline import models
        from pipeline.cluster import BoardClient

        self.images, self.prompts, self.path = inputs["images"], prompts, path
        self.draw = make(config, inputs, models.device(device))
        self.board = BoardClient(board)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[int]]:
        chunk = int(batch["shard"][0])
        if not self.board.stopping():
            started = shards.Clock()
            rows = self.prompts[chunk * CHUNK : (chunk + 1) * CHUNK]
            originals = self._originals({row["shard"] for row in rows})
            files: dict[str, FileEntry] = {}
            for row in rows:
                for name, pixels in self.draw(row, originals[row["key"]]).items():
                    file = f"{name}/{row['key']}.png"
                    files[file] = storage.publish(_png(pixels), storage.join(self.path, file))
            shards.publish_receipt(self.path, chunk, rows_in=len(rows), rows_out=len(rows), files=files, clock=started)
            total = len(self.prompts)
            self.board.post({"kind": "advance", "count": len(rows), "total": total, "unit": "pictures"})
        return {"shard": [chunk]}

    def _originals(self, numbers: set[int]) -> dict[str, np.ndarray]:
        return {
            row.key: row.pixels()
            for number in numbers
            for row in shards.read_images(self.images.read(shards.image_name(number)))
        }


def _stages(config: Config, inputs: dict[str, Artifact], where: Any) -> Draw:
    """Würstchen, and what Stage A and B keep of the original."""
    from pipeline import models
    from stages.sample import generate, reconstruct_a, reconstruct_b

    settings = config.sample
    loaded = models.everything(config, inputs, where)
    compressor = models.compressor(config.compressor.model, inputs["stage_b"]).to(where)

    def draw(row: Prompt, original: np.ndarray) -> dict[str, np.ndarray]:
        """One caption's pictures, batch size 1: what `sample` draws for the same caption and seed is the same."""
        image = _resized(original, settings.width).to(where)
        text = loaded.text_b.encode([row["caption"]])[0] if loaded.text_b else None
        drawn = generate(
            loaded,
            [row["caption"]],
            [settings.negative],
            [row["seed"]],
            width=settings.width,
            height=settings.height,
            steps_c=settings.steps_c,
            steps_b=settings.steps_b,
            guidance_c=settings.guidance_c,
            guidance_b=settings.guidance_b,
        )
        from_a = reconstruct_a(loaded.stage_a, image)
        from_b = reconstruct_b(loaded.stage_a, loaded.stage_b, compressor, image, text, [row["seed"]], settings.steps_b)
        return {
            "original": image[0].permute(1, 2, 0).cpu().numpy(),
            "stage_a": from_a[0].numpy(),
            "stage_b": from_b[0].numpy(),
            "generated": drawn[0].numpy(),
        }

    return draw


def _baseline(config: Config, inputs: dict[str, Artifact], where: Any) -> Draw:
    """The baseline."""
    from pipeline import models
    from stages.sample import generate_baseline

    sizes, settings = config.sample, config.baseline
    stage_a = models.stage_a(config.stage_a.model, inputs["stage_a"]).to(where)
    baseline = models.baseline(settings.model, inputs["baseline"]).to(where)
    tower = models.tower(config.text[settings.text], inputs[f"text_{settings.text}"]).to(where)

    def draw(row: Prompt, original: np.ndarray) -> dict[str, np.ndarray]:
        drawn = generate_baseline(
            stage_a,
            baseline,
            tower.encode([row["caption"]])[0],
            tower.encode([sizes.negative])[0],
            [row["seed"]],
            width=sizes.width,
            height=sizes.height,
            steps=settings.sample.steps,
            guidance=settings.sample.guidance,
        )
        shown = _resized(original, sizes.width)[0].permute(1, 2, 0).numpy()
        return {"original": shown, "generated": drawn[0].numpy()}

    return draw


def _resized(original: np.ndarray, side: int) -> Any:
    """A picture (H, W, 3) as a batch of one: uint8 tensor (1, 3, side, side)."""
    import torch

    from stages.layers import resized

    return resized(torch.from_numpy(original.copy()).permute(2, 0, 1)[None], side)


def _png(pixels: np.ndarray) -> bytes:
    from stages.grid import png

    return png(pixels)


def _tables(
    path: str, prompts: list[Prompt], files: dict[str, FileEntry], titles: dict[str, str]
) -> dict[str, FileEntry]:
    """The table of captions, twice (Parquet for programs, JSON for `show`), and the grid."""
    from PIL import Image

    from stages.grid import grid

    def pixels(name: str, key: str) -> np.ndarray:
        file = f"{name}/{key}.png"
        with Image.open(io.BytesIO(storage.read(storage.join(path, file), expect=files[file]))) as image:
            return np.asarray(image.convert("RGB"))

    rows = [{name: prompt[name] for name in ("key", "caption", "seed")} for prompt in prompts]
    shown = [(row["caption"], [pixels(name, row["key"]) for name in titles]) for row in rows[:GRID_ROWS]]
    contents = {
        "samples.parquet": shards.table_bytes(rows),
        "captions.json": json.dumps(rows, indent=1, ensure_ascii=False).encode(),
        "grid.png": grid(tuple(titles.values()), shown, blocks=4),
    }
    return {name: storage.publish(data, storage.join(path, name)) for name, data in contents.items()}
