"""The table of shards: what comes back of receipts, by folder, small enough to be sent."""

import pickle

import pytest

from datasets.files import storage
from datasets.files.storage import CorruptFile
from datasets.formats import shard_table, shards
from datasets.formats.shard_table import Shards
from datasets.formats.shards import Receipt

BUCKETS = ("256x256", "128x384", None)


def receipt(number: int, files: int = 2) -> Receipt:
    entries = {f"{number:05d}.{kind}": storage.entry_of(f"{number}{kind}".encode()) for kind in ("tar", "parquet")}
    chosen = dict(list(entries.items())[:files])
    return Receipt(number, 9, 9 - number % 2, {}, chosen, 1.0, 1, "host", bucket=BUCKETS[number % 3])


def test_what_receipts_say_comes_back_by_folder():
    told = {"": [receipt(number) for number in (7, 3, 12)], "128": [receipt(2, files=0), receipt(1)]}
    table = shard_table.load(shard_table.dump(told))
    for folder, receipts in told.items():
        found = shard_table.within(table, f"/root/{folder}", folder)
        assert list(found) == sorted(one.shard for one in receipts)
        for one in receipts:
            shard = found[one.shard]
            assert (shard.rows, shard.bucket, shard.files) == (one.rows_out, one.bucket, one.files)
            assert shard.folder == f"/root/{folder}"
        assert found.counts() == {one.shard: one.rows_out for one in receipts}
        assert found.buckets() == {one.shard: one.bucket for one in receipts}
        assert found.files() == {name: entry for one in receipts for name, entry in one.files.items()}
        assert found.counts(BUCKETS[1]) == {one.shard: one.rows_out for one in receipts if one.bucket == BUCKETS[1]}
        assert found.get(99) is None
    assert not shard_table.within(table, "/root/none", "none")


def test_equal_receipts_give_equal_bytes_in_any_order_and_whoever_made_them():
    receipts = [receipt(number) for number in range(9)]
    other = [Receipt(**{**vars(one), "seconds": 9.0, "pid": 2, "host": "b"}) for one in reversed(receipts)]
    assert shard_table.dump({"": receipts}) == shard_table.dump({"": other})


def test_a_shard_is_read_and_verified_by_what_is_known_of_it(tmp_path):
    made = {"00000.tar": storage.publish(b"pictures", f"{tmp_path}/00000.tar")}
    shards.publish_receipt(str(tmp_path), 0, rows_in=1, rows_out=1, files=made, clock=shards.Clock())
    shard = Shards.gathered(str(tmp_path))[0]
    assert shard.read("00000.tar") == b"pictures"
    storage.publish(b"pictUres", f"{tmp_path}/00000.tar")
    with pytest.raises(CorruptFile):
        shard.read("00000.tar")


def test_a_shard_is_sent_alone_and_all_of_them_as_a_table():
    few, many = (Shards.told("/root", [receipt(number) for number in range(count)]) for count in (10, 1000))
    assert len(pickle.dumps(many[5])) == len(pickle.dumps(few[5])) < 1000
    assert len(many.files()) == 2000  # what is made of it is not sent
    assert len(pickle.dumps(many)) < 200 * len(many)
    assert pickle.loads(pickle.dumps(many)) == many


def test_other_tables_are_no_tables_of_shards():
    with pytest.raises(CorruptFile, match="no table of shards"):
        shard_table.load(shards.table_bytes([{"shard": 1}]))
