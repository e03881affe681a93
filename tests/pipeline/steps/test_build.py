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
from pipeline.cluster.room import Room
from pipeline.errors import ClaimLost
from pipeline.settings import compose
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
        lease=lambda *about: writer.lease("download", "abc", *about),
        stopped=lambda: None,
    )
    assert list(growing.call_each(lambda number: -number, [(number,) for number in range(4)], 4)) == [0, -1, -2, -3]
    found, _ = ledger.read(str(tmp_path))
    assert sorted((lease.devices, lease.outcome) for lease in found) == [(2, "done"), (4, "done")]
    assert len({lease.attempt for lease in found}) == 1


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
    (rank,) = [call for place, call in calls("Checkpoints") if place.startswith("rank.py")]
    assert ast.unparse(rank.args[-1]) == "rank.fence"
    (commit,) = [call for place, call in calls("commit") if place.startswith("invocation.py")]
    assert ast.unparse(commit.args[-1]) == "build.claim"
