"""sample: draw a picture for each caption, and beside it what each stage alone could do."""

import io
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from datasets import shards, storage
from datasets.storage import FileEntry
from pipeline.artifacts import Artifact
from pipeline.build import Build, Facts
from pipeline.config import Config
from pipeline.sampling import caption_seed, drawn
from stages.grid import grid, png

CHUNK = 8  # captions between two receipts
COLUMNS = ("original", "stage_a", "stage_b", "generated")  # folders of the artifact, columns of the grid
TITLES = ("original", "Stage A alone", "Stages B + A", "from its caption")
GRID_ROWS = 64


def sample(build: Build) -> Facts:
    """images, text, stage_a, stage_b, stage_c -> samples: `generated/<key>.png` etc., `samples.parquet`."""
    config = build.config
    prompts = build.call(_prompts, build.inputs["images"], config.sample.limit, config.seed)
    chunks = list(range(-(-len(prompts) // CHUNK)))
    receipts = build.map_shards(
        Painter, (config, build.inputs, prompts, build.cluster.device), chunks, len(prompts), "pictures"
    )
    files = {name: entry for receipt in receipts for name, entry in receipt.files.items()}
    files |= build.call(_tables, build.path, prompts, files)
    build.report.image("samples", storage.read(storage.join(build.path, "grid.png")), 0)
    return Facts(
        files=files,
        rows=len(prompts),
        call="ray.data.Dataset.map_batches",
        workers=sorted({receipt.pid for receipt in receipts}),
    )


def _prompts(images: Artifact, limit: int, seed: int) -> list[dict[str, Any]]:
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
    """An actor with all models in memory that draws one chunk of captions at a time."""

    def __init__(
        self,
        config: Config,
        inputs: dict[str, Artifact],
        prompts: list[dict[str, Any]],
        device: str,
        path: str,
        board: Any,
    ):
        from pipeline import models
        from pipeline.cluster import BoardClient

        self.sampling, self.inputs, self.prompts, self.path = config.sample, inputs, prompts, path
        self.device = models.device(device)
        self.models = models.ready(lambda where: models.everything(config, inputs, where), config.sample, self.device)
        self.board = BoardClient(board)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[int]]:
        chunk = int(batch["shard"][0])
        if not self.board.stopping():
            started = shards.Clock()
            rows = self.prompts[chunk * CHUNK : (chunk + 1) * CHUNK]
            originals = self._originals({row["shard"] for row in rows})
            columns = self._columns(rows, [originals[row["key"]] for row in rows])
            files: dict[str, FileEntry] = {}
            for row, *pictures in zip(rows, *columns, strict=True):
                for name, pixels in zip(COLUMNS, pictures, strict=True):
                    file = f"{name}/{row['key']}.png"
                    files[file] = storage.publish(png(pixels), storage.join(self.path, file))
            shards.publish_receipt(self.path, chunk, rows_in=len(rows), rows_out=len(rows), files=files, clock=started)
            total = len(self.prompts)
            self.board.post({"kind": "advance", "count": len(rows), "total": total, "unit": "pictures"})
        return {"shard": [chunk]}

    def _originals(self, numbers: set[int]) -> dict[str, np.ndarray]:
        images = self.inputs["images"]
        return {
            row.key: row.pixels()
            for number in numbers
            for row in shards.read_images(images.read(shards.image_name(number)))
        }

    def _columns(self, rows: list[dict[str, Any]], originals: list[np.ndarray]) -> list[Iterable[np.ndarray]]:
        """The pictures of `COLUMNS`, each for all rows; the last as `sample` draws them for caption and seed."""
        import torch

        from stages.layers import resized
        from stages.sample import on, reconstruct_a

        image = resized(torch.from_numpy(np.stack(originals)).permute(0, 3, 1, 2), self.sampling.width)
        with on(self.device, self.models.stage_a) as stage_a:
            from_a = [reconstruct_a(stage_a, one[None].to(self.device))[0].numpy() for one in image]
        captions, seeds = [row["caption"] for row in rows], [row["seed"] for row in rows]
        batch, unguided = self.sampling.batch, self.sampling.model_copy(update={"guidance_b": 1.0})
        return [
            image.permute(0, 2, 3, 1).numpy(),
            from_a,
            drawn(self.models, captions, seeds, unguided, batch, self.device, image),
            drawn(self.models, captions, seeds, self.sampling, batch, self.device),
        ]


def _tables(path: str, prompts: list[dict[str, Any]], files: dict[str, FileEntry]) -> dict[str, FileEntry]:
    """The table of captions, twice (Parquet for programs, JSON for `show`), and the grid."""
    from PIL import Image

    def pixels(name: str, key: str) -> np.ndarray:
        file = f"{name}/{key}.png"
        with Image.open(io.BytesIO(storage.read(storage.join(path, file), expect=files[file]))) as image:
            return np.asarray(image.convert("RGB"))

    rows = [{name: prompt[name] for name in ("key", "caption", "seed")} for prompt in prompts]
    shown = [(row["caption"], [pixels(name, row["key"]) for name in COLUMNS]) for row in rows[:GRID_ROWS]]
    contents = {
        "samples.parquet": shards.table_bytes(rows),
        "captions.json": json.dumps(rows, indent=1, ensure_ascii=False).encode(),
        "grid.png": grid(TITLES, shown, blocks=4),
    }
    return {name: storage.publish(data, storage.join(path, name)) for name, data in contents.items()}
