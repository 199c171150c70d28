"""From a batch to log-probabilities: the one path that the policy, the reference and evaluation take.

The chunked head runs inside the causal LM's own forward, replaced on the instance and called through PEFT, DDP and
accelerate as usual, so hooks, autocast and gradient reduction stay where they are. Called without `score`, the model
is what it was.

Shapes as in `layouts`: B completions, N scored tokens, R rows of L positions.
"""

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_dpo.attention import BACKEND, attention_backend, recompute_with_same_attention
from qlora_dpo.logps import STATISTICS, LogitRule, sum_by_completion, token_scores

_FORWARD_KEYS = ("input_ids", "attention_mask", "position_ids")


def install_scoring(model: PreTrainedModel) -> None:
    """Let a causal LM's forward take `score=`, and then return log-probabilities instead of logits. Idempotent.

    With `score`, a dict of `predictors`, `targets`, `chunk_size` and `statistics`, and with `segments` for rows that
    hold many sequences, the forward returns a dict of `(N,)` tensors (`token_logps` and perhaps `STATISTICS`).
    """
    if hasattr(model.forward, "scores"):
        return
    own = model.__dict__.get("forward")  # one that accelerate put on the instance, or none
    rule = LogitRule.from_config(model.config.get_text_config())

    @functools.wraps(type(model).forward)  # `generate` validates its keywords against the model's own signature
    def forward(self: PreTrainedModel, *args: Any, score: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if score is None:
            return type(self).forward(self, *args, **kwargs) if own is None else own(*args, **kwargs)
        config = self.config
        named = {key: value for key, value in kwargs.items() if value is not None}
        with attention_backend(config, BACKEND if "segments" in named else config._attn_implementation):
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
    """No dropout, layer drop, embedding noise (NEFTune) or router jitter inside the block; layers stay in train mode.

    Layers that switch their arithmetic on `training` (4-bit layers on a CPU, checkpointing) keep it, so that a
    reference pass in here and a policy pass outside compute the same base model bit for bit. Dropout that is a function
    call in the attention reads a probability from its module: those are set to zero and put back.
    """
    quiet: list[nn.Module] = []
    probabilities: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        noisy = isinstance(module, nn.modules.dropout._DropoutNd) or hasattr(module, "neftune_noise_alpha")
        if module.training and noisy:
            quiet.append(module)
        for name, value in list(module.__dict__.items()):
            if isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name):
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
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def to_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
