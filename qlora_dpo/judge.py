"""How good a policy is on preference data: every pair once, and a report of it.

The numbers come from the trainer's own evaluation, so that a report and a training log never disagree.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qlora_dpo.adapters import trained_adapters
from qlora_dpo.config import QLoRADPOConfig
from qlora_dpo.data import columns_of, value_columns
from qlora_dpo.errors import FixableError
from qlora_dpo.evaluation import GatheredPairs
from qlora_dpo.measures import Pairs
from qlora_dpo.paths import PAIRS_NAME, RECORD_NAME, REPORT_NAME, local_adapter
from qlora_dpo.preference_report import PreferenceReport, preference_report
from qlora_dpo.record import read_record, recorded_options, require_known
from qlora_dpo.resuming import warn_of_base
from qlora_dpo.trainer import QLoRADPOTrainer


def evaluate_preferences(
    policy: PeftModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: QLoRADPOConfig | None = None,
    *,
    name: str = "preferences",
    output_dir: str | None = None,
) -> PreferenceReport:
    """Judge a policy on a preference data set.

    Args:
        policy: Base with adapters, as `load_policy` returns it.
        dataset: Rows in any form that training accepts; columns `subset` and `label_probs` are used in the report.
        tokenizer: The tokenizer of the model.
        args: `reference`, `beta`, lengths and batch size; None for those that the adapter was trained with, where
            `load_policy` loaded it from beside its `qlora_dpo.json`, else the defaults, with the base as reference.
        name: What to call the set in the report.
        output_dir: Where to write `report.json` and, a line for each pair, `pairs.jsonl`; None for nowhere.

    Returns:
        The report: accuracy with its interval, margins, calibration, and the same by length, subset and turns.

    Raises:
        TypeError: If the data set is not one.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"`dataset` must be one datasets.Dataset, got {type(dataset).__name__}. Pass one split or file."
        )
    if args is None:
        options = _as_trained(policy, "ref_logps" in value_columns(columns_of(dataset)))
        args = QLoRADPOConfig(output_dir=output_dir or tempfile.gettempdir(), report_to=[], **options)
    trainer = QLoRADPOTrainer(model=policy, args=args, eval_dataset=dataset, processing_class=tokenizer)
    trainer.evaluate()
    return judged(trainer, name, output_dir)


def _as_trained(policy: PeftModel, given: bool) -> dict[str, Any]:
    """The options that the record of a policy's adapter gives; without one, the base as reference."""
    source = getattr(policy, "adapter_sources", {}).get(trained_adapters(policy)[-1])
    if source is None or not Path(local_adapter(source), RECORD_NAME).is_file():
        return {"reference": "base"}
    record = read_record(source)
    options = recorded_options(record, given)
    require_known(record, options["reference"])
    warn_of_base(record, policy)
    return options


def judged(trainer: QLoRADPOTrainer, name: str, output_dir: str | None = None) -> PreferenceReport:
    """The report of a trainer's last evaluation, of one data set.

    Raises:
        FixableError: If there was none, or if a reward is not finite.
        ValueError: If it was of a stream that several workers read.
    """
    if trainer.last_pairs is None:
        raise FixableError("An evaluation must come before its report, got none. Call trainer.evaluate() first.")
    workers = trainer.args.dataloader_num_workers
    if isinstance(trainer.eval_dataset, IterableDataset) and workers > 1:
        raise ValueError(
            f"`dataloader_num_workers` must be 0 or 1 for a report of a stream, whose rows are looked up by number, "
            f"got {workers}. Leave it out."
        )
    groups = {row["row"]: row for row in trainer.eval_dataset}
    rewards = [trainer.last_pairs.column(f"reward_{side}") for side in ("chosen", "rejected")]
    if not np.isfinite(rewards).all():
        raise FixableError(
            "Rewards must be finite to be judged, got some that are not: the policy has diverged, or what it is "
            "trained from holds such numbers. Lower `learning_rate`; `qlora-dpo report` draws where the log went wrong."
        )
    referenced = trainer.reference.kind != "none" or "ref_logps" in columns_of(trainer.eval_dataset)
    report = preference_report(pairs_of(trainer.last_pairs, groups, trainer.beta, referenced), name)
    if output_dir is not None and trainer.args.process_index == 0:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        Path(output_dir, REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        lines = pair_lines(trainer.last_pairs, groups, trainer.processing_class)
        with Path(output_dir, PAIRS_NAME).open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return report


def pairs_of(records: GatheredPairs, groups: dict[int, dict[str, Any]], beta: float, referenced: bool = True) -> Pairs:
    """The pairs of an evaluation, with what the data set says of them.

    Args:
        records: Every pair once.
        groups: Tokenised groups by data-set row.
        beta: Factor of the rewards.
        referenced: Whether they are relative to a reference.
    """
    rows = records.rows().tolist()
    kl = [records.column(f"kl_{side}") for side in ("chosen", "rejected")]
    known = not np.isnan(kl[0]).any()
    columns = {
        f"{name}_{side}": records.column(f"{name}_{side}")
        for name in ("reward", "logps", "tokens")
        for side in ("chosen", "rejected")
    }
    return Pairs(
        row=np.array(rows),
        prompt=records.prompts(),
        **columns,
        beta=beta,
        referenced=referenced,
        kl_chosen=kl[0] if known else None,
        kl_rejected=kl[1] if known else None,
        label_probs=records.column("label_prob"),
        subset=np.array([groups[row]["subset"] or "" for row in rows]) if "subset" in groups[rows[0]] else None,
        turns=np.array([groups[row]["turns"] for row in rows]) if "turns" in groups[rows[0]] else None,
    )


def pair_lines(
    records: GatheredPairs, groups: dict[int, dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Each pair as a line: its row and number, rewards, log-probabilities, lengths, and the text the model saw."""
    names = [f"{n}_{side}" for n in ("reward", "logps", "tokens", "kl") for side in ("chosen", "rejected")]
    columns = {name: records.column(name).tolist() for name in names}
    for i, (row, number) in enumerate(zip(records.rows().tolist(), records.pair_ids().tolist(), strict=True)):
        group = groups[row]
        w, l = group["pairs"][number]
        values = {name: None if math.isnan(value[i]) else value[i] for name, value in columns.items()}
        texts = {"prompt": group["prompt_ids"], "chosen": group["completion_ids"][w]}
        texts["rejected"] = group["completion_ids"][l]
        yield {
            "row": row,
            "pair": number,
            "subset": group.get("subset"),
            "margin": columns["reward_chosen"][i] - columns["reward_rejected"][i],
            **values,
            **{name: tokenizer.decode(ids) for name, ids in texts.items()},
        }
