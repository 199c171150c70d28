"""What became of the rows of a data set: the report that is printed at the start of a run."""

import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qlora_dpo.prompts import tokens_once

MUCH_DROPPED = 0.1
"""Share of rows beyond which a run warns that they are dropped."""
WORTH_MERGING = 0.05
"""Share of tokens in prompts and completions that repeat from which on the report says so."""


@dataclass(frozen=True)
class DataReport:
    """What became of a data set, printed at the start of a run.

    Token lengths are of prompt + completion; `whole_*` of the longest of each row, before any was cut or dropped.
    `tokens_padded` is what one padded row per completion would compute at this batch size in data order, `tokens` what
    is placed in rows: each prompt and completion of a group once; `tokens_merged` the same with one group a prompt.
    """

    name: str
    rows: int
    groups: int
    pairs: int
    dropped: dict[str, int]
    unused_columns: list[str]
    length_median: int
    length_p95: int
    length_max: int
    whole_p95: int
    whole_max: int
    truncated_share: float
    boundary_moved_share: float
    lost_pairs: int
    tokens: int
    tokens_padded: int
    tokens_merged: int
    example: str

    @property
    def tokens_saved(self) -> float:
        """Share of the padded tokens that is not computed."""
        return 1 - self.tokens / self.tokens_padded

    def __str__(self) -> str:
        lines = [
            f"{self.name} data: {self.rows:,} rows -> {self.groups:,} groups, {self.pairs:,} pairs",
            f"  prompt + completion: median {self.length_median:,}, p95 {self.length_p95:,}, max {self.length_max:,} "
            f"tokens; truncated rows: {self.truncated_share:.1%}",
            f"  tokens computed: {self.tokens:,}, {self.tokens_saved:.0%} fewer than one padded row per completion",
        ]
        if self.name == "train" and self.tokens_merged < (1 - WORTH_MERGING) * self.tokens:
            fewer = 1 - self.tokens_merged / self.tokens
            lines.append(f"  prompts repeat: `merge_prompts` would compute {self.tokens_merged:,}, {fewer:.0%} fewer")
        if self.truncated_share:
            lines.insert(2, f"  before they were cut: p95 {self.whole_p95:,}, max {self.whole_max:,} tokens")
        lines += [f"  dropped {count:,}: {reason}" for reason, count in self.dropped.items()]
        if self.lost_pairs:
            lines.append(f"  left out {self.lost_pairs:,} pairs whose sides are the same")
        if self.boundary_moved_share:
            lines.append(
                f"  prompt ends before its last token in {self.boundary_moved_share:.1%} of rows: alone it is "
                "tokenised or rendered differently"
            )
        if self.unused_columns:
            lines.append(f"  columns not used: {', '.join(self.unused_columns)}")
        return "\n".join([*lines, self.example])


def _padded_tokens(lengths: Sequence[np.ndarray], batch_size: int) -> int:
    """Tokens of one padded row per completion, for batches of `batch_size` groups in data order."""
    batches = [np.concatenate(lengths[i : i + batch_size]) for i in range(0, len(lengths), batch_size)]
    return int(sum(batch.size * batch.max() for batch in batches))


def _example(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The first pair as the model sees it, special tokens shown; the middle of long texts left out."""
    width = 300
    w, l = row["pairs"][0]
    parts = {"prompt": row["prompt_ids"], "chosen": row["completion_ids"][w], "rejected": row["completion_ids"][l]}
    lines = ["  first pair, as the model sees it:"]
    for name, ids in parts.items():
        text = repr(tokenizer.decode(ids))
        if len(text) > width:
            text = f"{text[: width // 2]} ... {text[-width // 2 :]}"
        lines.append(f"    {name:8} {len(ids):5,} tokens  {text}")
    return "\n".join(lines)


def data_report(
    name: str,
    mapped: Dataset,
    kept: Dataset,
    unused_columns: list[str],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> DataReport:
    """The report.

    Args:
        name: What the set is called.
        mapped: Every row, tokenised or dropped.
        kept: The groups that are left.
        unused_columns: Columns of the rows that are not read.
        tokenizer: To show the first pair.
        batch_size: Groups in a batch, for the padded count.
    """
    prompt_lengths = [len(ids) for ids in kept["prompt_ids"]]
    completion_lengths = [np.array([len(ids) for ids in group]) for group in kept["completion_ids"]]
    wholes = [p + c for p, c in zip(prompt_lengths, completion_lengths, strict=True)]
    lengths = np.concatenate(wholes)
    return DataReport(
        name=name,
        rows=len(mapped),
        groups=len(kept),
        pairs=sum(len(pairs) for pairs in kept["pairs"]),
        dropped=dict(Counter(reason for reason in mapped["dropped"] if reason)),
        unused_columns=unused_columns,
        length_median=int(np.median(lengths)),
        length_p95=int(np.percentile(lengths, 95)),
        length_max=int(lengths.max()),
        whole_p95=int(np.percentile(mapped["whole_length"], 95)),
        whole_max=max(mapped["whole_length"]),
        truncated_share=float(np.mean(mapped["truncated"])),
        boundary_moved_share=float(np.mean(mapped["boundary_moved"])),
        lost_pairs=sum(mapped["lost_pairs"]),
        tokens=int(sum(prompt_lengths) + sum(int((c - 1).sum()) for c in completion_lengths)),
        tokens_padded=_padded_tokens(wholes, batch_size),
        tokens_merged=tokens_once(kept["prompt_ids"], kept["completion_ids"]),
        example=_example(kept[0], tokenizer),
    )


def show(report: DataReport) -> None:
    """Print a report where progress bars go, and warn if much is dropped."""
    print(report, file=sys.stderr)
    dropped = sum(report.dropped.values())
    if dropped > MUCH_DROPPED * report.rows:
        reason = max(report.dropped, key=report.dropped.__getitem__)
        warnings.warn(
            f"Of the {report.rows:,} rows of the {report.name} data {dropped:,} are dropped, most because: {reason}. "
            "Correct them, or raise `max_length` where it cuts them.",
            stacklevel=3,
        )
