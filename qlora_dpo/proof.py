"""What is checked on the model at hand before the first number is used: its logits, the layout, and the reference.

All of it without gradient, on the longest and the shortest group of the data.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedConfig

from qlora_dpo.errors import FixableError, is_out_of_memory
from qlora_dpo.forward import noise_off, score_batch
from qlora_dpo.four_bit_head import called_by_pieces
from qlora_dpo.layouts import Group, group_of, make_batch, positions
from qlora_dpo.logits import widen

SAMPLE = 2048
STREAM_SAMPLE = 16
"""Groups among which the longest is looked for, of a data set and of a stream, to prove the layout on."""


def extreme_groups(groups: Iterable[Group]) -> list[Group]:
    """The group with the longest sequence, and the one whose longest is shortest (one group if there is one)."""
    ordered = sorted(groups, key=lambda group: len(group.prompt_ids) + max(len(ids) for ids in group.completion_ids))
    return [ordered[-1], ordered[0]] if len(ordered) > 1 else ordered


def check_vocabulary(embeddings: int, groups: Sequence[Group]) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        ValueError: If there are any.
    """
    largest = max(max(ids) for group in groups for ids in (group.prompt_ids, *group.completion_ids))
    if largest >= embeddings:
        raise ValueError(
            f"Token ids must be below {embeddings}, the size of the model's vocabulary, got {largest}. Use the model's "
            "own tokenizer, or resize its embeddings."
        )


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
        with called_by_pieces(model.get_output_embeddings()):  # type: ignore[operator]
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        ours = model(input_ids=ids, score={**score, "chunk_size": None, "statistics": ()})["token_logps"]
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
            batch = send_to_device(make_batch([replace(group, completion_ids=[ids], pairs=[])], "padded"), device)
            scored = score_batch(model, batch)
            alone.append(scored["logps"][0])
            spread.append(scored["token_logps"].square().sum().sqrt())
    return torch.stack(alone), torch.stack(spread)


def _yardstick(model: nn.Module, groups: Sequence[Group], device: torch.device) -> tuple[Tensor, float]:
    """`(B,)` logps with every completion scored alone, and how far a layout that holds may be from them, in nats.

    The yardstick is what `padded` itself differs by in this arithmetic: the same two rows alone, together, and together
    in the other order. Where that is nothing at all (short rows on some CPUs), a few roundings of each token's
    log-probability, added up like a random walk, stand in for it. Over 27 tiny models in units of one such rounding,
    layouts that hold were within 5 in fp32 and 1 in bf16 (but for the expert choices of gpt-oss), those that do not
    were at 580,000 and 9 or more.
    """
    with torch.no_grad(), noise_off(model):
        alone, spread = _row_by_row(model, groups, device)
        first = groups[0]
        two = replace(first, completion_ids=first.completion_ids[:2], pairs=[])
        swapped = replace(two, completion_ids=two.completion_ids[::-1])
        together = score_batch(model, send_to_device(make_batch([two], "padded"), device))["logps"]
        reordered = score_batch(model, send_to_device(make_batch([swapped], "padded"), device))["logps"].flip(0)
    noise = max((together - reordered).abs().max().item(), (together - alone[:2]).abs().max().item())
    dtype = _arithmetic(model, device)
    roundings = 1 if dtype in (torch.bfloat16, torch.float16) else 4
    return alone, 4 * max(noise, roundings * torch.finfo(dtype).eps * spread.max().item())


def _arithmetic(model: nn.Module, device: torch.device) -> torch.dtype:
    """The coarsest dtype that activations are in: of the weights, of 4-bit layers, or of mixed precision."""
    found = {next(p.dtype for p in model.parameters() if p.is_floating_point())}
    found |= {dtype for module in model.modules() if (dtype := getattr(module, "compute_dtype", None))}
    if torch.is_autocast_enabled(device.type):
        found.add(torch.get_autocast_dtype(device.type))
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def prove_layout(model: nn.Module, groups: Sequence[Group], layout: str, device: torch.device) -> LayoutProof:
    """Score groups in a layout and row by row, without gradient, and compare.

    Args:
        model: A model prepared by `install_scoring`.
        groups: Groups to score, in one forward: the longest at hand and a short one.
        layout: `tree` or `packed`.
        device: The model's device.

    Returns:
        The proof, with both numbers.
    """
    alone, tolerance = _yardstick(model, groups, device)
    try:
        with torch.no_grad(), noise_off(model):
            tried = score_batch(model, send_to_device(make_batch(groups, layout), device))["logps"]
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):  # says nothing about the layout
            raise
        return LayoutProof(layout, float("inf"), tolerance, f"{type(error).__name__}: {error}")
    difference = (tried - alone).abs().max().item()
    return LayoutProof(layout, difference if difference == difference else float("inf"), tolerance)


def shortened(groups: Sequence[Group], max_tokens: int | None) -> list[Group]:
    """The groups with fewer and shorter completions and shorter prompts, where a forward would not hold them whole.

    Not cut into several forwards: a completion alone with its prompt would prove nothing of a row that branches. Two
    completions of each stay, with three tokens at least, in a tree.
    """
    found = list(groups)
    if max_tokens is None or positions(found, "tree") <= max_tokens:
        return found
    found = [replace(group, completion_ids=list(group.completion_ids[:2]), pairs=[]) for group in found]
    if positions(found, "tree") <= max_tokens:
        return found
    share = max_tokens // len(found)
    return [
        replace(
            group,
            prompt_ids=group.prompt_ids[-max(1, share // 2) :],
            completion_ids=[ids[: max(3, share // 4)] for ids in group.completion_ids],
        )
        for group in found
    ]


def beyond_window(groups: Sequence[Group], window: int | None, max_length: int | None) -> list[Group]:
    """The groups, and one whose sequences reach beyond the window if those do not and other rows may.

    Some models keep a sliding window or attention chunks in their mask alone, where no backend can see them: only rows
    that are long enough tell.

    Args:
        groups: Groups at hand.
        window: Positions of the model's sliding window or attention chunk; None for neither.
        max_length: Most tokens of any sequence; None for no limit.
    """
    if window is None or (max_length is not None and max_length <= window):
        return list(groups)
    first = groups[0]
    ids = [*first.prompt_ids, *first.completion_ids[0]]
    if len(ids) > window:
        return list(groups)
    long_prompt = (ids * (window // len(ids) + 2))[: window + 2]
    return [*groups, replace(first, prompt_ids=long_prompt, completion_ids=list(first.completion_ids[:2]))]


def attention_span(config: PreTrainedConfig) -> int | None:
    """Positions of the sliding window or attention chunk that a model's text config names; None for neither."""
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((span for span in spans if isinstance(span, int) and span > 0), default=None)


def choose_layout(
    model: nn.Module, groups: Sequence[Group], asked: str, device: torch.device
) -> tuple[str, LayoutProof | None]:
    """The layout to use: the one asked for, or for `auto` the tree if it proves equal to one row at a time.

    A layout that does not hold is warned about, with both numbers. `auto` then falls back to `padded`; one that was
    asked for by name is used all the same.

    Args:
        model: A model prepared by `install_scoring`.
        groups: What to prove it on.
        asked: The option `batch_layout`.
        device: The model's device.

    Returns:
        The layout, and its proof (None for `padded`, which is the truth).
    """
    if asked == "padded":
        return asked, None
    layout = "tree" if asked == "auto" else asked
    proof = prove_layout(model, groups, layout, device)
    if proof.holds:
        return layout, proof
    outcome = "falls back to" if asked == "auto" else "does not equal"
    warnings.warn(
        f"batch_layout='{asked}' {outcome} 'padded': in the '{layout}' layout log-probabilities differ by "
        f"{proof.difference:.3g} nats from one row at a time, and {proof.tolerance:.3g} are allowed. {proof.reason}",
        stacklevel=2,
    )
    return "padded" if asked == "auto" else asked, proof


def start_margin(
    model: nn.Module,
    compared: Callable[[nn.Module, dict[str, Any]], dict[str, Tensor]],
    groups: Sequence[Group],
    layout: str,
    device: torch.device,
    chunk_size: int | None = None,
    max_tokens: int | None = None,
) -> float:
    """How far the policy is from its reference before any training: the largest |margin| and |log-ratio|, in nats.

    Args:
        model: The policy.
        compared: Scores what it is compared with.
        groups: Groups whose pairs to score.
        layout: The layout to score in.
        device: The model's device.
        chunk_size: Positions in a tile of logits, as the reference has it: other tiles round otherwise.
        max_tokens: Most positions of one forward; None for no limit.
    """
    batch = send_to_device(make_batch(groups, layout, max_tokens=max_tokens), device)
    ref_logps = compared(model, batch)["logps"]
    with torch.no_grad(), noise_off(model):
        logratios = score_batch(model, batch, chunk_size=chunk_size)["logps"] - ref_logps
    margins = logratios[batch["yw_idxs"]] - logratios[batch["yl_idxs"]]
    return max(margins.abs().max().item(), logratios.abs().max().item())


def require_margin(margin: float, allowed: float) -> None:
    """A policy at its own start is its reference: every margin must be exactly 0, or a rounding if it was cached.

    Raises:
        FixableError: If one is not.
    """
    if margin <= allowed:
        return
    rule = "be exactly 0" if allowed == 0 else f"be within rounding ({allowed:.3g} nats) of cached log-probabilities"
    raise FixableError(
        f"Step-0 margins must {rule}, got {margin:.3g} nats: the policy does not start at its reference. "
        + (
            "Adapters must add nothing at the start: use init_lora_weights=True, or reference='initial'."
            if allowed == 0
            else "Delete the file of the cache."
        )
    )


def check_start(
    model: nn.Module,
    compared: Callable[[nn.Module, dict[str, Any]], dict[str, Tensor]],
    groups: Sequence[Group],
    layout: str,
    device: torch.device,
    expected: bool,
    rounds: bool,
    chunk_size: int | None = None,
    max_tokens: int | None = None,
) -> float:
    """The start margin, required to be 0 where the policy should start at what it is compared with.

    Args:
        model: The policy.
        compared: Scores what it is compared with.
        groups: Groups whose pairs to score.
        layout: The layout to score in.
        device: The model's device.
        expected: Whether they should be equal.
        rounds: Whether what it is compared with was computed in other rows, so that rounding is allowed.
        chunk_size: Positions in a tile of logits.
        max_tokens: Most positions of one forward; None for no limit.
    """
    margin = start_margin(model, compared, groups, layout, device, chunk_size, max_tokens)
    if expected:
        require_margin(margin, _yardstick(model, groups, device)[1] if rounds else 0.0)
    return margin


def sample_groups(dataset: Any) -> list[Group]:
    """The longest and the shortest of the first groups of a data set, or of the first of several.

    Raises:
        ValueError: If a stream has none.
    """
    if isinstance(dataset, Mapping):
        dataset = next(iter(dataset.values()))
    if isinstance(dataset, IterableDataset):
        rows = list(dataset.take(STREAM_SAMPLE))
    else:
        rows = list(dataset.select(range(min(len(dataset), SAMPLE))))
    if not rows:
        raise ValueError("The stream must keep at least one row, got none. Check its rows and `max_length`.")
    return extreme_groups(group_of(row) for row in rows)


def prove_model(
    model: Any,
    groups: Sequence[Group],
    asked: str,
    max_length: int | None,
    device: torch.device,
    max_tokens: int | None = None,
) -> tuple[str, LayoutProof | None]:
    """Check a model's vocabulary and logits on some groups, and choose the layout.

    Args:
        model: A model prepared by `install_scoring`, bare or with adapters.
        groups: The longest group at hand and a short one.
        asked: The option `batch_layout`.
        max_length: Most tokens of any sequence; None for no limit.
        device: The model's device.
        max_tokens: Most positions of one forward; None for no limit.

    Returns:
        The layout, and its proof (None for `padded`).
    """
    check_vocabulary(model.get_input_embeddings().weight.shape[0], groups)
    check_logit_rule(model, [*groups[0].prompt_ids, *groups[0].completion_ids[0]], device)
    span = attention_span(model.config.get_text_config())
    return choose_layout(model, beyond_window(shortened(groups, max_tokens), span, max_length), asked, device)


def prove_models(
    policy: Any, other: Any | None, groups: Sequence[Group], asked: str, *limits: Any
) -> tuple[str, LayoutProof | None]:
    """The layout that holds for a policy and, where there is one, for a reference model; and the policy's proof.

    Args:
        policy: As in `prove_model`.
        other: The reference model; None for none.
        groups: As in `prove_model`.
        asked: The option `batch_layout`.
        *limits: What else `prove_model` takes.
    """
    layout, proof = prove_model(policy, groups, asked, *limits)
    if other is not None:
        layout, _ = prove_model(other, groups, asked if layout == "tree" else layout, *limits)
    return layout, proof
