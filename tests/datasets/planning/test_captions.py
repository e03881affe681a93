"""Captions and URLs as strangers write them: rejected, or one clean text all the way to the tokens."""

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datasets.formats import shards
from datasets.left_out import LeftOut
from datasets.planning import plan
from datasets.source_settings import Part, SourceConfig
from stages.models.text import END, Tokenizer

TOKENIZER = Tokenizer(16)
WEB = Part("data", "laion_aesthetic", SourceConfig(source="laion_aesthetic"))
HOSTILE = st.one_of(
    st.binary(max_size=80),  # mostly no UTF-8
    st.text(max_size=80).map(str.encode),
    st.text("\0\u0085\u200d\u2028\u202e\u2066\ufeff\U0010ffffe\u0301'\"\\\n/.", max_size=80).map(str.encode),
)


@settings(max_examples=100)
@given(st.lists(st.tuples(HOSTILE, HOSTILE), max_size=4))
@example([(b"http://x/", b"word " * 20_000), (b"http://x/../../etc/passwd\0", b"\xed\xa0\x80 half a character")])
def test_whatever_rows_say_goes_unchanged_from_the_plan_to_tars_tables_and_tokens(rows):
    urls = [b"http://x.invalid/" + url for url, _ in rows]
    empty = pa.nulls(len(rows), pa.large_binary())
    scores = {
        name: pa.nulls(len(rows), pa.float64())
        for name in plan.SCHEMA.names
        if plan.SCHEMA.field(name).type == pa.float64()
    }
    captions = pa.array([text for _, text in rows], pa.large_binary())
    table = {"url": pa.array(urls, pa.large_binary()), "caption": captions, "licence": empty, "origin": empty}
    left_out = LeftOut()
    kept = plan._clean(pa.table(table | scores), WEB, 0, frozenset(), left_out)
    assert kept.num_rows + left_out.counts.total() == len(rows)
    stored = [
        shards.ImageRow(place, row["key"], row["url"], row["caption"], "png", b"picture")
        for place, row in enumerate(kept.to_pylist())
    ]
    assert all(shards.KEY.fullmatch(row.key) for row in stored)
    unique = list({row.key: row for row in stored}.values())
    assert shards.read_images(shards.write_images(unique)) == unique
    index = pq.read_table(pa.BufferReader(shards.table_bytes([vars(row) for row in unique])))
    assert index.to_pylist() == [vars(row) | {"captions": []} for row in unique]
    tokens = TOKENIZER([row.caption for row in unique]).ids
    assert tokens.shape == (len(unique), 16)
    assert ((tokens >= 0) & (tokens <= END)).all()
