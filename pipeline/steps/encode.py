"""encode_text, encode_a, encode_c: Ray Data over shard numbers, a pool of actors, one small receipt a shard.

Tensors never travel through Ray: an actor reads a shard of images, encodes it and publishes a shard of tensors, fp16,
raw (not normalised), with the same rows and keys.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from datasets import shards, storage
from datasets.storage import FileEntry
from pipeline.artifacts import Artifact
from pipeline.build import Build, Facts
from stages.config import CompressorConfig, StageAConfig, TextConfig

BATCH = 16  # rows encoded at a time
Encode = Callable[[list[shards.ImageRow]], np.ndarray]  # rows of images -> float32 tensors, one a row


def encode_text(build: Build) -> Facts:
    """images -> text_<tower>: hidden states of every caption, of the empty caption, and the tower itself."""
    config = build.config.text[build.step.output.removeprefix("text_")]
    files, notes = build.call(_prepare_tower, config, build.inputs["images"], build.path)
    tower = Artifact(build.step.output, build.path, {"files": {name: vars(entry) for name, entry in files.items()}})
    facts = _encode(build, "text", _text_encoder, (config, tower, build.cluster.device))
    return replace(facts, files=facts.files | files, notes=notes)


def encode_a(build: Build) -> Facts:
    """images, stage_a -> latents_a: unquantised latents as Stage A's encoder gives them."""
    return _encode(
        build,
        "latents_a",
        _stage_a_encoder,
        (build.config.stage_a.model, build.inputs["stage_a"], build.cluster.device),
    )


def encode_c(build: Build) -> Facts:
    """images, stage_b -> latents_c: the compressor's raw output."""
    return _encode(
        build,
        "latents_c",
        _compressor_encoder,
        (build.config.compressor.model, build.inputs["stage_b"], build.cluster.device),
    )


def _encode(build: Build, field: str, make: Callable[..., Encode], arguments: tuple[Any, ...]) -> Facts:
    images = build.inputs["images"]
    receipts = build.map_shards(
        ShardEncoder,
        (field, make, arguments, images),
        sorted(shards.finished(images.path)),
        images.manifest["rows"],
        "images",
    )
    return Facts(
        files={name: entry for receipt in receipts for name, entry in receipt.files.items()},
        rows=sum(receipt.rows_out for receipt in receipts),
        call="ray.data.Dataset.map_batches",
        workers=sorted({receipt.pid for receipt in receipts}),
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
    truncated = 0
    if isinstance(config, SeededTextConfig):
        captions = [row.caption for shard in sorted(shards.finished(images.path)) for row in _rows(images, shard)]
        hidden, truncated = tower.encode(captions)
        tower.centre(hidden.mean(dim=(0, 1)))
    null = {models.NULL_TEXT: safetensors.torch.save({"null_text": tower.encode([""])[0][0].half()})}
    contents = {models.TOWER: models.weights(tower), **null}
    label = "a seeded tower of random weights" if isinstance(config, SeededTextConfig) else config.model
    files = {name: storage.publish(data, storage.join(path, name)) for name, data in contents.items()}
    return files, {"tower": label, "truncated_captions": truncated}


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
        path: str,
        board: Any,
    ):
        from pipeline.cluster import BoardClient

        self.field, self.images, self.path = field, images, path
        self.board = BoardClient(board)
        self.encode = make(*arguments)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[int]]:
        shard = int(batch["shard"][0])
        if not self.board.stopping():
            clock = shards.Clock()
            rows = _rows(self.images, shard)
            parts = [self.encode(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
            name = shards.tensor_name(shard)
            data = shards.write_tensors(rows, self.field, np.concatenate(parts).astype(np.float16))
            files = {name: storage.publish(data, storage.join(self.path, name))}
            shards.publish_receipt(self.path, shard, rows_in=len(rows), rows_out=len(rows), files=files, clock=clock)
            total = self.images.manifest["rows"]
            self.board.post({"kind": "advance", "count": len(rows), "total": total, "unit": "images"})
        return {"shard": [shard]}


def _text_encoder(config: TextConfig, artifact: Artifact, device: str) -> Encode:
    from pipeline import models

    tower = models.tower(config, artifact).to(models.device(device))
    return lambda rows: tower.encode([row.caption for row in rows])[0].cpu().numpy()


def _stage_a_encoder(config: StageAConfig, artifact: Artifact, device: str) -> Encode:
    from pipeline import models

    where = models.device(device)
    return _on_pixels(models.stage_a(config, artifact).to(where).encode, where)


def _compressor_encoder(config: CompressorConfig, artifact: Artifact, device: str) -> Encode:
    from pipeline import models

    where = models.device(device)
    return _on_pixels(models.compressor(config, artifact).to(where), where)


def _on_pixels(encode: Callable[[Any], Any], where: Any) -> Encode:
    """Rows of images -> latents, by a function of pictures (B, 3, H, W) in [0, 1]."""
    import torch

    def encode_rows(rows: list[shards.ImageRow]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack([row.pixels() for row in rows])).to(where)
        with torch.inference_mode():
            latents: np.ndarray = encode(pixels.permute(0, 3, 1, 2).float() / 255).cpu().numpy()
        return latents

    return encode_rows
