"""What model cards say in words: base, quantisation, loss and reference, how to load, what was trained on what data.

Of a path of this machine they have the last part only.
"""

import math
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import BitsAndBytesConfig

from qlora_dpo.model import bits, default_quantization
from qlora_dpo.objective import options_in_use
from qlora_dpo.paths import split_revision
from qlora_dpo.record import AdapterRecord
from qlora_dpo.report import target_names

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` takes, whichever version it is."""
_NOT_SERVED = (
    *("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias"),
    *("trainable_token_indices", "target_parameters"),
)
"""What vLLM refuses in an adapter's config, or does not read and would compute otherwise."""
_REFERENCES = {
    "base": "the base model, with its adapters disabled",
    "initial": "a frozen copy of the policy's start",
    "adapter": "a frozen adapter",
    "model": "another model",
    "average": "a moving average of the policy (TR-DPO)",
    "given": "log-probabilities that came with the data (column `ref_logps`)",
    "none": "none",
}
_STRATEGIES = {
    "all": "every better completion with every worse one",
    "best_vs_rest": "the best with every other",
    "best_vs_worst": "the best with the worst",
    "adjacent": "every completion with the next worse",
}


def as_markdown(value: Any) -> str:
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


def base_in_words(record: AdapterRecord) -> str:
    """The base, with what is known of its revision."""
    parts = [f"revision {record.base_revision}"] if record.base_revision else []
    parts += [f"commit {record.base_commit}"] if record.base_commit else []
    return as_markdown(shown(record.base)) + f" ({', '.join(map(as_markdown, parts))})" * bool(parts)


def quantisation(record: AdapterRecord) -> str:
    """How the base was quantised, in a line."""
    found = record.quantization or {}
    if found.get("load_in_4bit"):
        double = ", double quantisation" if found.get("bnb_4bit_use_double_quant") else ""
        kind, compute = str(found.get("bnb_4bit_quant_type", "4 bit")).upper(), found.get("bnb_4bit_compute_dtype")
        return f"{kind}{double}, {str(compute).removeprefix('torch.')} compute; other weights in {record.dtype}"
    kind = found.get("quant_method") or "none"
    kind = "8 bit" if found.get("load_in_8bit") else str(getattr(kind, "value", kind))
    return f"{kind}; weights in {record.dtype}"


def loss_in_words(record: AdapterRecord) -> str:
    """The names of the losses, with their weights."""
    names, weights = record.loss.get("loss_type") or ["sigmoid"], record.loss.get("loss_weights")
    if weights is None:
        return " + ".join(names)
    return " + ".join(f"{weight} {name}" for weight, name in zip(weights, names, strict=False))


def _reference(record: AdapterRecord) -> str:
    parts = [_REFERENCES.get(record.reference, record.reference)]
    parts += [f"from {as_markdown(shown(record.reference_source))}"] if record.reference_source else []
    parts += [f"hash `{record.reference_hash}`"] if record.reference_hash else []
    return ", ".join(parts)


def introduction(record: AdapterRecord, lora: Mapping[str, Any]) -> str:
    """What the adapter is, in a paragraph."""
    kind = str(lora.get("peft_type", "LORA")).replace("LORA", "LoRA")
    below = ""
    if record.stacked_on:
        below = f", on top of the frozen adapter {as_markdown(shown(record.stacked_on))}"
    return f"A {kind} adapter for {base_in_words(record)}{below}, {method(record)}"


def method(record: AdapterRecord) -> str:
    """How it was trained, in the rest of a sentence."""
    return (
        f"trained on preferences with the library `qlora_dpo`: loss `{loss_in_words(record)}`, beta {record.beta:g}, "
        f"base in {quantisation(record)}. The methods: [DPO](https://arxiv.org/abs/2305.18290), "
        "[QLoRA](https://arxiv.org/abs/2305.14314)."
    )


def loading(record: AdapterRecord, lora: Mapping[str, Any], adapter: str) -> str:
    """How to load the adapter, alone, with PEFT and merged, and how to serve it."""
    base = shown(record.base)
    revision = f", revision={record.base_revision!r}" if record.base_revision else ""
    quantised, needed = _quantised_alike(record)
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({adapter!r})"
    own = f"""\
On the base as it was quantised in training:

```python
from transformers import AutoTokenizer{needed}

from qlora_dpo import load_policy

policy = load_policy({base!r}, adapter={adapter!r}{revision}{quantised})
{tokenizer}
```"""
    alone = f"""\
With PEFT alone:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r}{revision})
model = PeftModel.from_pretrained(base, {adapter!r})
{tokenizer}
```"""
    stacked = "The frozen adapter below it is loaded with it; PEFT alone would leave that one out."
    name = adapter.split("/")[-1]
    merged = f"""\
Merged with the base into a 16-bit model:

```bash
qlora-dpo merge --adapter {shlex.quote(adapter)} --output_dir {shlex.quote(f"{name}-merged")}
```"""
    served = "" if record.stacked_on else _serving(base, record.base_revision, lora, adapter)
    place = "" if is_id(record.base) else f"`{base}` was a folder where this was trained: write where yours lies."
    return "\n\n".join(part for part in (place, own, stacked if record.stacked_on else alone, merged, served) if part)


def _quantised_alike(record: AdapterRecord) -> tuple[str, str]:
    """What makes `load_policy` quantise as in training, and what to import for it; nothing where the defaults do."""
    found = record.quantization or {}
    if bits(found) == bits(default_quantization().to_dict()):
        return "", ""
    if not (found.get("load_in_4bit") or found.get("load_in_8bit")):
        return ", quantize=False", ""
    options = BitsAndBytesConfig.from_dict(dict(found)).to_diff_dict()
    words = ", ".join(f"{name}={value!r}" for name, value in options.items() if not name.startswith("_"))
    return f", quantization_config=BitsAndBytesConfig({words})", ", BitsAndBytesConfig"


def _serving(base: str, revision: str | None, lora: Mapping[str, Any], adapter: str) -> str:
    """How vLLM serves the adapter, if it can."""
    rank = next((rank for rank in _VLLM_RANKS if rank >= int(lora.get("r") or 0)), None)
    plain = lora.get("peft_type") == "LORA" and lora.get("bias", "none") == "none"
    if rank is None or not plain or any(lora.get(name) for name in _NOT_SERVED):
        return ""
    at = f" --revision {shlex.quote(revision)}" if revision else ""
    module = shlex.quote(f"{adapter.split('/')[-1]}={adapter}")
    return f"""\
Served by vLLM, on the base in 16 bit:

```bash
vllm serve {shlex.quote(base)}{at} --enable-lora --max-lora-rank {rank} --lora-modules {module}
```"""


def table(rows: Mapping[str, Any]) -> str:
    """What is known, a line each."""
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *lines])


def trained(record: AdapterRecord, lora: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was trained, how, and at what cost, by name."""
    targets = ", ".join(f"`{name}`" for name in target_names(lora)).replace("|", r"\|")  # a pattern may have some
    switches = [name for name in ("use_dora", "use_rslora") if lora.get(name)]
    shape = (
        f"rank {lora['r']}, alpha {lora.get('lora_alpha')}, dropout {lora.get('lora_dropout')}" if "r" in lora else ""
    )
    shape = f"{shape or lora.get('peft_type')}, on {targets}"
    rows: dict[str, Any] = {
        "base": base_in_words(record),
        "quantisation": quantisation(record),
        "adapter": ", ".join([shape, *(f"`{name}`" for name in switches)]),
        "loss": f"`{loss_in_words(record)}`",
        "reference": _reference(record),
        "mixed precision": record.mixed_precision,
        "most tokens of prompt and completion": record.max_length or "no limit",
        "most tokens of a prompt": record.max_prompt_length,
    }
    options = options_in_use(record.loss)
    unused = "num_train_epochs" if record.training.get("max_steps", -1) > 0 else "max_steps"
    options |= {name: value for name, value in record.training.items() if name != unused}
    rows |= {f"`{name}`": as_markdown(value) for name, value in options.items() if value is not None}
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


def data_in_words(record: AdapterRecord) -> str:
    """Each data set: where it came from, and what became of its rows."""
    lines = []
    for use, origin in record.datasets.items():
        facts = [f"{key} {origin[key]}" for key in ("config", "split", "revision", "fingerprint") if key in origin]
        name = as_markdown(origin.get("name", "unnamed data"))
        lines.append(f"- {as_markdown(use)}: {name}, {as_markdown(', '.join([*_rows(origin), *facts]))}")
        lines += [f"  - {as_markdown(fact)}" for fact in _became(use, origin, record)]
    return "\n".join(lines)


def _rows(origin: Mapping[str, Any], key: str = "rows", word: str = "row") -> list[str]:
    """A number of things, if it is known."""
    return [f"{origin[key]:,} {word}{'s' * (origin[key] != 1)}"] if key in origin else []


def _became(use: str, origin: Mapping[str, Any], record: AdapterRecord) -> list[str]:
    """What became of the rows of a data set, if it is known."""
    used = ", ".join([*_rows(origin, "groups", "group"), *_rows(origin, "pairs", "pair")])
    verb = "trained" if use == "train" else "evaluated"
    lines = [f"{verb} on: {used} (a group is a prompt with its completions)"] if used else []
    if made := origin.get("pairs_from"):
        lines.append(f"pairs were made from its {made}: {_STRATEGIES.get(record.pair_strategy, 'unknown')}")
    lines += [
        f"dropped: {count:,} row{'s' * (count != 1)}, because {reason}"
        for reason, count in origin.get("dropped", {}).items()
    ]
    if "truncated_share" in origin:
        lines.append(f"cut to fit the limits of tokens: {100 * origin['truncated_share']:.1f} % of the rows")
    return lines
