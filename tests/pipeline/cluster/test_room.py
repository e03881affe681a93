"""What a cluster has room for, as its nodes come and go, and before the first of a pool is there."""

from typing import Any

import pytest

from pipeline.cluster.room import Room, grown, ranks
from pipeline.errors import UsageError
from pipeline.settings import compose
from pipeline.settings.resources import POOL_LABEL, WORKERS
from pipeline.settings.resources import Cluster as ClusterConfig

POOLS = (
    "cluster=kuberay",
    "cluster.nodes={count: 2, gpus: 8, cpus: 90, memory_gib: 900, kind: A100}",
    "cluster.pools={cheap: {work: [data, text], nodes: {count: 4, gpus: 0, cpus: 16, memory_gib: 64}}}",
    "workers=16",
)


def node(cpus: int, gpus: int = 0, pool: str | None = None, alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": float(cpus), "memory": 1e9} | ({"GPU": gpus, "accelerator_type:A100": 1.0} if gpus else {})
    return {"Alive": alive, "Resources": resources, "Labels": {POOL_LABEL: pool} if pool else {}}


def cluster(*words: str) -> ClusterConfig:
    return compose.load("stage_c", ["data.metadata=x", *words]).cluster


def room(nodes: list[dict[str, Any]], *words: str) -> Room:
    return Room(cluster(*words), lambda: nodes)


def test_tasks_and_actors_follow_the_nodes():
    nodes = [node(4)]
    here = room(nodes, "cluster=a100x64", "cluster.device=auto", "cluster.encoders={min: 3, max: 64}")
    assert (here.tasks("data"), here.reserved("encode", 400)) == (8, 4)  # as many again wait: an autoscaler sees them
    assert here.actors("encode", 400) == (3, 64)
    assert here.actors("encode", 10) == (3, 3)  # each is to have four shards
    nodes += [node(12), node(100, alive=False)]
    assert (here.tasks("data"), here.reserved("encode", 400)) == (32, 16)
    nodes[:] = [node(8, gpus=2)]
    assert (here.device("encode"), here.kind("encode"), here.reserved("encode", 400)) == ("cuda", "cuda:A100", 2)


def test_a_ray_of_our_own_is_given_no_more_than_it_has():
    here = room([node(2)], "cluster=local", "cluster.encoders={min: 1, max: 8}")
    assert (here.tasks("data"), here.actors("encode", 400)) == (2, (1, 2))


def test_ranks_on_a_machine_of_our_own_share_its_cpus_and_elsewhere_take_what_they_are_told():
    here = room([node(9)], "cluster=local")
    assert (here.of_rank(2), here.reserved_for_ranks(2), here.trains_here) == ({"CPU": 4}, 8, True)
    gpus = room([node(16, gpus=2)], "cluster=local")
    assert (gpus.of_rank(2), gpus.reserved_for_ranks(2), gpus.trains_here) == ({"CPU": 8, "GPU": 1}, 2, False)
    there = room([node(64)], "cluster=cpus", "cluster.cpus_per_worker=3")
    assert (there.of_rank(2), there.reserved_for_ranks(2), there.trains_here) == ({"CPU": 3}, 6, False)


def test_ranks_that_would_wait_for_ever_are_refused():
    room([node(2)], "cluster=local").require(2)
    room([node(2)], "cluster=cpus").require(20)  # nodes may come
    room([node(16, gpus=4)], "cluster=local").require(4)
    with pytest.raises(UsageError, match="workers=3: this machine has CPU cores for 2; lower workers"):
        room([node(2)], "cluster=local").require(3)
    with pytest.raises(UsageError, match="workers=5: this machine has GPUs for 4"):
        room([node(16, gpus=4)], "cluster=local").require(5)
    with pytest.raises(UsageError, match="Ray sees no GPU"):
        room([node(16)], "cluster=local", "cluster.device=cuda").require(1)


@pytest.mark.parametrize(("share", "actors", "held"), [(1, 4, 4), (0.5, 8, 4.0), (0.3, 12, 3.6), (0.75, 4, 3.0)])
def test_encoders_may_share_gpus(share, actors, held):
    here = room([node(16, gpus=4)], "cluster=local", f"cluster.encoders={{min: 1, max: 99, gpus: {share}}}")
    assert here.actors("encode", 1000)[1] == actors
    assert here.reserved("encode", 1000) == pytest.approx(held)


def test_a_pool_that_is_still_at_zero_has_what_it_will_have():
    nodes: list[dict[str, Any]] = []
    here = room(nodes, *POOLS)
    assert (here.device("train"), here.kind("train"), here.tasks("data")) == ("cuda", "cuda:GPU", 1)
    assert (here.device("text"), here.device("encode"), here.device()) == ("cpu", "cuda", "cuda")
    assert here.actors("encode", 400)[0] == 1
    assert here.reserved("encode", 400) == 0
    nodes += [node(16, pool="cheap"), node(90, gpus=8, pool=WORKERS)]
    assert (here.has("CPU", "data"), here.has("CPU", "train"), here.has("CPU")) == (16, 90, 106)
    assert here.kind("encode") == "cuda:A100"


def test_selectors_are_for_platforms_that_start_labelled_nodes():
    assert room([], *POOLS).selector("text") == {POOL_LABEL: "cheap"}
    assert room([], *POOLS).selector("train") == {POOL_LABEL: WORKERS}
    slurm = ("cluster=slurm", "cluster.cpus_per_worker=1", *POOLS[1:])
    assert room([node(8)], *slurm).selector("text") == {}  # each pool is a job there
    assert room([node(8)], "cluster=kuberay", "cluster.pools={}").selector("train") == {}


@pytest.mark.parametrize(
    ("pools", "told"),
    [
        ("{a: {work: [data], nodes: null}}", "cluster.pools.a.nodes"),
        ("{a: {work: [train], nodes: {count: 1, gpus: 8, cpus: 8, memory_gib: 8}}}", "cluster.pools.a.work"),
        ("{job: {work: [data], nodes: {count: 1, gpus: 0, cpus: 8, memory_gib: 8}}}", "give the pool another name"),
        (
            "{a: {work: [data], nodes: {count: 1, gpus: 0, cpus: 8, memory_gib: 8}}, "
            "b: {work: [text, data], nodes: {count: 1, gpus: 0, cpus: 8, memory_gib: 8}}}",
            "a and b both take data",
        ),
    ],
)
def test_pools_that_mean_nothing_are_refused(pools, told):
    with pytest.raises(ValueError, match=told):
        cluster("cluster=kuberay", f"cluster.pools={pools}")
    with pytest.raises(ValueError, match="plain hosts are there anyway"):
        cluster("cluster=hosts", POOLS[2])


def test_a_rank_lies_on_one_node():
    each = {"CPU": 4.0, "GPU": 1.0}
    assert ranks([{"CPU": 7, "GPU": 8}, {"CPU": 90, "GPU": 3}, {"CPU": 3, "GPU": 1}, {"CPU": 8}, {}], each) == 4
    assert ranks([{"CPU": 7, "GPU": 0}], {"CPU": 2, "GPU": 0}) == 3


@pytest.mark.parametrize(
    ("workers", "free", "then"), [(2, 0, None), (2, 1, None), (2, 2, 4), (2, 5, 4), (2, 6, 8), (8, 9, None), (1, 1, 2)]
)
def test_a_training_that_shrank_grows_to_the_largest_world_there_is_room_for(workers, free, then):
    assert grown((8, 4, 2, 1), workers, free) == then
