"""The two threads beside a training: one reads batches ahead of the steps, one saves states behind them."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from stages.state_dicts import Serialized
from stages.training import checkpoint
from stages.training.checkpoint import Checkpoint

Batch = dict[str, Tensor]
ReadBatch = Callable[[int], dict[str, np.ndarray]]

_READ_AHEAD = 2  # batches waiting in memory while a step runs


def read_ahead(read_batch: ReadBatch, steps: range, device: torch.device) -> Generator[Batch, None, None]:
    """Yield the batch of every step, on the device, reading the next ones in one background thread."""

    def read(step: int) -> Batch:
        batch = {key: torch.from_numpy(value) for key, value in read_batch(step).items()}
        return {key: value.pin_memory() for key, value in batch.items()} if device.type == "cuda" else batch

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read_batch") as pool:
        submitted = (pool.submit(read, step) for step in steps)
        coming = deque(islice(submitted, _READ_AHEAD))
        while coming:
            batch = coming.popleft().result()
            coming.extend(islice(submitted, 1))
            yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}


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
