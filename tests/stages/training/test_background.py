"""Batches that are read ahead: as they were read, in their order; and in which order a GPU is asked for them."""

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.training import background
from stages.training.background import Values, read_ahead, uploaded

CPU = torch.device("cpu")


def test_batches_come_in_their_order_as_they_were_read() -> None:
    """Arrays and what an encoder made of them, without copies."""
    read: dict[int, dict[str, Values]] = {}

    def batch(step: int) -> dict[str, Values]:
        read[step] = {"image": np.full((2, 3), step, np.uint8), "text": torch.full((2, 4), float(step))}
        return read[step]

    with closing(read_ahead(batch, range(3, 8), CPU)) as batches:
        for step, found in enumerate(batches, start=3):
            image, text = read[step]["image"], read[step]["text"]
            assert isinstance(image, np.ndarray)
            assert isinstance(text, Tensor)
            assert found["image"].data_ptr() == image.ctypes.data
            assert found["text"] is text
    assert step == 7


def test_who_reads_ahead_on_a_cpu_computes_alone_and_a_step_as_before() -> None:
    """Also in a training that has computed nothing yet, as one that goes on."""
    threads: dict[str, int] = {}

    def batch(_: int) -> dict[str, Values]:
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

    def batch(step: int) -> Any:
        streams.tell(f"encoding {step}")
        return {"text": f"text {step}"}

    batches: Any = read_ahead(batch, range(2), torch.device("cuda"))
    assert [found["text"].name for found in batches] == ["text 0", "text 1"]
    assert streams.told[0] == ("training", "reading waits for training")
    by_thread = {name: [what for where, what in streams.told[1:] if where == name] for name in ("reading", "training")}
    for step in range(2):
        assert by_thread["reading"][3 * step :][:3] == [f"encoding {step}", f"text {step} goes up", "made"]
        waits, kept = "training waits for event of reading", f"text {step} is kept for training"
        assert by_thread["training"][2 * step :][:2] == [waits, kept]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_made_beside_the_steps_are_whole_when_a_step_sees_them() -> None:
    """The encoder is slow, no host waits, memory is let go at once: who did not wait would see other numbers."""
    device, shape = torch.device("cuda"), (1 << 20,)

    def batch(step: int) -> dict[str, Values]:
        slow = torch.rand(4096, 4096, device=device)
        for _ in range(8):
            slow = slow @ slow
        made = torch.full(shape, float(step), device=device) + 0 * slow.nan_to_num(0, 0, 0)[0, 0]
        return {"image": np.full(shape, step, np.float32), "text": made}

    wrong = torch.zeros((), device=device)
    for step, found in enumerate(read_ahead(batch, range(50), device)):
        wrong += sum((values != step).sum() for values in found.values())
    assert not wrong.item()


def test_what_lies_on_the_device_already_is_not_sent_again() -> None:
    values = torch.rand(2)
    assert uploaded(values, CPU) is values
