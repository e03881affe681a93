"""What a cluster has room for at the moment: it is asked again and again, for nodes come and go.

A pool (`cluster.pools`) takes some kinds of work, by a label of its nodes where they are started as they are needed.
Then what the config says of a pool counts before its first node is there: a GPU pool that is still at zero has GPUs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipeline.errors import UsageError
from pipeline.settings.resources import POOL_LABEL, Work
from pipeline.settings.resources import Cluster as ClusterConfig

Nodes = Sequence[Mapping[str, Any]]  # as `ray.nodes` tells of them
SHARDS_PER_ACTOR = 4  # at least: an actor takes seconds to start
ACCELERATOR = "accelerator_type:"


class Room:
    """Room for kinds of work on the nodes that `nodes` tells of."""

    def __init__(self, config: ClusterConfig, nodes: Callable[[], Nodes]) -> None:
        self.config, self._nodes = config, nodes

    def selector(self, work: Work | None) -> dict[str, str]:
        """The label of the nodes that a kind of work runs on; none where all nodes take it."""
        return {POOL_LABEL: self.config.pool_of(work)} if work and self.config.starts_nodes else {}

    def nodes(self, work: Work | None = None) -> list[Mapping[str, Any]]:
        """The nodes for it that are there; None: all."""
        wanted = self.selector(work).items()
        return [node for node in self._nodes() if node["Alive"] and wanted <= node.get("Labels", {}).items()]

    def has(self, name: str, work: Work | None = None) -> int:
        """How much of a resource these have, by Ray's names."""
        return int(sum(node["Resources"].get(name, 0) for node in self.nodes(work)))

    def device(self, work: Work | None = None) -> str:
        """`cuda` or `cpu`: where such work computes."""
        if self.config.device == "cpu":
            return "cpu"
        return "cuda" if self._gpus_come(work) or self.has("GPU", work) else "cpu"

    def kind(self, work: Work | None = None) -> str:
        """The kind of device, as the ledger calls it; GPUs are called after what they are, once one is there."""
        if self.device(work) == "cpu":
            return "cpu"
        names = {
            name.partition(":")[2] for node in self.nodes(work) for name in node["Resources"] if ACCELERATOR in name
        }
        return f"cuda:{'+'.join(sorted(names)) or 'GPU'}"

    def tasks(self, work: Work) -> int:
        """Tasks of a CPU each that Ray should have at once.

        On a running Ray as many again as there are cores: what waits is the demand that an autoscaler sees, and a node
        that was added gets work at once.
        """
        cores = self.has("CPU", work)
        return max(1, cores if self.config.address is None else 2 * cores)

    def actors(self, work: Work, shards: int) -> tuple[int, int]:
        """The smallest and the largest pool of encoding actors over so many shards: the latter, on a running Ray, also
        where there is no room for it yet."""
        worthwhile, room = -(-shards // SHARDS_PER_ACTOR), self._actors_now(work)
        most = max(1, min(self.config.encoders.max, worthwhile))
        if self.config.address is None:
            most = max(1, min(most, room))
        return max(1, min(self.config.encoders.min, most, room)), most

    def reserved(self, work: Work, shards: int) -> float:
        """Devices that such a pool holds now: GPUs, or CPUs where there are none; 0 while no node is there."""
        actors = min(self.actors(work, shards)[1], self._actors_now(work))
        return actors * (self.config.encoders.gpus if self.device(work) == "cuda" else 1)

    def require(self, workers: int) -> None:
        """Raise UsageError where so many ranks would wait for ever."""
        if self.config.device == "cuda" and self.device("train") == "cpu":
            raise UsageError("cluster.device=cuda, but Ray sees no GPU; use cluster.device=auto or cpu")
        if self.device("train") == "cuda":
            found, kind = self.has("GPU") // max(1, self.config.gpus_per_worker), "GPUs"
        else:
            found, kind = self.has("CPU"), "CPU cores"
        if workers > found and self.config.address is None:  # a cluster may still grow
            raise UsageError(f"workers={workers}: this machine has {kind} for {found}; lower workers")

    def of_rank(self, workers: int) -> dict[str, float]:
        """What each of so many training ranks holds, by Ray's names: of our own local Ray's CPUs its share of all."""
        here = self.config.address is None
        each: dict[str, float] = {"CPU": max(1, self.has("CPU") // workers) if here else self.config.cpus_per_worker}
        if self.device("train") == "cuda":
            each["GPU"] = self.config.gpus_per_worker
        return each

    def reserved_for_ranks(self, workers: int) -> float:
        """Devices that so many training ranks hold: GPUs, or CPUs where there are none."""
        each = self.of_rank(workers)
        return workers * each.get("GPU", each["CPU"])

    @property
    def trains_here(self) -> bool:
        """Whether trainings take the CPUs of this machine, and nobody else's Ray."""
        return self.config.address is None and self.device("train") == "cpu"

    def _actors_now(self, work: Work) -> int:
        if self.device(work) == "cuda":
            return self.has("GPU", work) * int(1 / self.config.encoders.gpus)  # an actor never lies across two GPUs
        return self.has("CPU", work)

    def _gpus_come(self, work: Work | None) -> bool:
        return self.config.starts_nodes and any(nodes.gpus for nodes in self.config.nodes_for(work))


def ranks(resources: Iterable[Mapping[str, float]], each: Mapping[str, float]) -> int:
    """Ranks that fit on nodes with these resources; none lies across two."""
    return sum(min(int(has.get(name, 0) / count) for name, count in each.items() if count) for has in resources)


def grown(worlds: Sequence[int], workers: int, free: int) -> int | None:
    """On how many ranks a training should go on that has `workers` of them, with room for `free` more.

    The largest of `worlds`, descending, that there is room for; None: on as many as it has.
    """
    return next((world for world in worlds if workers < world <= workers + free), None)
