"""Line charts over kimg or hours as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float | None]

_WIDTH, _HEIGHT = 400, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 26  # margins
_MAX_POINTS = 300  # about one per pixel
_COLOURS = 12


@dataclass(frozen=True)
class Series:
    """One curve: ``points`` are position (kimg or hours) and value, in order; a value of None is a gap in the curve."""

    name: str
    points: Sequence[Point]
    colour: int | None = None
    """0 to 11; None: the curve's position in its chart."""

    @property
    def finite(self) -> list[float]:
        """The values other than None."""
        return [value for _, value in self.points if value is not None]


def chart(
    series: Sequence[Series], end: float, best: float | None = None, dots: bool = False, unit: str = "kimg"
) -> str:
    """An SVG chart of curves that share a vertical axis.

    The axis is logarithmic if all values are positive and span more than a factor of eight. The attributes ``data-*``
    let a script convert positions to values.

    Args:
        series: one to twelve, each with a value that is not None. Long ones are averaged over equal numbers of points.
        end: right end of the horizontal axis, above 0.
        best: position at which to circle the first curve.
        dots: mark each point, for values that are rarely measured.
        unit: of the horizontal axis.
    """
    assert 1 <= len(series) <= _COLOURS
    assert end > 0
    thinned = [_thin(one.points) for one in series]
    values = [value for points in thinned for _, value in points if value is not None]
    ticks, is_log = axis(min(values), max(values))
    scaled = [math.log(tick) for tick in ticks] if is_log else ticks
    low, high = scaled[0], scaled[-1]

    def x(kimg: float) -> float:
        return _LEFT + kimg / end * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        height = (math.log(value) if is_log else value) - low
        return _HEIGHT - _BOTTOM - height / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_summary(series)}"'
        f' data-left="{_LEFT}" data-right="{_WIDTH - _RIGHT}" data-top="{_TOP}" data-bottom="{_HEIGHT - _BOTTOM}"'
        f' data-end="{end:g}" data-unit="{unit}" data-low="{low!r}" data-high="{high!r}"'
        f"{' data-log' if is_log else ''}>"
    ]
    for tick in ticks:
        parts.append(f'<path class="rule" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="value" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}">{_label(tick)}</text>')
    for tick in (tick for tick in _ticks(0, end) if tick <= end):
        parts.append(f'<text class="position" x="{x(tick):.1f}" y="{_HEIGHT - 8}">{tick:g}</text>')
    for i, (one, points) in enumerate(zip(series, thinned, strict=True)):
        lines = [[f"{x(kimg):.1f},{y(value):.2f}" for kimg, value in line] for line in _lines(points)]
        curve = "".join(f'<polyline points="{" ".join(line)}"/>' for line in lines)
        if dots:
            centres = (position.split(",") for line in lines for position in dict.fromkeys(line))
            curve += "".join(f'<circle cx="{cx}" cy="{cy}" r="3"/>' for cx, cy in centres)
        parts.append(f'<g class="curve c{i if one.colour is None else one.colour}">{curve}</g>')
    if best is not None:
        (at,) = [value for kimg, value in series[0].points if kimg == best and value is not None][:1]
        parts.append(f'<circle class="best" cx="{x(best):.1f}" cy="{y(at):.2f}" r="6"/>')
    parts.append(f'<path class="cursor" d="M0 {_TOP}V{_HEIGHT - _BOTTOM}"/></svg>')
    return "".join(parts)


def axis(low: float, high: float) -> tuple[list[float], bool]:
    """Ticks that enclose all values from ``low`` to ``high``, and whether the axis is logarithmic: if all values are
    positive and span more than a factor of eight."""
    is_log = low > 0 and high / low > 8
    return _log_ticks(low, high) if is_log else _ticks(low, high), is_log


def _summary(series: Sequence[Series]) -> str:
    """The chart in words, for screen readers."""
    words = [f"{one.name} from {one.finite[0]:.4g} to {one.finite[-1]:.4g}" for one in series]
    return escape("; ".join(words))


def _thin(points: Sequence[Point]) -> Sequence[Point]:
    size = math.ceil(len(points) / _MAX_POINTS)
    if size <= 1:
        return points
    return [_mean(points[start : start + size]) for start in range(0, len(points), size)]


def _mean(points: Sequence[Point]) -> Point:
    values = [value for _, value in points if value is not None]
    kimg = sum(kimg for kimg, _ in points) / len(points)
    return kimg, sum(values) / len(values) if values else None


def _lines(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """The points split at gaps. A single point is doubled, since a line needs two to be visible."""
    lines: list[list[tuple[float, float]]] = [[]]
    for kimg, value in points:
        if value is None:
            lines.append([])
        else:
            lines[-1].append((kimg, value))
    return [line if len(line) > 1 else line * 2 for line in lines if line]


def _label(tick: float) -> str:
    """``tick`` in at most about six characters: 0.05, 250, 12.25k."""
    return f"{tick / 1000:.5g}k" if abs(tick) >= 1e4 else f"{tick:.4g}"


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose ``low`` and ``high``. Values within half a per cent are shown as equal: a
    utilisation of 99.9 to 100% would look like a crash."""
    if high - low <= 0.005 * max(abs(low), abs(high)):
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and below three decades also 2 and 5 times these, that enclose ``low`` and ``high``."""
    factors = (1, 2, 5) if high / low < 1e3 else (1,)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [factor * 10.0**decade for decade in decades for factor in factors]
    first = max(i for i, step in enumerate(steps) if step <= low * (1 + 1e-9))
    last = min(i for i, step in enumerate(steps) if step >= high * (1 - 1e-9))
    return steps[first : last + 1]
