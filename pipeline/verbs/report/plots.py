"""Plots as inline SVG: curves of a training, win rates with intervals, bars. Colours come from the page's style."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 64, 10, 34
DOTTED = 60  # points, up to which each is shown as a dot with its value
NAMES = {"loss": "training", "validation_loss": "held-out", "validation_loss_ema": "held-out, EMA"}
LABELS, FOREST, LINE = 330, 860, 24  # px of a win rate's label, of all, of a line's height
Points = Sequence[tuple[float, float]]


def tag(name: str, content: object = "", **attributes: object) -> Markup:
    """An element; of attributes' names a last underscore is dropped, others are dashes. Everything is escaped."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(f"{value:.2f}" if isinstance(value, float) else value)}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{told}>{escape(content)}</{name}>")  # whose parts are escaped


def joined(parts: Iterable[Markup]) -> Markup:
    """Elements one after the other."""
    return Markup("").join(parts)


def text(content: str, x: float, y: float, anchor: str, class_: str = "tick", **more: object) -> Markup:
    """A label."""
    return tag("text", content, class_=class_, x=float(x), y=float(y), text_anchor=anchor, **more)


@dataclass(frozen=True)
class Axis:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Few round values between its ends."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            every = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
            found = [value for value in every if self.low <= value <= self.high]
            tens = [value for value in found if math.isclose(math.log10(value), round(math.log10(value)))]
            if len(found) > 2:
                return tens if len(found) > 6 and len(tens) > 1 else found
        step = _round_step((self.high - self.low) / 5)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * number for number in range(first, last + 1)]


def _number(tick: float) -> str:
    """A round value with all its digits: of a late part of a long training only the last ones differ."""
    return f"{tick:,.10g}"


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * one for one in (1, 2, 2.5, 5, 10) if power * one >= step * (1 - 1e-9))


def curves(found: Mapping[str, Sequence[Mapping[str, Any]]], by: str) -> Markup | None:
    """Losses by `step` or by `hours`, the loss on a logarithmic axis; None where no point has both."""
    series: dict[str, Points] = {}
    for name, told in found.items():
        if known := [(float(one[by]), float(one["value"])) for one in told if _is_drawn(one, by)]:
            series[name] = known
    if not series:
        return None
    values = [value for points in series.values() for _, value in points]
    low, high = min(values), max(values)
    if high < low * 1.5:
        low, high = low / 1.25, high * 1.25
    places = [at for points in series.values() for at, _ in points]
    late = len(places) > 1 and min(places) > max(places) / 2  # a long start would hide the rest
    begin = min(places) if late else 0.0
    x = Axis(begin, max(max(places), begin + 1e-9), LEFT, WIDTH - RIGHT)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP, log=True)
    parts = _axes(x, y, "step" if by == "step" else "device-hours")
    taken: list[float] = []
    for name, points in series.items():
        parts += [_line(name, points, x, y), _end(name, points[-1], x, y, taken)]
    return _drawing(parts, "plot", WIDTH, HEIGHT, f"loss by {by}")


def _drawing(parts: Iterable[Markup], class_: str, width: int, height: int, label: str) -> Markup:
    return tag("svg", joined(parts), class_=class_, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def _is_drawn(point: Mapping[str, Any], by: str) -> bool:
    return point[by] is not None and math.isfinite(point["value"]) and point["value"] > 0


def _axes(x: Axis, y: Axis, label: str) -> list[Markup]:
    right = WIDTH - RIGHT
    parts = []
    for tick in y.ticks():
        parts.append(tag("line", class_="grid", x1=LEFT, x2=right, y1=y(tick), y2=y(tick)))
        parts.append(text(_number(tick), LEFT - 6, y(tick) + 4, "end"))
    parts += [text(_number(tick), x(tick), HEIGHT - 18, "middle") for tick in x.ticks()]
    return [*parts, text(label, (LEFT + right) / 2, HEIGHT - 3, "middle")]


def _line(name: str, points: Points, x: Axis, y: Axis) -> Markup:
    places = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
    line = tag("polyline", class_=f"line {name}", points=places)
    if len(points) > DOTTED:
        return line
    dots = (
        tag(
            "circle",
            _hint(f"{NAMES[name]} {v:.4g} at {_number(round(at, 6))}"),
            class_=f"dot {name}",
            cx=x(at),
            cy=y(v),
            r=2.5,
        )
        for at, v in points
    )
    return line + joined(dots)


def _hint(content: str) -> Markup:
    """What a browser shows where the pointer rests."""
    return tag("title", content)


def _end(name: str, last: tuple[float, float], x: Axis, y: Axis, taken: list[float]) -> Markup:
    """The last value beside its curve, moved away from labels that are there."""
    place = y(last[1]) + 4
    while any(abs(place - other) < 12 for other in taken):
        place -= 12
    taken.append(place)
    return text(f"{last[1]:.3g}", x(last[0]) + 6, place, "start", f"end {name}", data_value=repr(last[1]))


def forest(rows: Sequence[Mapping[str, Any]], sets: Sequence[str]) -> Markup | None:
    """Win rates with their intervals, a line each, about the half that chance would give."""
    lines = [(row, name) for row in rows if row["kind"] != "paper" for name in sets if name in row["cells"]]
    if not lines:
        return None
    x, bottom = Axis(0.0, 1.0, LABELS, FOREST - 60), 26 + LINE * len(lines)
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        kind = "half" if share == 0.5 else "grid"
        parts.append(tag("line", class_=kind, x1=x(share), x2=x(share), y1=14, y2=bottom))
        parts.append(text(f"{share:.0%}", x(share), bottom + 16, "middle"))
    parts += [_rate(row, name, x, 28.0 + LINE * number) for number, (row, name) in enumerate(lines)]
    return _drawing(parts, "forest", FOREST, bottom + 22, "win rates")


def _rate(row: Mapping[str, Any], name: str, x: Axis, at: float) -> Markup:
    line = row["cells"][name]
    parts = (
        text(f"{row['label']} · {row['scorer']} · {name}", LABELS - 12, at + 4, "end", "label"),
        tag("line", class_="interval", x1=x(line["low"]), x2=x(line["high"]), y1=at, y2=at),
        tag("circle", cx=x(line["rate"]), cy=at, r=5),
        text(f"{line['rate']:.1%}", x(line["high"]) + 8, at + 4, "start", "label", data_value=repr(line["rate"])),
    )
    return tag("g", joined(parts), class_=row["kind"])


def bar(parts: Mapping[str, float], whole: float) -> Markup:
    """One bar cut into named parts, its length by its share of `whole`."""
    at, found = 0.0, []
    for name, value in parts.items():
        share = 100 * value / (whole or 1.0)
        hint = _hint(f"{name} {value:.4g}")
        found.append(tag("rect", hint, class_=f"phase {name}", x=at, y=0, width=share, height=10))
        at += share
    return tag("svg", joined(found), class_="bar", viewBox="0 0 100 10", preserveAspectRatio="none", aria_hidden="true")


def short(value: object) -> str:
    """A value of the config, short enough for a table."""
    said = str(value)
    return said if len(said) <= 80 else f"{said[:77]}..."
