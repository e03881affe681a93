"""A training on several ranks: whole copies (DDP), or copies that are each spread over some ranks (FSDP2, HSDP).

`world` ranks form `world / shard` replicas of `shard` ranks each. Where `shard` is above 1, every parameter's rows lie
spread over the ranks of its replica, and so do gradients, moments and moving average. What a rank keeps is plain
tensors by name, so that optimiser, average and checkpoints need not know of any of this.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from stages.settings.base import Precision
from stages.training.checkpoint import Rows

if TYPE_CHECKING:  # a second of each process that does without
    from stages.training.sharding import Sharded

CLIP_EPS = 1e-6  # as torch's clipping by norm
BUCKET_MIB, RING_MIB = 25, 2  # least gradients that DDP exchanges at a time; that many a rank, for a ring's latency
_PASSED_ON = 64 << 20  # bytes at a time from one rank to all


class Replica:
    """An objective on a device, as this rank trains it.

    `model` is what to call, `trained` holds the leaves for the optimiser by name: the parameters themselves, or this
    rank's rows of them. `reduces` are the precisions in which its phases exchange gradients, one where it is spread;
    `reduce` is that of the present one. `buffers` are the module's own.
    """

    def __init__(
        self,
        objective: nn.Module,
        device: torch.device,
        rank: int,
        world: int,
        shard: int,
        reduces: Collection[Precision],
    ):
        self.device, self.world, self.parts, self.part = device, world, shard, rank % shard
        self.reduce: Precision = "fp32"
        self.number = rank // shard  # of the replica that this rank is in
        self._whole = objective
        self._module = copy.deepcopy(objective) if shard > 1 else objective  # sharding a module is for good
        if device.type == "cuda" and shard == 1:  # as its convolutions want their weights; FSDP wants rows
            self._module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        else:
            self._module.to(device)
        if world > 1 and device.type == "cuda":  # on CPUs each rank normalises over its own rows
            self._module = nn.SyncBatchNorm.convert_sync_batchnorm(self._module)
        self._sharded = self._shard(reduces) if shard > 1 else None
        if shard > 1:
            self.model = self._module
        elif world > 1:
            self.model = self._replicate(reduces)
        else:
            self.model = self._module
        self._sources = {name: value for name, value in self._module.named_parameters() if value.requires_grad}
        self.trained = {name: self._leaf(value) for name, value in self._sources.items()}
        # Found once: going through all modules takes the host a tenth of a step of Stage B.
        self._state = {name: self._local(value) for name, value in self._module.state_dict().items()}
        self.buffers = list(self._module.buffers())

    def _replicate(self, reduces: Collection[Precision]) -> nn.Module:
        devices = [self.device] if self.device.type == "cuda" else None
        # No `static_graph`: it saves the search for unused parameters, which is off anyway, and torch (2.15) fails an
        # assertion of its own where the first step accumulates gradients.
        model = DistributedDataParallel(
            self._module,
            device_ids=devices,
            gradient_as_bucket_view=True,
            bucket_cap_mb=bucket_mib(sum(p.numel() * p.element_size() for p in self._module.parameters()), self.world),
        )
        if "bf16" in reduces:
            model.register_comm_hook(dist.group.WORLD, self._exchange)
        return model

    def _exchange(self, group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        exchange = bf16_compress_hook if self.reduce == "bf16" else allreduce_hook
        found: torch.futures.Future[Tensor] = exchange(group, bucket)
        return found

    def _shard(self, reduces: Collection[Precision]) -> "Sharded":
        from stages.training.sharding import Sharded

        return Sharded(self._module, self.device, self.world // self.parts, self.parts, reduces)

    def _local(self, value: Tensor) -> Tensor:
        """This rank's rows of a parameter or gradient: all, where it is not spread."""
        return self._sharded.local(value) if self._sharded else value

    def _leaf(self, parameter: nn.Parameter) -> nn.Parameter:
        """The parameter itself, or this rank's rows of it as one that shares their memory."""
        return nn.Parameter(self._local(parameter)) if self._sharded else parameter

    @property
    def module(self) -> nn.Module:
        """The objective that is trained."""
        return self._module

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward pass of a piece of a batch: ranks exchange gradients with the last one only."""
        if self._sharded:
            self._sharded.exchange(last)
        elif isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def same_buffers(self) -> None:
        """Give all ranks the buffers of the first, as DDP does; on GPUs, SyncBatchNorm keeps them the same anyway."""
        if self.parts > 1 and self.device.type == "cpu":
            for buffer in self.buffers:
                dist.broadcast(buffer, 0)

    @contextmanager
    def evaluating(self, average: dict[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """The objective in evaluation mode, without gradients; with the average's values, where that is given.

        All ranks have the first one's buffers, as a checkpoint has. Afterwards weights, buffers and modes are what they
        were, to the bit. The average trades places with the weights meanwhile, so that this takes no memory.
        """
        modes = [(module, module.training) for module in self._module.modules()]
        self._module.eval()
        self._trade(average)
        own = [buffer.clone() for buffer in self.buffers]
        try:
            with torch.no_grad():
                if self.world > 1:
                    for buffer in self.buffers:
                        dist.broadcast(buffer, 0)
                yield self._module
        finally:
            for module, training in modes:
                module.training = training
            if self._sharded:
                self._sharded.drop_whole()
            for buffer, value in zip(self.buffers, own, strict=True):
                buffer.copy_(value)
            self._trade(average)

    @torch.no_grad()
    def _trade(self, average: dict[str, Tensor] | None) -> None:
        """Swap the values of weights and buffers with those of the average, one tensor at a time."""
        if average is not None:
            for name, tensor in self.state().items():
                value = tensor.clone()
                tensor.copy_(average[name])
                average[name].copy_(value)

    def forget_gradients(self) -> None:
        """Drop all gradients."""
        for name, leaf in self.trained.items():
            leaf.grad = self._sources[name].grad = None

    def clip(self, largest: float, divisor: Tensor | None) -> Tensor:
        """Scale this rank's gradients so that the whole gradient's norm is at most `largest`; the norm before, ().

        divisor: takes what the optimiser is to divide them by, which spares a pass over all of them; None: scale them.
        """
        for name, leaf in self.trained.items():
            gradient = self._sources[name].grad
            leaf.grad = None if gradient is None else self._local(gradient)
        norm = nn.utils.get_total_norm([leaf.grad for leaf in self.trained.values() if leaf.grad is not None])
        if self._sharded:
            squared = norm.square()
            dist.all_reduce(squared, group=self._sharded.group)
            norm = squared.sqrt()
        if divisor is None:
            nn.utils.clip_grads_with_norm_(self.trained.values(), largest, norm)
        else:
            divisor.copy_(((norm + CLIP_EPS) / largest).clamp(min=1.0))
        return norm

    def state(self) -> dict[str, Tensor]:
        """Weights and buffers by name, this rank's rows of them; references, not copies."""
        return self._state

    def rows(self) -> dict[str, Rows]:
        """Of each parameter that has rows: which of them lie here; of one rank none is told, it has all."""
        if self.world == 1:
            return {}
        found = {}
        for name, value in self._module.named_parameters():
            if value.dim():
                each = -(-value.shape[0] // self.parts)  # as torch.chunk cuts
                found[name] = Rows(min(self.part * each, value.shape[0]), value.shape[0])
        return found

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Put values by name, this rank's rows, in the place of weights and buffers."""
        for name, tensor in self.state().items():
            tensor.copy_(values[name])

    @torch.no_grad()
    def give_back(self) -> None:
        """Put the trained weights into the objective that was given, whole on every rank."""
        if self._sharded:
            given = self._whole.state_dict()
            for name, value in self._module.state_dict().items():
                given[name].copy_(self._sharded.whole(value))
            self._whole.to(self.device)


def most(value: float, world: int, device: torch.device) -> float:
    """The largest value of any rank."""
    if world == 1:
        return value
    found = torch.tensor(float(value), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def shared(read: Callable[[], bytes], owner: int, rank: int, world: int, device: torch.device) -> bytes:
    """What the rank `owner` reads, on all ranks."""
    content = read() if rank == owner else b""
    if world == 1:
        return content
    size = torch.tensor(len(content), device=device)
    dist.broadcast(size, owner)
    pieces = []
    for start in range(0, int(size), _PASSED_ON):
        piece = content[start : start + _PASSED_ON] or bytes(min(_PASSED_ON, int(size) - start))
        there = torch.frombuffer(bytearray(piece), dtype=torch.uint8).to(device)
        dist.broadcast(there, owner)
        if rank != owner:
            pieces.append(there.cpu().numpy().tobytes())
    return content or b"".join(pieces)


def bucket_mib(gradients: int, ranks: int) -> int:
    """MiB of gradients that ranks exchange at a time: more have longer rings; an eighth leaves room to hide."""
    return max(BUCKET_MIB, min(RING_MIB * ranks, gradients >> 23))


def pieces(rows: int, micro_batch: int | None) -> list[slice]:
    """The rows of a rank's batch, cut into equal pieces of at most `micro_batch`."""
    size = min(rows, micro_batch or rows)
    assert rows % size == 0
    return [slice(start, start + size) for start in range(0, rows, size)]
