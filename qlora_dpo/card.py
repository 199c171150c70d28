"""The model card of an adapter: `README.md`, made anew from what lies in the adapter's folder.

It says what is known and leaves out what is not. Of a path of this machine it has the last part only.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from peft.utils import CONFIG_NAME
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qlora_dpo.cardtext import as_markdown, data_in_words, introduction, is_id, loading, shown, table, trained
from qlora_dpo.measures import Estimate
from qlora_dpo.paths import EVALUATIONS, JUDGED, METRICS_NAME, OF_WEIGHTS, REPORT_NAME, saved_adapter
from qlora_dpo.preference_report import PreferenceReport
from qlora_dpo.record import AdapterRecord, read_record, weights_hash_of
from qlora_dpo.report import PICTURES, curve_charts, picture_name, write_pictures

TAGS = ("dpo", "qlora-dpo", "lora", "preference-alignment")
MARK = (
    "<!-- qlora_dpo writes this card anew at every save. Take this line out, and a push leaves the card as it is. -->"
)
FEWEST_STEPS = 3
"""Logged steps that make a curve."""
_PEFT_DRAFT = "# Model Card for Model ID"
_LIMITS = """\
- The numbers above are about the preference data named here, and about nothing else: neither safety nor abilities
  outside that data were measured.
- Rewards are relative to the reference, and log-probabilities belong to the quantisation named above. On the base in
  16 bit, and merged into it, the model is not quite the same.
- The adapter has the limits and the biases of its base model and of those who wrote the preferences."""


@dataclass(frozen=True)
class Judged:
    """An evaluation of the adapter's weights: where its data came from, and what it gave."""

    origin: Mapping[str, Any]
    found: Mapping[str, Any]
    report: PreferenceReport | None = None

    @property
    def accuracy(self) -> Estimate:
        """Of the rewards."""
        return Estimate(**self.found["accuracy"])

    @property
    def name(self) -> str:
        """What to call the data."""
        return str(self.origin["name"])

    @property
    def data(self) -> tuple[Any, ...]:
        """Two evaluations of the same data are one result."""
        return self.name, self.origin.get("config"), self.origin.get("split"), self.found["pairs"]


def write_card(
    folder: str,
    name: str | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    draw: bool = True,
    target: str | None = None,
    **metadata: Any,
) -> str:
    """Write the card of a saved adapter, and its charts where the extra `report` is installed.

    Args:
        folder: Where the adapter lies, with its `qlora_dpo.json`.
        name: Hub id of the adapter, if it has one.
        history: Lines of the training's log; None for those in the folder's `trainer_state.json`.
        draw: Whether to draw charts, which takes most of a second.
        target: Folder to write them to; None for that of the adapter.
        **metadata: More for the card's head: `language`, `license`, `tags`, `model_name`.

    Returns:
        The path of the card.
    """
    path, to = Path(folder), Path(target or folder)
    lines = _history(path) if history is None else history
    charts = curve_charts(lines) if len({line.get("step") for line in lines}) >= FEWEST_STEPS else []
    if draw:
        write_pictures(to / PICTURES, charts)
    files = {chart.title: Path(PICTURES, picture_name(chart.title)) for chart in charts}
    drawn = [title for title, file in files.items() if (path / file).is_file() or (to / file).is_file()]
    make_card(path, name, lines, drawn, metadata).save(to / REPOCARD_NAME)
    return str(to / REPOCARD_NAME)


def save_card(folder: str, *args: Any, **kwargs: Any) -> None:
    """As `write_card`, with a warning where that fails: no training is lost for its card."""
    try:
        write_card(folder, *args, **kwargs)
    except Exception as error:  # whatever it is, the adapter is saved and the run goes on
        warnings.warn(
            f"The card of {folder} could not be written ({type(error).__name__}: {error}); the adapter is saved. "
            "`qlora-dpo push` makes one anew.",
            stacklevel=2,
        )


def is_own(path: Path) -> bool:
    """Whether a card was written, or taken over, by a person: neither by this module nor a draft of PEFT's."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    return MARK not in text and _PEFT_DRAFT not in text


def make_card(
    folder: Path,
    name: str | None,
    history: Sequence[Mapping[str, Any]],
    curves: Sequence[str],
    metadata: Mapping[str, Any],
) -> ModelCard:
    """The card of a saved adapter.

    Args:
        folder: Where it lies.
        name: Its Hub id, if it has one.
        history: Lines of the training's log.
        curves: Titles of the charts that lie beside it.
        metadata: More for the card's head.
    """
    record = read_record(str(folder))
    lora = json.loads(Path(saved_adapter(str(folder)), CONFIG_NAME).read_text())
    judged = _evaluations(folder, record)
    title = str(metadata.get("model_name") or (name or _run_name(folder)).split("/")[-1])
    sections = {
        "": introduction(record, lora),
        "How to load it": loading(record, lora, name or title),
        "Evaluation": _evaluation(judged),
        "Training": table(trained(record, lora, history)),
        "Data": data_in_words(record),
        "Curves": "\n".join(f"![{as_markdown(title)}]({PICTURES}/{picture_name(title)})" for title in curves),
        "Limits": _LIMITS,
        "Versions": ", ".join(f"{package} {found}" for package, found in record.versions.items()),
    }
    body = "\n\n".join(f"## {head}\n\n{text}" if head else text for head, text in sections.items() if text)
    data = _metadata(record, judged, title, metadata)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{MARK}\n\n# {as_markdown(title)}\n\n{body}\n")


def _run_name(folder: Path) -> str:
    """What a run is called: by its folder, or by that of its checkpoint."""
    whole = folder.resolve()
    return whole.parent.name if whole.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else whole.name


def _history(folder: Path) -> list[dict[str, Any]]:
    """Lines of the training's log, if they were saved."""
    found = _read(folder / TRAINER_STATE_NAME).get("log_history")
    return [line for line in found if isinstance(line, dict)] if isinstance(found, list) else []


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _report(folder: Path) -> PreferenceReport | None:
    """The report of an evaluation, if there is one of this version."""
    try:
        return PreferenceReport.from_dict(_read(folder / REPORT_NAME))
    except (ValueError, KeyError, TypeError):
        return None


def _evaluations(folder: Path, record: AdapterRecord) -> list[Judged]:
    """What is known of these very weights: the evaluations of the training, and those of `qlora-dpo evaluate`."""
    weights = weights_hash_of(folder)
    own = _read(folder / METRICS_NAME).get(OF_WEIGHTS, weights) == weights  # else of a run that was here before
    after, judged = _report(folder / JUDGED["after"]) if own else None, []
    for name, found in record.evaluations.items():
        same = after is not None and (after.accuracy.value, after.pairs) == (found["accuracy"]["value"], found["pairs"])
        label = "unnamed data" if name == "eval" else name.removeprefix("eval_")
        origin = {"name": label} | record.datasets.get(name, {})
        judged.append(Judged(origin, found, after if same else None))
    for path in sorted((folder / EVALUATIONS).glob(f"*/{METRICS_NAME}")):
        report, metrics = _report(path.parent), _read(path)
        if report is None or metrics.get(OF_WEIGHTS) != weights:
            continue
        found = {"pairs": report.pairs, "groups": report.groups, "ties": report.ties, "margin": report.margin.mean}
        found["accuracy"] = dict(vars(report.accuracy))
        origin = metrics.get("data") or {"name": shown(report.name)}
        latest = Judged(origin, found, report)
        judged = [*(one for one in judged if one.data != latest.data), latest]
    return judged


# ---- the text --------------------------------------------------------------------------------------------------------


def _evaluation(judged: Sequence[Judged]) -> str:
    if not judged:
        return "These weights were not evaluated."
    head = [
        "data",
        "pairs",
        "accuracy [95 %]",
        "reference's own",
        "mean margin",
        "ties",
        "ECE",
        "KL chosen, nats/token",
    ]
    rows = []
    for one in judged:
        report = one.report
        kl = report.kl_per_token if report else None
        accuracy = one.accuracy
        cells = [
            f"{one.name} {one.origin.get('split', '')}".strip(),
            f"{one.found['pairs']:,}",
            f"{accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}], {accuracy.method}",
            f"{report.reference_accuracy.value:.3f}" if report and report.reference_accuracy else "",
            f"{one.found['margin']:.4g}",
            f"{100 * one.found['ties']:.1f} %",
            f"{report.calibration.ece:.3f}" if report else "",
            f"{kl.chosen:.4g}" if kl else "",
        ]
        rows.append(cells)
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[head[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    note = "Accuracy is the share of pairs whose chosen completion has the higher reward, a tie counting one half."
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines) + f"\n\n{note}"


def _cell(text: str) -> str:
    return text if text == "---" else as_markdown(text).replace(r"\[", "[").replace(r"\]", "]")


# ---- the head --------------------------------------------------------------------------------------------------------


def _metadata(
    record: AdapterRecord, judged: Sequence[Judged], title: str, metadata: Mapping[str, Any]
) -> ModelCardData:
    """What the Hub reads of the card; a base or data set that is no Hub id is not named there."""
    asked = metadata.get("tags") or []
    tags = [*TAGS, *(record.loss.get("loss_type") or []), *([asked] if isinstance(asked, str) else asked)]
    ids = dict.fromkeys(origin["id"] for origin in record.datasets.values() if "id" in origin)
    licence = {"license": metadata["license"]} if metadata.get("license") else record.licence
    results = [result for one in judged for result in _results(one)]
    known: dict[str, Any] = {
        "base_model": record.base if is_id(record.base) else None,
        "base_model_relation": "adapter" if is_id(record.base) else None,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(tags)),
        "datasets": list(ids) or None,
        "language": metadata.get("language"),
        **licence,
    }
    found = {name: value for name, value in known.items() if value is not None}
    return ModelCardData(**found, model_name=title if results else None, eval_results=results or None)


def _results(judged: Judged) -> list[EvalResult]:
    """Accuracy and margin as entries of the `model-index`."""
    accuracy, origin = judged.accuracy, judged.origin
    shared = {
        "task_type": "text-generation",
        "task_name": "Preference ranking by implicit reward",
        "dataset_name": judged.name,
        "dataset_type": str(origin.get("id") or judged.name),
        "dataset_config": origin.get("config"),
        "dataset_split": origin.get("split"),
        "dataset_revision": origin.get("revision"),
    }
    interval = {"low": accuracy.low, "high": accuracy.high, "confidence": 0.95, "method": accuracy.method}
    pairs = {"pairs": judged.found["pairs"]}
    return [
        EvalResult(
            **shared,
            metric_type="accuracy",
            metric_name="Preference accuracy",
            metric_value=accuracy.value,
            metric_args=interval | pairs,
        ),
        EvalResult(
            **shared,
            metric_type="reward_margin",
            metric_name="Reward margin",
            metric_value=judged.found["margin"],
            metric_args=pairs,
        ),
    ]
