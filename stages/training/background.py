"""The two threads beside a training: one reads batches ahead of the steps, one saves states behind them."""

from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from stages.state_dicts import Serialized
from stages.training import checkpoint
from stages.training.checkpoint import Checkpoint

Batch = dict[str, Tensor]
ReadBatch = Callable[[int], Mapping[str, np.ndarray]]  # in the host's memory, by step
Encode = Callable[[int, Batch], Batch]  # what a step's batch is to be, of what was read for it; on the device

_READ_AHEAD = 2  # batches waiting in the device's memory while a step runs


def encodes_ahead(device: torch.device) -> bool:
    """Whether batches are encoded beside the steps. CPUs have nothing else to do it with: threads of both would wait
    for each other on the same cores, which takes up to half as long again as one after the other, and beside other
    programs up to ten times as long."""
    return device.type != "cpu"


def read_ahead(
    read_batch: ReadBatch, steps: range, device: torch.device, encode: Encode | None = None
) -> Generator[Batch, None, None]:
    """Yield the batch of every step, on the device, reading (and encoding) the next ones in one background thread.

    On a GPU that thread has a stream of its own: batches are copied there, and what `encode` makes of them is reckoned
    there, beside the steps. A step's stream waits for its batch; the host waits for neither.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    torch.get_num_threads()  # a thread that has never asked takes the number that another one has set last
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # which may still load the encoders' weights

    def read(step: int) -> tuple[Batch, torch.cuda.Event | None]:
        with nullcontext() if stream is None else torch.cuda.stream(stream):  # of this thread alone
            batch = {key: uploaded(values, device) for key, values in read_batch(step).items()}
            batch = encode(step, batch) if encode else batch
            return batch, None if stream is None else stream.record_event()

    with ThreadPoolExecutor(1, "read_batch", initializer=partial(_compute_alone, device)) as pool:
        submitted = (pool.submit(read, step) for step in steps)
        coming = deque(islice(submitted, _READ_AHEAD))
        while coming:
            batch, made = coming.popleft().result()
            coming.extend(islice(submitted, 1))
            if made is not None:
                _handed_over(batch, made, torch.cuda.current_stream(device))
            yield batch


def _compute_alone(device: torch.device) -> None:
    """Have this thread start no others where the step computes on the same cores: they would wait for each other."""
    if device.type == "cpu":
        torch.set_num_threads(1)


def uploaded(values: np.ndarray, device: torch.device) -> Tensor:
    """On the device; a GPU takes them from page-locked memory, in the present stream."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _handed_over(batch: Batch, made: torch.cuda.Event, to: torch.cuda.Stream) -> None:
    """Have a stream wait until a batch is made; its memory is taken for nothing else before that stream is done too."""
    to.wait_event(made)
    for tensor in batch.values():
        tensor.record_stream(to)


class Saver:
    """Saves states in a background thread, one at a time: the training goes on, what is written is a copy.

    The memory of the copy stays for the next one, page-locked where a GPU trains.
    """

    def __init__(self, save_state: Callable[[int, Serialized], None], device: torch.device) -> None:
        self._save_state, self._pinned = save_state, device.type == "cuda"
        self._place: Serialized | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save_state")
        self._saving: Future[None] | None = None

    def save(self, state: Checkpoint) -> None:
        """Copy the state and start saving it; waits for the one before, and raises what went wrong with that."""
        self.wait()
        self._place = checkpoint.dump(state, self._place or Serialized(state.tensors, self._pinned))
        self._saving = self._pool.submit(self._save_state, state.step, self._place)

    def wait(self) -> None:
        """Wait until everything is saved."""
        if self._saving is not None:
            self._saving.result()

    def close(self) -> None:
        """End the thread, after what it is doing."""
        self._pool.shutdown()
