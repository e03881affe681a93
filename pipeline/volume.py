"""How much a step would store, and what an encoder costs whose outputs are stored, or made anew whenever seen.

Tensors in closed form; pictures by the mean of photographs. Rows are the planned ones, of which some will be
lost: read every figure as "at most".
"""

from collections import Counter
from dataclasses import dataclass

from pipeline.config import Config
from stages import flops
from stages.parameters import CODE_STRIDE

BYTES = {"fp16": 2, "int8": 1}  # of a stored number
TOKEN_BYTES = 2
PICTURE_BYTES = {
    "jpg": 0.3,
    "png": 1.5,
}  # a px; img2dataset's figures: 50 TB for 170 million of 1024 px, 98 KB at 256 px


@dataclass(frozen=True)
class Volume:
    """Bytes and objects (files, receipts included) that a step stores."""

    bytes: int
    objects: int


@dataclass(frozen=True)
class Encoder:
    """FLOPs of an encoder whose outputs are stored, and where trainings encode each picture whenever they see it."""

    cached_flops: int
    online_flops: int


def stored(step: str, output: str, config: Config, rows: int) -> Volume | None:
    """What a step stores for so many planned rows; None where it is little, or depends on no rows."""
    shards = -(-rows // config.data.shard_rows)
    if step == "download":
        pixels = config.data.image.size**2
        return Volume(int(rows * pixels * PICTURE_BYTES[config.data.image.format]), 3 * shards)  # tar, table, receipt
    row = _row_bytes(step, output, config)
    return Volume(rows * sum(row.values()), 2 * shards * len(row)) if row else None


def encoder(step: str, output: str, config: Config, rows: int) -> Encoder | None:
    """Both costs of an encoding step, for so many rows and all that the trainings see; None of other steps."""
    per_picture = _row_flops(step, output, config)
    seen = _seen(step, output, config)
    if not per_picture:
        return None
    return compare(per_picture, rows, seen)


def compare(per_picture: dict[int, int], rows: int, seen: dict[int, int]) -> Encoder:
    """FLOPs of encoding `rows` pictures once at each size, and of encoding those `seen` by trainings at each size.

    `per_picture` gives the FLOPs of one; both are by the side of the pictures in px.
    """
    online = sum(count * per_picture[size] for size, count in seen.items())
    return Encoder(rows * sum(per_picture.values()), online)


def _row_bytes(step: str, output: str, config: Config) -> dict[int, int]:
    """Bytes of an encoded picture by its side, px; captions count as of side 0."""
    encode = config.encode
    match step:
        case "encode_text":
            tower = config.text[output.removeprefix("text_")]
            if encode.text.online:
                return {0: TOKEN_BYTES * tower.context_length}
            return {0: BYTES[encode.text.dtype] * tower.context_length * tower.width}
        case "encode_a":
            model, width = config.stage_a.model, BYTES[encode.latents_a.dtype]
            return {size: width * model.latent_channels * (size >> model.levels) ** 2 for size in _sizes(step, config)}
        case "encode_c":
            width = BYTES[encode.latents_c.dtype] * config.compressor.model.latent_channels
            return {size: width * (_seen_side(size, config) // CODE_STRIDE) ** 2 for size in _sizes(step, config)}
        case _:
            return {}


def _row_flops(step: str, output: str, config: Config) -> dict[int, int]:
    """FLOPs of encoding a picture by its side, px; captions count as of side 0."""
    match step:
        case "encode_text":
            tower = config.text[output.removeprefix("text_")]
            return {0: flops.encode_text(tower.layers, tower.width, tower.context_length)}
        case "encode_a":
            return {size: flops.encode_a(config.stage_a.model, size, size) for size in _sizes(step, config)}
        case "encode_c":
            return {
                size: flops.encode_c(config.compressor.model, _seen_side(size, config)) for size in _sizes(step, config)
            }
        case _:
            return {}


def _seen(step: str, output: str, config: Config) -> dict[int, int]:
    """Pictures that the trainings see that would encode them, by side in px; captions count as of side 0."""
    if step == "encode_text":
        users = [name for name in ("stage_b", "stage_c") if f"text_{getattr(config, name).text}" == output]
        trainings = [f"train_{name[-1]}" for name in users]
    else:
        trainings = [step.replace("encode", "train").replace("_a", "_b")]
    seen: Counter[int] = Counter()
    for name in trainings:
        for training in config.trainings_of(name):
            for phase in training.phases:
                seen[0 if step == "encode_text" else phase.size] += phase.steps * phase.batch_size
    return dict(seen)


def _sizes(step: str, config: Config) -> list[int]:
    return sorted({frame.size for frame in config.frames_of({"encode_a": "train_b", "encode_c": "train_c"}[step])})


def _seen_side(size: int, config: Config) -> int:
    """Side in px of what the compressor sees of a picture."""
    return int(size * config.compressor.model.input_ratio)
