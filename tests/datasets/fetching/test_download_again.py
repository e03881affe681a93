"""Pictures that were stored once: forgotten, asked for again, kept."""

import hashlib
from typing import Any

import pyarrow as pa
import pytest

from datasets.fetching.download import losses, results
from datasets.formats import removal, shards
from tests.datasets.fetching.servers import DOWNLOAD, HOST, PICTURE, download, planned


@pytest.mark.parametrize("named_by", ["url", "origin"])
def test_a_forgotten_picture_is_not_asked_for_and_taken_out_later_leaves_the_same_bytes(server, tmp_path, named_by):
    rows = planned("good", "good-too", "missing").drop("origin")
    rows = rows.append_column("origin", pa.array([None, "https://original.invalid/too.png", None]))
    key, name = rows["key"][0].as_py(), rows[named_by][1].as_py()
    kept = download(rows, tmp_path / "kept", server)
    server.RequestHandlerClass.seen.clear()
    receipt = download(rows, tmp_path / "never", server, forgotten={key, name})
    assert set(server.RequestHandlerClass.seen) == {"missing"}
    assert receipt.dropped == {"forgotten": 2, "gone": 1}
    keys = {key, rows["key"][1].as_py()}
    for name, change in ((shards.image_name(7), removal.from_images), (shards.index_name(7), removal.from_index)):
        content = (tmp_path / "kept" / name).read_bytes()
        assert change(content, set()) == content
        assert change(content, keys) == (tmp_path / "never" / name).read_bytes()
    assert removal.from_receipt(kept, {}, 0, downloaded=True).dropped == receipt.dropped


def test_the_bytes_of_a_forgotten_picture_are_not_kept_wherever_they_come_from(server, tmp_path):
    rows = planned("good", "moved", "good-too")
    first = download(rows, tmp_path / "first", server)
    assert first.rows_out == 3
    tar, index = ((tmp_path / "first" / name).read_bytes() for name in (shards.image_name(7), shards.index_name(7)))
    for name, earlier in {"asked": None, "taken over": results(tar, index)}.items():
        forgotten = {hashlib.sha256(PICTURE).hexdigest()}
        receipt = download(rows, tmp_path / name, server, forgotten=forgotten, earlier=earlier)
        assert receipt.dropped == {"forgotten": 2}
        (kept,) = shards.read_images((tmp_path / name / shards.image_name(7)).read_bytes())
        assert kept.key == rows["key"][2].as_py()
        told = list(losses(rows, (tmp_path / name / shards.index_name(7)).read_bytes()))
        assert [(cause, sentence) for _, _, cause, sentence in told] == [
            ("forgotten", "it has the bytes of a picture that this root was to forget")
        ] * 2


def test_a_later_attempt_asks_again_for_passing_losses_only_and_keeps_every_other_byte(server, tmp_path):
    rows = planned("good", "late", "missing", "down")
    once = DOWNLOAD.model_copy(update={"retries": 0})
    first = download(rows, tmp_path / "first", server, download=once)
    assert first.dropped == {"gone": 1, "server_error": 2}
    tar, index = ((tmp_path / "first" / name).read_bytes() for name in (shards.image_name(7), shards.index_name(7)))
    server.RequestHandlerClass.seen[:] = ["late"]
    second = download(rows, tmp_path / "second", server, download=once, earlier=results(tar, index))
    assert sorted(server.RequestHandlerClass.seen) == ["down", "late", "late"]
    assert second.dropped == {"gone": 1, "server_error": 1}
    before = shards.read_images(tar)
    after = shards.read_images((tmp_path / "second" / shards.image_name(7)).read_bytes())
    assert [row.row for row in after] == [0, 1]
    assert after[0] == before[0]
    again = download(rows.slice(0, 1), tmp_path / "same", server, earlier={0: results(tar, index)[0]})
    assert again.rows_out == 1
    assert shards.read_images((tmp_path / "same" / shards.image_name(7)).read_bytes()) == before


def test_asked_again_in_its_own_folder_a_shard_keeps_what_it_has(server, tmp_path):
    """Where nothing is gained its files stay as they are; the old receipt never stands beside new files."""
    rows = planned("good", "late", "down")
    once = DOWNLOAD.model_copy(update={"retries": 0})
    first = download(rows, tmp_path, server, download=once)
    assert first.dropped == {"server_error": 2}
    server.RequestHandlerClass.seen[:] = []
    files = [tmp_path / name for name in (shards.image_name(7), shards.index_name(7))]

    def known() -> Any:
        return results(*(file.read_bytes() for file in files))

    counts: list[int] = []
    same = download(rows, tmp_path, server, download=once, earlier=known(), replaced=first, settled=counts.append)
    assert same is first
    assert sum(counts) == 3
    server.RequestHandlerClass.seen[:] = ["late"]

    def fence() -> None:
        assert len(shards.read_images(files[0].read_bytes())) == 1 or shards.finished(str(tmp_path)) == {}

    better = download(rows, tmp_path, server, download=once, earlier=known(), replaced=first, fence=fence)
    assert better.dropped == {"server_error": 1}
    assert shards.finished(str(tmp_path)) == {7: better}
    assert sorted(server.RequestHandlerClass.seen) == ["down", "late", "late"]
    lost = list(losses(rows, files[1].read_bytes()))
    assert lost == [(None, f"http://{HOST}/down", "server_error", "HTTP Error 500: Internal Server Error")]
