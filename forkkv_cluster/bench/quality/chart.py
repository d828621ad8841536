"""Small charts as SVG text, without a drawing library. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from forkkv_cluster.bench.quality.stats import Interval

__all__ = ["COLOURS", "interval_chart", "line_chart"]

COLOURS = ("#3b6fb6", "#d1782c", "#3f8f5b", "#b04a5a", "#7a5aa6", "#8a7a3d", "#4a9aa6", "#777777")
_WIDTH, _ROW, _LABEL, _VALUE = 640, 22, 180, 110


def interval_chart(title: str, entries: Sequence[tuple[str, Interval]], unit: str = "%", decimals: int = 1) -> str:
    """One line for each entry, a share or a difference of shares: a dot with a bar from low to high, and zero dashed."""
    scale = 100.0
    ends = [value * scale for _, interval in entries for value in interval]
    low, high = min(0.0, *ends), max(0.0, *ends)
    span = (high - low) or 1.0
    height = _ROW * (len(entries) + 1) + 14

    def x_of(value: float) -> float:
        return _LABEL + (value - low) / span * (_WIDTH - _LABEL - _VALUE)

    parts = [
        f'<line x1="{x_of(0):.1f}" x2="{x_of(0):.1f}" y1="{_ROW}" y2="{height - 12}" stroke="currentColor" '
        'stroke-dasharray="3 3" opacity="0.4"/>'
    ]
    for index, (label, interval) in enumerate(entries):
        y, colour = _ROW * (index + 1.5), COLOURS[index % len(COLOURS)]
        x, x1, x2 = (x_of(value * scale) for value in interval)
        parts.append(
            f'<text x="{_LABEL - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
            f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="3" opacity="0.5"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
            f'<text x="{x2 + 8:.1f}" y="{y + 4:.1f}">{interval.value * scale:.{decimals}f} {escape(unit)}</text>'
        )
    return _svg(title, height, parts)


def line_chart(title: str, series: Mapping[str, Sequence[float]], x_label: str) -> str:
    """One line for each series over 0, 1, ...; from zero up. Every series has at least one value."""
    height, left, top, bottom, right = 220, 56, 30, 40, 170
    top_value = max(max(values) for values in series.values()) or 1.0
    num_points = max(len(values) for values in series.values())

    def place(index: int, value: float) -> tuple[float, float]:
        x = left + index / max(1, num_points - 1) * (_WIDTH - left - right)
        return x, height - bottom - value / top_value * (height - top - bottom)

    parts = []
    for share in (0.0, 0.5, 1.0):
        _, y = place(0, share * top_value)
        parts.append(
            f'<line x1="{left}" x2="{_WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" opacity="0.15"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{share * top_value:.3g}</text>'
        )
    for index in range(num_points):
        x, _ = place(index, 0)
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{index}</text>')
    for number, (name, values) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [place(index, value) for index, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
        y = top + 16 * number + 8
        parts.append(
            f'<circle cx="{_WIDTH - right + 18}" cy="{y - 4}" r="4" fill="{colour}"/>'
            f'<text x="{_WIDTH - right + 28}" y="{y}">{escape(name)}</text>'
        )
    parts.append(f'<text x="{(left + _WIDTH - right) / 2:.0f}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    return _svg(title, max(height, top + 16 * len(series) + 16), parts)


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f'<text x="0" y="14" font-weight="bold">{escape(title)}</text>{"".join(parts)}</svg>'
    )
