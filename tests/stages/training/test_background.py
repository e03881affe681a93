"""Batches that are read ahead: as they were read, in their order; and in which order a GPU is asked for them."""

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stages.draws import Draws
from stages.settings.training import Phase, TrainingConfig
from stages.training import background
from stages.training.activity import ENCODING
from stages.training.background import Batch, read_ahead
from stages.training.callbacks import Callbacks
from stages.training.loop import train

CPU = torch.device("cpu")
FIELDS = ("image", "text")


def test_batches_come_in_their_order_as_they_were_read() -> None:
    """Arrays, without copies."""
    read: dict[int, dict[str, np.ndarray]] = {}

    def batch(step: int) -> dict[str, np.ndarray]:
        read[step] = {"image": np.full((2, 3), step, np.uint8)}
        return read[step]

    with closing(read_ahead(batch, range(3, 8), CPU)) as batches:
        for step, found in enumerate(batches, start=3):
            assert found["image"].data_ptr() == read[step]["image"].ctypes.data
    assert step == 7


def test_who_reads_ahead_on_a_cpu_computes_alone_and_a_step_as_before() -> None:
    """Also in a training that has computed nothing yet, as one that goes on."""
    threads: dict[str, int] = {}

    def batch(_: int) -> dict[str, np.ndarray]:
        threads["reading"] = torch.get_num_threads()
        return {}

    def train() -> None:
        torch.set_num_threads(3)
        with closing(read_ahead(batch, range(2), CPU)) as batches:
            next(batches)
            threads["step"] = torch.get_num_threads()

    before = torch.get_num_threads()
    training = threading.Thread(target=train)
    training.start()
    training.join()
    torch.set_num_threads(before)
    assert threads == {"reading": 1, "step": 3}


def test_on_cpus_a_step_encodes_its_batch_itself_with_all_its_threads() -> None:
    """Of what another thread has read meanwhile; the time counts as the step's, not as waiting."""
    where: dict[str, list[tuple[int, str, int]]] = {"reading": [], "encoding": []}
    callbacks = Callbacks()

    def note(what: str, step: int) -> None:
        where[what].append((step, threading.current_thread().name, torch.get_num_threads()))

    def read(step: int) -> dict[str, np.ndarray]:
        note("reading", step)
        return {"image": np.full((2, 3), step, np.float32)}

    def encode(step: int, batch: Batch) -> Batch:
        note("encoding", step)
        assert callbacks.doing.now()[:2] == (step, ENCODING)
        return {"encoded": batch["image"] + 1}

    class Objective(nn.Linear):
        def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
            return super().forward(batch["encoded"]).mean(), {"seen": batch["encoded"].mean()}

    seen: list[float] = []
    callbacks.log = lambda step, values: seen.append(values["seen"])  # type: ignore[method-assign]
    recipe = TrainingConfig(
        phases=[Phase(steps=4, batch_size=2, size=64)], learning_rate=0.1, warmup_steps=0, schedule="constant",
        precision="fp32", log_every=1, checkpoint_every=4,
    )  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        train(Objective(3, 1), read, recipe, callbacks, seed=0, device=CPU, encode=encode)
    finally:
        torch.set_num_threads(before)
    assert seen == [1.0, 2.0, 3.0, 4.0]
    here = threading.current_thread().name
    assert where["encoding"] == [(step, here, 3) for step in range(4)]
    assert [(step, threads) for step, _, threads in where["reading"]] == [(step, 1) for step in range(4)]
    assert not {name for _, name, _ in where["reading"]} & {here}


class Streams:
    """What a GPU is told, in its order, each with the stream of the thread that tells it."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self._local = threading.local()

    @property
    def present(self) -> str:
        return getattr(self._local, "name", "training")

    def tell(self, what: str) -> None:
        self.told.append((self.present, what))

    @contextmanager
    def within(self, stream: "Stream") -> Iterator[None]:
        before, self._local.name = self.present, stream.name
        yield
        self._local.name = before


class Stream:
    """One of them."""

    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def wait_stream(self, other: "Stream") -> None:
        self.streams.tell(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.streams.tell("made")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.streams.tell(f"{self.name} waits for {event}")


class Lying:
    """A tensor on the GPU."""

    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def record_stream(self, stream: Stream) -> None:
        self.streams.tell(f"{self.name} is kept for {stream.name}")


def test_a_gpu_makes_batches_in_a_stream_of_their_own_and_a_step_waits_for_its_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = Streams()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(streams, "reading"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(streams, streams.present))
    monkeypatch.setattr(torch.cuda, "stream", streams.within)

    def sent(values: Any, device: torch.device) -> Lying:
        streams.tell(f"{values} goes up")
        return Lying(streams, values)

    monkeypatch.setattr(background, "uploaded", sent)

    def encode(step: int, batch: Batch) -> Batch:
        streams.tell(f"encoding {step}")
        return {**batch, "text": Lying(streams, f"text {step}")}  # type: ignore[dict-item]

    batches: Any = read_ahead(lambda step: {"image": f"image {step}"}, range(2), torch.device("cuda"), encode)  # type: ignore[dict-item]
    assert [found["text"].name for found in batches] == ["text 0", "text 1"]
    assert streams.told[0] == ("training", "reading waits for training")
    by_thread = {name: [what for where, what in streams.told[1:] if where == name] for name in ("reading", "training")}
    for step in range(2):
        assert by_thread["reading"][3 * step :][:3] == [f"image {step} goes up", f"encoding {step}", "made"]
        waits, kept = "training waits for event of reading", [f"{what} {step} is kept for training" for what in FIELDS]
        assert by_thread["training"][3 * step :][:3] == [waits, *kept]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_made_beside_the_steps_are_whole_when_a_step_sees_them() -> None:
    """The encoder is slow, no host waits, memory is let go at once: who did not wait would see other numbers."""
    device, shape = torch.device("cuda"), (1 << 20,)

    def encode(step: int, batch: Batch) -> Batch:
        slow = torch.rand(4096, 4096, device=device)
        for _ in range(8):
            slow = slow @ slow
        made = torch.full(shape, float(step), device=device) + 0 * slow.nan_to_num(0, 0, 0)[0, 0]
        return {**batch, "text": made}

    wrong = torch.zeros((), device=device)
    batches = read_ahead(lambda step: {"image": np.full(shape, step, np.float32)}, range(50), device, encode)
    for step, found in enumerate(batches):
        wrong += sum((values != step).sum() for values in found.values())
    assert not wrong.item()
