"""Confs for tests, with what they cannot do without."""

from pipeline.settings import compose
from pipeline.settings.config import Config

GROUPS = compose.groups()


def load(*words: str, conf: str = "stage_c", scale: str = "micro") -> Config:
    """A conf at a scale, with LAION's metadata named where the scale wants it, and what the conf itself asks for."""
    metadata = ["data.metadata=rows.parquet"] if scale == "paper" else []
    asked = {
        "interpolate": ["interpolate.first=a.pt", "interpolate.second=b.pt"],
        "finetune_c": ["data.folder.path=pictures"],
    }
    return compose.load(conf, [f"scale={scale}", *metadata, *asked.get(conf, []), *words])
