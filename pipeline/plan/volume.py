"""How much a step would store, and what an encoder costs whose outputs are stored, or made anew whenever seen.

Tensors in closed form; pictures by the mean of photographs. Rows are the planned ones, of which some will be
lost: read every figure as "at most". A row may have several captions, each of which is encoded.
"""

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass

from datasets.buckets import Frame
from pipeline.settings.config import Config
from stages.anatomy import flops

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


def stored(step: str, output: str, config: Config, rows: int, captions: int) -> Volume | None:
    """What a step stores for so many planned rows with so many captions; None where it is little, or depends on no
    rows."""
    shards = -(-rows // config.data.shard_rows)
    if step == "download":
        pixels = config.data.image.size**2
        return Volume(int(rows * pixels * PICTURE_BYTES[config.data.image.format]), 3 * shards)  # tar, table, receipt
    row = _row_bytes(step, output, config)
    count = captions if step == "encode_text" else rows
    return Volume(count * sum(row.values()), 2 * shards * len(row)) if row else None


def encoder(step: str, output: str, config: Config, rows: int, trainings: Set[str]) -> Encoder | None:
    """Both costs of an encoding step, for so many rows and all that those of `trainings` (steps) see that would encode
    online instead; None of other steps, and of one that stores nothing. Rows of text are captions."""
    per_picture = _row_flops(step, output, config)
    if not per_picture or (step == "encode_text" and config.encode.text.online):
        return None
    seen = _seen(step, output, config, trainings)
    online = sum(count * per_picture[frame] for frame, count in seen.items())
    return Encoder(rows * sum(per_picture.values()), online)


def _row_bytes(step: str, output: str, config: Config) -> dict[Frame | None, int]:
    """Bytes of an encoded picture by its frame; captions have none."""
    encode = config.encode
    match step:
        case "encode_text":
            tower = config.text[output.removeprefix("text_")]
            if encode.text.online:
                return {None: TOKEN_BYTES * tower.context_length}
            return {None: BYTES[encode.text.dtype] * tower.context_length * tower.width}
        case "encode_a":
            model, width = config.stage_a.model, BYTES[encode.latents_a.dtype]
            return {
                frame: width * model.latent_channels * (frame.size >> model.levels) ** 2
                for frame in config.frames_of("train_b")
            }
        case "encode_c":
            compressor = config.compressor.model
            width = BYTES[encode.latents_c.dtype] * compressor.latent_channels
            return {frame: width * compressor.code_side(frame.size) ** 2 for frame in config.frames_of("train_c")}
        case _:
            return {}


def _row_flops(step: str, output: str, config: Config) -> dict[Frame | None, int]:
    """FLOPs of encoding a picture by its frame; captions have none."""
    match step:
        case "encode_text":
            tower = config.text[output.removeprefix("text_")]
            return {None: flops.encode_text(tower.layers, tower.width, tower.context_length)}
        case "encode_a":
            model = config.stage_a.model
            return {frame: flops.encode_a(model, frame.size, frame.size) for frame in config.frames_of("train_b")}
        case "encode_c":
            compressor = config.compressor.model
            return {
                frame: flops.encode_c(compressor, compressor.seen_side(frame.size))
                for frame in config.frames_of("train_c")
            }
        case _:
            return {}


def _seen(step: str, output: str, config: Config, trainings: Set[str]) -> dict[Frame | None, int]:
    """Pictures that those of `trainings` see that read an encoding step's output, by their frame."""
    readers = {
        "encode_text": {name for name, tower in config.towers.items() if f"text_{tower}" == output},
        "encode_a": {"train_b", "train_baseline"},
        "encode_c": {"train_c", "train_previewer"},
    }
    seen: Counter[Frame | None] = Counter()
    for name in readers[step] & trainings:
        for training in config.trainings_of(name).values():
            for phase in training.phases:
                frame = None if step == "encode_text" else Frame(phase.size, phase.max_aspect)
                seen[frame] += phase.steps * phase.batch_size
    return dict(seen)
