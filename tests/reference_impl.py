"""The naive truth: DPO from the formulas, one unpadded forward per sequence, slow and obvious.

Nothing here is shared with the code under test. Shapes: K completions of one prompt, C tokens of one completion,
V vocabulary entries, P pairs of a batch. Log-probabilities and entropies are in nats.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def completion_logits(model, prompt_ids: list[int], completion_ids: list[int]) -> Tensor:
    """Logits that predict each completion token, from one forward over prompt + completion.

    Args:
        model: Causal LM whose output has `logits` of shape (1, P + C, V).
        prompt_ids: Token ids of the prompt, at least one.
        completion_ids: Token ids of the completion, C of them.

    Returns:
        (C, V) logits with their graph, float32 unless the model computes in float64.

    Raises:
        ValueError: If `prompt_ids` is empty, since nothing then predicts the first completion token.
    """
    if len(prompt_ids) == 0:
        raise ValueError("`prompt_ids` must hold at least one token, got none. Put a BOS token in front.")
    device = next(model.parameters()).device
    input_ids = torch.tensor([list(prompt_ids) + list(completion_ids)], device=device)
    logits = model(input_ids=input_ids, use_cache=False).logits[0]
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits[len(prompt_ids) - 1 : -1]


def completion_token_stats(model, prompt_ids: list[int], completion_ids: list[int]) -> dict[str, Tensor]:
    """Per-token statistics of one completion.

    Args:
        model: Causal LM.
        prompt_ids: Token ids of the prompt, at least one.
        completion_ids: Token ids of the completion, C of them.

    Returns:
        Four tensors of shape (C,): `logps` (nats), `entropy` (nats) of the distribution that predicted the token,
        `mean_logit` over the vocabulary, and the booleans `is_top1`, whether the token was the most likely one.
    """
    logits = completion_logits(model, prompt_ids, completion_ids)
    targets = torch.tensor(list(completion_ids), dtype=torch.long, device=logits.device)
    log_probs = torch.log_softmax(logits, dim=-1)
    return {
        "logps": log_probs.gather(-1, targets[:, None])[:, 0],
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "mean_logit": logits.mean(-1),
        "is_top1": logits.argmax(-1) == targets,
    }


def completion_token_logps(model, prompt_ids: list[int], completion_ids: list[int]) -> Tensor:
    """Log-probability of each completion token, shape (C,), nats, with its graph."""
    return completion_token_stats(model, prompt_ids, completion_ids)["logps"]


def completion_logps(model, prompt_ids: list[int], completions: list[list[int]]) -> Tensor:
    """Summed log-probability of each completion of one prompt, shape (K,), nats, with its graph."""
    return torch.stack([completion_token_logps(model, prompt_ids, ids).sum() for ids in completions])


def reference_logps(peft_model, prompt_ids: list[int], completions: list[list[int]]) -> Tensor:
    """Summed log-probability of each completion under the model without its adapter, shape (K,), nats, no graph."""
    with peft_model.disable_adapter(), torch.no_grad():
        return completion_logps(peft_model, prompt_ids, completions)


def pair_loss(
    name: str,
    pi_w: Tensor,
    pi_l: Tensor,
    ref_w: Tensor,
    ref_l: Tensor,
    len_w: int | Tensor,
    len_l: int | Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of a pair (or elementwise of several), with h = log pi - log pi_ref and D = h_w - h_l.

    Args:
        name: `sigmoid`, `hinge` or `ipo`.
        pi_w: Policy log-prob of the chosen completion, summed, nats.
        pi_l: Policy log-prob of the rejected completion.
        ref_w: Reference log-prob of the chosen completion.
        ref_l: Reference log-prob of the rejected completion.
        len_w: Tokens of the chosen completion (used by `ipo`).
        len_l: Tokens of the rejected completion (used by `ipo`).
        beta: Inverse temperature, for `ipo` the tau of its paper.
        label_smoothing: Probability that a label is flipped; only `sigmoid` knows it.

    Returns:
        Tensor of the shape of `pi_w`.

    Raises:
        ValueError: If the name is unknown, or smoothing is asked of a loss without it.

    Source:
        DPO arXiv:2305.18290 eq. 7; its smoothed form, cDPO; hinge from SLiC arXiv:2305.10425; IPO arXiv:2310.12036
        eq. 17, on log-ratios averaged over tokens.
    """
    if name != "sigmoid" and label_smoothing != 0.0:
        raise ValueError(f"`label_smoothing` must be 0 for {name}, got {label_smoothing}. Use the sigmoid loss.")
    h_w = pi_w - ref_w
    h_l = pi_l - ref_l
    scaled = beta * (h_w - h_l)
    if name == "sigmoid":
        return -(1 - label_smoothing) * logsigmoid(scaled) - label_smoothing * logsigmoid(-scaled)
    if name == "hinge":
        return torch.clamp(1 - scaled, min=0)
    if name == "ipo":
        return (h_w / len_w - h_l / len_l - 1 / (2 * beta)) ** 2
    raise ValueError(f"`name` must be sigmoid, hinge or ipo, got {name!r}. Pick one of them.")


def groups_loss(
    peft_model, groups: list[dict], beta: float, loss: str = "sigmoid", label_smoothing: float = 0.0
) -> Tensor:
    """Mean loss over all pairs of all groups; every pair weighs the same, whatever its group.

    Args:
        peft_model: Policy with its adapter on; the reference is the same model with the adapter off.
        groups: Dicts with `prompt_ids`, `completion_ids` (K lists) and `pairs` (index of chosen, of rejected).
        beta: Inverse temperature.
        loss: Name known to `pair_loss`.
        label_smoothing: Probability that a label is flipped.

    Returns:
        Differentiable scalar.
    """
    losses = []
    for group in groups:
        completions = group["completion_ids"]
        pi = completion_logps(peft_model, group["prompt_ids"], completions)
        ref = reference_logps(peft_model, group["prompt_ids"], completions)
        for yw, yl in group["pairs"]:
            lengths = len(completions[yw]), len(completions[yl])
            losses.append(pair_loss(loss, pi[yw], pi[yl], ref[yw], ref[yl], *lengths, beta, label_smoothing))
    return torch.stack(losses).mean()


def pair_metrics(chosen_rewards, rejected_rewards) -> dict[str, float]:
    """Metrics of P pairs from their rewards (nats times beta).

    Args:
        chosen_rewards: (P,) rewards of the chosen completions.
        rejected_rewards: (P,) rewards of the rejected completions.

    Returns:
        `accuracy` (a tie counts one half), `ties` (share of pairs), and the means `margin`, `chosen`, `rejected`.

    >>> pair_metrics([1.0, 2.0], [1.0, 0.0])["accuracy"]
    0.75
    """
    chosen = np.asarray(chosen_rewards, dtype=np.float64)
    rejected = np.asarray(rejected_rewards, dtype=np.float64)
    margin = chosen - rejected
    return {
        "accuracy": float(np.mean(np.where(margin == 0, 0.5, margin > 0))),
        "ties": float(np.mean(margin == 0)),
        "margin": float(margin.mean()),
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
    }
