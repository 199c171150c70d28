"""What models say of a few preference rows, one after the other, and how far apart they are."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from qlora_dpo.data import TokenLimits, prepare_dataset
from qlora_dpo.forward import install_scoring, score_batch
from qlora_dpo.layouts import Group, group_of, make_batch
from qlora_dpo.metrics import outcomes
from qlora_dpo.record import AdapterRecord, read_record
from qlora_dpo.score import load_scorer
from qlora_dpo.shards import weight_files


@dataclass(frozen=True)
class MergeDifference:
    """A merged model beside 4-bit base and adapter, on the sample rows.

    Attributes:
        token_mean: Mean absolute difference of a token's log-probability, in nats.
        token_max: The largest.
        completion_mean: Mean absolute difference of a completion's summed log-probability, in nats.
        completion_max: The largest.
        accuracy: Preference accuracy of the merged model.
        margin: Mean reward margin of the merged model.
    """

    token_mean: float
    token_max: float
    completion_mean: float
    completion_max: float
    accuracy: float
    margin: float


@dataclass(frozen=True)
class SampleScores:
    """What a model says of the sample rows.

    Attributes:
        token_logps: `(N,)` in nats.
        logps: `(B,)` in nats.
        margins: `(T,)` log-ratio of chosen minus rejected, times beta.
    """

    token_logps: Tensor
    logps: Tensor
    margins: Tensor

    @property
    def accuracy(self) -> float:
        """Mean of the pairs' `outcomes`."""
        return float(outcomes(self.margins).double().mean())

    @property
    def margin(self) -> float:
        """Mean margin."""
        return float(self.margins.mean())


@dataclass(frozen=True)
class Sample:
    """The sample rows as token ids, and what the rewards are relative to.

    Attributes:
        groups: The rows.
        ref_logps: `(B,)` of the reference, in nats, of all groups one after the other.
        beta: Factor of the rewards.
        pad_token_id: Token that fills padded rows.
    """

    groups: list[Group]
    ref_logps: Tensor
    beta: float
    pad_token_id: int

    def batches(self, device: torch.device) -> Iterator[dict[str, Any]]:
        """A padded batch for each row: the slow truth, which needs no proof."""
        return (send_to_device(make_batch([group], "padded", self.pad_token_id), device) for group in self.groups)

    def scores(self, model: Any, device: torch.device) -> SampleScores:
        """The scores of a model that was prepared by `install_scoring`."""
        with torch.no_grad():
            found = [score_batch(model, batch) for batch in self.batches(device)]
        logps, tokens = (torch.cat([one[key].double().cpu() for one in found]) for key in ("logps", "token_logps"))
        ratios, first, margins = logps - self.ref_logps, 0, []
        for group in self.groups:
            margins += [self.beta * (ratios[first + w] - ratios[first + l]) for w, l in group.pairs]
            first += len(group.completion_ids)
        return SampleScores(tokens, logps, torch.stack(margins))


def scored_as_trained(
    adapter: str, rows: Dataset, reference: str | None, **model_kwargs: Any
) -> tuple[Sample, SampleScores]:
    """The sample rows, and what 4-bit base and adapter, computed as in training, say of them."""
    scorer = load_scorer(adapter, reference, **model_kwargs)
    groups = _groups(rows, scorer.tokenizer, read_record(adapter))
    sample = Sample(groups, torch.empty(0), scorer.beta, int(scorer.tokenizer.pad_token_id))
    with torch.no_grad(), scorer.autocast():
        batches = sample.batches(scorer.device)
        logps = [scorer.reference(scorer.policy, batch)["logps"].double().cpu() for batch in batches]
        sample = replace(sample, ref_logps=torch.cat(logps))
        return sample, sample.scores(scorer.policy, scorer.device)


def _groups(rows: Dataset, tokenizer: PreTrainedTokenizerBase, record: AdapterRecord) -> list[Group]:
    """Rows as `evaluate` takes them."""
    limits = TokenLimits(record.max_length, record.max_prompt_length)
    found, _ = prepare_dataset(rows, tokenizer, limits, name="sample", pair_strategy=record.pair_strategy)
    return [group_of(row) for row in found]


def compared(sample: Sample, folder: Path, dtype: str, before: SampleScores, **model_kwargs: Any) -> MergeDifference:
    """A merged model as transformers loads it beside base and adapter."""
    gc.collect()  # the model before this one
    device = _roomiest(sum(path.stat().st_size for path in weight_files(folder)))
    options = {"dtype": getattr(torch, dtype), "device_map": {"": device}} | model_kwargs
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.eval()
    install_scoring(model)
    after = sample.scores(model, device)
    tokens = (after.token_logps - before.token_logps).abs()
    completions = (after.logps - before.logps).abs()
    return MergeDifference(
        float(tokens.mean()),
        float(tokens.max()),
        float(completions.mean()),
        float(completions.max()),
        after.accuracy,
        after.margin,
    )


def _roomiest(needed: int) -> torch.device:
    """The GPU if a model of that many bytes and its activations fit, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] > 1.25 * needed:
            return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
