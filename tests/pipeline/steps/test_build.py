"""What a step gets: shards that are really there, a stop within a tick of a loss, and a fence before each receipt."""

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import datasets
import pipeline
from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shards import Clock, ImageRow
from pipeline.cluster.mapping import Worker
from pipeline.cluster.ranks.job import Job
from pipeline.cluster.room import Room
from pipeline.errors import ClaimLost
from pipeline.hours.spent import spent
from pipeline.settings import compose
from pipeline.settings.resources import POOL_LABEL, WORKERS
from pipeline.steps.build import Build
from pipeline.store import claims, ledger
from pipeline.store.ledger import Writer


@pytest.fixture
def build(tmp_path: Path) -> Build:
    unused: Any = None
    warnings: list[str] = []
    report: Any = SimpleNamespace(warning=warnings.append, warnings=warnings)
    claim = claims.take(str(tmp_path), "artifacts/latents_a/0", print)
    step: Any = SimpleNamespace(name="encode_a")
    path = str(tmp_path / "artifacts/latents_a/0")
    return Build(unused, step, path, claim, {}, unused, unused, report, frozenset(), unused)


def make(folder: str, shard: int) -> None:
    rows = [ImageRow(row, f"{shard:016x}{row:016x}", "u", "c", "png", b"x") for row in range(3)]
    content = shards.write_tensors(rows, "latents_a", np.full((3, 2), shard, np.float16))
    name = shards.tensor_name(shard)
    files = {name: storage.publish(content, storage.join(folder, name))}
    shards.publish_receipt(folder, shard, rows_in=3, rows_out=3, files=files, clock=Clock())


def test_a_shard_counts_as_done_while_its_files_are_there(build):
    folder = f"{build.path}/128"
    for shard in range(4):
        make(folder, shard)
    assert sorted(build.finished_shards(folder)) == [0, 1, 2, 3]
    assert build.report.warnings == []
    (Path(folder) / "00001.parquet").unlink()
    (Path(folder) / "00002.parquet").write_bytes(b"cut")
    assert sorted(build.finished_shards(folder)) == [0, 3]
    assert build.report.warnings == ["encode_a: files of 2 shards are gone or cut short; made anew"]
    assert storage.listing(folder) == ["00000.parquet", "00003.parquet", "receipts/00000.json", "receipts/00003.json"]


def test_a_loser_drops_no_shard(build):
    make(build.path, 0)
    (Path(build.path) / "00000.parquet").unlink()
    build.claim.release()
    claims.take(build.claim.fence.root, build.claim.fence.what, print)
    with pytest.raises(ClaimLost):
        build.finished_shards(build.path)
    assert storage.listing(build.path) == ["receipts/00000.json"]


def test_a_step_ends_with_the_tick_after_a_loss_was_noticed(build):
    build.claim.release()
    claims.take(build.claim.fence.root, build.claim.fence.what, print)
    with pytest.raises(ClaimLost):
        build.claim.beat()
    with pytest.raises(ClaimLost, match="latents_a/0 was taken over"):
        build.tick()


def test_a_lease_follows_the_nodes_and_all_of_it_is_one_attempt(build, tmp_path):
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}]
    config = compose.load("stage_c", ["scale=micro", "cluster.address=auto"]).cluster

    class Growing:
        room = Room(config, lambda: nodes)

        def exchange(self, stop: bool) -> list[dict[str, Any]]:
            return []

        def call_each(self, function: Any, items: Any, work: str, tick: Any) -> Any:
            assert work == "data"
            for number, item in enumerate(items):
                if number == 1:
                    nodes.append(nodes[0])
                tick()
                yield function(*item)

    writer = Writer(str(tmp_path), "one")
    step: Any = SimpleNamespace(name="download", call="download:download")
    growing: Any = replace(
        build,
        step=step,
        cluster=Growing(),
        lease=lambda *about, **more: writer.lease("download", "abc", *about, **more),
        stopped=lambda: None,
    )
    assert list(growing.call_each(lambda number: -number, [(number,) for number in range(4)], 4)) == [0, -1, -2, -3]
    found, _ = ledger.read(str(tmp_path))
    assert sorted((lease.devices, lease.outcome) for lease in found) == [(2, "done"), (4, "done")]
    assert len({lease.attempt for lease in found}) == 1


A100 = {"Alive": True, "Resources": {"CPU": 90.0, "GPU": 8.0, "accelerator_type:A100": 1.0}}
H100 = {"Alive": True, "Resources": {"CPU": 90.0, "GPU": 4.0, "accelerator_type:H100": 1.0}}
PLATFORM = (
    "cluster=kuberay",
    "cluster.nodes={count: 2, gpus: 8, cpus: 90, memory_gib: 900, kind: A100}",
    "cluster.pools={cheap: {work: [data, text], nodes: {count: 4, gpus: 0, cpus: 16, memory_gib: 64}}}",
    "workers=16",
)


@pytest.mark.parametrize("work", ["shards", "task", "tasks"])
def test_nobody_pays_for_a_pool_that_is_at_zero(work, build, tmp_path):
    nodes: list[dict[str, Any]] = []
    config = compose.load("stage_c", ["data.metadata=x", "cluster.encoders={min: 1, max: 99}", *PLATFORM]).cluster

    class Starting:
        """Where the first nodes come after a while, then others, and at last all are gone again."""

        room = Room(config, lambda: nodes)
        board = None

        def exchange(self, stop: bool) -> list[dict[str, Any]]:
            return []

        def follow(self, tick: Any) -> None:
            for there in ([], [A100], [A100, H100], []):
                nodes[:] = [{**node, "Labels": {POOL_LABEL: WORKERS}} for node in there]
                tick()

        def map_shards(self, actor: Any, about: Any, todo: Any, work: Any, tick: Any, at_once: int) -> None:
            self.follow(tick)
            for shard, _ in todo:
                make(build.path, shard)

        def call(self, function: Any, *arguments: Any, work: Any, gpus: int, tick: Any) -> Any:
            assert gpus == 1
            self.follow(tick)

        def call_each(self, function: Any, items: Any, work: Any, tick: Any) -> Any:
            self.follow(tick)
            yield from items

    writer = Writer(str(tmp_path), "one")
    starting: Any = replace(
        build,
        step=SimpleNamespace(name="encode_a", call="encode:latents_a"),
        cluster=Starting(),
        lease=lambda *about, **more: writer.lease("encode_a", "abc", *about, **more),
        report=SimpleNamespace(advance=lambda *_: None),
        stopped=lambda: None,
    )
    match work:
        case "shards":
            starting.map_shards(Worker, (), {shard: None for shard in range(64)}, 192, "images")
            held = [("cuda:A100", 8), ("cuda:A100+H100", 12)]
        case "task":
            starting.call(print, accelerated=True)
            held = [("cuda:A100", 1), ("cuda:A100+H100", 1)]
        case "tasks":
            assert len(list(starting.call_each(print, [(1,)] * 100, 100))) == 100
            held = [("cpu", 90), ("cpu", 100)]
    found, _ = ledger.read(str(tmp_path))
    waiting = [lease for lease in found if not lease.devices]
    opened = sorted(found, key=lambda one: (one.opened, one.kind, one.devices))  # two may open within a millisecond
    assert [(lease.kind, lease.devices) for lease in opened if lease.devices] == held
    assert len(waiting) == 2
    assert sum(sum(lease.phases.values()) for lease in waiting) == 0
    assert "cuda:GPU" not in spent(found).by_kind
    assert len({lease.attempt for lease in found}) == 1


def test_a_training_gets_as_many_ranks_as_it_wants_and_holds_their_devices_alone(build, tmp_path):
    words = ["scale=micro", "workers=4", "cluster.min_workers=1", "stage_a.train.ranks=2"]
    handed: list[Any] = []
    ranks: list[Any] = []

    class Settled:
        board = None
        room = SimpleNamespace(kind=lambda work: "cuda:A100", reserved_for_ranks=lambda workers: workers)

        def settle(self, worlds: Any, tick: Any) -> int:
            return int(worlds[0])

        def train(self, loop: Any, *, workers: int, worlds: Any, **_: Any) -> None:
            handed.append((workers, worlds))
            loop("the board")

    writer = Writer(str(tmp_path), "one")
    began: list[int] = []
    training: Any = replace(
        build,
        config=compose.load("stage_c", words),
        step=SimpleNamespace(name="train_a", call="train:train_a"),
        cluster=Settled(),
        lease=lambda *about, **more: writer.lease("train_a", "abc", *about, **more),
        report=SimpleNamespace(begin_training=began.append),
        stopped=lambda: None,
    )
    job = Job(build.path, training.building, build.claim.fence, "", seed=0, stall_s=60.0, flops={}, bytes={})
    for one in (training, replace(training, step=SimpleNamespace(name="train_c", call="train:train_c"))):
        one.train(lambda *given: ranks.append(given), job)
    assert handed == [(2, [2, 1]), (4, [4, 2, 1])]
    assert ranks == [(replace(job, attempt=attempt), "the board") for attempt in (1, 2)]
    found, _ = ledger.read(str(tmp_path))
    assert began == sorted(lease.devices for lease in found) == [2, 4]


def calls(*names: str) -> list[tuple[str, ast.Call]]:
    """Calls of functions of these names in the program, with the file and line of each."""
    found = []
    for package in (pipeline, datasets):
        for file in sorted(Path(package.__path__[0]).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call):
                    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                    if name in names:
                        found.append((f"{file.name}:{node.lineno}", node))
    return found


def test_each_receipt_is_published_through_a_fence():
    """In the steps, in the download, and where pictures are forgotten."""
    receipts = calls("publish_receipt", "put_receipt", "download_shard")
    assert len(receipts) >= 7
    for place, call in receipts:
        names = {keyword.arg for keyword in call.keywords} | {ast.unparse(value) for value in call.args}
        if "downloader" not in ast.unparse(call.func):  # img2dataset's own, which publishes nothing
            assert any("fence" in str(name) for name in names), place


def test_those_who_save_and_commit_do_so_through_a_fence():
    ranks = [call for place, call in calls("Checkpoints") if place.startswith("rank.py")]
    (rank,) = [call for call in ranks if len(call.args) > 2]  # who only asks what there is saves no part
    assert ast.unparse(rank.args[-1]) == "rank.job.fence"
    (commit,) = [call for place, call in calls("commit") if place.startswith("building.py")]
    assert ast.unparse(commit.args[-1]) == "build.claim"
