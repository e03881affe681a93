"""What the tests of plans share: rows that pass LAION's filters, and plans of them in memory."""

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from datasets.config import DataConfig
from datasets.planning import plan

CONF = Path(__file__).parents[3] / "conf" / "data"


def data_config(name: str, **changes: Any) -> DataConfig:
    """A committed data config with some keys changed (`__` for a dot)."""
    tree = OmegaConf.create({"data": OmegaConf.load(CONF / f"{name}.yaml")})
    for key, value in changes.items():
        OmegaConf.update(tree, "data." + key.replace("__", "."), value)
    return DataConfig.model_validate(OmegaConf.to_container(tree, resolve=True)["data"])


def laion_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A row that passes the filters of laion_aesthetic."""
    row = {
        "URL": f"https://example.org/{number}.jpg",
        "TEXT": f"a photograph, number {number}",
        "WIDTH": 1500,
        "HEIGHT": 1200,
        "similarity": 0.3,
        "punsafe": 0.01,
        "pwatermark": 0.1,
        "AESTHETIC_SCORE": 6.5,
    }
    return row | changes


def metadata(folder: Path, rows: list[dict[str, Any]], name: str = "part-0.parquet") -> str:
    """Path of a Parquet file with these rows."""
    folder.mkdir(exist_ok=True)
    columns = list(rows[0]) if rows else list(laion_row())
    pq.write_table(pa.table({key: [row[key] for row in rows] for key in columns}), folder / name)
    return str(folder / name)


class Made(NamedTuple):
    """A plan in memory."""

    rows: pa.Table
    rejected: dict[str, int]
    parts: list[pa.Table]


def make(config: DataConfig, seed: int = 0) -> Made:
    parts: list[pa.Table] = []
    counts = plan.make(config, seed, parts.append)
    rows = pa.concat_tables(parts)
    assert rows.num_rows == counts.planned == counts.read - sum(counts.rejected.values())
    return Made(rows, counts.rejected, parts)


def made(folder: Path, rows: list[dict[str, Any]], seed: int = 0, **changes: Any) -> Made:
    return make(data_config("laion_aesthetic", metadata=metadata(folder, rows), **changes), seed)
