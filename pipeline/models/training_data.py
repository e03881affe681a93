"""What a training reads: batches by how its phases see the pictures, held-out samples, and what is encoded on the way.

The driver says of what they are made (`Reading`), each rank makes them of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.buckets import Frame
from datasets.files.cache import VerifiedFiles
from datasets.planning import plan_files
from datasets.reading import augment, views
from datasets.reading.batches import Batches, Source
from datasets.reading.bucket_batches import BucketBatches
from datasets.reading.order import Span
from datasets.reading.views import View
from pipeline.models.encoders import Encoder, Loaded
from pipeline.settings.resources import Cache
from pipeline.store.artifacts import Artifact
from stages.models.layers import resized
from stages.settings.training import AugmentConfig, TrainingConfig
from stages.training.background import uploaded

SHOWN = 16  # samples in a panel
SHOWN_HELD_OUT = 12  # of them, where there are so many
HELD = "held out: "  # before the caption of one
Stretch = tuple[Frame, str | None]  # how a phase sees the pictures, and the name of its view


class EncodedBatches:
    """Batches of one frame, some of whose `fields` are encoded on the way, of pictures as `augment` changes them."""

    def __init__(
        self,
        stored: Batches | BucketBatches,
        frame: Frame,
        fields: Sequence[str],
        online: Sequence[Loaded],
        augmented: AugmentConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.stored, self._frame, self._fields, self._online = stored, frame, fields, online
        self._augmented, self._seed = augmented, seed
        self.rows = stored.rows

    def read(self, start: int, rows: int) -> dict[str, np.ndarray]:
        """As of the stored ones, for `fields`: pictures (rows, 3, H, W) of the frame, what is encoded here in fp32."""
        return self._encoded(self.seen(start, rows))

    def seen(self, start: int, rows: int) -> dict[str, np.ndarray]:
        """What is stored of samples, pictures as `augment` changes them, in the frame: of which `encoded` makes a
        batch."""
        batch = self.stored.read(start, rows)
        if self._augmented and "image" in batch:
            shares = self._augmented.model_dump()
            batch["image"] = augment.changed(batch["image"], start, self._seed, **shares)
        return self._framed(batch)

    def encoded(self, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch of what `seen` returned, on the encoders' device, in the present stream."""
        batch = dict(seen)
        for loaded in self._online:
            batch[loaded.encoder.field] = loaded.there(batch[loaded.encoder.reads])
        return {field: batch[field] for field in ("key", *self._fields)}

    def first(self, rows: int) -> dict[str, np.ndarray]:
        """The first samples, at most so many, as they are."""
        return self._encoded(self._framed(self.stored.first(rows)))

    def captions(self, rows: int, planned: Artifact) -> list[str]:
        """Captions of the first samples, as they were planned."""
        known = plan_files.captions(planned.read, planned.files, self.stored.first_shards(rows))
        keys = self.stored.first(rows)["key"]
        return [known.get(bytes(key).hex(), "") for key in keys]

    def _framed(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if "image" in batch and self._frame.square:
            batch["image"] = resized(torch.from_numpy(batch["image"]), self._frame.size).numpy()
        return batch

    def _encoded(self, seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """In the host's memory."""
        batch = {name: torch.from_numpy(values) for name, values in seen.items()}
        for loaded in self._online:
            batch[loaded.encoder.reads] = uploaded(seen[loaded.encoder.reads], loaded.where)
        batch = self.encoded(batch)
        return {name: values.cpu().numpy() for name, values in batch.items()}


@dataclass(frozen=True)
class Shown:
    """The samples of panels, held-out ones first: their fields, (rows, ...) each, and what stands above each."""

    fields: Mapping[str, np.ndarray]
    captions: Sequence[str]


@dataclass(frozen=True)
class TrainingData:
    """What a training reads: batches by how its phases see pictures (frame, name of the view), and held-out ones."""

    batches: Mapping[Stretch, EncodedBatches]
    held_out: EncodedBatches | None
    """As the last phase sees pictures, of the largest bucket where that reads buckets."""
    planned: Artifact | None = None
    """The plan of the pictures, which has their captions."""

    @property
    def largest(self) -> EncodedBatches:
        """The batches of the largest pictures."""
        return self.batches[max(self.batches, key=lambda stretch: stretch[0])]

    @cached_property
    def shown(self) -> Shown:
        """The samples that panels show: the first held-out ones, then the first that are trained on, where these have
        the same size. Read once."""
        if self.held_out is None:
            seen = self.largest.first(SHOWN)
            return Shown(seen, self._captions(self.largest, seen, ""))
        held = self.held_out.first(SHOWN_HELD_OUT)
        captions = self._captions(self.held_out, held, HELD)
        seen = self.largest.first(SHOWN - len(held["key"]))
        if any(held[name].shape[1:] != seen[name].shape[1:] for name in held):
            return Shown(held, captions)
        both = {name: np.concatenate([held[name], seen[name]]) for name in held}
        return Shown(both, [*captions, *self._captions(self.largest, seen, "")])

    def _captions(self, batches: EncodedBatches, first: Mapping[str, Any], label: str) -> list[str]:
        """One for each of the first samples, empty where no plan tells them."""
        rows = len(first["key"])
        found = batches.captions(rows, self.planned) if self.planned else [""] * rows
        return [label + caption for caption in found]


@dataclass(frozen=True)
class Reading:
    """Of what the batches of a step's trainings are made; can be sent to its ranks.

    `sources` are the stored fields by frame, `online` makes further ones of these; of both the batches have `fields`.
    `views` are artifacts by the view's name, `planned` is the plan of the pictures.
    """

    fields: tuple[str, ...]
    online: Sequence[Encoder]
    sources: Mapping[Frame, Sequence[Source]]
    stretches: Sequence[Stretch]
    views: Mapping[str, Artifact]
    held_out: Artifact | None
    seed: int
    cache: Cache
    planned: Artifact | None = None

    def only(self, fields: tuple[str, ...]) -> "Reading":
        """The same for batches of some of the fields; nothing else is read or encoded."""
        online = [encoder for encoder in self.online if encoder.field in fields]
        read = {*fields, *(encoder.reads for encoder in online)}
        sources = {frame: [one for one in every if one.field in read] for frame, every in self.sources.items()}
        return replace(self, fields=fields, online=online, sources=sources)

    def loaded(self, where: torch.device) -> list[Loaded]:
        """The encoders of what is made online, with their models."""
        return [encoder.load(where) for encoder in self.online]

    def data(self, training: TrainingConfig, online: Sequence[Loaded]) -> TrainingData:
        """Batches by frame and view; squares of all sizes come in the same order, and so do buckets.

        Held-out samples do not depend on the seed, so that trainings can be compared. Of `online`, the loaded encoders,
        those that make its fields are used.
        """
        online = [loaded for loaded in online if loaded.encoder in self.online]
        files = VerifiedFiles(self.cache.folder, int(self.cache.gib * 2**30))

        batches = {
            (frame, view): EncodedBatches(
                self._seen(frame, view, training, files), frame, self.fields, online, training.augment, self.seed
            )
            for frame, view in self.stretches
        }
        last = training.phases[-1]
        frame, (_, held) = Frame(last.size, last.max_aspect), self._split(last.view)
        held_out = None
        if held and held.rows:
            held_out = EncodedBatches(self._held_out(frame, held, files), frame, self.fields, online)
        return TrainingData(batches, held_out, self.planned)

    def _seen(
        self, frame: Frame, view: str | None, training: TrainingConfig, files: VerifiedFiles
    ) -> Batches | BucketBatches:
        sources, (chosen, _) = self.sources[frame], self._split(view)
        if not frame.square:
            spans = _spans(training, buckets=True)
            return BucketBatches(sources, frame, self.seed, spans, files, chosen, training.shared_lanes)
        spans = _spans(training, buckets=False)
        return Batches(sources, self.seed, files=files, view=chosen, lanes=training.shared_lanes, spans=spans)

    def _held_out(self, frame: Frame, held: View, files: VerifiedFiles) -> Batches:
        sources = self.sources[frame]
        if not frame.square:
            return BucketBatches(sources, frame, 0, [], files, held).largest
        return Batches(sources, seed=0, window=1, files=files, view=held)

    def _split(self, view: str | None) -> tuple[View | None, View | None]:
        return split(self.views[view] if view else None, self.held_out)


def split(view: Artifact | None, held_out: Artifact | None) -> tuple[View | None, View | None]:
    """What trainings see of a view's pictures (None: of all), None for all of them; and what is held out of these."""
    chosen = views.read(view.read(views.FILE)) if view else None
    if held_out is None:
        return chosen, None
    held = views.read(held_out.read(views.FILE))
    return (~held, held) if chosen is None else (chosen & ~held, chosen & held)


def _spans(training: TrainingConfig, *, buckets: bool) -> list[Span]:
    """The phases that read buckets, or those that read squares."""
    starts = accumulate((phase.steps for phase in training.phases), initial=0)
    return [
        Span(training.images_after(start), training.images_after(start + phase.steps), phase.batch_size)
        for start, phase in zip(starts, training.phases, strict=False)
        if buckets == (phase.max_aspect > 1)
    ]
