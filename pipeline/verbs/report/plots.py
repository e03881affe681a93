"""Plots as inline SVG: curves of a training, and win rates with their intervals. Colours come from the page's style."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 64, 10, 34
DOTTED = 60  # points, up to which each is shown as a dot with its value
NAMES = {"loss": "training", "validation_loss": "held-out", "validation_loss_ema": "held-out, EMA"}


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
            tens = [value for value in found if math.isclose(math.log10(value) % 1, 0, abs_tol=1e-9)]
            return tens if len(found) > 6 and len(tens) > 1 else found
        step = _round_step((self.high - self.low) / 5)
        count = math.floor((self.high - self.low) / step + 1e-9)
        return [self.low + step * number for number in range(count + 1)]


def _round_step(step: float) -> float:
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * one for one in (1, 2, 2.5, 5, 10) if power * one >= step * (1 - 1e-9))


def curves(found: Mapping[str, Sequence[Mapping[str, Any]]], by: str) -> Markup | None:
    """Losses by `step` or by `hours`, the loss on a logarithmic axis; None where no point has both."""
    series = {
        name: [(float(one[by]), float(one["value"])) for one in points if one[by] is not None and one["value"] > 0]
        for name, points in found.items()
    }
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    values = [value for points in series.values() for _, value in points]
    low, high = min(values), max(values)
    if high < low * 1.5:
        low, high = low / 1.25, high * 1.25
    x = Axis(0.0, max(at for points in series.values() for at, _ in points) or 1.0, LEFT, WIDTH - RIGHT)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP, log=True)
    parts = [*_axes(x, y, "step" if by == "step" else "device-hours")]
    labels: list[float] = []
    for name, points in series.items():
        parts.append(_line(name, points, x, y))
        parts.append(_end(name, points[-1], x, y, labels))
    return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, f"loss by {by}", Markup("").join(parts)
    )


def _axes(x: Axis, y: Axis, label: str) -> list[Markup]:
    parts = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            LEFT, WIDTH - RIGHT, y(tick), y(tick), LEFT - 6, y(tick) + 4, f"{tick:.3g}"
        )
        for tick in y.ticks()
    ]
    parts += [
        Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x(tick), HEIGHT - 18, f"{tick:.4g}")
        for tick in x.ticks()
    ]
    parts.append(
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, label)
    )
    return parts


def _line(name: str, points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> Markup:
    places = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
    line = Markup('<polyline class="line {}" points="{}"/>').format(name, places)
    if len(points) > DOTTED:
        return line
    dots = [
        Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.5"><title>{}</title></circle>').format(
            name, x(at), y(value), f"{NAMES[name]} {value:.4g} at {at:.4g}"
        )
        for at, value in points
    ]
    return line + Markup("").join(dots)


def _end(name: str, last: tuple[float, float], x: Axis, y: Axis, taken: list[float]) -> Markup:
    """The last value beside its curve, moved away from labels that are there."""
    place = y(last[1]) + 4
    while any(abs(place - other) < 12 for other in taken):
        place -= 12
    taken.append(place)
    return Markup('<text class="end {}" x="{:.1f}" y="{:.1f}" data-value="{}">{}</text>').format(
        name, x(last[0]) + 6, place, repr(last[1]), f"{last[1]:.3g}"
    )


def forest(rows: Sequence[Mapping[str, Any]], sets: Sequence[str]) -> Markup | None:
    """Win rates with their intervals, a line each, about the half that chance would give."""
    lines = [(row, name, row["cells"][name]) for row in rows if row["kind"] != "paper" for name in sets if name in row["cells"]]
    if not lines:
        return None
    left, width, step = 330, 860, 24
    x = Axis(0.0, 1.0, left, width - 60)
    height = 26 + step * len(lines) + 22
    parts = [
        Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="14" y2="{}"/><text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            "half" if share == 0.5 else "grid", x(share), x(share), height - 22, x(share), height - 6, f"{share:.0%}"
        )
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    for number, (row, name, line) in enumerate(lines):
        at = 28 + step * number
        parts.append(
            Markup(
                '<g class="{}"><text class="label" x="{}" y="{}" text-anchor="end">{}</text>'
                '<line class="interval" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/><circle cx="{:.1f}" cy="{}" r="5"/>'
                '<text class="label" x="{:.1f}" y="{}" data-value="{}">{}</text></g>'
            ).format(
                row["kind"], left - 12, at + 4, f"{row['label']} · {row['scorer']} · {name}",
                x(line["low"]), x(line["high"]), at, at, x(line["rate"]), at,
                x(line["high"]) + 8, at + 4, repr(line["rate"]), f"{line['rate']:.1%}",
            )  # fmt: skip
        )
    return Markup('<svg class="forest" viewBox="0 0 {} {}" role="img" aria-label="win rates">{}</svg>').format(
        width, height, Markup("").join(parts)
    )


def bar(parts: Mapping[str, float], whole: float) -> Markup:
    """One bar cut into named parts, its length by its share of `whole`."""
    at, found = 0.0, []
    for name, value in parts.items():
        share = 100 * value / (whole or 1.0)
        found.append(
            Markup('<rect class="phase {}" x="{:.2f}" y="0" width="{:.2f}" height="10"><title>{}</title></rect>').format(
                name, at, share, f"{name} {value:.4g}"
            )
        )
        at += share
    return Markup('<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{}</svg>').format(
        Markup("").join(found)
    )


def told(value: object) -> str:
    """A value of the config, short enough for a table."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
