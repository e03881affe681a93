"""encode_text, encode_a, encode_c: Ray Data over shard numbers, a pool of actors, one small receipt a shard.

Tensors never travel through Ray: an actor reads a shard of images, encodes it and publishes a shard of tensors, fp16,
raw (not normalised), with the same rows and keys.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from datasets import shards, storage
from datasets.buckets import Frame, Size
from datasets.shards import Receipt
from datasets.storage import FileEntry
from pipeline.artifacts import Artifact
from pipeline.build import Build, Facts
from stages.config import CompressorConfig, StageAConfig, TextConfig

BATCH = 16  # rows encoded at a time
# rows of images, their bucket if they have one -> float32 tensors, one a row, and counts of what was noticed
Encode = Callable[[list[shards.ImageRow], str | None], tuple[np.ndarray, Counter[str]]]


def encode_text(build: Build) -> Facts:
    """images -> text_<tower>: hidden states of every caption, of the empty caption, and the tower itself."""
    config = build.config.text[build.step.output.removeprefix("text_")]
    files, notes = build.call(_prepare_tower, config, build.inputs["images"], build.path)
    tower = Artifact(build.step.output, build.path, {"files": {name: vars(entry) for name, entry in files.items()}})
    receipts = _encode(build, build.path, "text", _text_encoder, (config, tower, build.cluster.device))
    facts = _facts(build, {"": receipts})
    if truncated := facts.notes.get("truncated_captions"):
        build.report.warning(
            f"{truncated} of {facts.rows} captions have more than the {config.context_length} tokens of the tower "
            f"'{config.model}'; their ends are cut off"
        )
    return replace(facts, files=facts.files | files, notes=facts.notes | notes)


def encode_a(build: Build) -> Facts:
    """images, stage_a -> latents_a: Stage A's unquantised latents, a family for each size that train_b uses."""
    return _families(build, "latents_a", "train_b", _stage_a_encoder, build.config.stage_a.model, "stage_a")


def encode_c(build: Build) -> Facts:
    """images, stage_b -> latents_c: the compressor's raw output, a family for each size that train_c uses."""
    return _families(build, "latents_c", "train_c", _compressor_encoder, build.config.compressor.model, "stage_b")


def _families(build: Build, field: str, training: str, make: Callable[..., Encode], model: Any, source: str) -> Facts:
    families = {}
    frames = build.config.frames_of(training)
    for frame in frames:
        folder = storage.join(build.path, frame.name)
        arguments = (model, build.inputs[source], build.cluster.device, frame)
        families[f"{frame.name}/"] = _encode(build, folder, field, make, arguments, passes=len(frames))
    return _facts(build, families)


def _encode(
    build: Build, folder: str, field: str, make: Callable[..., Encode], arguments: tuple[Any, ...], passes: int = 1
) -> list[Receipt]:
    """Encode all images once; `passes` is how often the step does so, for the progress."""
    images = build.inputs["images"]
    total = sorted(shards.finished(images.path))
    rows = passes * images.manifest["rows"]
    return build.map_shards(ShardEncoder, (field, make, arguments, images, rows), total, rows, "images", folder)


def _facts(build: Build, families: dict[str, list[Receipt]]) -> Facts:
    """The manifest's facts of receipts by folder (a prefix of file names)."""
    every = [(prefix, receipt) for prefix, receipts in families.items() for receipt in receipts]
    return Facts(
        files={prefix + name: entry for prefix, receipt in every for name, entry in receipt.files.items()},
        rows=build.inputs["images"].manifest["rows"],
        call="ray.data.Dataset.map_batches",
        workers=sorted({receipt.pid for _, receipt in every}),
        notes=dict(sum((Counter(receipt.counts) for _, receipt in every), Counter())),
    )


def _prepare_tower(config: TextConfig, images: Artifact, path: str) -> tuple[dict[str, FileEntry], dict[str, Any]]:
    """Publish the tower with its weights, and the hidden states of the empty caption.

    A seeded tower is centred on these captions: random weights say nearly the same of every caption, and Stage C needs
    the difference.
    """
    import safetensors.torch

    from pipeline import models
    from stages.config import SeededTextConfig

    tower = models.fresh_tower(config)
    if isinstance(config, SeededTextConfig):
        captions = [row.caption for shard in sorted(shards.finished(images.path)) for row in _rows(images, shard)]
        tower.centre(tower.encode(captions)[0].mean(dim=(0, 1)))
    null = {models.NULL_TEXT: safetensors.torch.save({"null_text": tower.encode([""])[0][0].half()})}
    contents = {models.TOWER: models.weights(tower), **null}
    label = "a seeded tower of random weights" if isinstance(config, SeededTextConfig) else config.model
    files = {name: storage.publish(data, storage.join(path, name)) for name, data in contents.items()}
    return files, {"tower": label}


def _rows(images: Artifact, shard: int) -> list[shards.ImageRow]:
    return shards.read_images(images.read(shards.image_name(shard)))


class ShardEncoder:
    """An actor: reads a shard of images, publishes a shard of tensors, then its receipt.

    `make(*arguments)` runs in the actor and returns the function that encodes some rows.
    """

    def __init__(
        self,
        field: str,
        make: Callable[..., Encode],
        arguments: tuple[Any, ...],
        images: Artifact,
        total_rows: int,
        path: str,
        board: Any,
    ):
        from pipeline.cluster import BoardClient

        self.field, self.images, self.total_rows, self.path = field, images, total_rows, path
        self.board = BoardClient(board)
        self.encode = make(*arguments)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[int]]:
        shard = int(batch["shard"][0])
        if not self.board.stopping():
            clock = shards.Clock()
            rows = _rows(self.images, shard)
            bucket = shards.receipt(self.images.path, shard).bucket
            files, counts = self._publish(shard, rows, bucket) if rows else ({}, Counter())
            shards.publish_receipt(
                self.path,
                shard,
                rows_in=len(rows),
                rows_out=len(rows),
                files=files,
                clock=clock,
                counts=counts,
                bucket=bucket,
            )
            self.board.post({"kind": "advance", "count": len(rows), "total": self.total_rows, "unit": "images"})
        return {"shard": [shard]}

    def _publish(
        self, shard: int, rows: list[shards.ImageRow], bucket: str | None
    ) -> tuple[dict[str, FileEntry], Counter[str]]:
        encoded = [self.encode(rows[start : start + BATCH], bucket) for start in range(0, len(rows), BATCH)]
        tensors = np.concatenate([part for part, _ in encoded]).astype(np.float16)
        name = shards.tensor_name(shard)
        entry = storage.publish(shards.write_tensors(rows, self.field, tensors), storage.join(self.path, name))
        return {name: entry}, sum((counts for _, counts in encoded), Counter())


def _text_encoder(config: TextConfig, artifact: Artifact, device: str) -> Encode:
    from pipeline import models

    tower = models.tower(config, artifact).to(models.device(device))

    def encode_rows(rows: list[shards.ImageRow], _: str | None) -> tuple[np.ndarray, Counter[str]]:
        hidden, truncated = tower.encode([row.caption for row in rows])
        return hidden.cpu().numpy(), Counter(truncated_captions=truncated)

    return encode_rows


def _stage_a_encoder(config: StageAConfig, artifact: Artifact, device: str, frame: Frame) -> Encode:
    from pipeline import models

    where = models.device(device)
    return _on_pixels(models.stage_a(config, artifact).to(where).encode, where, frame)


def _compressor_encoder(config: CompressorConfig, artifact: Artifact, device: str, frame: Frame) -> Encode:
    from pipeline import models

    where = models.device(device)
    return _on_pixels(models.compressor(config, artifact).to(where), where, frame)


def _on_pixels(encode: Callable[[Any], Any], where: Any, frame: Frame) -> Encode:
    """Rows of images -> latents, by a function of pictures (B, 3, H, W) in [0, 1] of a size of the frame."""
    import torch

    from stages.layers import resized, to_unit_range

    def encode_rows(rows: list[shards.ImageRow], bucket: str | None) -> tuple[np.ndarray, Counter[str]]:
        size = frame.nearest(*Size.parse(bucket)) if bucket else None
        pixels = torch.from_numpy(np.stack([row.pixels(size) for row in rows])).permute(0, 3, 1, 2).to(where)
        with torch.inference_mode():
            fitting = pixels if bucket else resized(pixels, frame.size)
            latents: np.ndarray = encode(to_unit_range(fitting)).cpu().numpy()
        return latents, Counter()

    return encode_rows
