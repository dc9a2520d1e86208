"""Charts as inline SVG: log axes, dots with titles, nothing loaded from elsewhere. Sized to be read on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from trimtab.units import format_si

WIDTH, HEIGHT = 400, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 14, 46


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One mark: position in data units, radius in pixels, series (class name) and the text shown on hover."""

    x: float
    y: float
    series: str
    title: str
    radius: float = 4.0


@dataclass(frozen=True, slots=True)
class LogAxis:
    """A logarithmic axis from `low` to `high` laid on pixels `start`..`end`."""

    low: float
    high: float
    start: float
    end: float

    @staticmethod
    def around(values: Sequence[float], start: float, end: float, margin: float = 1.6) -> LogAxis:
        """An axis that holds all positive values with some room."""
        positive = [value for value in values if value > 0] or [1.0]
        return LogAxis(min(positive) / margin, max(positive) * margin, start, end)

    def at(self, value: float) -> float:
        """Pixel of a value; values outside are held at the edge."""
        share = (math.log(max(value, 1e-300)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten inside the axis, thinned to at most six."""
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        step = max(1, math.ceil((last - first + 1) / 6))
        return [10.0**power for power in range(first, last + 1, step)]


def _frame(x: LogAxis, y: LogAxis, x_label: str, y_label: str, x_unit: str, y_unit: str) -> list[str]:
    parts = []
    for value in x.ticks():
        at = x.at(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">{_tick(value, x_unit)}</text>'
        )
    for value in y.ticks():
        at = y.at(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{WIDTH - _RIGHT}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_tick(value, y_unit)}</text>')
    parts.append(
        f'<text x="{(WIDTH + _LEFT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle" class="label">{escape(x_label)}</text>'
    )
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(
        f'<text transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle" class="label">{escape(y_label)}</text>'
    )
    return parts


def _tick(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms" if value >= 1e-3 else f"{value * 1e6:g} µs"
    if value < 1:
        return f"{value:g}"
    return format_si(value).replace(".00", "").replace(".0", "")


def _axes(xs: Sequence[float], ys: Sequence[float]) -> tuple[LogAxis, LogAxis]:
    return LogAxis.around(xs, _LEFT, WIDTH - _RIGHT), LogAxis.around(ys, HEIGHT - _BOTTOM, _TOP)


def _marks(dots: Sequence[Dot], x: LogAxis, y: LogAxis) -> list[str]:
    return [
        f'<circle class="dot {escape(dot.series)}" cx="{x.at(dot.x):.1f}" cy="{y.at(dot.y):.1f}" r="{dot.radius:.1f}">'
        f"<title>{escape(dot.title)}</title></circle>"
        for dot in dots
    ]


def _document(label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def roofline(label: str, dots: Sequence[Dot], peak_flops_per_s: float, bandwidth_bytes_per_s: float) -> str:
    """Attainable FLOP/s over arithmetic intensity with one dot per operator.

    Args:
        label: what a screen reader says.
        dots: x = FLOP per byte, y = FLOP/s reached.
        peak_flops_per_s: flat part of the roof.
        bandwidth_bytes_per_s: slope of the roof.
    """
    ridge = peak_flops_per_s / bandwidth_bytes_per_s
    xs = [dot.x for dot in dots] + [ridge / 4, ridge * 4]
    x, y = _axes(xs, [dot.y for dot in dots] + [peak_flops_per_s])
    roof_y = y.at(peak_flops_per_s)
    start = max(x.low, y.low / bandwidth_bytes_per_s)
    parts = _frame(x, y, "arithmetic intensity, FLOP per byte", "FLOP/s", "", "")
    parts.append(
        f'<polyline class="roof" points="{x.at(start):.1f},{y.at(start * bandwidth_bytes_per_s):.1f} '
        f'{x.at(ridge):.1f},{roof_y:.1f} {x.at(x.high):.1f},{roof_y:.1f}"/>'
    )
    return _document(label, [*parts, *_marks(dots, x, y)])


def scatter(label: str, dots: Sequence[Dot], *, unit: str, x_label: str, y_label: str, band: float) -> str:
    """Measured over predicted with the diagonal and a band around it.

    Args:
        label: what a screen reader says.
        dots: x = predicted, y = measured, same unit.
        unit: ``s`` for times.
        x_label, y_label: axis labels.
        band: share around the diagonal, 0.25 = 25 %.
    """
    values = [dot.x for dot in dots] + [dot.y for dot in dots]
    x, y = _axes(values, values)
    parts = _frame(x, y, x_label, y_label, unit, unit)
    low, high = x.low * (1 + band), x.high / (1 + band)
    corners = [(low, low * (1 + band)), (high, high * (1 + band)), (high, high / (1 + band)), (low, low / (1 + band))]
    parts.append(f'<polygon class="band" points="{" ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in corners)}"/>')
    parts.append(
        f'<line class="roof" x1="{x.at(low):.1f}" y1="{y.at(low):.1f}" x2="{x.at(high):.1f}" y2="{y.at(high):.1f}"/>'
    )
    return _document(label, [*parts, *_marks(dots, x, y)])
