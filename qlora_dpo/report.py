"""`report.html`: a training run on one page that needs no network, no script and no other file.

Charts are inline SVG, 360 units wide so that their text is as large as the page's on a phone. Colours are CSS variables
that follow the reader's light or dark mode. Every text from the run passes `_text`, the only way into the page.
"""

import heapq
import html
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from operator import itemgetter
from pathlib import Path
from typing import Any

from qlora_dpo.measures import PreferenceReport, Slice

REPORT_PAGE = "report.html"
STATE_NAME = "trainer_state.json"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
SIDES = ("chosen", "rejected")
CURVES = {
    "Loss": {"": "loss"},
    "Accuracy": {"": "rewards/accuracies"},
    "Margin": {"": "rewards/margins"},
    "Rewards": {side: f"rewards/{side}" for side in SIDES},
    "Log-probabilities, nats": {side: f"logps/{side}" for side in SIDES},
    "KL from the reference, nats per token": {side: f"kl/{side}" for side in SIDES},
}
"""Charts by title: the log keys in each, by what the legend calls them."""

MOST_SLICES, SHOWN_PAIRS, CLIP = 40, 5, 320
_UNPRINTABLE = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 46, 350, 8, 180
_STYLE = """
:root{color-scheme:light dark;--ink:#1c2230;--soft:#5d6677;--rule:#d9dde5;--paper:#fff;--card:#f5f6f9;--c0:#1d5fd0;
--c1:#c2410c}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9f0;--soft:#9aa4b6;--rule:#343b49;--paper:#12151c;--card:#1b2029;
--c0:#7fb0ff;--c1:#ffa066}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:70rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}h3{font-size:1rem;margin:0 0 .3rem}
.soft,figcaption,.legend{color:var(--soft);font-size:.85rem}p{margin:.3rem 0}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr))}
.card,figure{margin:0;padding:.8rem;border-radius:.6rem;background:var(--card);min-width:0}
figure{max-width:34rem}.big{font-size:1.5rem;font-weight:600;line-height:1.3}
figure>svg{display:block;width:100%;height:auto}svg text{font:11px system-ui,sans-serif;
fill:var(--soft);stroke:var(--card);stroke-width:4px;paint-order:stroke}
svg .rule{stroke:var(--rule);fill:none}svg .zero{stroke:var(--soft);fill:none}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--soft)}
.legend{list-style:none;padding:0;margin:.3rem 0 0;display:flex;flex-wrap:wrap;gap:.1rem .9rem}
.legend svg{width:22px;height:10px;margin-right:.3rem}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:.25rem .8rem .25rem 0;
border-bottom:1px solid var(--rule)}th{font-weight:500;color:var(--soft);width:11rem;overflow-wrap:normal}
.pair{margin:0 0 1rem}.text{white-space:pre-wrap;unicode-bidi:isolate;font-size:.9rem;margin:.1rem 0 .6rem;
padding-left:.6rem;border-left:3px solid currentColor}.text>*,.text{overflow-wrap:anywhere}
.text span,.text summary{color:var(--ink)}summary{cursor:pointer}
@media(max-width:30rem){th{width:7.5rem}}
"""


def write_report(run_dir: str) -> str:
    """Write `report.html` of a training run, whatever parts of it there are, into its folder.

    Args:
        run_dir: Folder with `trainer_state.json`, and perhaps `metrics.json`, `qlora_dpo.json`, adapters, and
            `report.json` and `pairs.jsonl` in `evaluation/before` and `evaluation/after`.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If there is no such folder, or it has no `trainer_state.json`.
        ValueError: If `trainer_state.json` holds no log history.
    """
    run = Path(run_dir)
    state = _state(run)
    notes: list[str] = []
    metrics, record = (_optional(run / name, notes) for name in ("metrics.json", "qlora_dpo.json"))
    folders = {when: run / "evaluation" / when for when in ("before", "after")}
    reports = {when: found for when, path in folders.items() if (found := _report(path / "report.json", notes))}
    pairs = {when: path / "pairs.jsonl" for when, path in folders.items() if (path / "pairs.jsonl").is_file()}
    notes += [f"evaluation/{when}/pairs.jsonl is missing." for when in folders if when not in pairs]
    title = _text(f"Preference training of {run.resolve().name}")
    sections = {
        "Result": _headline(reports, metrics),
        "Curves": _curves(state["log_history"]),
        "Margins and calibration": _distributions(reports, pairs),
        "Accuracy by part, with 95 % intervals": _slices(reports),
        "Pairs": _extremes(pairs),
        "What was trained": _facts(run, state, metrics, record),
        "Missing from the run folder": "".join(f'<p class="soft">{_text(note)}</p>' for note in notes),
    }
    body = "".join(f"<section><h2>{name}</h2>{content}</section>\n" for name, content in sections.items() if content)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}</body></html>\n"
    )
    path = run / REPORT_PAGE
    path.write_text(page, encoding="utf-8")
    return str(path)


def _state(run: Path) -> dict[str, Any]:
    if not run.is_dir():
        raise FileNotFoundError(f"`run_dir` must be a folder, got {run}. Pass the `output_dir` of a training run.")
    path = run / STATE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"`run_dir` must hold {STATE_NAME}, got {run} without it. Call trainer.save_state().")
    notes: list[str] = []
    state = _optional(path, notes)
    history = state.get("log_history")
    if not isinstance(history, list) or not all(isinstance(line, dict) for line in history):
        got = "no JSON object" if notes else f"{type(history).__name__} as `log_history`"
        raise ValueError(f"`run_dir` must hold a log history in {STATE_NAME}, got {got}. Call trainer.save_state().")
    return state


def _optional(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object of the run, or an empty one and a note."""
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # JSON and UTF-8 errors alike
        found = None
    if not isinstance(found, dict):
        notes.append(f"{path.name} is not a JSON object.")
        return {}
    return found


def _report(path: Path, notes: list[str]) -> PreferenceReport | None:
    name = f"evaluation/{path.parent.name}/{path.name}"
    try:
        return PreferenceReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        notes.append(f"{name} is missing.")
    except (ValueError, KeyError, TypeError):
        notes.append(f"{name} is no report of this version.")
    return None


def _pairs(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `pairs.jsonl` that have a finite margin."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                pair = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was cut off
            if isinstance(pair, dict) and math.isfinite(_float(pair.get("margin"))):
                yield pair


def _float(value: Any) -> float:
    """A number that can be drawn, or NaN."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e100 else math.nan


def _text(value: Any) -> str:
    """Any value as text that HTML and XML take as it is."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(value).replace("\r\n", "\n")))


def _short(value: Any, width: int) -> str:
    text = str(value)
    return _text(text if len(text) <= width else text[: width - 1] + "…")


def _headline(reports: Mapping[str, PreferenceReport], metrics: Mapping[str, Any]) -> str:
    logged = {when: found for when in ("before", "after") if isinstance(found := metrics.get(when), dict)}
    if not reports and not logged:
        return "<p>No evaluation was saved: give the run a test split to see accuracy, margin and calibration.</p>"

    def card(name: str, key: str, value: Callable[[PreferenceReport], float], note: str) -> str:
        numbers = [
            value(reports[when]) if when in reports else logged.get(when, {}).get(key) for when in ("before", "after")
        ]
        big = " → ".join("?" if number is None else f"{_float(number):.3f}" for number in numbers)
        return f'<div class="card"><h3>{name}</h3><p class="big">{big}</p><p class="soft">{note}</p></div>'

    shares = [
        f"{when} [{report.accuracy.low:.3f}, {report.accuracy.high:.3f}], {_text(report.accuracy.method)}"
        for when, report in reports.items()
    ]
    cards = [
        card("Accuracy", "eval_rewards/accuracies", lambda report: report.accuracy.value, "; ".join(shares)),
        card("Margin", "eval_rewards/margins", lambda report: report.margin.mean, "mean reward, chosen less rejected"),
        card("ECE", "", lambda report: report.calibration.ece, "calibration error; 0 is best"),
    ]
    size = [
        f"{when}: {_text(report.name)}, {report.pairs:,} pairs of {report.groups:,} prompts, "
        f"ties {100 * report.ties:.1f} %, accuracy of the reference {_text(report.reference_accuracy)}"
        for when, report in reports.items()
    ]
    lines = "".join(f'<p class="soft">{line}</p>' for line in size)
    return f'<p class="soft">Before → after training.</p><div class="grid">{"".join(cards)}</div>{lines}'


@dataclass(frozen=True)
class _Line:
    """A curve: what the legend calls it, its points by x, its colour, and 0 for training or the evaluation's number."""

    label: str
    points: list[tuple[float, float]]
    colour: int
    kind: int

    @property
    def stroke(self) -> str:
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
            parts.append(f'<text x="{self.px(tick)}" y="{_BOTTOM + 16}" text-anchor="middle">{label}</text>')
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


def _svg(label: str, height: float, *parts: str) -> str:
    head = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">'
    return f"{head}{''.join(parts)}</svg>"


def _figure(title: str, svg: str, legend: Mapping[str, str], note: str = "") -> str:
    """A chart with its heading, a legend of `label: shape`, and a line to explain it."""
    items = "".join(
        f'<li><svg viewBox="0 0 22 10" aria-hidden="true">{shape}</svg>{label}</li>' for label, shape in legend.items()
    )
    caption = f"<figcaption>{note}</figcaption>" if note else ""
    return f'<figure><h3>{title}</h3>{svg}<ul class="legend">{items}</ul>{caption}</figure>'


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """A key's value at each step, the last of several, and NaN for what is no number."""
    found = {_float(line["step"]): _float(line[key]) for line in history if key in line and "step" in line}
    return sorted((step, value) for step, value in found.items() if math.isfinite(step))


def _lines(history: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> list[_Line]:
    marker = re.compile("eval_(?:(.*)_)?rewards/accuracies", re.DOTALL)
    sets = list(dict.fromkeys(m[1] or "" for line in history for key in line if (m := marker.fullmatch(key))))
    lines = []
    for colour, (side, key) in enumerate(keys.items()):
        lines.append(_Line(f"training {side}", _points(history, key), colour, 0))
        for number, name in enumerate(sets or [""], 1):
            found = _points(history, f"eval_{name}_{key}" if name else f"eval_{key}")
            lines.append(_Line(f"evaluation {name} {side}", found, colour, number))
    return [line for line in lines if line.points]


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    figures = [_line_chart(title, lines) for title, keys in CURVES.items() if (lines := _lines(history, keys))]
    missing = [_text(title) for title, keys in CURVES.items() if not _lines(history, keys)]
    note = f'<p class="soft">Not logged: {"; ".join(missing)}.</p>' if missing else ""
    return f'<div class="grid">{"".join(figures)}</div>{note}'


def _line_chart(title: str, lines: Sequence[_Line]) -> str:
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
    legend = {_text(" ".join(line.label.split())): f'<path {line.stroke} d="M0 5H22"/>' for line in lines}
    return _figure(_text(title), _svg(f"{_text(title)} by training step", 204, *parts), legend, note)


def _distributions(reports: Mapping[str, PreferenceReport], pairs: Mapping[str, Path]) -> str:
    margins = {when: [float(pair["margin"]) for pair in _pairs(path)] for when, path in pairs.items()}
    margins = {when: values for when, values in margins.items() if values}
    parts = [_histogram(margins)] if margins else []
    parts += [_reliability({when: report.calibration.curve for when, report in reports.items()})] if reports else []
    return f'<div class="grid">{"".join(parts)}</div>' if parts else ""


def _colour(when: str) -> str:
    return 'class="c0"' if when == "after" else 'class="c2"'


def _dots(names: Iterable[str]) -> dict[str, str]:
    """A legend of dots."""
    return {when: f'<circle {_colour(when)} cx="11" cy="5" r="4" fill="currentColor"/>' for when in names}


def _histogram(sets: Mapping[str, list[float]]) -> str:
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
    return _figure("Margin", _svg("Margins before and after training", 204, *parts), legend, note)


def _reliability(curves: Mapping[str, list[tuple[float, float, int]]]) -> str:
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
    return _figure("Reliability", _svg("Share of pairs ranked right by confidence", 204, *parts), _dots(curves), note)


def _slices(reports: Mapping[str, PreferenceReport]) -> str:
    figures = []
    for title, name in {"Length": "by_length", "Subset": "by_subset", "Turns": "by_turns"}.items():
        parts = {when: {part.name: part for part in getattr(report, name)} for when, report in reports.items()}
        if any(parts.values()):
            figures.append(_intervals(title, parts))
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _intervals(title: str, sets: Mapping[str, Mapping[str, Slice]]) -> str:
    """A row for each part: its name, and for each set its accuracy as a dot on its interval."""
    names = list(dict.fromkeys(name for parts in sets.values() for name in parts))
    plane, height = _Plane((0, 1), (0, 1)), 12 + 42 * min(len(names), MOST_SLICES)
    parts = [f'<path class="{"zero" if x == 0.5 else "rule"}" d="M{plane.px(x)} 4V{height}"/>' for x in (0, 0.5, 1)]
    parts += [f'<text x="{plane.px(x)}" y="{height + 14}" text-anchor="middle">{x}</text>' for x in (0, 0.5, 1)]
    for number, name in enumerate(names[:MOST_SLICES]):
        found = [(when, slices[name].accuracy) for when, slices in sets.items() if name in slices]
        top, last = 18 + 42 * number, found[-1][1]
        label = f"{_short(name, 24)}: {last.value:.3f} [{last.low:.2f}, {last.high:.2f}], {last.count:,} pairs"
        parts.append(f'<text x="{_LEFT + 4}" y="{top}">{label}</text>')
        for row, (when, share) in enumerate(found):
            y, ends = top + 9 + 9 * row, f"{plane.px(_float(share.low))} {plane.px(_float(share.high))}".split()
            if "nan" in ends or math.isnan(_float(share.value)):
                continue
            dot = f'<circle cx="{plane.px(share.value)}" cy="{y}" r="3.4" fill="currentColor"/>'
            line = f'<path stroke="currentColor" stroke-width="1.6" d="M{ends[0]} {y}H{ends[1]}"/>'
            parts.append(f"<g {_colour(when)}>{line}{dot}</g>")
    left = len(names) - MOST_SLICES
    note = f"numbers: {list(sets)[-1]}" + f"; {left} more not shown" * (left > 0)
    return _figure(title, _svg(f"Accuracy by {title.lower()}", height + 20, *parts), _dots(sets), note)


def _extremes(pairs: Mapping[str, Path]) -> str:
    """The pairs that were judged most wrongly and most rightly, after training where that is known."""
    if not pairs:
        return ""
    when = "after" if "after" in pairs else "before"

    margin = itemgetter("margin")
    wrong = heapq.nsmallest(SHOWN_PAIRS, (pair for pair in _pairs(pairs[when]) if margin(pair) < 0), key=margin)
    right = heapq.nlargest(SHOWN_PAIRS, (pair for pair in _pairs(pairs[when]) if margin(pair) > 0), key=margin)
    parts = []
    for title, found in {"Most wrong": wrong, "Most right": right}.items():
        parts.append(f"<h3>{title}, {when} training</h3>" + "".join(map(_pair, found)))
        parts.append("" if found else '<p class="soft">No such pair.</p>')
    return "".join(parts)


def _pair(pair: Mapping[str, Any]) -> str:
    subset = "" if pair.get("subset") is None else f", subset {_text(pair['subset'])}"
    head = f"row {_text(pair.get('row', '?'))}, pair {_text(pair.get('pair', '?'))}{subset}"
    texts = []
    for colour, name in {2: "prompt", 0: "chosen", 1: "rejected"}.items():
        reward, tokens = _float(pair.get(f"reward_{name}")), pair.get(f"tokens_{name}")
        label = name + f", reward {reward:.3f}" * math.isfinite(reward)
        label += "" if tokens is None else f", {_text(f'{_float(tokens):g}')} tokens"
        content = str(pair.get(name, ""))
        shown = f"<span>{_text(content)}</span>"
        if len(content) > CLIP:
            shown = f"<details><summary>{_short(content, CLIP)}</summary>{shown}</details>"
        texts.append(f'<p class="soft">{label}</p><div class="text c{colour}" dir="auto">{shown}</div>')
    return f'<div class="card pair"><p><b>margin {pair["margin"]:.3f}</b>, {head}</p>{"".join(texts)}</div>'


def _facts(run: Path, state: Mapping[str, Any], metrics: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """What was trained, on what, with which loss, and the versions of the packages."""
    shown = {name.replace("_", " "): value for name, value in record.items() if value is not None}
    for path in sorted([*run.glob("adapter_config.json"), *run.glob("*/adapter_config.json")]):
        if path.parent.name.startswith("checkpoint-"):
            continue
        config = _optional(path, [])
        lora = {name: config[name] for name in ("r", "lora_alpha", "lora_dropout", "target_modules") if name in config}
        files = {file.name: f"{file.stat().st_size:,} bytes" for file in sorted(path.parent.glob("adapter_model*"))}
        shown["adapter" if path.parent == run else f"adapter {path.parent.name}"] = lora | files
    shown |= {name: state[key] for name, key in {"steps": "global_step", "epochs": "epoch"}.items() if key in state}
    train = metrics.get("train")
    if isinstance(train, dict) and "train_runtime" in train:
        shown["time"] = f"{_float(train['train_runtime']):.1f} s"
    shown["installed when this page was written"] = {name: _version(name) for name in PACKAGES}
    rows = (f"<tr><th>{_text(name)}</th><td>{_value(value)}</td></tr>" for name, value in shown.items())
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "<br>".join(f"{_text(name)}: {_value(part)}" for name, part in value.items())
    return ", ".join(map(_value, value)) if isinstance(value, list) else _text(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
