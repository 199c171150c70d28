"""From a batch to log-probabilities: the one path that the policy, the reference and evaluation take.

The chunked head runs inside the causal LM's own forward, replaced on the instance and called through PEFT, DDP and
accelerate as usual, so hooks, autocast and gradient reduction stay where they are. Called without `score`, the model
is what it was.

Shapes as in `layouts`: B completions, N scored tokens, R rows of L positions.
"""

import contextlib
import functools
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_dpo.attention import BACKEND, attention_backend, recompute_with_same_attention
from qlora_dpo.lean import use_lean_layers
from qlora_dpo.logits import LogitRule
from qlora_dpo.logps import sum_by_completion, token_divergences, token_scores
from qlora_dpo.lora import keep_trained_biases, use_fast_lora
from qlora_dpo.segments import RowPlan

ROUTER_LOSS = "router_aux_loss"
"""A statistic of the whole forward: the load-balancing loss of a mixture of experts, with gradient."""

ROWS, KL = "rows", "kl"
"""Hidden states at the scored positions, asked for as a statistic; and the divergence from those of another pass."""

_FORWARD_KEYS = ("input_ids", "attention_mask", "position_ids")


def prepare_policy(policy: PeftModel) -> None:
    """Let a policy be scored, its layers computing as they do in training. Idempotent."""
    keep_trained_biases(policy)
    use_fast_lora(policy)
    use_lean_layers(policy)
    install_scoring(policy.get_base_model())


def install_scoring(model: PreTrainedModel) -> None:
    """Let a causal LM's forward take `score=`, and then return log-probabilities instead of logits. Idempotent.

    With `score`, a dict of `predictors`, `targets`, `chunk_size`, `statistics` and perhaps `against` (hidden states of
    another pass, through the same head, to diverge from), and with `segments`, a `RowPlan`, for rows that
    hold many sequences, the forward returns a dict of `(N,)` tensors: `token_logps` and the statistics asked for.
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
            router = {"output_router_logits": True} if ROUTER_LOSS in score["statistics"] else {}
            body = self.model if self.base_model is self else self.base_model  # Llama 4 names a prefix it does not have
            outputs = body(*args, use_cache=False, **named, **router)
        hidden, home = outputs.last_hidden_state, score["targets"].device
        predictors, targets = (score[name].to(hidden.device) for name in ("predictors", "targets"))
        rows = hidden.flatten(0, 1)[predictors]
        statistics = [name for name in score["statistics"] if name not in (ROUTER_LOSS, ROWS)]
        head = self.get_output_embeddings()
        found = token_scores(rows, head, targets, rule, score["chunk_size"], statistics)
        if ROWS in score["statistics"]:
            found[ROWS] = rows.detach()
        if score.get("against") is not None:
            both = (rows.detach(), score["against"].to(rows))
            found[KL] = token_divergences(both, head, rule, score["chunk_size"], head.out_features)
        found |= {ROUTER_LOSS: _router_loss(self, outputs, kwargs)} if router else {}
        return {name: value.to(home) for name, value in found.items()}  # from the last device of a model that is spread

    forward.scores = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _router_loss(model: Any, outputs: Any, kwargs: dict[str, Any]) -> Tensor:
    """`(1,)` load-balancing loss of a mixture of experts, over the tokens of the forward, by the model's own function.

    Raises:
        NotImplementedError: If the model's code has none.
    """
    balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    sizes = [getattr(model, name, None) for name in ("num_experts", "num_experts_per_tok")]
    if balance is None or None in sizes or outputs.router_logits is None:
        raise NotImplementedError(
            f"`router_aux_loss_coef` must be 0 for {type(model).__name__}, whose load-balancing loss is not known here,"
            " got another. Set it to 0."
        )
    return balance(outputs.router_logits, *sizes, kwargs.get("attention_mask")).reshape(1)


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the LM head is one layer that nothing adapts or trains, and so the same in every pass."""
    head = model.get_output_embeddings()
    return isinstance(head, nn.Linear) and not any(p.requires_grad for p in head.parameters())


def score_batch(
    model: nn.Module,
    batch: dict[str, Any],
    statistics: Sequence[str] = (),
    chunk_size: int | None = None,
    against: Tensor | None = None,
) -> dict[str, Tensor]:
    """Log-probabilities of the completions of a batch, whatever its layout and however many parts it has.

    Args:
        model: A causal LM prepared by `install_scoring`, bare or wrapped (PEFT, DDP).
        batch: What `layouts.make_batch` returns, on the model's device.
        statistics: Which statistics to return too, by name as in `logps.tile_scores`.
        chunk_size: Positions in a tile of logits; None for `logits.chunk_length`'s.
        against: `(N, H)` `ROWS` of a pass through the same head, for the exact divergence from it.

    Returns:
        `logps` `(B,)` summed over each completion, in nats; `token_logps` `(N,)`; and `(N,)` per statistic, without
        gradient. `ROUTER_LOSS` is one number for each part, `ROWS` are `(N, H)`; with `against`, `KL` `(N,)` in nats.
    """
    parts, first = [], 0
    for part in batch.get("parts", [batch]):
        other = None if against is None else against[first : first + len(part["targets"])]
        parts.append(_score_part(model, part, statistics, chunk_size, other))
        first += len(part["targets"])
    tokens = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {"logps": sum_by_completion(tokens["token_logps"], batch["lengths"]), **tokens}


def _score_part(
    model: nn.Module, part: dict[str, Any], statistics: Sequence[str], chunk_size: int | None, against: Tensor | None
) -> dict[str, Tensor]:
    """`(N,)` token scores of one forward."""
    kwargs = {key: part[key] for key in _FORWARD_KEYS}
    if part["segments"] is None:  # right-padded rows: the model's own positions are the truth to compare with
        del kwargs["position_ids"]
    else:
        kwargs["segments"] = RowPlan(part["segments"])
    request = {"predictors": part["predictors"], "targets": part["targets"], "chunk_size": chunk_size}
    return model(**kwargs, score={**request, "statistics": tuple(statistics), "against": against})


@contextlib.contextmanager
def noise_off(model: nn.Module) -> Iterator[None]:
    """No dropout, layer drop, embedding noise (NEFTune) or router jitter inside the block; layers stay in train mode.

    Layers that switch their arithmetic on `training` (4-bit layers on a CPU, checkpointing) keep it, so that a
    reference pass in here and a policy pass outside compute the same base model bit for bit. Probabilities, of layers
    or for function calls, are set to zero and put back.
    """
    quiet = [module for module in model.modules() if module.training and hasattr(module, "neftune_noise_alpha")]
    probabilities = list(_probabilities(model, ("drop", "jitter")))
    try:
        for module in quiet:
            module.training = False
        for holder, name, _ in probabilities:
            holder[name] = 0.0
        yield
    finally:
        for module in quiet:
            module.training = True
        for holder, name, value in probabilities:
            holder[name] = value


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the model to zero for good: dropout layers and function calls alike."""
    for holder, name, _ in _probabilities(model, ("drop",)):
        holder[name] = 0.0


def _probabilities(model: nn.Module, words: Sequence[str]) -> Iterator[tuple[dict[str, Any], str, float]]:
    """Where the modules of a model keep probabilities that are not zero, under what name, and the probabilities.

    A dropout layer's is `p`, which GPT-2's attention reads too; LoHa's and LoKr's are one for each adapter, in a dict.
    """
    for module in model.modules():
        own = module.__dict__
        several = [found for name, found in own.items() if isinstance(found, dict) and "drop" in name]
        is_dropout = isinstance(module, nn.modules.dropout._DropoutNd) or "Dropout" in type(module).__name__  # BOFT's
        for holder, named in ((own, False), *((found, True) for found in several)):
            for name, value in list(holder.items()):
                read = named or any(word in name for word in words) or (is_dropout and name == "p")
                if isinstance(value, float) and value > 0 and read:
                    yield holder, name, value
