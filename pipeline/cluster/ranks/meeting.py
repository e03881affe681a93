"""Where ranks meet: at the addresses that their nodes have in Ray.

Gloo would listen at what a machine's own name stands for. That is loopback on Debian's machines, and nothing at all
where no name server knows it: ranks of other nodes would then connect to themselves, in vain.
"""

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import ray.exceptions
import ray.train.backend
from ray._common.network_utils import build_address
from ray.train._internal.utils import get_address_and_port

GLOO = "GLOO_SOCKET_IFNAME"  # who sets it has a reason
PARTING_S = 30.0  # for ranks to leave their group; those that hang never do

log = logging.getLogger("ray.train.meeting")  # of which Ray keeps a log where it trains


class Backend(ray.train.backend.Backend):
    """Has the ranks meet, by Ray's own functions.

    Ray's process beside a training holds it too, which does without torch: that takes seconds to import. What needs it
    is called in the ranks.
    """

    share_cuda_visible_devices = True  # a rank sees the GPUs of its node's others, to reach them

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(make_ready)
        place = f"tcp://{build_address(*worker_group.execute_single(0, get_address_and_port))}"
        ranks = range(world := len(worker_group))
        ray.get([worker_group.execute_single_async(n, meet, backend_config.backend, n, world, place) for n in ranks])

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        try:
            ray.get(worker_group.execute_async(part, len(worker_group) > 1), timeout=PARTING_S)
        except ray.exceptions.GetTimeoutError:
            log.warning("the ranks have not left their process group within %.0f s", PARTING_S)


@dataclass
class Meeting(ray.train.backend.BackendConfig):
    """How the ranks of a training become one process group, of torch's `backend`: gloo or nccl."""

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        return Backend

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        return on_own_device


def make_ready() -> None:
    """In a rank: all that takes time before it can meet others, so that nobody takes the port that it is told of."""
    importlib.import_module("ray.train.torch.config")  # imports torch
    listen_where_ray_does()


def meet(backend: str, rank: int, world: int, place: str) -> None:
    """In a rank: join the others at `place`."""
    from ray.train.torch import config  # imports torch

    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, world, place)


def part(grouped: bool) -> None:
    """In a rank: leave the others, and give its GPU's memory back."""
    from ray.train.torch import config  # imports torch

    config._shutdown_torch(destroy_process_group=grouped)


@contextlib.contextmanager
def on_own_device() -> Iterator[None]:
    """In a rank: its GPU is torch's current one meanwhile."""
    from ray.train.torch.config import TorchConfigContextManager  # imports torch

    with TorchConfigContextManager():
        yield


def listen_where_ray_does() -> None:
    """Have Gloo listen on the interface with this node's address in Ray, if that is on one."""
    cards = {name: [address.address for address in addresses] for name, addresses in psutil.net_if_addrs().items()}
    if card := interface(cards, ray.util.get_node_ip_address()):
        os.environ.setdefault(GLOO, card)


def interface(cards: Mapping[str, Sequence[str]], address: str) -> str | None:
    """The interface whose first address it is, which Gloo takes; a node behind a translated address has it on none."""
    return next((name for name, addresses in cards.items() if addresses and addresses[0] == address), None)
