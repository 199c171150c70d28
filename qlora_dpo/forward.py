"""From a batch to log-probabilities: the one path that the policy, the reference and evaluation take.

The chunked head runs inside the causal LM's own forward, replaced on the instance and called through PEFT, DDP and
accelerate as usual, so hooks, autocast and gradient reduction stay where they are. Called without `score`, the model
is what it was.

Shapes as in `layouts`: B completions, N scored tokens, R rows of L positions.
"""

import contextlib
import functools
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_dpo.attention import BACKEND, attention_backend, recompute_with_same_attention
from qlora_dpo.layouts import Group, make_batch
from qlora_dpo.logps import STATISTICS, LogitRule, sum_by_completion, token_scores, widen

_FORWARD_KEYS = ("input_ids", "attention_mask", "position_ids")


def install_scoring(model: PreTrainedModel) -> None:
    """Let a causal LM's forward take `score=`, and then return log-probabilities instead of logits. Idempotent.

    With `score`, a dict of `predictors`, `targets`, `chunk_size` and `statistics`, and with `segments` for rows that
    hold many sequences, the forward returns a dict of `(N,)` tensors (`token_logps` and perhaps `STATISTICS`).
    """
    if hasattr(model.forward, "scores"):
        return
    original = model.forward
    config = model.config
    rule = LogitRule.from_config(config.get_text_config())

    @functools.wraps(type(model).forward)  # `generate` validates its keywords against the model's own signature
    def forward(self: PreTrainedModel, *args: Any, score: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if score is None:
            return original(*args, **kwargs)
        named = {key: value for key, value in kwargs.items() if value is not None}
        own = config._attn_implementation
        with attention_backend(config, BACKEND if "segments" in named else own):
            recompute_with_same_attention(self, config)
            hidden = self.base_model(*args, use_cache=False, **named).last_hidden_state
        rows = hidden.flatten(0, 1)[score["predictors"]]
        head = self.get_output_embeddings()
        return token_scores(rows, head, score["targets"], rule, score["chunk_size"], score["statistics"])

    forward.scores = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def score_batch(
    model: nn.Module, batch: dict[str, Any], statistics: bool = False, chunk_size: int | None = None
) -> dict[str, Tensor]:
    """Log-probabilities of the completions of a batch, whatever its layout.

    Args:
        model: A causal LM prepared by `install_scoring`, bare or wrapped (PEFT, DDP).
        batch: What `layouts.make_batch` returns, on the model's device.
        statistics: Whether to return sums of `logps.STATISTICS` too.
        chunk_size: Positions in a tile of logits; None for 64 MiB of them.

    Returns:
        `logps` `(B,)` summed over each completion, in nats; `token_logps` `(N,)`; with `statistics`, `(B,)` sums over
        each completion's tokens of `entropy` (nats), `mean_logits` and `is_top1`, without gradient.
    """
    kwargs = {key: batch[key] for key in _FORWARD_KEYS}
    if batch["segments"] is None:  # right-padded rows: the model's own positions are the truth to compare with
        del kwargs["position_ids"]
    else:
        kwargs["segments"] = batch["segments"]
    request = {"predictors": batch["predictors"], "targets": batch["targets"], "chunk_size": chunk_size}
    tokens = model(**kwargs, score={**request, "statistics": statistics})
    lengths = batch["lengths"]
    sums = {name: sum_by_completion(tokens[name], lengths) for name in STATISTICS if name in tokens}
    logps = sum_by_completion(tokens["token_logps"], lengths)
    return {"logps": logps, "token_logps": tokens["token_logps"], **sums}


@contextlib.contextmanager
def noise_off(model: nn.Module) -> Iterator[None]:
    """No dropout, embedding noise (NEFTune) or router jitter inside the block, with the layers still in train mode.

    Layers that switch their arithmetic on `training` (4-bit layers on a CPU, checkpointing) keep it, so that a
    reference pass in here and a policy pass outside compute the same base model bit for bit. Dropout that is a function
    call in the attention reads a probability from its module: those are set to zero and put back.
    """
    quiet: list[nn.Module] = []
    probabilities: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        if module.training and isinstance(module, (nn.modules.dropout._DropoutNd, nn.Embedding)):
            quiet.append(module)
        for name, value in list(module.__dict__.items()):
            if isinstance(value, float) and value > 0 and ("dropout" in name or "jitter" in name):
                probabilities.append((module, name, value))
    try:
        for module in quiet:
            module.training = False
        for module, name, _ in probabilities:
            setattr(module, name, 0.0)
        yield
    finally:
        for module in quiet:
            module.training = True
        for module, name, value in probabilities:
            setattr(module, name, value)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the model to zero for good: dropout layers and function calls alike."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(module.__dict__.items()):
            if isinstance(value, float) and "dropout" in name:
                setattr(module, name, 0.0)


def check_logit_rule(model: nn.Module, token_ids: Sequence[int], device: torch.device) -> None:
    """Compare the chunked head with the model's own logits on one short sequence.

    Args:
        model: A model prepared by `install_scoring`.
        token_ids: At least two tokens; the first sixteen are used.
        device: The model's device.

    Raises:
        NotImplementedError: If the model does more to its logits than a scale and a soft-cap named in its config.
    """
    ids = torch.tensor([list(token_ids[:16])], device=device)
    score = {"predictors": torch.arange(ids.shape[1] - 1, device=device), "targets": ids[0, 1:]}
    with torch.no_grad(), noise_off(model):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        ours = model(input_ids=ids, score={**score, "chunk_size": None, "statistics": False})["token_logps"]
    theirs = torch.log_softmax(widen(logits), -1).gather(-1, ids[0, 1:, None])[:, 0]
    rounding = torch.finfo(logits.dtype).eps * max(1.0, logits.abs().max().item())
    difference = (ours - theirs).abs().max().item()
    if not difference <= 8 * rounding + 1e-4:
        raise NotImplementedError(
            f"The logits of {type(model).__name__} must be its head's output times a scale, soft-capped, as its config "
            f"says, got log-probabilities that differ by {difference:.3g} nats. Report the model's config.model_type."
        )


@dataclass(frozen=True)
class LayoutProof:
    """How far a layout's log-probabilities are from those of one row at a time.

    Attributes:
        layout: The layout that was tried.
        difference: Largest difference of a completion's log-probability, in nats; infinite if the layout cannot run.
        tolerance: 4 times what `padded` differs from itself by.
        reason: Why the layout cannot run, if it cannot.
    """

    layout: str
    difference: float
    tolerance: float
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether the layout may be used."""
        return self.difference <= self.tolerance


def _row_by_row(model: nn.Module, groups: Sequence[Group], device: torch.device) -> tuple[Tensor, Tensor]:
    """`(B,)` logps with every completion scored alone, and `(B,)` root of the sum of its squared token logps."""
    alone, spread = [], []
    for group in groups:
        for ids in group.completion_ids:
            batch = to_device(make_batch([replace(group, completion_ids=[ids], pairs=[])], "padded"), device)
            scored = score_batch(model, batch)
            alone.append(scored["logps"][0])
            spread.append(scored["token_logps"].square().sum().sqrt())
    return torch.stack(alone), torch.stack(spread)


def prove_layout(model: nn.Module, groups: Sequence[Group], layout: str, device: torch.device) -> LayoutProof:
    """Score groups in a layout and row by row, without gradient, and compare.

    The yardstick is what `padded` itself differs by in this dtype: the same two rows alone, together, and together in
    the other order. Where that is nothing at all (short rows on some CPUs), a few roundings of each token's
    log-probability, added up like a random walk, stand in for it. Over 27 tiny families in units of one such rounding,
    layouts that hold were within 5 in fp32 and 1 in bf16 (but for the expert choices of gpt-oss), those that do not
    were at 580,000 and 9 or more.

    Args:
        model: A model prepared by `install_scoring`.
        groups: Groups to score: the longest at hand and a short one.
        layout: `tree` or `packed`.
        device: The model's device.

    Returns:
        The proof, with both numbers.
    """
    with torch.no_grad(), noise_off(model):
        alone, spread = _row_by_row(model, groups, device)
        first = groups[0]
        two = replace(first, completion_ids=first.completion_ids[:2], pairs=[])
        swapped = replace(two, completion_ids=two.completion_ids[::-1])
        together = score_batch(model, to_device(make_batch([two], "padded"), device))["logps"]
        reordered = score_batch(model, to_device(make_batch([swapped], "padded"), device))["logps"].flip(0)
        noise = max((together - reordered).abs().max().item(), (together - alone[:2]).abs().max().item())
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        roundings = 1 if dtype in (torch.bfloat16, torch.float16) else 4
        tolerance = 4 * max(noise, roundings * torch.finfo(dtype).eps * spread.max().item())
        try:
            tried = score_batch(model, to_device(make_batch(groups, layout), device))["logps"]
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            return LayoutProof(layout, float("inf"), tolerance, f"{type(error).__name__}: {error}")
        difference = (tried - alone).abs().max().item()
    return LayoutProof(layout, difference if difference == difference else float("inf"), tolerance)


def to_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
