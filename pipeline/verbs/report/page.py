"""The page of an experiment: `page.html` filled with the document. Whatever it says is text, never markup."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.results import measures
from pipeline.results.scores import rate
from pipeline.results.trainings import TITLES
from pipeline.verbs.report import plots
from pipeline.verbs.report.pictures import Album

TEMPLATE = "page.html"
CHANGES = 60  # keys of the config that are listed
SETS = {"held_out": "captions of pictures that no training saw", "training": "captions that it was trained on"}


def page(document: Mapping[str, Any], album: Album) -> str:
    """The whole page, HTML that loads nothing from anywhere.

    Args:
        document: `report.json`, see `results.document`.
        album: its pictures.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "hours": hours, "size": size, "day": day}
    environment.filters |= {"short": plots.short, "rate": rate}
    environment.globals |= {"distance_table": measures.distance_table, "speed_table": measures.speed_table}
    environment.globals |= {"curves": plots.curves, "forest": plots.forest, "bar": plots.bar}
    about = {"titles": TITLES, "sets": SETS, "most_changes": CHANGES, "album": album}
    return environment.get_template(TEMPLATE).render(doc=document, **about)


def figure(value: float | None) -> str:
    """A number, to four digits that tell; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def hours(value: float | None) -> str:
    """Hours: of small ones as many digits as tell something."""
    if value is None:
        return "–"
    return f"{value:,.1f}" if value >= 100 else f"{value:.4f}" if value < 1 else f"{value:.2f}"


def size(count: float | None) -> str:
    """Bytes, in a unit that fits."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError


def day(moment: str | None) -> str:
    """A point in time as a person reads it."""
    try:
        return datetime.fromisoformat(str(moment)).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return str(moment or "–")
