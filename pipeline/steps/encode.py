"""encode_text, encode_a, encode_c: Ray Data over shard numbers, a pool of actors, one small receipt a shard.

Tensors never travel through Ray: an actor reads a shard of images, encodes it and publishes a shard of tensors, raw
(not normalised), with the same rows and keys. What that rounded off is measured and stands in the manifest.
"""

import functools
import operator
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from datasets.buckets import Frame, Size
from datasets.config import DataError
from datasets.files import storage
from datasets.files.storage import CorruptFile, FileEntry
from datasets.formats import shards
from datasets.formats.rounding import Dtype, Int8, Rounding, rounded
from datasets.formats.shard_table import Shard
from datasets.formats.shards import ImageRow, Receipt
from datasets.reading import captions
from pipeline.cluster.mapping import Made, chunked
from pipeline.models import encoders
from pipeline.models.encoders import Encoder
from pipeline.settings.sections import Encoding
from pipeline.steps.build import Build, Facts
from pipeline.store import deleting
from pipeline.store.artifacts import Artifact
from stages.settings.base import ChosenPrecision
from stages.settings.models import SeededTextConfig, TextConfig

if TYPE_CHECKING:  # import torch, which a plan can do without
    from torch import Tensor

    from stages.models.text import TextTower

Item = TypeVar("Item")
T = TypeVar("T")
# rows of images, their bucket if they have one -> what an encoder takes of them, and counts of what was noticed
Read = Callable[[Sequence[ImageRow], str | None], tuple[np.ndarray, Counter[str]]]
CENTRED = 1024  # captions of a batch that centres a seeded tower; any other number changes rounding
AT_ONCE = 3  # shards in an actor's hands: one is read, one encoded, one published
CALLED, WITH = "captions of ", "pictures with "  # counts: captions by their name, pictures by the names they have
CHANNEL = {"text": 2, "latents_a": 1, "latents_c": 1}  # axis of the channels


def encode_text(build: Build) -> Facts:
    """images, captions_<name> -> text_<tower>: hidden states of every caption, of the empty caption, and the tower.

    Encoded online, a caption is stored as tokens in place of its states.
    """
    name = build.step.output.removeprefix("text_")
    config = build.config.text[name]
    settings = build.config.encode.text
    works = list(_works(build).values()) if isinstance(config, SeededTextConfig) else []
    beside = deleting.kept(build.path)
    files, notes = build.call(_prepare_tower, config, name, settings.precision, works, build.path, beside)
    tower = Artifact(build.step.output, build.path, {"files": {name: vars(entry) for name, entry in files.items()}})
    encoder = encoders.text(build.config, tower)
    read = partial(_tokens, config.context_length)
    facts = _facts(build, encoder, settings, {"": _encode(build, build.path, encoder, settings, read)})
    found = _named(facts.notes)
    if truncated := found.get("truncated_captions"):
        count = sum(found.get("captions", {}).values()) or facts.rows
        build.report.warning(
            f"{truncated} of {count} captions have more than the {config.context_length} tokens of the tower "
            f"'{config.model}'; their ends are cut off"
        )
    return replace(facts, files=facts.files | files, notes=found | notes)


def _named(notes: dict[str, Any]) -> dict[str, Any]:
    """Notes with the counts of captions by their name, and of pictures by the names of theirs, where there are any."""
    found = {name: value for name, value in notes.items() if not name.startswith((CALLED, WITH))}
    for about, prefix in (("captions", CALLED), ("pictures", WITH)):
        counts = {name.removeprefix(prefix): value for name, value in notes.items() if name.startswith(prefix)}
        found |= {about: dict(sorted(counts.items()))} if counts else {}
    return found


def encode_a(build: Build) -> Facts:
    """images, stage_a -> latents_a: Stage A's unquantised latents, a family for each size that train_b uses."""
    encoder = encoders.latents_a(build.config, build.inputs["stage_a"])
    return _families(build, "train_b", encoder, build.config.encode.latents_a)


def encode_c(build: Build) -> Facts:
    """images, stage_b -> latents_c: the compressor's raw output, a family for each size that train_c uses."""
    encoder = encoders.latents_c(build.config, build.inputs["stage_b"])
    return _families(build, "train_c", encoder, build.config.encode.latents_c)


def _families(build: Build, training: str, encoder: Encoder, settings: Encoding) -> Facts:
    families = {}
    frames = build.config.frames_of(training)
    for frame in frames:
        folder = storage.join(build.path, frame.name)
        read = partial(_pictures, frame)
        families[frame.name] = _encode(build, folder, encoder, settings, read, passes=len(frames))
    return _facts(build, encoder, settings, families)


def _encode(
    build: Build,
    folder: str,
    encoder: Encoder,
    settings: Encoding,
    read: Callable[[], Read],
    passes: int = 1,
) -> list[Receipt]:
    """Encode all images once; `passes` is how often the step does so, for the progress."""
    images = build.inputs["images"]
    rows = passes * images.manifest["rows"]
    dtype = None if settings.online else settings.dtype
    arguments = (encoder, dtype, read, build.device)
    works = _works(build) if encoder.reads == "tokens" else {n: Work(shard) for n, shard in images.shards().items()}
    return build.map_shards(ShardEncoder, arguments, works, rows, "images", folder, AT_ONCE)


def _works(build: Build) -> "dict[int, Work]":
    """The shards whose captions are encoded: all of each picture, where the plan's rows are pictures."""
    data, found = build.config.data, build.inputs["images"].shards()
    if not data.captions:
        return {number: Work(shard) for number, shard in found.items()}
    others = {name: build.inputs[f"captions_{name}"].shards() for name in data.captioned}
    return {
        number: Work(shard, {name: captioned[number] for name, captioned in others.items()})
        for number, shard in found.items()
    }


def _facts(build: Build, encoder: Encoder, settings: Encoding, families: dict[str, list[Receipt]]) -> Facts:
    """The manifest's facts of receipts by folder."""
    every = [receipt for receipts in families.values() for receipt in receipts]
    notes: dict[str, Any] = dict(sum((Counter(receipt.counts) for receipt in every), Counter()))
    if not settings.online:
        lost = sum((receipt.rounding for receipt in every if receipt.rounding), Rounding(0.0, 0.0, 0.0))
        notes["rounding"] = {"max_abs": lost.max_abs, "relative_rms": lost.relative_rms}
    return Facts(
        files={},
        shards=families,
        rows=build.inputs["images"].manifest["rows"],
        call="ray.data.Dataset.map_batches",
        workers=sorted({receipt.pid for receipt in every}),
        notes={**notes, "spec": encoder.spec(encoder.reads if settings.online else settings.dtype)},
    )


def _prepare_tower(
    config: TextConfig,
    name: str,
    precision: ChosenPrecision,
    works: "list[Work]",
    path: str,
    kept: dict[str, FileEntry],
) -> tuple[dict[str, FileEntry], dict[str, Any]]:
    """Publish the tower with its weights, and the hidden states of the empty caption.

    A seeded tower is centred on the captions of `works`: random weights say nearly the same of every caption, and Stage
    C needs the difference. Where some shards are made anew, it is `kept` as it was for the others, whatever their
    captions are.
    """
    import torch

    from pipeline.models import loading
    from stages.precision import autocast
    from stages.state_dicts import serialized

    label = "a seeded tower of random weights" if isinstance(config, SeededTextConfig) else config.model
    if files := _whole(path, kept, (loading.TOWER, loading.NULL_TEXT)):
        return files, {"tower": label}
    tower = loading.fresh_tower(config, name)
    if isinstance(config, SeededTextConfig):
        tower.centre(_mean_state(tower, [row.caption for work in works for row, _ in work.rows()]))
    with autocast(torch.device("cpu"), precision):
        null = tower.encode([""])[0][0].half()
    contents = {loading.TOWER: loading.weights(tower), loading.NULL_TEXT: serialized({"null_text": null})}
    files = {name: storage.publish(data, storage.join(path, name)) for name, data in contents.items()}
    return files, {"tower": label}


def _whole(path: str, kept: dict[str, FileEntry], names: tuple[str, ...]) -> dict[str, FileEntry] | None:
    """Files of these names as they were kept; None where one was not, or does not hold its bytes any more."""
    try:
        for name in names:
            storage.read(storage.join(path, name), expect=kept[name])
    except (KeyError, CorruptFile, FileNotFoundError):
        return None
    return {name: kept[name] for name in names}


def _mean_state(tower: "TextTower", captions: list[str]) -> "Tensor":
    """The mean of the hidden states of captions over all positions, (width,) fp32."""
    batches = [captions[start : start + CENTRED] for start in range(0, len(captions), CENTRED)]
    shares = (tower.encode(batch)[0].mean(dim=(0, 1)) * (len(batch) / len(captions)) for batch in batches)
    return functools.reduce(operator.add, shares)


@dataclass(frozen=True)
class Work:
    """What an actor encodes of a shard: a row a picture, or, with `captions`, a row for each of its captions.

    These are the source's own, and others by name: the shards of their artifacts.
    """

    images: Shard
    captions: Mapping[str, Shard] | None = None

    def rows(self) -> list[tuple[ImageRow, str | None]]:
        """The rows, each with its caption and the name of that; verified."""
        pictures = self.images.images()
        if self.captions is None:
            return [(row, None) for row in pictures]
        name = shards.tensor_name(self.images.number)
        others = {called: captions.by_key(shard.read(name)) for called, shard in self.captions.items()}
        return [
            (replace(row, caption=text), called) for row in pictures for called, text in captions.named(row, others)
        ]


class ShardEncoder:
    """Makes of a shard of images one of tensors.

    Several threads may call it: the model works on one shard at a time, while others are read or published. Without a
    `dtype` it stores what the encoder reads instead of what it makes. `read()` is called in the actor.
    """

    def __init__(self, encoder: Encoder, dtype: Dtype | None, read: Callable[[], Read], device: str):
        from pipeline.models import loading

        self.encoder, self.dtype, self.read = encoder, dtype, read()
        self.encode = encoder.load(loading.device(device)) if dtype else None
        self._turn = threading.Lock()

    def __call__(self, number: int, work: Work) -> Made:
        bucket, named = work.images.bucket, work.rows()
        rows, names = [row for row, _ in named], [name for _, name in named if name is not None]
        if not rows:
            return Made(0, {}, bucket=bucket)
        counts = _counts(rows, names)
        parts = chunked(rows, self.encoder.batch).values()
        tensors = []
        coming = _ahead(lambda part: self.read(part, bucket), parts)
        with self._turn:
            for read, noticed in coming:
                counts += noticed
                tensors.append(self.encode(read) if self.encode else read)
        exact = np.concatenate(tensors)
        kept = self._rounded(number, exact) if self.dtype else exact
        field = self.encoder.field if self.dtype else self.encoder.reads
        content = shards.write_tensors(rows, field, kept, names or None)
        return Made(
            rows=len({row.key for row in rows}),
            files={shards.tensor_name(number): content},
            counts=counts,
            bucket=bucket,
            rounding=Rounding.of(exact, kept) if self.dtype else None,
        )

    def _rounded(self, shard: int, exact: np.ndarray) -> np.ndarray | Int8:
        assert self.dtype
        field = self.encoder.field
        try:
            return rounded(exact, self.dtype, CHANNEL[field])
        except OverflowError as error:
            raise DataError(
                f"shard {shard} of {field}: {error}; look at the weights, or store it with encode.{field}.dtype=int8"
            ) from error


def _ahead(make: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
    """What is made of each item, the next of them by a thread while one is used, the first before anybody asks."""
    pool, waiting = ThreadPoolExecutor(1), iter(items)
    coming = deque(pool.submit(make, item) for item in islice(waiting, 1))

    def made() -> Iterator[T]:
        with pool:
            while coming:
                ready = coming.popleft()
                coming.extend(pool.submit(make, item) for item in islice(waiting, 1))
                yield ready.result()

    return made()


def _counts(rows: list[ImageRow], names: list[str]) -> Counter[str]:
    """Captions by their names, and pictures by the names of theirs; none where captions have no names."""
    held: dict[str, set[str]] = {}
    for row, name in zip(rows, names, strict=False):
        held.setdefault(row.key, set()).add(name)
    counts = Counter(f"{WITH}{'+'.join(sorted(found))}" for found in held.values())
    return counts + Counter(f"{CALLED}{name}" for name in names)


def _tokens(context_length: int) -> Read:
    from stages.models.text import Tokenizer

    tokenizer = Tokenizer(context_length)

    def read(rows: Sequence[ImageRow], _: str | None) -> tuple[np.ndarray, Counter[str]]:
        tokens = tokenizer([row.caption for row in rows])
        return tokens.ids.numpy().astype(np.uint16), Counter(truncated_captions=tokens.truncated)

    return read


def _pictures(frame: Frame) -> Read:
    """Pictures (B, 3, H, W) of a size of the frame, made smaller on the CPU: the same pixels on every device."""
    import torch

    from stages.models.layers import resized

    def read(rows: Sequence[ImageRow], bucket: str | None) -> tuple[np.ndarray, Counter[str]]:
        size = frame.nearest(*Size.parse(bucket)) if bucket else None
        pixels = torch.from_numpy(np.stack([row.pixels(size) for row in rows])).permute(0, 3, 1, 2)
        return (pixels if bucket else resized(pixels, frame.size)).numpy(), Counter()

    return read
