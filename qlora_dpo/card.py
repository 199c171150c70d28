"""The model card of an adapter: `README.md`, made anew from what lies in the adapter's folder.

It says what is known and leaves out what is not. Of a path of this machine it has the last part only.
"""

import json
import math
import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from transformers import BitsAndBytesConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qlora_dpo.measures import Estimate, PreferenceReport
from qlora_dpo.model import bits, default_quantization
from qlora_dpo.paths import split_revision
from qlora_dpo.record import AdapterRecord, read_record, saved_adapter, weights_hash
from qlora_dpo.report import PICTURES, STATE_NAME, curve_charts, picture_name, target_names, write_pictures

TAGS = ("dpo", "qlora-dpo", "lora", "preference-alignment")
MARK = (
    "<!-- qlora_dpo writes this card anew at every save. Take this line out, and a push leaves the card as it is. -->"
)
FEWEST_STEPS = 3
"""Logged steps that make a curve."""
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` takes, whichever version it is."""
_NOT_SERVED = (
    *("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias"),
    *("trainable_token_indices", "target_parameters"),
)
"""What vLLM refuses in an adapter's config, or does not read and would compute otherwise."""
_PEFT_DRAFT = "# Model Card for Model ID"
_REFERENCES = {
    "base": "the base model, with its adapters disabled",
    "initial": "a frozen copy of the policy's start",
    "adapter": "a frozen adapter",
    "model": "another model",
    "average": "a moving average of the policy (TR-DPO)",
    "given": "log-probabilities that came with the data (column `ref_logps`)",
    "none": "none",
}
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
    lora = json.loads(Path(saved_adapter(str(folder)), "adapter_config.json").read_text())
    judged = _evaluations(folder, record)
    title = str(metadata.get("model_name") or (name or _run_name(folder)).split("/")[-1])
    sections = {
        "": _introduction(record, lora),
        "How to load it": _loading(record, lora, name or title),
        "Evaluation": _evaluation(judged),
        "Training": _table(_training(record, lora, history)),
        "Data": _data(record.datasets),
        "Curves": "\n".join(f"![{escaped(title)}]({PICTURES}/{picture_name(title)})" for title in curves),
        "Limits": _LIMITS,
        "Versions": ", ".join(f"{package} {found}" for package, found in record.versions.items()),
    }
    body = "\n\n".join(f"## {head}\n\n{text}" if head else text for head, text in sections.items() if text)
    data = _metadata(record, judged, title, metadata)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{MARK}\n\n# {escaped(title)}\n\n{body}\n")


def escaped(value: Any) -> str:
    """Any value as text in one line that Markdown takes as it is, in a table too."""
    return re.sub(r"([\\`*<>|\[\]{}])", r"\\\1", " ".join(str(value).split()))


def shown(path_or_id: str) -> str:
    """An id as it is, and of a path the last part: the rest says something of this machine only."""
    try:
        name, _ = split_revision(path_or_id, "model")
    except (FileNotFoundError, ValueError):
        name = None
    is_path = name is None or Path(name).exists()
    return Path(path_or_id).expanduser().name if is_path else path_or_id


def is_id(path_or_id: str) -> bool:
    """Whether it is no path of this machine."""
    return shown(path_or_id) == path_or_id and not Path(path_or_id).exists()


def _run_name(folder: Path) -> str:
    """What a run is called: by its folder, or by that of its checkpoint."""
    whole = folder.resolve()
    return whole.parent.name if whole.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else whole.name


def _history(folder: Path) -> list[dict[str, Any]]:
    """Lines of the training's log, if they were saved."""
    found = _read(folder / STATE_NAME).get("log_history")
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
        return PreferenceReport.from_dict(_read(folder / "report.json"))
    except (ValueError, KeyError, TypeError):
        return None


def _evaluations(folder: Path, record: AdapterRecord) -> list[Judged]:
    """What is known of these very weights: the evaluations of the training, and the last of `qlora-dpo evaluate`."""
    after, judged = _report(folder / "evaluation" / "after"), []
    for name, found in record.evaluations.items():
        same = after is not None and (after.accuracy.value, after.pairs) == (found["accuracy"]["value"], found["pairs"])
        origin = {"name": "unnamed data" if name == "eval" else name} | record.datasets.get(name, {})
        judged.append(Judged(origin, found, after if same else None))
    later, metrics = _report(folder / "evaluation"), _read(folder / "evaluation" / "metrics.json")
    if later is not None and metrics.get("adapter_sha256") == weights_hash(str(folder)):
        found = {"pairs": later.pairs, "groups": later.groups, "ties": later.ties, "margin": later.margin.mean}
        found["accuracy"] = dict(vars(later.accuracy))
        origin = metrics.get("data") or {"name": shown(later.name)}
        judged = [one for one in judged if (one.name, one.found["pairs"]) != (origin.get("name"), later.pairs)]
        judged.append(Judged(origin, found, later))
    return judged


# ---- the text --------------------------------------------------------------------------------------------------------


def _base(record: AdapterRecord) -> str:
    """The base, with what is known of its revision."""
    parts = [f"revision {record.base_revision}"] if record.base_revision else []
    parts += [f"commit {record.base_commit}"] if record.base_commit else []
    return escaped(shown(record.base)) + f" ({', '.join(map(escaped, parts))})" * bool(parts)


def _quantisation(record: AdapterRecord) -> str:
    """How the base was quantised, in a line."""
    found = record.quantization or {}
    if found.get("load_in_4bit"):
        double = ", double quantisation" if found.get("bnb_4bit_use_double_quant") else ""
        kind, compute = str(found.get("bnb_4bit_quant_type", "4 bit")).upper(), found.get("bnb_4bit_compute_dtype")
        return f"{kind}{double}, {str(compute).removeprefix('torch.')} compute; other weights in {record.dtype}"
    kind = found.get("quant_method") or "none"
    kind = "8 bit" if found.get("load_in_8bit") else str(getattr(kind, "value", kind))
    return f"{kind}; weights in {record.dtype}"


def _loss(record: AdapterRecord) -> str:
    names, weights = record.loss.get("loss_type") or ["sigmoid"], record.loss.get("loss_weights")
    if weights is None:
        return " + ".join(names)
    return " + ".join(f"{weight} {name}" for weight, name in zip(weights, names, strict=False))


def _reference(record: AdapterRecord) -> str:
    parts = [_REFERENCES.get(record.reference, record.reference)]
    parts += [f"from {escaped(shown(record.reference_source))}"] if record.reference_source else []
    parts += [f"hash `{record.reference_hash}`"] if record.reference_hash else []
    return ", ".join(parts)


def _introduction(record: AdapterRecord, lora: Mapping[str, Any]) -> str:
    kind = str(lora.get("peft_type", "LORA")).replace("LORA", "LoRA")
    below = ""
    if record.stacked_on:
        below = f", on top of the frozen adapter {escaped(shown(record.stacked_on))}"
    return (
        f"A {kind} adapter for {_base(record)}{below}, trained on preferences with the library `qlora_dpo`: loss "
        f"`{_loss(record)}`, beta {record.beta:g}, base in {_quantisation(record)}. The methods: "
        "[DPO](https://arxiv.org/abs/2305.18290), [QLoRA](https://arxiv.org/abs/2305.14314)."
    )


def _loading(record: AdapterRecord, lora: Mapping[str, Any], adapter: str) -> str:
    base = shown(record.base)
    revision = f", revision={record.base_revision!r}" if record.base_revision else ""
    quantised, needed = _quantised_alike(record)
    own = f"""\
On the base as it was quantised in training:

```python
{needed}from qlora_dpo import load_policy

policy = load_policy({base!r}, adapter={adapter!r}{revision}{quantised})
```"""
    if record.stacked_on:
        return own + "\n\nThe frozen adapter below it is loaded with it; PEFT alone would leave that one out."
    return (
        own
        + f"""

With PEFT alone:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r}{revision})
model = PeftModel.from_pretrained(base, {adapter!r})
```

Merged into a 16-bit model: `qlora-dpo merge` (see `qlora-dpo merge --help`)."""
        + _serving(base, lora, adapter)
    )


def _quantised_alike(record: AdapterRecord) -> tuple[str, str]:
    """What makes `load_policy` quantise as in training, and its import; nothing where the defaults do."""
    found = record.quantization or {}
    if bits(found) == bits(default_quantization().to_dict()):
        return "", ""
    if not (found.get("load_in_4bit") or found.get("load_in_8bit")):
        return ", quantize=False", ""
    options = BitsAndBytesConfig.from_dict(dict(found)).to_diff_dict()
    words = ", ".join(f"{name}={value!r}" for name, value in options.items() if not name.startswith("_"))
    return f", quantization_config=BitsAndBytesConfig({words})", "from transformers import BitsAndBytesConfig\n\n"


def _serving(base: str, lora: Mapping[str, Any], adapter: str) -> str:
    """How vLLM serves the adapter, if it can."""
    rank = next((rank for rank in _VLLM_RANKS if rank >= int(lora.get("r") or 0)), None)
    plain = lora.get("peft_type") == "LORA" and lora.get("bias", "none") == "none"
    if rank is None or not plain or any(lora.get(name) for name in _NOT_SERVED):
        return ""
    return f"""

Served by vLLM, on the base in 16 bit:

```bash
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {adapter.split("/")[-1]}={adapter}
```"""


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
            f"{report.reference_accuracy.value:.3f}" if report else "",
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
    return text if text == "---" else escaped(text).replace(r"\[", "[").replace(r"\]", "]")


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *lines])


def _training(record: AdapterRecord, lora: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    targets = ", ".join(f"`{name}`" for name in target_names(lora)).replace("|", r"\|")  # a pattern may have some
    switches = [name for name in ("use_dora", "use_rslora") if lora.get(name)]
    shape = f"rank {lora.get('r')}, alpha {lora.get('lora_alpha')}, dropout {lora.get('lora_dropout')}, on {targets}"
    rows: dict[str, Any] = {
        "base": _base(record),
        "quantisation": _quantisation(record),
        "adapter": ", ".join([shape, *(f"`{name}`" for name in switches)]),
        "loss": f"`{_loss(record)}`",
        "reference": _reference(record),
        "mixed precision": record.mixed_precision,
        "longest": f"{record.max_length} tokens" if record.max_length else "no limit",
        "longest prompt": f"{record.max_prompt_length} tokens" if record.max_prompt_length else None,
        "pairs of scores or ranks": record.pair_strategy,
    }
    options = {name: value for name, value in record.loss.items() if name not in ("loss_type", "loss_weights")}
    unused = "num_train_epochs" if record.training.get("max_steps", -1) > 0 else "max_steps"
    options |= {name: value for name, value in record.training.items() if name != unused}
    rows |= {f"`{name}`": escaped(value) for name, value in options.items() if value is not None}
    return rows | _costs(history)


def _costs(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Steps, peak memory and speed, from the log."""

    def values(key: str) -> list[float]:
        found = (line[key] for line in history if isinstance(line.get(key), int | float))
        return [float(value) for value in found if math.isfinite(value)]

    rows = {}
    if steps := values("step"):
        rows["steps"] = f"{max(steps):g}"
    if epochs := values("epoch"):
        rows["epochs"] = f"{max(epochs):.3g}"
    if memory := values("peak_memory_gib"):
        rows["peak memory"] = f"{max(memory):.2f} GiB"
    names = {"pairs_per_second": "pairs", "tokens_per_second": "unique tokens"}
    speeds = [f"{statistics.median(found):.3g} {name}" for key, name in names.items() if (found := values(key))]
    if speeds:
        rows["speed, median"] = f"{', '.join(speeds)} a second"
    return rows


def _data(datasets: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for use, origin in datasets.items():
        facts = [f"{key} {origin[key]}" for key in ("config", "split", "revision", "fingerprint") if key in origin]
        facts.insert(0, f"{origin['rows']:,} rows") if "rows" in origin else None
        lines.append(f"- {escaped(use)}: {escaped(origin.get('name', 'unnamed data'))}, {escaped(', '.join(facts))}")
    return "\n".join(lines)


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
