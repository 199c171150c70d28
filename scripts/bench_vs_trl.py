"""Measures this library against TRL's DPOTrainer: the same pairs, 4-bit model, adapter and options, a process a run.

    python scripts/bench_vs_trl.py --data preferences.jsonl --model MODEL --output bench.json

Needs the extra `bench`. Rows are pairs (`prompt`, `chosen`, `rejected`) or groups (`prompt`, `completions`, `pairs`);
TRL gets the pairs of a group unrolled, all of them in one batch. Runs alternate: ours, TRL, ours, TRL, ...; each makes
one step to warm up, which is not timed.

- TRL turns the adapters of a 4-bit model into bf16. The compared runs give it back the fp32 weights that ours starts
  with, so that losses can be compared; `--as_is_repeats` more runs for each setting leave TRL as its users run it.
- `--unsloth` runs Unsloth beside them, where it is installed: its model and adapter, the DPOTrainer that it patches.
  It starts from the same fp32 weights as TRL.
- A step is timed from the end of the one before to its own end, so fetching its batch and writing a log line count;
  every step is logged. The time between its own beginning and end is kept beside that in the JSON.
- Memory is the peak while training above what the loaded model takes: allocated on a GPU, resident on a CPU (Linux).
- Unique tokens are those that this library computes in a step; the same number divides both sides' times.
"""

import argparse
import contextlib
import ctypes
import gc
import hashlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer
from qlora_dpo.data import TokenLimits, prepare_dataset
from qlora_dpo.files import load_rows
from qlora_dpo.layouts import group_of
from qlora_dpo.memory import GIB
from qlora_dpo.model import default_lora, device_map, load_tokenizer
from qlora_dpo.preferences import parse_row

from surroundings import surroundings

SEED = 42
WARMUP_STEPS = 1
OURS, TRL, TRL_AS_IS, UNSLOTH = "ours", "trl", "trl_as_is", "unsloth"
RENDERING = ("tools", "chat_template_kwargs")
"""Columns that decide the tokens beside the texts; all others but the pairs are left out, `label_probs` too."""
PEERS = (TRL, TRL_AS_IS, UNSLOTH)

Pair = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Length of the prompt, token ids of prompt + chosen and of prompt + rejected."""


@dataclass(frozen=True)
class Work:
    """What a run has to do; written by the parent, read by the process of the run.

    Attributes:
        model: Hub id or folder.
        dtype: Name of the dtype of the 16- or 32-bit weights and of the arithmetic.
        checkpointing: Whether activations are recomputed.
        max_length: Most tokens of prompt + completion.
        learning_rate: Of AdamW, constant.
        steps: Timed steps.
        batch_size: Groups in a step.
        pairs_per_group: 1 for data of pairs.
        rows: Rows by side, in the order of training.
        unique_tokens: Tokens that this library places in each timed step.
    """

    model: str
    dtype: str
    checkpointing: bool
    max_length: int
    learning_rate: float
    steps: int
    batch_size: int
    pairs_per_group: int
    rows: dict[str, list[dict[str, Any]]]
    unique_tokens: list[int]


# ---- the data: pairs that are the same tokens on both sides ----------------------------------------------------------


def unrolled(row: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row as this library gets it, and its pairs as rows of their own as TRL gets them."""
    preference = parse_row(row)
    shared = {name: row[name] for name in RENDERING if row.get(name) is not None}
    if preference.prompt is not None:
        shared["prompt"] = preference.prompt
    texts = preference.completions
    pairs = [shared | {"chosen": texts[w], "rejected": texts[l]} for w, l in preference.pairs]
    if "completions" not in row:
        return pairs[0], pairs
    return shared | {"completions": texts, "pairs": [list(pair) for pair in preference.pairs]}, pairs


def pair_of(prompt: list[int], chosen: list[int], rejected: list[int], max_length: int) -> Pair:
    """A pair as it is trained on, cut to `max_length`."""
    return len(prompt), tuple((prompt + chosen)[:max_length]), tuple((prompt + rejected)[:max_length])


def our_pairs(groups: Iterable[dict[str, Any]], max_length: int) -> dict[int, list[Pair]]:
    """Pairs of this library's tokenised groups, by the number of their row."""
    found = {}
    for row in groups:
        group = group_of(row)
        sides = row["completion_ids"]
        found[row["row"]] = [pair_of(row["prompt_ids"], sides[w], sides[l], max_length) for w, l in group.pairs]
    return found


def trl_pairs(rows: Iterable[dict[str, Any]], max_length: int) -> list[Pair]:
    """Pairs of TRL's tokenised rows, cut as its collator does."""
    return [pair_of(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"], max_length) for row in rows]


def tokenised_by_trl(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> Dataset:
    """Rows as TRL prepares them, without a model: its preparation needs the tokenizer only."""
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(output_dir=folder, max_length=max_length, bf16=False, report_to=[])
        needs: Any = SimpleNamespace(_tokenizer=tokenizer)
        return DPOTrainer._prepare_dataset(needs, Dataset.from_list(rows), tokenizer, config, "train")


def places_in_tree(group: dict[str, Any]) -> int:
    """Tokens of a group that the tree computes: the prompt, and each completion but its last token."""
    return len(group["prompt_ids"]) + sum(len(ids) - 1 for ids in group["completion_ids"])


def choose_rows(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, int]]:
    """The first rows of the file that both sides tokenise alike, as fields of `Work`, and what became of the others.

    Raises:
        ValueError: If there are too few.
    """
    tokenizer = load_tokenizer(args.model)
    found = [unrolled(row) for row in load_rows(args.data)]
    groups, _ = prepare_dataset(Dataset.from_list([ours for ours, _ in found]), tokenizer, TokenLimits(args.max_length))
    ours = our_pairs(groups, args.max_length)
    flat = [pair | {"group": number} for number, (_, pairs) in enumerate(found) for pair in pairs]
    theirs: dict[int, list[Pair]] = {}
    prepared = tokenised_by_trl(flat, tokenizer, args.max_length)
    for number, pair in zip(prepared["group"], trl_pairs(prepared, args.max_length), strict=True):
        theirs.setdefault(number, []).append(pair)
    alike = {row["row"]: row for row in groups if ours[row["row"]] == theirs.get(row["row"])}
    common = Counter(len(row["pairs"]) for row in alike.values()).most_common(1)[0][0] if alike else 1
    usable = [number for number, row in alike.items() if len(row["pairs"]) == common]
    ranked = any("completions" in row for row, _ in found)
    size = args.batch_size or (1 if ranked else 4)
    need = (args.steps + WARMUP_STEPS) * size
    counts = {
        "rows": len(found),
        "dropped_by_ours": len(found) - len(ours),
        "dropped_by_trl": len(found) - len(theirs),
        "not_the_same_pairs": sum(ours[number] != theirs[number] for number in ours.keys() & theirs.keys()),
        "other_number_of_pairs": len(alike) - len(usable),
        "usable": len(usable),
        "trained_on": need,
    }
    if len(usable) < need:
        raise ValueError(f"`--data` must hold {need} usable rows, got {counts}. Take fewer steps or a smaller batch.")
    used = usable[:need]
    timed = [used[i : i + size] for i in range(WARMUP_STEPS * size, need, size)]
    fields = {
        "batch_size": size,
        "pairs_per_group": common,
        "rows": {
            OURS: [found[number][0] for number in used],
            TRL: [pair for number in used for pair in found[number][1]],
        },
        "unique_tokens": [sum(places_in_tree(alike[number]) for number in step) for step in timed],
    }
    return fields, counts


# ---- one run ---------------------------------------------------------------------------------------------------------


class StepClock(TrainerCallback):
    """When each step began and ended, in seconds."""

    def __init__(self) -> None:
        self.begins: list[float] = []
        self.ends: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begins.append(_now())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(_now())


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _status(name: str) -> int | None:
    """A line of this process's status on Linux, in bytes; None elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def memory_now() -> int | None:
    """Memory in use, in bytes, after what is free has been given back."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def forget_peak() -> None:
    """Count the peak of memory from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Most memory in use since `forget_peak`, in bytes."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def load_model(work: Work) -> PreTrainedModel:
    """The base in NF4 with double quantisation, the same for both sides."""
    dtype = getattr(torch, work.dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        work.model, quantization_config=quantization, dtype=dtype, device_map=device_map()
    )


def load_unsloth(work: Work) -> PreTrainedModel:
    """The same base as Unsloth loads it, with its kernels."""
    from unsloth import FastLanguageModel, PatchDPOTrainer

    PatchDPOTrainer()
    model, _ = FastLanguageModel.from_pretrained(
        work.model, max_seq_length=work.max_length, dtype=getattr(torch, work.dtype), load_in_4bit=True
    )
    return model


def with_unsloths_adapter(model: PreTrainedModel, work: Work) -> PreTrainedModel:
    """The base under Unsloth's adapter."""
    from unsloth import FastLanguageModel

    lora = default_lora()
    return FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=0.0,
        target_modules="q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(),
        use_gradient_checkpointing="unsloth" if work.checkpointing else False,
    )


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The adapter's weights by name."""
    return sorted((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def start_adapters(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Set the adapter to the same weights on either side: A random as PEFT makes it, B zero.

    Args:
        model: The policy.
        dtype: Of the weights; None for the one they have.
    """
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in trainable(model):
        value = torch.zeros(weight.shape)
        if "lora_A" in name:
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        weight.data = value.to(weight.device, dtype or weight.dtype)


def adapter_hash(model: nn.Module) -> str:
    """SHA-256 of the adapter's names and weights."""
    digest = hashlib.sha256()
    for name, weight in trainable(model):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def build_trainer(side: str, work: Work, model: PreTrainedModel, folder: str) -> Any:
    """The trainer of a side, with the same options, its adapter at the common start."""
    size = work.batch_size if side == OURS else work.batch_size * work.pairs_per_group
    options: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": size,
        "max_steps": WARMUP_STEPS + work.steps,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_length": work.max_length,
        "gradient_checkpointing": work.checkpointing,
        "bf16": work.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": SEED,
    }
    common = {"model": model, "processing_class": load_tokenizer(work.model)}
    if side != UNSLOTH:  # which has its adapter
        common["peft_config"] = default_lora()
    if side == OURS:
        rows = Dataset.from_list(work.rows[OURS])
        trainer: Any = QLoRADPOTrainer(args=QLoRADPOConfig(**options), train_dataset=rows, **common)
    else:
        trainer = DPOTrainer(args=DPOConfig(**options), train_dataset=Dataset.from_list(work.rows[TRL]), **common)
    start_adapters(trainer.model, torch.float32 if side in (TRL, UNSLOTH) else None)
    return trainer


def pairs_hash(side: str, trainer: Any, max_length: int) -> str:
    """SHA-256 of the pairs that a trainer has tokenised, in order."""
    rows = trainer.train_dataset
    if side == OURS:
        pairs = [pair for found in our_pairs(rows, max_length).values() for pair in found]
    else:
        pairs = trl_pairs(rows, max_length)
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def run_one(side: str, work: Work) -> dict[str, Any]:
    """A run from loading the model to the last step, measured."""
    model = load_unsloth(work) if side == UNSLOTH else load_model(work)
    loaded = memory_now()
    if side == UNSLOTH:
        model = with_unsloths_adapter(model, work)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(side, work, model, folder)
        start = {"adapter_hash": adapter_hash(trainer.model), "pairs_hash": pairs_hash(side, trainer, work.max_length)}
        dtypes = sorted({str(weight.dtype).removeprefix("torch.") for _, weight in trainable(trainer.model)})
        trainer.add_callback(clock)
        forget_peak()
        trainer.train()
        peak = peak_memory()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    bounds = clock.ends[WARMUP_STEPS - 1 :]
    seconds = [end - begin for begin, end in itertools.pairwise(bounds)]
    pairs = work.steps * work.batch_size * work.pairs_per_group
    return start | {
        "adapter_dtype": "/".join(dtypes),
        "layout": trainer.data_collator.layout if side == OURS else "padded",
        "kept_layers": trainer.kept.count if side == OURS else 0,
        "losses": [entry["loss"] for entry in log],
        "grad_norms": [float(entry["grad_norm"]) for entry in log],
        "num_tokens": [int(entry["num_tokens"]) for entry in log],
        "num_unique_tokens": [int(entry["num_unique_tokens"]) for entry in log] if side == OURS else None,
        "step_seconds": seconds,
        "begin_to_end_seconds": [e - b for b, e in zip(clock.begins, clock.ends, strict=True)][WARMUP_STEPS:],
        "seconds_per_step": sum(seconds) / work.steps,
        "pairs_per_second": pairs / sum(seconds),
        "unique_tokens_per_second": sum(work.unique_tokens) / sum(seconds),
        "loaded_bytes": loaded,
        "peak_bytes": peak,
        "peak_above_model_gib": None if peak is None or loaded is None else (peak - loaded) / GIB,
    }


# ---- all runs --------------------------------------------------------------------------------------------------------


def run_in_process(side: str, work: Work) -> dict[str, Any]:
    """A run in a process of its own; one that fails says why under `error`."""
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "work.json"), Path(folder, "result.json")
        job.write_text(json.dumps(asdict(work)))
        start = [__file__]
        if side == UNSLOTH:  # which patches what is imported after it
            here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
            start = ["-c", f"{here}; import unsloth, bench_vs_trl; sys.exit(bench_vs_trl.main())"]
        command = [sys.executable, *start, "--one", side, "--work", str(job), "--output", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not result.is_file():
            return {"error": f"exit status {done.returncode}: {done.stderr[-2000:]}"}
        return json.loads(result.read_text())


def all_runs(works: Sequence[Work], sides: Sequence[str], repeats: int, as_is: int) -> list[dict[str, Any]]:
    """Every run: for each setting the sides in turn, `repeats` times, with TRL as it is in the first `as_is` rounds."""
    runs = []
    for work in works:
        rounds = [[*sides, TRL_AS_IS] if TRL in sides and repeat < as_is else sides for repeat in range(repeats)]
        for repeat, side in ((repeat, side) for repeat, members in enumerate(rounds) for side in members):
            found = run_in_process(side, work)
            runs.append({"side": side, "checkpointing": work.checkpointing, "repeat": repeat} | found)
            said = f"{found['seconds_per_step']:.2f} s a step" if "error" not in found else found["error"]
            print(f"{side}, checkpointing {on_off(work.checkpointing)}, {repeat + 1}: {said}", file=sys.stderr)
    return runs


def check_same(runs: Sequence[dict[str, Any]]) -> None:
    """See that all runs trained on the same pairs, and compared runs from the same adapter.

    Raises:
        RuntimeError: If not: no number could be compared.
    """
    done = [run for run in runs if "error" not in run]
    compared = [run for run in done if run["side"] != TRL_AS_IS]
    for name, among in (("pairs_hash", done), ("num_tokens", done), ("adapter_hash", compared)):
        if len({json.dumps(run[name]) for run in among}) > 1:
            found = {run["side"]: run[name] for run in among}
            raise RuntimeError(f"`{name}` must be the same in all runs, got {found}. Nothing can be compared.")


def select(runs: Sequence[dict[str, Any]], side: str, checkpointing: bool) -> list[dict[str, Any]]:
    """The runs of a side in a setting, in order."""
    return [run for run in runs if run["side"] == side and run["checkpointing"] == checkpointing]


def differences(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Largest absolute difference of any step's loss and gradient norm between runs side by side; None without."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if "error" not in a and "error" not in b]
    if not pairs:
        return None
    return {
        name: max(abs(x - y) for a, b in pairs for x, y in zip(a[name], b[name], strict=True))
        for name in ("losses", "grad_norms")
    }


MEASURES = {
    "pairs_per_second": "pairs/s",
    "unique_tokens_per_second": "unique tokens/s",
    "seconds_per_step": "seconds a step",
    "peak_above_model_gib": "peak above model, GiB",
}


def values(runs: Sequence[dict[str, Any]], name: str) -> list[float]:
    """A measure of the runs that have it."""
    return [run[name] for run in runs if run.get(name) is not None]


def spread(numbers: Sequence[float]) -> dict[str, float] | None:
    """Median, least and most; None of none."""
    if not numbers:
        return None
    return {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}


def ratios(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], name: str) -> dict[str, float] | None:
    """Spread of ours/TRL over runs side by side."""
    pairs = [(a.get(name), b.get(name)) for a, b in zip(ours, theirs, strict=False)]
    return spread([a / b for a, b in pairs if a is not None and b])


def summary(runs: Sequence[dict[str, Any]], checkpointing: bool) -> dict[str, Any]:
    """What the runs of a setting come to."""
    ours, trl, as_is, other = (select(runs, side, checkpointing) for side in (OURS, TRL, TRL_AS_IS, UNSLOTH))
    everyone = (*ours, *trl, *as_is, *other)
    columns: dict[str, Callable[[str], dict[str, float] | None]] = {
        OURS: lambda name: spread(values(ours, name)),
        TRL: lambda name: spread(values(trl, name)),
        "ours/trl": lambda name: ratios(ours, trl, name),
        TRL_AS_IS: lambda name: spread(values(as_is, name)),
        "ours/trl_as_is": lambda name: ratios(ours, as_is, name),
        UNSLOTH: lambda name: spread(values(other, name)),
        "ours/unsloth": lambda name: ratios(ours, other, name),
    }
    return {
        "checkpointing": checkpointing,
        "measures": {name: {column: of(name) for column, of in columns.items()} for name in MEASURES},
        "adapter_dtypes": {run["side"]: run["adapter_dtype"] for run in everyone if "error" not in run},
        "layouts": sorted({run["layout"] for run in ours if "error" not in run}),
        "grad_norm": spread([norm for run in (*ours, *trl) for norm in run.get("grad_norms", [])]),
        "differences": {side: differences(ours, select(runs, side, checkpointing)) for side in PEERS},
        "failed": [run["side"] for run in everyone if "error" in run],
    }


# ---- what is said ----------------------------------------------------------------------------------------------------


def on_off(flag: bool) -> str:
    """`on` or `off`."""
    return "on" if flag else "off"


def cell(found: dict[str, float] | None) -> str:
    """A spread as `median (min-max)`, a single number alone."""
    if found is None:
        return "-"
    if found["min"] == found["max"]:
        return f"{found['median']:,.4g}"
    return f"{found['median']:,.4g} ({found['min']:,.4g}-{found['max']:,.4g})"


def table(found: dict[str, Any]) -> str:
    """The summary of a setting for people."""
    dtypes = found["adapter_dtypes"]
    titles = {
        OURS: f"ours, {dtypes.get(OURS, 'failed')}",
        TRL: f"TRL, {dtypes.get(TRL, 'failed')}",
        "ours/trl": "ours/TRL",
        TRL_AS_IS: f"TRL as it is, {dtypes.get(TRL_AS_IS, 'failed')}",
        "ours/trl_as_is": "ours/TRL as it is",
        UNSLOTH: f"Unsloth, {dtypes.get(UNSLOTH, 'failed')}",
        "ours/unsloth": "ours/Unsloth",
    }
    shown = [column for column in titles if any(row[column] for row in found["measures"].values())]
    lines = [["", *(titles[column] for column in shown)]]
    for name, title in MEASURES.items():
        lines.append([title, *(cell(found["measures"][name][column]) for column in shown)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(0, f"gradient checkpointing {on_off(found['checkpointing'])} (columns name the adapters' dtype)")
    norm = found["grad_norm"]["median"] if found["grad_norm"] else math.nan
    for side, difference in found["differences"].items():
        if difference:
            text.append(
                f"largest difference from {titles[side]}: loss {difference['losses']:.1e}, gradient norm "
                f"{difference['grad_norms']:.1e} (median norm {norm:.3g}), warm-up step included"
            )
    if OURS in dtypes and found["layouts"] != ["tree"]:
        text.append(f"our layout fell back to {', '.join(found['layouts'])}")
    text += [f"failed: {side} (see `error` in the JSON)" for side in found["failed"]]
    return "\n".join(text)


def described(counts: dict[str, int], work: Work) -> str:
    """What the runs train on, in words."""
    return (
        f"{counts['rows']} rows: {counts['dropped_by_ours']} dropped by ours, {counts['dropped_by_trl']} by TRL, "
        f"{counts['not_the_same_pairs']} not the same tokens or pairs, {counts['other_number_of_pairs']} without "
        f"{work.pairs_per_group} pairs; the first {counts['trained_on']} of {counts['usable']} usable ones are trained "
        f"on\na step: {work.batch_size} rows = {work.batch_size * work.pairs_per_group} pairs, "
        f"{statistics.mean(work.unique_tokens):,.0f} unique tokens; {work.steps} timed steps after "
        f"{WARMUP_STEPS} to warm up; {work.dtype}"
    )


def options_of(work: Work) -> dict[str, Any]:
    """What all runs of a benchmark share."""
    return {name: value for name, value in asdict(work).items() if name not in ("rows", "checkpointing")}


def heading(about: dict[str, Any]) -> str:
    """Machine and versions in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['gpu'] or about['cpu']}, {about['threads']} threads; {versions}"


def read_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a .jsonl, .json, .parquet or .csv file, or a Hub id")
    parser.add_argument("--model", help="Hub id or folder of a causal LM, with its tokenizer")
    parser.add_argument("--output", help="JSON file with all numbers")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a side in a setting")
    parser.add_argument("--as_is_repeats", type=int, default=1, help="rounds in which TRL is also run as it is")
    parser.add_argument("--batch_size", type=int, help="rows in a step: pairs (default 4) or groups (default 1)")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--checkpointing", choices=("on", "off", "both"), default="both")
    parser.add_argument("--learning_rate", type=float, default=5e-6)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--baseline_only", action="store_true", help="TRL alone")
    parser.add_argument("--unsloth", action="store_true", help="Unsloth too, which must be installed")
    only.add_argument("--ours_only", action="store_true", help="this library alone")
    parser.add_argument("--one", choices=(OURS, *PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.one is None and not (args.data and args.model):
        parser.error("--data and --model must be given")
    if min(args.steps, args.repeats, args.max_length, args.batch_size or 1) < 1:
        parser.error("--steps, --repeats, --max_length and --batch_size must be 1 or more")
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns 1 if a run failed."""
    args = read_arguments(words)
    if args.one is not None:
        work = Work(**json.loads(Path(args.work).read_text()))
        Path(args.output).write_text(json.dumps(run_one(args.one, work)))
        return 0
    datasets.disable_progress_bars()
    fields, counts = choose_rows(args)
    shared = {name: getattr(args, name) for name in ("model", "dtype", "max_length", "learning_rate", "steps")}
    settings = {"on": [True], "off": [False], "both": [True, False]}[args.checkpointing]
    works = [Work(checkpointing=setting, **shared, **fields) for setting in settings]
    print(described(counts, works[0]), file=sys.stderr)
    sides = [OURS] * (not args.baseline_only) + [TRL] * (not args.ours_only) + [UNSLOTH] * args.unsloth
    runs = all_runs(works, sides, args.repeats, args.as_is_repeats)
    found = [summary(runs, setting) for setting in settings]
    about = surroundings() | {"data": args.data, "rows": counts, "work": options_of(works[0])}
    if args.output:
        Path(args.output).write_text(json.dumps(about | {"summary": found, "runs": runs}, indent=2) + "\n")
    check_same(runs)
    print(heading(about), described(counts, works[0]), *map(table, found), sep="\n\n")
    return int(any("error" in run for run in runs))


if __name__ == "__main__":
    sys.exit(main())
