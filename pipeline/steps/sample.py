"""sample: draw a picture for each prompt of a set, and beside it what each stage alone could do, where there is an
original; sample_again: the same with other seeds; sample_baseline: their rival."""

import io
import json
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import numpy as np
import pyarrow as pa

from datasets.buckets import Size
from datasets.config import DataError
from datasets.files import storage
from datasets.files.storage import FileEntry
from datasets.formats import ranges, shards
from datasets.formats.shard_table import Shard
from pipeline.cluster.mapping import Made, chunked
from pipeline.models import prompt_sets
from pipeline.models.drawing import caption_seed, drawn
from pipeline.models.prompt_sets import Prompt
from pipeline.settings.config import Config
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact
from stages.sampling.grid import grid, png

CHUNK = 8  # prompts between two receipts
GRID_ROWS = 64
Pictures = Iterable[np.ndarray]  # uint8 (H, W, 3) each
# prompts, originals uint8 (B, H, W, 3) if they have any -> pictures by folder
Draw = Callable[[Sequence[Prompt], np.ndarray | None], dict[str, Pictures]]
TITLES = {
    "original": "original",
    "stage_a": "Stage A alone",
    "stage_b": "Stages B + A",
    "generated": "from its caption",
    "preview": "its code, previewed",
    "without_text": "B + A without text",
}


def sample(build: Build) -> Facts:
    """text, stages, and for captions of the data images -> samples: `generated/<key>.png` etc., `samples.parquet`."""
    facts = _paint(build, _stages, TITLES)
    about = facts.notes["prompts"]
    if trained := about.get("trained"):
        build.report.warning(
            f"{build.step.output}: of {about['n']} captions of held-out pictures {trained} are also those of pictures "
            "that were trained on"
        )
    return facts


def sample_again(build: Build) -> Facts:
    """The same -> null_samples: only `generated/`, with seeds made of those of samples. What chance alone changes."""
    return _paint(build, _again, {"original": "original", "generated": "with another seed"})


def sample_baseline(build: Build) -> Facts:
    """images, text, stage_a, baseline -> baseline_samples: the same captions, seeds and sizes as in samples."""
    return _paint(build, _baseline, {"original": "original", "generated": "by the baseline"})


def _paint(build: Build, make: Callable[..., Draw], titles: dict[str, str]) -> Facts:
    """Draw all prompts with `make(config, inputs, device)`; titles of the grid's columns by the artifact's folders."""
    config = build.config
    name = prompt_sets.drawn_for(config, build.step.output)
    prompts, about = build.call(prompt_sets.read, config, name, build.inputs)
    if not prompts:
        raise DataError(f"the prompt set {name} has no prompt: raise data.holdout, or leave {name} out of eval.prompts")
    arguments = (make, config, build.inputs, build.device)
    receipts = build.map_shards(Painter, arguments, chunked(prompts, CHUNK), len(prompts), "pictures")
    files = {name: entry for receipt in receipts for name, entry in receipt.files.items()}
    files |= build.call(_tables, build.path, prompts, files, titles)
    build.report.image(build.step.output, storage.read(storage.join(build.path, "grid.png")), 0)
    return Facts(
        files=files,
        rows=len(prompts),
        call="ray.data.Dataset.map_batches",
        workers=sorted({receipt.pid for receipt in receipts}),
        notes={"prompts": about},
    )


class Painter:
    """Draws one chunk of prompts at a time; `make` loads the models."""

    def __init__(self, make: Callable[..., Draw], config: Config, inputs: dict[str, Artifact], device: str):
        from pipeline.models import loading

        self.square = Size(config.data.image.size, config.data.image.size)
        self.draw = make(config, inputs, loading.device(device))
        self._last: tuple[int, list[shards.ImageRow]] = (-1, [])

    def __call__(self, number: int, rows: Sequence[Prompt]) -> Made:
        files = {
            f"{folder}/{row.key}.png": png(pixels)
            for folder, pictures in self.draw(rows, self._originals(rows)).items()
            for row, pixels in zip(rows, pictures, strict=True)
        }
        return Made(len(rows), files)

    def _originals(self, prompts: Sequence[Prompt]) -> np.ndarray | None:
        """The pictures of which the prompts are captions, uint8 (B, H, W, 3); None where they are nobody's.

        No others of their shards are decoded, or read where these are few.
        """
        stored = {prompt.shard.number: prompt.shard for prompt in prompts if prompt.shard}
        if not stored:
            return None
        keys = {prompt.key for prompt in prompts}
        found = {row.key: row for _, shard in sorted(stored.items()) for row in self._rows(shard, keys)}
        return np.stack([found[prompt.key].pixels(self.square) for prompt in prompts])

    def _rows(self, shard: Shard, keys: Set[str]) -> list[shards.ImageRow]:
        """Pictures of a shard, not decoded; of one that is read whole they stay: the next prompts are of it too."""
        if (few := ranges.by_keys(shard, keys)) is not None:
            return few
        if self._last[0] != shard.number:
            self._last = shard.number, shard.images()
        return self._last[1]


def _stages(config: Config, inputs: dict[str, Artifact], where: Any) -> Draw:
    """Würstchen, and what Stage A and B keep of the original; the last as the verb `sample` draws caption and seed.

    Also what of its models decides what, where that is asked for (`sample.ablations`)."""
    from pipeline.models import loading
    from stages.sampling.sample import on, reconstruct_a

    sampling = config.sample
    loaded = loading.ready(lambda device: loading.everything(config, inputs, device), sampling, where)
    unguided = sampling.model_copy(update={"guidance_b": 1.0})

    def draw(rows: Sequence[Prompt], originals: np.ndarray | None) -> dict[str, Pictures]:
        captions, seeds = [row.caption for row in rows], [row.seed for row in rows]
        ours: dict[str, Pictures] = {"generated": drawn(loaded, captions, seeds, sampling, sampling.batch, where)}
        if "preview" in sampling.ablations:  # the same seeds: the same codes
            ours["preview"] = drawn(loaded, captions, seeds, sampling, sampling.batch, where, preview=True)
        if originals is None:
            return ours
        image = _resized(originals, sampling.width)
        with on(where, loaded.stage_a) as stage_a:
            from_a = [reconstruct_a(stage_a, one[None].to(where))[0].numpy() for one in image]
        if "without_text" in sampling.ablations:  # the caption that trainings give for none
            blank = [""] * len(captions)
            ours["without_text"] = drawn(loaded, blank, seeds, unguided, sampling.batch, where, image)
        return {
            "original": image.permute(0, 2, 3, 1).numpy(),
            "stage_a": from_a,
            "stage_b": drawn(loaded, captions, seeds, unguided, sampling.batch, where, image),
            **ours,
        }

    return draw


def _again(config: Config, inputs: dict[str, Artifact], where: Any) -> Draw:
    """Würstchen with other seeds, for what chance alone changes."""
    from pipeline.models import loading

    sampling = config.sample
    loaded = loading.ready(lambda device: loading.everything(config, inputs, device), sampling, where)

    def draw(rows: Sequence[Prompt], originals: np.ndarray | None) -> dict[str, Pictures]:
        seeds = [caption_seed(row.seed, row.caption) for row in rows]
        captions = [row.caption for row in rows]
        generated = {"generated": drawn(loaded, captions, seeds, sampling, sampling.batch, where)}
        return _beside(originals, sampling.width) | generated

    return draw


def _baseline(config: Config, inputs: dict[str, Artifact], where: Any) -> Draw:
    """The baseline."""
    from pipeline.models import loading
    from stages.sampling.sample import generate_baseline

    sizes, settings = config.sample, config.baseline
    stage_a = loading.stage_a(config.stage_a.model, inputs["stage_a"]).to(where)
    baseline = loading.baseline(settings.model, inputs["baseline"]).to(where)
    tower = loading.tower(config.text[settings.text], inputs[f"text_{settings.text}"]).to(where)

    def one(row: Prompt) -> np.ndarray:
        pixels = generate_baseline(
            stage_a,
            baseline,
            tower.encode([row.caption])[0],
            tower.encode([sizes.negative])[0],
            [row.seed],
            width=sizes.width,
            height=sizes.height,
            steps=settings.sample.steps,
            guidance=settings.sample.guidance,
        )
        return pixels[0].numpy()

    def draw(rows: Sequence[Prompt], originals: np.ndarray | None) -> dict[str, Pictures]:
        return _beside(originals, sizes.width) | {"generated": map(one, rows)}

    return draw


def _beside(originals: np.ndarray | None, side: int) -> dict[str, Pictures]:
    """The originals in the size of what is drawn, where there are any."""
    return {} if originals is None else {"original": _resized(originals, side).permute(0, 2, 3, 1).numpy()}


def _resized(originals: np.ndarray, side: int) -> Any:
    """Pictures (B, H, W, 3) as a uint8 tensor (B, 3, side, side)."""
    import torch

    from stages.models.layers import resized

    return resized(torch.from_numpy(originals).permute(0, 3, 1, 2), side)


def _tables(
    path: str, prompts: list[Prompt], files: dict[str, FileEntry], titles: dict[str, str]
) -> dict[str, FileEntry]:
    """The table of captions, twice (Parquet for programs, JSON for `show`), and the grid."""
    from PIL import Image

    def pixels(name: str, key: str) -> np.ndarray:
        file = f"{name}/{key}.png"
        with Image.open(io.BytesIO(storage.read(storage.join(path, file), expect=files[file]))) as image:
            return np.asarray(image.convert("RGB"))

    there = {name: title for name, title in titles.items() if f"{name}/{prompts[0].key}.png" in files}
    rows = [prompt.row() for prompt in prompts]
    shown = [(row["caption"], [pixels(name, row["key"]) for name in there]) for row in rows[:GRID_ROWS]]
    contents = {
        "samples.parquet": shards.table_bytes(rows, _schema(rows)),
        "captions.json": json.dumps(rows, indent=1, ensure_ascii=False).encode(),
        "grid.png": grid(tuple(there.values()), shown, blocks=4),
    }
    return {name: storage.publish(data, storage.join(path, name)) for name, data in contents.items()}


def _schema(rows: list[dict[str, Any]]) -> pa.Schema:
    """Key, caption and seed, and whatever else any row has."""
    types = {"key": pa.string(), "caption": pa.string(), "seed": pa.int64()}
    others = sorted({name for row in rows for name in row} - types.keys())
    return pa.schema(types | dict.fromkeys(others, pa.string()))
