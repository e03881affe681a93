"""Aesthetic scores that were computed from the stored pictures: a table a shard, with a row for each picture."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.formats.shards import ImageRow, parquet_bytes

SCHEMA = pa.schema([("row", pa.int32()), ("key", pa.string()), ("aesthetic", pa.float32())])


def table_bytes(rows: Sequence[ImageRow], scores: np.ndarray) -> bytes:
    """The table of a shard: pictures and their scores, float32 (N,)."""
    columns = [[row.row for row in rows], [row.key for row in rows], scores]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
    return parquet_bytes(pa.table(arrays, schema=SCHEMA))


def scored(planned: pa.Table, content: bytes) -> pa.Table:
    """Planned rows with the scores of a table in place of their own; null where it has none."""
    found = pq.read_table(pa.BufferReader(content), schema=SCHEMA)
    scores = pc.cast(found["aesthetic"], pa.float64()).take(pc.index_in(planned["key"], found["key"].combine_chunks()))
    return planned.set_column(planned.column_names.index("aesthetic"), "aesthetic", scores)
