"""The commands of the command line: `qlora-dpo demo`, `train`, `evaluate` and the others in `RUNS`.

Arguments are the dataclasses' fields, read by `HfArgumentParser`. `--config file.yaml` sets defaults and flags win.
"""

import argparse
import gc
import hashlib
import io
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.exceptions import DatasetsError
from transformers import PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from qlora_dpo.checkpoints import checkpoint_to_resume, last_intact
from qlora_dpo.config import EVALUATION_FIELDS, QLoRADPOConfig
from qlora_dpo.data import value_columns
from qlora_dpo.demo import DemoArguments, run_demo
from qlora_dpo.errors import FixableError, StoppedError
from qlora_dpo.files import load_rows
from qlora_dpo.footprint import MemoryOptions
from qlora_dpo.generations import GENERATIONS_NAME
from qlora_dpo.hub import push_adapter
from qlora_dpo.judge import judged
from qlora_dpo.memory import parse_bytes, plan_memory
from qlora_dpo.merge import merge_adapter
from qlora_dpo.model import load_tokenizer
from qlora_dpo.options import DataArguments, ModelArguments, chosen_policy
from qlora_dpo.parsing import parse
from qlora_dpo.paths import EVALUATIONS, JUDGED, METRICS_NAME, OF_WEIGHTS, UNKNOWN
from qlora_dpo.record import (
    policy_of,
    read_record,
    recorded_options,
    recorded_reference,
    require_base,
    require_known,
    warn_of_reference,
    weights_hash,
)
from qlora_dpo.report import write_report
from qlora_dpo.resuming import warn_of_base
from qlora_dpo.rewardbench import as_conversations, section_scores
from qlora_dpo.score import row_errors, score_file
from qlora_dpo.shapes import BUILT_IN
from qlora_dpo.terminal import one_line_warnings
from qlora_dpo.trainer import QLoRADPOTrainer
from qlora_dpo.typed import help_of, refuse_changed

SOURCE = "source_sha256"
"""Key of an evaluation's metrics that tells its data from others of the same name."""
AS_RECORDED = "as recorded"
TRAINING_ONLY = {f.name for f in fields(QLoRADPOConfig)}.difference(EVALUATION_FIELDS)


@dataclass
class EvaluationArguments:
    """What to evaluate."""

    adapter: str = field(metadata={"help": "Folder or Hub id of a saved adapter with its qlora_dpo.json."})
    dataset_name: str = field(metadata=help_of(DataArguments, "dataset_name"))
    dataset_config: str | None = field(default=None, metadata=help_of(DataArguments, "dataset_config"))
    dataset_test_split: str = field(default="train", metadata={"help": "Split to evaluate on."})
    benchmark: str | None = field(
        default=None, metadata={"help": "rewardbench: rows of text with its subsets, and the scores of its sections."}
    )
    json: bool = field(default=False, metadata={"help": "Print the report as JSON instead of a table."})


def _write_metrics(folder: str, metrics: dict[str, Any]) -> None:
    path = Path(folder, METRICS_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"metrics written to {path}", file=sys.stderr)


def _summary(title: str, metrics: dict[str, float]) -> str:
    """One line a person reads."""
    return (
        f"{title}: preference accuracy {metrics['eval_rewards/accuracies']:.3f}, "
        f"reward margin {metrics['eval_rewards/margins']:+.4f}, loss {metrics['eval_loss']:.4f}"
    )


def train(words: Sequence[str]) -> None:
    """`qlora-dpo train`: an adapter, with metrics of its evaluation data before and after."""
    data, model, args = parse((DataArguments, ModelArguments, QLoRADPOConfig), words, "qlora-dpo train")
    try:
        _train(data, model, args)
    except KeyboardInterrupt as stop:
        found = last_intact(args.output_dir)
        if found is None or not found[1]:
            raise StoppedError("stopped, with no complete checkpoint. Run it again to begin anew.") from stop
        raise StoppedError(
            f"stopped; the last complete checkpoint is {found[0]}. Run it again with --resume_from_checkpoint true to "
            "go on."
        ) from stop


def _train(data: DataArguments, model: ModelArguments, args: QLoRADPOConfig) -> None:
    if args.eval_strategy != "no" and data.dataset_test_split is None:
        raise ValueError(
            f"`dataset_test_split` must be given with `eval_strategy`, got none with {args.eval_strategy.value}. Add "
            "--dataset_test_split 'train[90%:]', or leave out --eval_strategy."
        )
    goes_on = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)  # before anything is loaded
    load: dict[str, Any] = {"path_or_id": data.dataset_name, "name": data.dataset_config}
    train_rows = load_rows(split=data.dataset_train_split, **load)
    test_rows = load_rows(split=data.dataset_test_split, **load) if data.dataset_test_split else None
    trainer = _trainer(data, model, args, train_rows, test_rows)
    metrics: dict[str, Any] = {}
    if goes_on is None and args.process_index == 0:
        _forget_judged(args.output_dir)
    if test_rows is not None and goes_on is None:
        metrics["before"] = trainer.evaluate()
        judged(trainer, data.dataset_name, str(Path(args.output_dir) / JUDGED["before"]))
        _write_metrics(args.output_dir, metrics)
    elif goes_on is not None and Path(args.output_dir, METRICS_NAME).is_file():
        metrics = json.loads(Path(args.output_dir, METRICS_NAME).read_text())
    metrics["train"] = trainer.train(resume_from_checkpoint=goes_on).metrics or metrics.get("train", {})
    _save(trainer, metrics)  # before anything that may fail
    if test_rows is not None:
        metrics["after"] = trainer.evaluate()
        _save(trainer, metrics)
        found = judged(trainer, data.dataset_name, str(Path(args.output_dir) / JUDGED["after"]))
        for title in ("before", "after"):
            if title in metrics:
                print(_summary(title, metrics[title]))
        print(found)
        trainer.create_model_card()  # with what the report says
    if args.push_to_hub:
        print(f"adapter pushed to {trainer.push_to_hub()}")
    print(f"adapter saved in {args.output_dir}; judge it with: qlora-dpo evaluate --adapter {args.output_dir}")


def _trainer(
    data: DataArguments, model: ModelArguments, args: QLoRADPOConfig, train_rows: Dataset, test_rows: Dataset | None
) -> QLoRADPOTrainer:
    """The trainer of a policy that the options choose, with the names of its data."""
    set_seed(args.seed)  # the adapter's A matrices are random
    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    revision = options.get("revision", model.model_revision)
    policy = chosen_policy(model, args)
    at = {} if revision is None else {"revision": revision}
    tokenizer = load_tokenizer(model.model_name_or_path, trust_remote_code=args.trust_remote_code, **at)
    trainer = QLoRADPOTrainer(
        model=policy,
        args=args,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        processing_class=tokenizer,
    )
    for origin in trainer.prepared.origins:
        trainer.prepared.name(origin, data.dataset_name, data.dataset_config)
    return trainer


def _save(trainer: QLoRADPOTrainer, metrics: dict[str, Any]) -> None:
    """What a training leaves behind, without pushing it."""
    trainer.save_state()
    trainer.save_model(_internal_call=True)
    _write_metrics(trainer.args.output_dir, metrics | {OF_WEIGHTS: weights_hash(trainer.args.output_dir)})


def _forget_judged(folder: str) -> None:
    """Take away what another run in the same folder was judged by, which would stand beside this one's numbers."""
    for path in JUDGED.values():
        shutil.rmtree(Path(folder, path), ignore_errors=True)
    Path(folder, GENERATIONS_NAME).unlink(missing_ok=True)


def _section_scores(trainer: QLoRADPOTrainer) -> dict[str, float]:
    """RewardBench's sections of a trainer's last evaluation."""
    pairs = trainer.last_pairs
    assert pairs is not None
    subsets = dict(zip(trainer.eval_dataset["row"], trainer.eval_dataset["subset"], strict=True))
    margins = pairs.column("reward_chosen") - pairs.column("reward_rejected")
    return section_scores(margins, [subsets[row] for row in pairs.rows().tolist()])


def _evaluation_source(asked: EvaluationArguments) -> str:
    """What tells one data set and split from any other, hashed, as paths are nobody else's business."""
    data = Path(asked.dataset_name).expanduser()
    names = str(data.resolve()) if data.exists() else asked.dataset_name, asked.dataset_config, asked.dataset_test_split
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _evaluation_folder(asked: EvaluationArguments) -> str:
    """A folder for each data set and split, beside the adapter, or here for one on the Hub."""
    adapter, data = Path(asked.adapter), Path(asked.dataset_name).expanduser()
    split = None if asked.dataset_test_split == "train" else asked.dataset_test_split  # which all files have
    names = data.stem if data.exists() else asked.dataset_name, asked.dataset_config, split
    folder = "-".join(re.sub(r"[^\w.:]+", "-", name).strip("-").replace(":", "_") for name in names if name)
    parent, source = (adapter if adapter.is_dir() else Path(adapter.name)) / EVALUATIONS, _evaluation_source(asked)
    for number in itertools.count(1):
        path = parent / (folder if number == 1 else f"{folder}-{number}")
        metrics = path / METRICS_NAME
        if not metrics.is_file() or json.loads(metrics.read_text()).get(SOURCE) in (None, source):
            break
    return str(path)


def evaluate(words: Sequence[str]) -> None:
    """`qlora-dpo evaluate`: a saved adapter, as its record says."""
    classes, program = (EvaluationArguments, QLoRADPOConfig), "qlora-dpo evaluate"
    # The adapter's record sets the other defaults; the first look must not judge options by the library's own.
    asked, own = parse(classes, words, program, {"reference": AS_RECORDED}, TRAINING_ONLY)
    adapter, record = asked.adapter, read_record(asked.adapter)
    defaults = recorded_options(record, given=False) | {"output_dir": _evaluation_folder(asked)}
    if own.reference != AS_RECORDED:
        defaults.pop("reference_in_4bit", None)  # which is of the recorded one
    chosen, args = parse(classes, words, program, defaults, TRAINING_ONLY)
    rows = load_rows(chosen.dataset_name, chosen.dataset_test_split, chosen.dataset_config)
    if chosen.benchmark not in (None, "rewardbench"):
        raise ValueError(f"`benchmark` must be rewardbench, got {chosen.benchmark}. Leave it out for other data.")
    if chosen.benchmark:
        rows = as_conversations(rows)
    if args.reference == UNKNOWN:
        args.reference = recorded_reference(record, given="ref_logps" in value_columns(rows.column_names))
    require_known(record, args.reference)
    require_base(record, chosen.adapter)
    policy = policy_of(record, chosen.adapter, trust_remote_code=args.trust_remote_code)
    tokenizer = load_tokenizer(chosen.adapter, trust_remote_code=args.trust_remote_code)
    trainer = QLoRADPOTrainer(model=policy, args=args, eval_dataset=rows, processing_class=tokenizer)
    trainer.step.bco_delta.total, trainer.step.bco_delta.count = record.bco_delta, 1
    trainer.remove_callback(PrinterCallback)  # with `disable_tqdm` it would print its line before the report
    warn_of_reference(record, trainer.reference)
    warn_of_base(record, policy)
    metrics: dict[str, Any] = dict(trainer.evaluate())
    found = judged(trainer, chosen.dataset_name, args.output_dir)
    extra = {"rewardbench": _section_scores(trainer)} if chosen.benchmark else {}
    sections = [f"\n{section:10} {score:.3f}" for scores in extra.values() for section, score in scores.items()]
    print(json.dumps(found.to_dict() | extra, indent=2) if chosen.json else "".join([str(found), *sections]))
    trainer.prepared.name("eval", chosen.dataset_name, chosen.dataset_config)
    metrics |= extra | {OF_WEIGHTS: weights_hash(adapter), "data": trainer.prepared.origins["eval"]}
    metrics[SOURCE] = _evaluation_source(chosen)
    _write_metrics(args.output_dir, metrics)


def demo(words: Sequence[str]) -> None:
    """`qlora-dpo demo`: a small training from nothing."""
    (arguments,) = parse((DemoArguments,), words, "qlora-dpo demo")
    _write_metrics(arguments.output_dir, run_demo(arguments))


@dataclass
class ScoreArguments:
    """What to score."""

    adapter: str = field(metadata=help_of(EvaluationArguments, "adapter"))
    source: str = field(
        metadata={"help": "A .jsonl file of rows with `prompt` and `completions`, or chosen and rejected."}
    )
    target: str = field(metadata={"help": "File to write, a line for each row; one that is begun is continued."})
    batch_size: int = field(default=8, metadata={"help": "Rows scored at a time."})
    reference: str | None = field(default=None, metadata={"help": "base, none, or a path or id. Default: as recorded."})
    min_margin: float | None = field(
        default=None, metadata={"help": "Drop rows of chosen and rejected whose margin is below it."}
    )
    trust_remote_code: bool = field(default=False, metadata=help_of(QLoRADPOConfig, "trust_remote_code"))


def score(words: Sequence[str]) -> int:
    """`qlora-dpo score`: a file of rows into a file of scores; 1 if a row has none."""
    (chosen,) = parse((ScoreArguments,), words, "qlora-dpo score")
    try:
        count = score_file(**vars(chosen))
    except KeyboardInterrupt as stop:
        raise StoppedError("stopped. Run it again to go on.") from stop
    errors = row_errors(chosen.target)
    print(f"{count} rows scored into {chosen.target}" + ("" if count else ": none was left to score"))
    if errors:
        print(
            f"qlora-dpo score: every row must have a score, got {len(errors)} with an error in {chosen.target} (first: "
            f"{errors[0]}). Correct them in {chosen.source}, and score it into a new file.",
            file=sys.stderr,
        )
    return 1 if errors else 0


def report(words: Sequence[str]) -> None:
    """`qlora-dpo report`: a run as one HTML file."""
    parser = argparse.ArgumentParser(prog="qlora-dpo report")
    parser.add_argument("run_dir", help="The output_dir of a training.")
    run = Path(parser.parse_args(list(words)).run_dir).expanduser()
    print(f"report written to {write_report(str(run))}")


@dataclass
class PlanArguments:
    """Which model to plan for, and which card."""

    model: str | None = field(
        default=None,
        metadata={"help": "A built-in name (see --list), or a folder or Hub id, of which only config.json is read."},
    )
    list: bool = field(default=False, metadata={"help": "Show the built-in names."})
    gpu: str | None = field(
        default=None, metadata={"help": "Memory of the card: 24GB, 8192MiB. Default: the one that is there."}
    )
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a table."})


def _card(gpu: str | None) -> int | None:
    """Bytes of the card named, or of the one that is there."""
    if gpu is not None:
        return parse_bytes(gpu)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def plan(words: Sequence[str]) -> None:
    """`qlora-dpo plan`: what fits on a card."""
    chosen, options = parse((PlanArguments, MemoryOptions), words, "qlora-dpo plan")
    if chosen.list:
        print(json.dumps(BUILT_IN) if chosen.json else "\n".join(BUILT_IN))
        return
    if chosen.model is None:
        raise ValueError("`model` must be given, got none. Name one with --model; --list shows built-in ones.")
    card = _card(chosen.gpu)
    found = plan_memory(chosen.model, gpu_bytes=card, **asdict(options))
    print(json.dumps(found.to_dict(), indent=2) if chosen.json else found)
    if card is None:
        print("no GPU is here: add --gpu 24GB to see what fits on one", file=sys.stderr)


@dataclass
class PushArguments:
    """What to push, and where."""

    adapter: str = field(metadata={"help": "Folder of a saved adapter with its qlora_dpo.json."})
    repo_id: str = field(metadata={"help": "user/name on the Hub; made if it is not there."})
    private: bool = field(default=False, metadata={"help": "Make it private. Default: as the user has set it."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to. Default: the main one."})
    commit_message: str | None = field(default=None, metadata={"help": "First line of the commit."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead."})


def push(words: Sequence[str]) -> None:
    """`qlora-dpo push`: a saved adapter to the Hub."""
    (chosen,) = parse((PushArguments,), words, "qlora-dpo push")
    options = vars(chosen) | {"private": chosen.private or None}  # False would make public what is private by default
    print(f"adapter pushed: {push_adapter(options.pop('adapter'), options.pop('repo_id'), **options)}")


@dataclass
class MergeArguments:
    """What to merge."""

    adapter: str = field(metadata=help_of(EvaluationArguments, "adapter"))
    output_dir: str = field(metadata={"help": "Folder to write, new or empty; an unfinished merge is begun again."})
    into: str = field(
        default="quantized",
        metadata={"help": "quantized: the 4-bit base, dequantised, as trained. original: the base as it is stored."},
    )
    base: str | None = field(default=None, metadata={"help": "Base model, if it is not where it was in training."})
    dtype: str = field(default="bfloat16", metadata={"help": "Weights to write: bfloat16, float16 or float32."})
    max_shard_size: str = field(default="2GB", metadata={"help": "Largest file."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Preference rows to measure the difference on: a file, a folder or a Hub id."}
    )
    dataset_config: str | None = field(default=None, metadata=help_of(DataArguments, "dataset_config"))
    dataset_test_split: str = field(default="train", metadata={"help": "Split to take the rows from."})
    num_rows: int = field(default=16, metadata={"help": "Rows to measure on, the first of the split."})
    reference: str | None = field(default=None, metadata=help_of(ScoreArguments, "reference"))
    trust_remote_code: bool = field(default=False, metadata=help_of(QLoRADPOConfig, "trust_remote_code"))
    json: bool = field(default=False, metadata=help_of(EvaluationArguments, "json"))


def merge(words: Sequence[str]) -> None:
    """`qlora-dpo merge`: an adapter and its base into a model to serve."""
    (chosen,) = parse((MergeArguments,), words, "qlora-dpo merge")
    if chosen.num_rows < 1:
        raise ValueError(f"`num_rows` must be 1 or more, got {chosen.num_rows}. Leave out --dataset_name for none.")
    rows = None
    if chosen.dataset_name is None:
        refuse_changed(chosen, ("dataset_config", "dataset_test_split", "num_rows", "reference"), "`dataset_name`")
    else:
        rows = load_rows(chosen.dataset_name, chosen.dataset_test_split, chosen.dataset_config)
        rows = rows.select(range(min(chosen.num_rows, len(rows))))
    names = ("base", "into", "dtype", "max_shard_size", "reference", "trust_remote_code")
    options = {name: getattr(chosen, name) for name in names}
    found = merge_adapter(chosen.adapter, chosen.output_dir, sample_rows=rows, **options)
    print(json.dumps(found.to_dict(), indent=2) if chosen.json else found)
    print(f"model written to {chosen.output_dir}", file=sys.stderr)


RUNS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "score": score,
    "report": report,
    "plan": plan,
    "push": push,
    "merge": merge,
}
"""What the commands in `__main__` do."""


def run(command: str, words: Sequence[str]) -> int:
    """Run a command: the exit status, and one line for every error that the user can put right."""
    transformers_logging.set_verbosity_warning()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not show every letter of a data set
    try:
        with one_line_warnings():
            return RUNS[command](words) or 0
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError, DatasetsError, FixableError) as error:
        print(f"qlora-dpo {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (StoppedError, KeyboardInterrupt) as stop:
        how = str(stop) or "stopped."
    gc.collect()  # closes progress bars, which would draw themselves below the line
    print(f"\nqlora-dpo {command}: {how}", file=sys.stderr)
    return 130
