"""Checks of a running cluster, from one of its nodes: what each is like, and how fast ranks reach each other."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from datasets.files import storage
from pipeline.cluster.messages import Sums
from pipeline.environment import quiet_environment
from pipeline.errors import InfrastructureError, RetriesExhausted, UsageError
from pipeline.verbs.doctor.finding import Asked, Finding
from pipeline.verbs.doctor.traces import no_traces
from stages.anatomy.memory_estimate import GIB

if TYPE_CHECKING:  # imports Ray and torch
    from pipeline.cluster.nodes import Node, Seen
    from pipeline.cluster.ray_cluster import Cluster

SKEW_S = 5.0  # as of the file system's clock
FREE_GIB = 20.0  # Ray's logs, spilled objects
MB = 1e6


def every(asked: Asked) -> Iterator[Finding]:
    """A finding for each node of the Ray that a run would join, and one for its ranks."""
    if asked.cluster is None or asked.cluster.address is None:
        return
    quiet_environment()
    from pipeline.cluster.ray_cluster import Cluster

    workers = asked.config.workers if asked.config else 1
    try:
        cluster = Cluster(asked.cluster, workers)
    except (UsageError, RetriesExhausted) as error:
        yield Finding("nodes", "failed", str(error))
        return
    try:
        with no_traces(asked.root) as folder:
            yield from _of_nodes(folder)
            yield of_ranks(cluster, storage.join(folder, "ranks"), workers)
    finally:
        cluster.close()


def _of_nodes(folder: str) -> Iterator[Finding]:
    from pipeline.cluster import nodes

    found = nodes.every()
    here = nodes.look(folder)
    for node, told in zip(found, nodes.ask(found, nodes.look, folder), strict=True):
        if isinstance(told, BaseException):
            yield Finding(f"node {node.address}", "failed", f"it does not answer: {told}")
        else:
            yield of_node(node, told, here, nodes.skew_s(node), nodes.SAMPLE)


def of_node(node: "Node", told: "Seen", here: "Seen", skew_s: float, sample: int) -> Finding:
    """What is to be said of a node, in one line; `here` is what the driver's says of itself."""
    check, cpus, failed, warned = f"node {node.address}", int(node.resources.get("CPU", 0)), [], []
    free, scarce = f"{told.free / GIB:.0f} GiB free", told.free / GIB < FREE_GIB
    other = [f"{name} {told.versions[name]}" for name in here.versions if told.versions[name] != here.versions[name]]
    if other:
        failed.append(
            f"{', '.join(other)}, where the driver has {', '.join(map(here.versions.__getitem__, _names(other)))}"
        )
    if told.code != here.code:
        failed.append("its code is not the driver's; give all nodes one image or folder, or cluster.code=sent")
    if told.store:
        failed.append(f"the root: {told.store}")
    if abs(skew_s) > SKEW_S:
        warned.append(f"set its clock, which is {skew_s:+.1f} s off")
    if scarce:
        warned.append(
            f"{free} in {told.folder}, where Ray's logs and spilled objects want {FREE_GIB:.0f}: make room there, or "
            "start that node's Ray with --temp-dir on a larger disk"
        )
    state = "failed" if failed else "warning" if warned else "ok"
    speed = (
        ""
        if told.store
        else f", root {sample / told.written_s / MB:.0f} MB/s written, {sample / told.read_s / MB:.0f} read"
    )
    facts = f"{cpus} CPUs, {node.gpus}, {'' if scarce else f'{free}, '}clock {skew_s:+.3f} s{speed}"
    return Finding(check, state, "; ".join([*failed, *warned, facts]))


def _names(versions: Sequence[str]) -> list[str]:
    return [version.partition(" ")[0] for version in versions]


def of_ranks(cluster: "Cluster", folder: str, workers: int) -> Finding:
    """How fast the ranks of a training would add up their gradients, on devices that nobody uses at the moment."""
    check, most = "ranks", min(workers, cluster.room_for_ranks())
    if most < 2:
        return Finding(check, "ok", f"{most} rank: nothing to exchange")
    ranks = min(most, cluster.room_for_ranks(free=True))
    if ranks < 2:
        used = f"the devices are in use: {ranks} of {most} ranks would find room now"
        return Finding(check, "warning", f"{used}; ask again for the speed of their exchange once what runs has ended")
    from pipeline.cluster import nodes

    try:
        cluster.train(nodes.add_up, workers=ranks, folder=folder, tick=lambda: None)
    except InfrastructureError as error:
        return Finding(check, "failed", f"{ranks} ranks do not reach each other: {error}")
    (told,) = [message for message in cluster.exchange(stop=False) if isinstance(message, Sums)]
    speed = nodes.bandwidth(ranks, told.seconds) / MB
    return Finding(
        check, "ok", f"{ranks} ranks add up {nodes.GRADIENTS * 4 / MB:.0f} MB at {speed:.0f} MB/s ({told.backend})"
    )
