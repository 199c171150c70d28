"""Charts as SVG, for a page that is light or dark, and as PNG.

They are 360 units wide, so that their text is as large as the page's on a phone. Colours are CSS classes: `COLOURS` has
their values by mode. Every text from a run passes `as_html`, the only way into a chart or a page.
"""

import functools
import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_dpo.measures import Slice

COLOURS = {
    "light": {"ink": "#1c2230", "soft": "#5d6677", "rule": "#d9dde5", "paper": "#fff", "card": "#f5f6f9"}
    | {"c0": "#1d5fd0", "c1": "#c2410c"},
    "dark": {"ink": "#e6e9f0", "soft": "#9aa4b6", "rule": "#343b49", "paper": "#12151c", "card": "#1b2029"}
    | {"c0": "#7fb0ff", "c1": "#ffa066"},
}
"""Colours by mode and name."""
CHART_STYLE = """
svg text{font:11px system-ui,sans-serif;fill:var(--soft);stroke:var(--card);stroke-width:4px;paint-order:stroke}
svg .rule{stroke:var(--rule);fill:none}svg .zero{stroke:var(--soft);fill:none}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--soft)}
"""
"""How a chart's classes look, in terms of `COLOURS`."""

MOST_SLICES = 40
_UNPRINTABLE = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 46, 350, 8, 180
_DIGIT = 6.6
"""Width of a digit at most, in the fonts that are `system-ui`."""


def drawable(value: Any) -> float:
    """A number that can be drawn, or NaN."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e100 else math.nan


def as_html(value: Any) -> str:
    """Any value as text that HTML and XML take as it is."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(value).replace("\r\n", "\n")))


def clipped(value: Any, width: int) -> str:
    """Escaped, and cut at so many characters."""
    text = str(value)
    return as_html(text if len(text) <= width else text[: width - 1] + "…")


_FONTS = "'DejaVu Sans','Liberation Sans','Noto Sans',Arial,Helvetica,'Segoe UI',sans-serif"
"""By name: where there is no browser, a family that is not installed is no text at all."""


@dataclass(frozen=True)
class Line:
    """A curve: what the legend calls it, its points by x, its colour, and 0 for training or the evaluation's number."""

    label: str
    points: list[tuple[float, float]]
    colour: int
    kind: int

    @property
    def stroke(self) -> str:
        """Attributes of its path: thin for training, broken for the second evaluation set and on."""
        dash = f' stroke-dasharray="{8 - 2 * min(self.kind, 3)} 3"' if self.kind > 1 else ""
        look = f'stroke-width="{2 if self.kind else 1.2}" opacity="{1 if self.kind else 0.6}"'
        return f'class="c{self.colour}" stroke="currentColor" fill="none" {look}{dash}'


@dataclass(frozen=True)
class _Plane:
    """Where the numbers of a chart lie on it."""

    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, x: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * (x - self.x[0]) / (self.x[1] - self.x[0]), 1)

    def py(self, y: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * (y - self.y[0]) / (self.y[1] - self.y[0]), 1)

    def axes(self, whole: bool = False) -> str:
        """Rules and numbers; on x only whole ones for training steps."""
        parts = []
        for tick, label in _ticks(self.y, 5):
            y = self.py(tick)
            parts.append(f'<path class="rule" d="M{_LEFT} {y}H{_RIGHT}"/>')
            parts.append(f'<text x="{_LEFT - 5}" y="{y + 4}" text-anchor="end">{label}</text>')
        for tick, label in _ticks(self.x, 5, 1 if whole else 0):
            x = round(min(self.px(tick), _WIDTH - _DIGIT * len(label) / 2), 1)  # none sticks out at the right
            parts.append(f'<text x="{x}" y="{_BOTTOM + 16}" text-anchor="middle">{label}</text>')
        return "".join(parts)


def _step(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


def _ticks(ends: tuple[float, float], most: int, least: float = 0) -> list[tuple[float, str]]:
    step = max(least, _step((ends[1] - ends[0]) / most))
    numbers = range(math.ceil(ends[0] / step - 1e-9), math.floor(ends[1] / step + 1e-9) + 1)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    plain = decimals < 5 and max(map(abs, ends)) < 1e5
    return [(n * step, f"{n * step:.{decimals}f}" if plain else f"{n * step:.3g}") for n in numbers]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis: a little more than the values, and something to see where they are all the same."""
    low, high = min(values), max(values)
    alike = high - low <= 1e-9 * max(abs(low), abs(high))
    pad = (abs(low) / 10 or 1.0) if alike else (high - low) / 20
    return low - pad, high + pad


@dataclass(frozen=True)
class Chart:
    """A drawing 360 units wide with its heading, a legend of `label: shape`, and a line to explain it."""

    title: str
    label: str
    height: float
    drawing: str
    legend: Mapping[str, str]
    note: str = ""

    def figure(self) -> str:
        """As a part of a page."""
        head = f'<svg viewBox="0 0 {_WIDTH} {self.height}" role="img" aria-label="{as_html(self.label)}">'
        items = "".join(
            f'<li><svg viewBox="0 0 22 10" aria-hidden="true">{shape}</svg>{as_html(label)}</li>'
            for label, shape in self.legend.items()
        )
        legend = f'<ul class="legend">{items}</ul>' + f"<figcaption>{self.note}</figcaption>" * bool(self.note)
        return f"<figure><h3>{as_html(self.title)}</h3>{head}{self.drawing}</svg>{legend}</figure>"

    def png(self) -> bytes:
        """As a picture of its own, light, three pixels a unit.

        Raises:
            ImportError: Without the package `resvg_py`, the extra `report`.
        """
        from resvg_py import svg_to_bytes

        style = CHART_STYLE + "text.title{font:600 14px system-ui,sans-serif;fill:var(--ink)}"
        style = style.replace("system-ui,sans-serif", _FONTS)
        for name, value in COLOURS["light"].items():
            style = style.replace(f"var(--{name})", value)
        rows = [
            f'<svg x="12" y="{14 + 18 * i}" width="22" height="10">{shape}</svg><text x="40" y="{23 + 18 * i}">'
            f"{as_html(label)}</text>"
            for i, (label, shape) in enumerate(self.legend.items())
        ]
        height = 30 + self.height + 18 * len(rows) + 18
        picture = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}">'
            f'<text class="title" x="12" y="20">{as_html(self.title)}</text><g transform="translate(0 30)">'
            f'{self.drawing}</g><g transform="translate(0 {30 + self.height})">{"".join(rows)}</g></svg>'
        )
        background, scale = COLOURS["light"]["card"], 3
        return bytes(svg_to_bytes(svg_string=picture, style_sheet=style, background=background, zoom=scale))


@functools.cache
def draws_words() -> bool:
    """Whether pictures have their words: where no font is installed they are left out without an error.

    Raises:
        ImportError: Without the package `resvg_py`, the extra `report`.
    """
    from resvg_py import svg_to_bytes

    picture = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 20"><text y="15" font-family="{}">{}</text></svg>'
    )
    without, within = (bytes(svg_to_bytes(svg_string=picture.format(_FONTS, word))) for word in ("", "W"))
    return without != within


def line_chart(title: str, lines: Sequence[Line]) -> Chart:
    """Curves by training step, broken where a value is not finite; points without neighbours are dots."""
    seen = [point for line in lines for point in line.points if math.isfinite(point[1])]
    lost = sum(math.isnan(y) for line in lines for _, y in line.points)
    note = "by training step" + f"; {lost} value{'s' * (lost > 1)} not finite" * (lost > 0)
    plane = _Plane(_span([x for x, _ in seen] or [0]), _span([y for _, y in seen] or [0]))
    parts = [plane.axes(whole=True)]
    for line in lines:
        points, path, dots, pen = line.points, [], [], "M"
        for i, (x, y) in enumerate(points):
            if not math.isfinite(y):
                pen = "M"
                continue
            path.append(f"{pen}{plane.px(x)} {plane.py(y)}")
            alone = pen == "M" and (i + 1 == len(points) or not math.isfinite(points[i + 1][1]))
            if alone or (line.kind and len(points) <= 60):
                dots.append(f'<circle cx="{plane.px(x)}" cy="{plane.py(y)}" r="2.6" fill="currentColor"/>')
            pen = "L"
        parts.append(f'<path {line.stroke} d="{" ".join(path)}"/>' if path else "")
        parts.append(f'<g class="c{line.colour}">{"".join(dots)}</g>')
    legend = {" ".join(line.label.split()): f'<path {line.stroke} d="M0 5H22"/>' for line in lines}
    return Chart(title, f"{title} by training step", 204, "".join(parts), legend, note)


def _colour(when: str) -> str:
    return 'class="c0"' if when == "after" else 'class="c2"'


def _dots(names: Iterable[str]) -> dict[str, str]:
    """A legend of dots."""
    return {when: f'<circle {_colour(when)} cx="11" cy="5" r="4" fill="currentColor"/>' for when in names}


def histogram(sets: Mapping[str, list[float]]) -> Chart:
    """Share of pairs by margin. A set of equal margins, such as an untrained adapter's, is a line across the chart."""
    low, high = _span([value for values in sets.values() for value in values])
    width = _step((high - low) / 24)
    shares: dict[str, dict[int, float]] = {}
    for when, values in sets.items():
        shares[when] = {}
        for value in values if min(values) < max(values) else []:
            number = math.floor(value / width)
            shares[when][number] = shares[when].get(number, 0) + 1 / len(values)
    top = max((share for found in shares.values() for share in found.values()), default=1)
    plane = _Plane((math.floor(low / width) * width, math.ceil(high / width) * width), (0, 1.05 * top))
    parts, legend = [plane.axes()], {}
    for when, values in sets.items():
        look = f'{_colour(when)} stroke="currentColor" fill="currentColor"'
        if not shares[when]:
            at = f'd="M{plane.px(values[0])} {_BOTTOM}V{_TOP}"'
            parts.append(f'<path {look} stroke-width="2" stroke-dasharray="5 3" {at}/>')
            legend[f"{when}: all {len(values):,} at {values[0]:.3g}"] = f'<path {look} d="M0 5H22"/>'
            continue
        for number, share in sorted(shares[when].items()):
            x, y = plane.px(number * width), plane.py(share)
            box = f'x="{x}" y="{y}" width="{plane.px((number + 1) * width) - x:.1f}" height="{_BOTTOM - y:.1f}"'
            parts.append(f'<rect {look} fill-opacity="0.3" {box}/>')
        shape = 'fill-opacity="0.3" x="1" y="1" width="20" height="8"'
        legend[f"{when}, {len(values):,} pairs"] = f"<rect {look} {shape}/>"
    if plane.x[0] < 0 < plane.x[1]:
        parts.append(f'<path class="zero" d="M{plane.px(0)} {_BOTTOM}V{_TOP}"/>')
    note = "share of pairs; right of 0 the chosen completion has the higher reward"
    return Chart("Margins", "Margins before and after training", 204, "".join(parts), legend, note)


def reliability(curves: Mapping[str, list[tuple[float, float, int]]]) -> Chart:
    """Outcome by confidence; a dot's area is its pairs, and the diagonal is perfect calibration."""
    plane = _Plane((0.48, 1.02), (-0.03, 1.03))
    ends = f"M{plane.px(0.5)} {plane.py(0.5)}L{plane.px(1)} {plane.py(1)}"
    parts = [plane.axes(), f'<path class="zero" stroke-dasharray="3 3" d="{ends}"/>']
    for when, curve in curves.items():
        most = max((count for _, _, count in curve), default=1)
        at = [(plane.px(confidence), plane.py(outcome), count) for confidence, outcome, count in curve]
        path = " ".join(f"{'L' if i else 'M'}{x} {y}" for i, (x, y, _) in enumerate(at))
        dots = "".join(
            f'<circle cx="{x}" cy="{y}" r="{2 + 5 * math.sqrt(count / most):.1f}" fill="currentColor" '
            f'fill-opacity="0.45"><title>{count:,} pairs</title></circle>'
            for x, y, count in at
        )
        line = f'<path stroke="currentColor" fill="none" d="{path}"/>' if path else ""
        parts.append(f"<g {_colour(when)}>{line}{dots}</g>")
    note = "share of pairs ranked right, by confidence, the sigmoid of the margin's size; calibrated is dashed"
    label = "Share of pairs ranked right by confidence"
    return Chart("Reliability", label, 204, "".join(parts), _dots(curves), note)


def intervals(title: str, sets: Mapping[str, Mapping[str, Slice]]) -> Chart:
    """A row for each part: its name, and below it for each set its accuracy as a dot on its interval."""
    names = list(dict.fromkeys(name for parts in sets.values() for name in parts))
    plane, height = _Plane((0, 1), (0, 1)), 12 + 42 * min(len(names), MOST_SLICES)
    rules = {"rule": (0, 1), "zero": (0.5,)}
    parts = [f'<text x="{plane.px(x)}" y="{height + 14}" text-anchor="middle">{x}</text>' for x in (0, 0.5, 1)]
    for number, name in enumerate(names[:MOST_SLICES]):
        found = [(when, slices[name].accuracy) for when, slices in sets.items() if name in slices]
        top, last = 18 + 42 * number, found[-1][1]
        label = f"{clipped(name, 24)}: {last.value:.3f} [{last.low:.2f}, {last.high:.2f}], {last.count:,} pairs"
        parts.append(f'<text x="6" y="{top}">{label}</text>')
        foot = height if number + 1 == min(len(names), MOST_SLICES) else top + 28  # above the next name
        for kind, places in rules.items():
            parts.append(f'<path class="{kind}" d="{"".join(f"M{plane.px(x)} {top + 5}V{foot}" for x in places)}"/>')
        for row, (when, share) in enumerate(found):
            y, ends = top + 9 + 9 * row, f"{plane.px(drawable(share.low))} {plane.px(drawable(share.high))}".split()
            if "nan" in ends or math.isnan(drawable(share.value)):
                continue
            dot = f'<circle cx="{plane.px(share.value)}" cy="{y}" r="3.4" fill="currentColor"/>'
            line = f'<path stroke="currentColor" stroke-width="1.6" d="M{ends[0]} {y}H{ends[1]}"/>'
            parts.append(f"<g {_colour(when)}>{line}{dot}</g>")
    left = len(names) - MOST_SLICES
    note = f"numbers: {list(sets)[-1]}" + f"; {left} more not shown" * (left > 0)
    return Chart(title, f"Accuracy by {title.lower()}", height + 20, "".join(parts), _dots(sets), note)
