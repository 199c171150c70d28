"""`report.html`: a training run on one page that needs no network, no script and no other file.

Its colours follow the reader's light or dark mode. Beside it the same charts lie as PNG, where `resvg_py` is installed.
"""

import heapq
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qlora_dpo.charts import (
    CHART_STYLE,
    COLOURS,
    Chart,
    Line,
    as_html,
    drawable,
    draws_words,
    histogram,
    intervals,
    line_chart,
    reliability,
)
from qlora_dpo.generations import GENERATIONS_NAME
from qlora_dpo.measures import Estimate
from qlora_dpo.origins import versions
from qlora_dpo.paths import EVALUATIONS, JUDGED, METRICS_NAME, OF_WEIGHTS, PAIRS_NAME, RECORD_NAME, REPORT_NAME
from qlora_dpo.preference_report import PreferenceReport
from qlora_dpo.record import weights_hash_of

REPORT_PAGE, PICTURES = "report.html", "charts"
UNTOLD = {"run", "evaluations", "bco_delta"}
"""Fields of the record that are shown elsewhere on the page or serve only to go on with a run."""
_WAY_OUT = (
    "Name the `output_dir` of a training or one of its checkpoints; after training, trainer.save_model() and "
    "trainer.save_state() write it."
)
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

SHOWN_PAIRS, CLIP = 5, 320
_STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:70rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}h3{font-size:1rem;margin:0 0 .3rem}
.soft,figcaption,.legend{color:var(--soft);font-size:.85rem}p{margin:.3rem 0}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr))}
.card,figure{margin:0;padding:.8rem;border-radius:.6rem;background:var(--card);min-width:0}
figure{max-width:34rem}.big{font-size:1.5rem;font-weight:600;line-height:1.3}
figure>svg{display:block;width:100%;height:auto}
.legend{list-style:none;padding:0;margin:.3rem 0 0;display:flex;flex-wrap:wrap;gap:.1rem .9rem}
.legend svg{width:22px;height:10px;margin-right:.3rem}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:.25rem .8rem .25rem 0;
border-bottom:1px solid var(--rule)}th{font-weight:500;color:var(--soft);width:11rem;overflow-wrap:normal}
.pair{margin:0 0 1rem}.text{white-space:pre-wrap;unicode-bidi:isolate;font-size:.9rem;margin:.1rem 0 .6rem;
padding-left:.6rem;border-left:3px solid currentColor}.text>*,.text{overflow-wrap:anywhere}
.text span,.text summary{color:var(--ink)}.text i{color:var(--soft);font-style:normal;font-size:.7rem}
summary{cursor:pointer}
@media(max-width:30rem){th{width:7.5rem}}
"""


def write_report(run_dir: str) -> str:
    """Write `report.html` of a training run, whatever parts of it there are, into its folder, and `charts/*.png`.

    Args:
        run_dir: Folder with `trainer_state.json`, and perhaps `metrics.json`, `qlora_dpo.json`, adapters, and
            `report.json` and `pairs.jsonl` in `evaluation/before` and `evaluation/after`, and `generations.jsonl`.
            What is of another adapter than the one that lies there is left out.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If there is no such folder, or it has no `trainer_state.json`.
        ValueError: If `trainer_state.json` holds no log history.
    """
    run = Path(run_dir)
    state = _state(run)
    notes: list[str] = []
    metrics, record = (_optional(run / name, notes) for name in (METRICS_NAME, RECORD_NAME))
    folders = _judged(run, metrics, notes)
    reports = {when: found for when, path in folders.items() if (found := _report(path / REPORT_NAME, notes))}
    pairs = {when: path / PAIRS_NAME for when, path in folders.items() if (path / PAIRS_NAME).is_file()}
    without = [folder.relative_to(run).as_posix() for when, folder in folders.items() if when not in pairs]
    notes += [f"{folder}/{PAIRS_NAME} is missing." for folder in without]
    curves, distributions, slices = curve_charts(state["log_history"]), _distributions(reports, pairs), _slices(reports)
    notes += write_pictures(run / PICTURES, [*curves, *distributions, *slices])
    special = _special_tokens(run)
    title = as_html(f"Preference training of {run.resolve().name}")
    sections = {
        "Result": _headline(reports, metrics, record),
        "Curves": _grid(curves) + _not_logged(curves),
        "Margins and calibration": _grid(distributions),
        "Accuracy by part, with 95 % intervals": _grid(slices),
        "Pairs": _extremes(pairs, special),
        "Answers": _answers(run / GENERATIONS_NAME, special),
        "What was trained": _facts(run, state, metrics, record),
        "Missing from the run folder": "".join(f'<p class="soft">{as_html(note)}</p>' for note in notes),
    }
    body = "".join(f"<section><h2>{name}</h2>{content}</section>\n" for name, content in sections.items() if content)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{_modes()}{CHART_STYLE}{_STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}</body></html>\n"
    )
    path = run / REPORT_PAGE
    path.write_text(page, encoding="utf-8")
    return str(path)


def _modes() -> str:
    """The colours as CSS variables, dark ones where the reader wants them."""
    sets = {mode: "".join(f"--{name}:{value};" for name, value in found.items()) for mode, found in COLOURS.items()}
    return (
        f":root{{color-scheme:light dark;{sets['light']}}}@media(prefers-color-scheme:dark){{:root{{{sets['dark']}}}}}"
    )


def write_pictures(folder: Path, charts: Sequence[Chart]) -> list[str]:
    """Write each chart as a PNG; returns notes on what could not be."""
    if charts and find_spec("resvg_py") is None:
        return ["The charts as PNG: pip install 'qlora-dpo[report]' and write the report again."]
    for chart in charts:
        folder.mkdir(exist_ok=True)
        (folder / picture_name(chart.title)).write_bytes(chart.png())
    if charts and not draws_words():
        return ["Words in the charts as PNG: install a font (such as DejaVu Sans) and write the report again."]
    return []


def picture_name(title: str) -> str:
    """What the file of a chart is called.

    >>> picture_name("Log-probabilities, nats")
    'log-probabilities-nats.png'
    """
    return re.sub("[^a-z]+", "-", title.lower()).strip("-") + ".png"


def _state(run: Path) -> dict[str, Any]:
    if not run.is_dir():
        raise FileNotFoundError(f"`run_dir` must be a folder, got {run}. Pass the `output_dir` of a training run.")
    path = run / TRAINER_STATE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"`run_dir` must hold {TRAINER_STATE_NAME}, got {run} without it. {_WAY_OUT}")
    notes: list[str] = []
    state = _optional(path, notes)
    history = state.get("log_history")
    if not isinstance(history, list) or not all(isinstance(line, dict) for line in history):
        got = "no JSON object" if notes else f"{type(history).__name__} as `log_history`"
        raise ValueError(f"`run_dir` must hold a log history in {TRAINER_STATE_NAME}, got {got}. {_WAY_OUT}")
    return state


def _judged(run: Path, metrics: dict[str, Any], notes: list[str]) -> dict[str, Path]:
    """Folders with evaluations of the run, by when: its own, or the last of `qlora-dpo evaluate` on its adapter.

    The numbers of another run in the same folder are taken out of `metrics`.
    """
    weights = weights_hash_of(run)
    found = {when: run / path for when, path in JUDGED.items()}
    if metrics.get(OF_WEIGHTS, weights) != weights:
        notes.append(f"{METRICS_NAME} and evaluation/ are of another run, whose adapter was written over.")
        metrics.clear()
        found = {}
    if "after" not in found or not (found["after"] / REPORT_NAME).is_file():
        later = sorted((run / EVALUATIONS).glob(f"*/{METRICS_NAME}"), key=lambda path: path.stat().st_mtime)
        of_these = [path.parent for path in later if weights and _optional(path, []).get(OF_WEIGHTS) == weights]
        found |= {"after": of_these[-1]} if of_these else {}
    return found


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
    name = "/".join(path.parts[-3:])
    try:
        return PreferenceReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        notes.append(f"{name} is missing.")
    except (ValueError, KeyError, TypeError):
        notes.append(f"{name} is no report of this version.")
    return None


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, a line each."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was cut off
            if isinstance(found, dict):
                yield found


def _pairs(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `pairs.jsonl` that have a finite margin."""
    return (pair for pair in _json_lines(path) if math.isfinite(drawable(pair.get("margin"))))


def _headline(reports: Mapping[str, PreferenceReport], metrics: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    logged = {when: found for when in ("before", "after") if isinstance(found := metrics.get(when), dict)}
    if not reports and not logged:
        return _recorded(record)

    def card(name: str, key: str, value: Callable[[PreferenceReport], float], note: str) -> str:
        numbers = [
            value(reports[when]) if when in reports else logged.get(when, {}).get(key) for when in ("before", "after")
        ]
        big = " → ".join("?" if number is None else f"{drawable(number):.3f}" for number in numbers)
        return f'<div class="card"><h3>{name}</h3><p class="big">{big}</p><p class="soft">{note}</p></div>'

    shares = [
        f"{when} [{report.accuracy.low:.3f}, {report.accuracy.high:.3f}], {as_html(report.accuracy.method)}"
        for when, report in reports.items()
    ]
    cards = [
        card("Accuracy", "eval_rewards/accuracies", lambda report: report.accuracy.value, "; ".join(shares)),
        card("Margin", "eval_rewards/margins", lambda report: report.margin.mean, "mean reward, chosen less rejected"),
        card("ECE", "", lambda report: report.calibration.ece, "calibration error; 0 is best"),
    ]
    size = [
        f"{when}: {as_html(report.name)}, {report.pairs:,} pairs of {report.groups:,} rows, "
        f"ties {100 * report.ties:.1f} %"
        + (f", accuracy of the reference {as_html(found)}" if (found := report.reference_accuracy) else "")
        for when, report in reports.items()
    ]
    lines = "".join(f'<p class="soft">{line}</p>' for line in size)
    return f'<p class="soft">Before → after training.</p><div class="grid">{"".join(cards)}</div>{lines}'


def _recorded(record: Mapping[str, Any]) -> str:
    """The evaluations of a run that was no command's: accuracy and margin of each set."""
    way = "<p>{} `qlora-dpo evaluate --adapter` on this folder adds calibration, accuracy by part, and pairs.</p>"
    found = record.get("evaluations") or {}
    if not found:
        return way.format("No evaluation of this adapter was saved.")
    lines = [
        f"<p>{as_html(name)}: accuracy {as_html(Estimate(**one['accuracy']))}, margin {one['margin']:.3f}, "
        f"{one['pairs']:,} pairs</p>"
        for name, one in found.items()
    ]
    return "".join([*lines, way.format("These are what the training recorded.")])


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """A key's value at each step, the last of several, and NaN for what is no number."""
    found = {drawable(line["step"]): drawable(line[key]) for line in history if key in line and "step" in line}
    return sorted((step, value) for step, value in found.items() if math.isfinite(step))


def _lines(history: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> list[Line]:
    marker = re.compile("eval_(?:(.*)_)?rewards/accuracies", re.DOTALL)
    sets = list(dict.fromkeys(m[1] or "" for line in history for key in line if (m := marker.fullmatch(key))))
    lines = []
    for colour, (side, key) in enumerate(keys.items()):
        lines.append(Line(f"training {side}", _points(history, key), colour, 0))
        for number, name in enumerate(sets or [""], 1):
            found = _points(history, f"eval_{name}_{key}" if name else f"eval_{key}")
            lines.append(Line(f"evaluation {name} {side}", found, colour, number))
    return [line for line in lines if line.points]


def curve_charts(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The `CURVES` that a log history has numbers for."""
    return [line_chart(title, lines) for title, keys in CURVES.items() if (lines := _lines(history, keys))]


def _not_logged(curves: Sequence[Chart]) -> str:
    missing = [title for title in CURVES if title not in [chart.title for chart in curves]]
    return f'<p class="soft">Not logged: {as_html("; ".join(missing))}.</p>' if missing else ""


def _distributions(reports: Mapping[str, PreferenceReport], pairs: Mapping[str, Path]) -> list[Chart]:
    margins = {when: [float(pair["margin"]) for pair in _pairs(path)] for when, path in pairs.items()}
    margins = {when: values for when, values in margins.items() if values}
    charts = [histogram(margins)] if margins else []
    return charts + ([reliability({when: r.calibration.curve for when, r in reports.items()})] if reports else [])


def _slices(reports: Mapping[str, PreferenceReport]) -> list[Chart]:
    charts = []
    for title, name in {"Length": "by_length", "Subset": "by_subset", "Turns": "by_turns"}.items():
        parts = {when: {part.name: part for part in getattr(report, name)} for when, report in reports.items()}
        if any(parts.values()):
            charts.append(intervals(title, parts))
    return charts


def _grid(charts: Sequence[Chart]) -> str:
    return f'<div class="grid">{"".join(chart.figure() for chart in charts)}</div>' if charts else ""


def _special_tokens(run: Path) -> re.Pattern[str]:
    """What matches a special token of the run's tokenizer, if that lies beside the adapter; else nothing."""
    added = _optional(run / "tokenizer.json", []).get("added_tokens")
    known = [one for one in added if isinstance(one, dict) and one.get("special")] if isinstance(added, list) else []
    texts = sorted((str(one["content"]) for one in known if one.get("content")), key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, texts)) or r"(?!)") + ")")


def _answers(path: Path, special: re.Pattern[str]) -> str:
    """The last answers that were sampled, policy and reference side by side."""
    lines = list(_json_lines(path)) if path.is_file() else []
    cards = []
    for line in [line for line in lines if line.get("step") == lines[-1].get("step")]:
        writers = {who: line[who] for who in ("policy", "reference") if isinstance(line.get(who), dict)}
        texts = [
            f'<div><p class="soft">{who}, {as_html(way)}</p>{_folded(text, colour, special)}</div>'
            for way in dict.fromkeys(way for found in writers.values() for way in found)
            for colour, (who, found) in zip((0, 2), writers.items(), strict=False)
            if (text := found.get(way)) is not None
        ]
        prompt = f'<p class="soft">prompt</p>{_folded(line.get("prompt", ""), 2, special)}'
        head = f"<p>step {as_html(line.get('step', '?'))}</p>"
        cards.append(f'<div class="card pair">{head}{prompt}<div class="grid">{"".join(texts)}</div></div>')
    return "".join(cards)


def _extremes(pairs: Mapping[str, Path], special: re.Pattern[str]) -> str:
    """The pairs that were judged most wrongly and most rightly, after training where that is known."""
    if not pairs:
        return ""
    when = "after" if "after" in pairs else "before"

    margin = itemgetter("margin")
    wrong = heapq.nsmallest(SHOWN_PAIRS, (pair for pair in _pairs(pairs[when]) if margin(pair) < 0), key=margin)
    right = heapq.nlargest(SHOWN_PAIRS, (pair for pair in _pairs(pairs[when]) if margin(pair) > 0), key=margin)
    parts = []
    for title, found in {"Most wrong": wrong, "Most right": right}.items():
        parts.append(f"<h3>{title}, {when} training</h3>" + "".join(_pair(pair, special) for pair in found))
        parts.append("" if found else '<p class="soft">No such pair.</p>')
    return "".join(parts)


def _pair(pair: Mapping[str, Any], special: re.Pattern[str]) -> str:
    subset = "" if pair.get("subset") is None else f", subset {as_html(pair['subset'])}"
    head = f"row {as_html(pair.get('row', '?'))}, pair {as_html(pair.get('pair', '?'))}{subset}"
    texts = []
    for colour, name in {2: "prompt", 0: "chosen", 1: "rejected"}.items():
        reward, tokens = drawable(pair.get(f"reward_{name}")), pair.get(f"tokens_{name}")
        label = name + f", reward {reward:.3f}" * math.isfinite(reward)
        label += "" if tokens is None else f", {as_html(f'{drawable(tokens):g}')} tokens"
        texts.append(f'<p class="soft">{label}</p>{_folded(pair.get(name, ""), colour, special)}')
    return f'<div class="card pair"><p><b>margin {pair["margin"]:.3f}</b>, {head}</p>{"".join(texts)}</div>'


def _folded(text: Any, colour: int, special: re.Pattern[str]) -> str:
    """A text in a box, its special tokens muted, and all of it behind its beginning if it is long."""
    content = str(text)
    shown = f"<span>{_muted(content, special)}</span>"
    if len(content) > CLIP:
        shown = f"<details><summary>{_muted(content[: CLIP - 1] + '…', special)}</summary>{shown}</details>"
    return f'<div class="text c{colour}" dir="auto">{shown}</div>'


def _muted(text: str, special: re.Pattern[str]) -> str:
    """Escaped, with special tokens smaller and softer than the text."""
    parts = map(as_html, special.split(text))
    return "".join(f"<i>{part}</i>" if number % 2 else part for number, part in enumerate(parts))


def _facts(run: Path, state: Mapping[str, Any], metrics: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """What was trained, on what, with which loss, and the versions of the packages."""
    told = {name: value for name, value in record.items() if value and name not in UNTOLD}
    shown = {name.replace("_", " "): value for name, value in told.items()}
    for path in sorted([*run.glob(CONFIG_NAME), *run.glob(f"*/{CONFIG_NAME}")]):
        if path.parent.name.startswith(PREFIX_CHECKPOINT_DIR):
            continue
        config = _optional(path, [])
        lora: dict[str, Any] = {name: config[name] for name in ("r", "lora_alpha", "lora_dropout") if name in config}
        lora["target_modules"] = target_names(config)
        files = {file.name: f"{file.stat().st_size:,} bytes" for file in sorted(path.parent.glob("adapter_model*"))}
        shown["adapter" if path.parent == run else f"adapter {path.parent.name}"] = lora | files
    shown |= {name: state[key] for name, key in {"steps": "global_step", "epochs": "epoch"}.items() if key in state}
    train = metrics.get("train")
    if isinstance(train, dict) and "train_runtime" in train:
        shown["time"] = f"{drawable(train['train_runtime']):.1f} s"
    shown |= {"speed and memory": speed} if (speed := _speed(state["log_history"])) else {}
    if not record.get("versions"):
        shown["installed when this page was written"] = versions()
    rows = (f"<tr><th>{as_html(name)}</th><td>{_value(value)}</td></tr>" for name, value in shown.items())
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def target_names(config: Mapping[str, Any]) -> list[str]:
    """Kinds of the layers that an adapter's config names, without their paths.

    >>> target_names({"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]})
    ['q_proj']
    """
    targets = config.get("target_modules") or []
    return [targets] if isinstance(targets, str) else sorted({str(one).split(".")[-1] for one in targets})


def _speed(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Speed and memory as the log had them last."""
    units = {"pairs_per_second": "pairs a second", "tokens_per_second": "unique tokens a second"}
    units["peak_memory_gib"] = "GiB at most"
    found = {key: drawable(line[key]) for line in history for key in units if key in line}
    return [f"{value:.3g} {units[key]}" for key, value in found.items()]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        parts = {name: part for name, part in value.items() if part is not None}
        return "<br>".join(f"{as_html(name)}: {_value(part)}" for name, part in parts.items())
    return ", ".join(map(_value, value)) if isinstance(value, list) else as_html(value)
