"""A module whose parameters' rows lie spread over the ranks of its replica: FSDP2, and HSDP for several replicas.

Only trainings that are spread import this: what torch needs for it takes a second of every process that loads it.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from stages.models.layers import Block
from stages.settings.base import Precision


class Sharded:
    """A module, spread for good over `parts` ranks each of `replicas`; `group` are the ranks of this one's replica.

    `reduces` are the precisions in which gradients are exchanged, which is one for all phases.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, replicas: int, parts: int, reduces: Collection[Precision]
    ):
        mesh = init_device_mesh(device.type, (replicas, parts), mesh_dim_names=("replicate", "shard"))
        self.group = mesh.get_group("shard")
        if replicas == 1:
            mesh = mesh["shard"]
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if "bf16" in reduces else None)
        # Whole weights stay until the backward pass is over (ZeRO-2): memory goes to moments, not to weights.
        for block in [part for part in module.modules() if isinstance(part, Block)]:
            fully_shard(block, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        self._spread = [part for part in module.modules() if isinstance(part, FSDPModule)]

    def exchange(self, now: bool) -> None:
        """Whether the next backward pass ends with an exchange of gradients."""
        for part in self._spread:
            part.set_requires_gradient_sync(now, recurse=False)

    def drop_whole(self) -> None:
        """Drop whole weights after a forward pass that no backward pass follows."""
        for part in self._spread:
            part.reshard()

    @staticmethod
    def local(value: Tensor) -> Tensor:
        """This rank's rows of a parameter, or of its gradient."""
        return value.to_local() if isinstance(value, DTensor) else value

    @staticmethod
    def whole(value: Tensor) -> Tensor:
        """All rows, on every rank."""
        return value.full_tensor() if isinstance(value, DTensor) else value
