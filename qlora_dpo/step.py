"""The step: a batch scored under reference and policy, the scores turned into losses.

Most losses need one forward and backward per batch. Where the loss of a pair needs log-probabilities from several
forwards (a group beyond the token budget, losses that couple the pairs of an optimizer step), a first stage scores
everything without gradient and finds dL / d(token log-prob), and a second stage runs each forward again with those as
weights: the same gradient, with the activations of one forward at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.forward import KL, ROUTER_LOSS, ROWS, has_plain_head, score_batch
from qlora_dpo.logps import STATISTICS, sum_by_completion
from qlora_dpo.metrics import pair_table
from qlora_dpo.objective import Objective, RunningMean
from qlora_dpo.reference import LiveReference, Reference
from qlora_dpo.remembered import Remembered
from qlora_dpo.scores import Scores, scores_of_sides, sides_table
from qlora_dpo.segments import sent


@dataclass
class Step:
    """What a step computes with.

    Attributes:
        reference: Scores completions under the reference.
        objective: Turns scores into losses.
        beta: Factor of the logged rewards.
        chunk_size: Positions in a tile of logits; None for `logits.chunk_length`'s.
        router_aux_loss_coef: Factor of a mixture of experts' load-balancing loss; 0 for none.
    """

    reference: Reference
    objective: Objective
    beta: float
    chunk_size: int | None = None
    router_aux_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        self.bco_delta = RunningMean()

    @property
    def _statistics(self) -> tuple[str, ...]:
        router = (ROUTER_LOSS,) if self.router_aux_loss_coef else ()
        return (*STATISTICS, *self.objective.statistics, *router)

    def compared(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the policy is compared with: the log-probabilities that the data brings, or the reference's."""
        if "ref_logps" not in batch:
            return self.reference(model, batch)
        given = torch.tensor(batch["ref_logps"], dtype=torch.float32)
        return {"logps": sent(batch["yw_idxs"].device, given)}

    def scores(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        divergence: bool = False,
        remembered: Remembered | None = None,
    ) -> tuple[Scores, dict[str, Tensor]]:
        """Log-probabilities of a batch under reference and policy, and the policy's token values.

        With `divergence` those hold the exact `KL` of each token's distribution from the reference's, where both passes
        go through one plain head; that costs two more passes through it. What is remembered of a reference that stays
        as it is is not computed again.
        """

        def compared() -> dict[str, Tensor]:
            live = self.reference if divergence and not given else None
            if isinstance(live, LiveReference) and has_plain_head(live.policy.get_base_model()):
                return live(model, batch, (ROWS,))
            return self.compared(model, batch)

        given = "ref_logps" in batch
        reference = compared() if remembered is None or given else remembered.of(batch, divergence, compared)
        tokens = score_batch(model, batch, self._statistics, self.chunk_size, reference.get(ROWS))
        return _scores_of(batch, reference, tokens), tokens

    def losses(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        divergence: bool = False,
        remembered: Remembered | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`(T,)` losses of a batch's pairs, and its pair table."""
        scores, tokens = self.scores(model, batch, divergence, remembered)
        losses = self._with_router(self.objective(scores, self.bco_delta.mean), scores, tokens)
        return losses, self._table(batch, scores, losses, tokens)

    def _with_router(self, losses: Tensor, scores: Scores, tokens: dict[str, Tensor]) -> Tensor:
        """The losses, with the load-balancing loss of the forward in each item."""
        if not self.router_aux_loss_coef:
            return losses
        return losses + self.router_aux_loss_coef * tokens[ROUTER_LOSS].mean() * self.objective.items(scores)

    def _table(self, batch: dict[str, Any], scores: Scores, losses: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        sums = {n: sum_by_completion(tokens[n], batch["lengths"]) for n in (*STATISTICS, KL) if n in tokens}
        router = tokens[ROUTER_LOSS].mean() if self.router_aux_loss_coef else None
        table = pair_table(scores, losses, self.objective.items(scores), sums, self.beta, router)
        if not self.objective.coupled:
            return table
        with torch.no_grad():  # what the losses of a whole data set are computed from
            return torch.cat((table, sides_table(self.objective.prepared(scores)).to(table.dtype)), dim=1)

    def of_sides(self, sides: Tensor) -> Tensor:
        """`(T,)` losses of a `sides_table` of prepared pairs."""
        return self.objective.of(scores_of_sides(sides), self.bco_delta.mean)

    # ---- two stages ----------------------------------------------------------------------------------------------

    def first_stage(self, model: nn.Module, batches: Sequence[dict[str, Any]]) -> list[Tensor]:
        """Score batches without gradient and leave in each forward's dict what the second stage needs.

        Every part (or the batch, if it has none) gets `slopes` `(n,)`: dL / d(token log-prob) with L the sum of the
        losses over all pairs of all batches, of all processes where the objective couples pairs; `loss` and `items`:
        its share of the sum and of their number; and `random_state`, so that dropout falls alike in both stages.

        Returns:
            The pair table of each batch.
        """
        found = [self._without_gradient(model, batch) for batch in batches]
        leaves = [tokens["token_logps"].requires_grad_() for _, tokens in found]
        scores = [
            _scores_of(batch, reference, tokens) for batch, (reference, tokens) in zip(batches, found, strict=True)
        ]
        losses, slopes = (self._coupled if self.objective.coupled else self._alone)(scores, leaves)
        tables = []
        for batch, score, loss, slope, (_, tokens) in zip(batches, scores, losses, slopes, found, strict=True):
            parts = batch.get("parts", [batch])
            tables.append(self._table(batch, score, self._with_router(loss, score, tokens), tokens).detach())
            items = self.objective.items(score).sum()
            for part, run in zip(parts, slope.split([len(part["targets"]) for part in parts]), strict=True):
                part["slopes"], part["loss"] = run, loss.sum() / len(parts)
                part["items"] = items / len(parts)
        return tables

    def second_stage(self, model: nn.Module, part: dict[str, Any]) -> Tensor:
        """The part's share of the sum of losses, whose gradient is that of the whole."""
        part["random_state"].restore(part["targets"].device)
        router = (ROUTER_LOSS,) if self.router_aux_loss_coef else ()
        tokens = score_batch(model, part, router, self.chunk_size)
        weighted = (part["slopes"] * tokens["token_logps"]).sum()
        loss = weighted - weighted.detach() + part["loss"]
        if self.router_aux_loss_coef:
            loss = loss + self.router_aux_loss_coef * tokens[ROUTER_LOSS].mean() * part["items"]
        return loss

    def _without_gradient(self, model: nn.Module, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Reference and policy scores, every forward's random state kept."""
        reference = self.compared(model, batch)
        found = []
        for part in batch.get("parts", [batch]):
            part["random_state"] = RandomState.of(part["targets"].device)
            with torch.no_grad():
                found.append(score_batch(model, part, self._statistics, self.chunk_size))
        return reference, {name: torch.cat([tokens[name] for tokens in found]) for name in found[0]}

    def _alone(self, scores: Sequence[Scores], leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Losses and slopes of batches whose pairs do not depend on those of others."""
        losses = [self.objective(score) for score in scores]
        slopes = [torch.autograd.grad(loss.sum(), leaf)[0] for loss, leaf in zip(losses, leaves, strict=True)]
        return [loss.detach() for loss in losses], slopes

    def _coupled(self, scores: Sequence[Scores], leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Losses and slopes where all pairs of the optimizer step, of all processes, are one unit."""
        sides = [sides_table(self.objective.prepared(score)) for score in scores]
        mine = torch.cat(sides)
        everyone, first = _gathered(mine.detach())
        everyone.requires_grad_()
        if self.objective.bco_running_mean:
            self.bco_delta.add(scores_of_sides(everyone).rewards(self.beta))
        losses = self.of_sides(everyone)
        upstream = torch.autograd.grad(losses.sum(), everyone)[0][first : first + len(mine)]
        slopes = torch.autograd.grad(mine, leaves, upstream, allow_unused=True)
        own = losses.detach()[first : first + len(mine)].split([len(side) for side in sides])
        filled = [torch.zeros_like(leaf) if s is None else s for s, leaf in zip(slopes, leaves, strict=True)]
        return list(own), filled


def _scores_of(batch: dict[str, Any], reference: dict[str, Tensor], tokens: dict[str, Tensor]) -> Scores:
    """Scores of a batch from token values, differentiable in `token_logps`."""
    token_logps = tokens["token_logps"]
    device = token_logps.device
    given = {
        name: sent(device, torch.tensor(batch[name], dtype=token_logps.dtype))
        for name in ("weights", "label_probs", "offsets")
        if name in batch
    }
    return Scores(
        pi_logps=sum_by_completion(token_logps, batch["lengths"]),
        ref_logps=reference["logps"],
        yw_idxs=batch["yw_idxs"],
        yl_idxs=batch["yl_idxs"],
        lengths=sent(device, torch.tensor(batch["lengths"])),
        group=batch["group"],
        pi_token_logps=token_logps,
        ref_token_logps=reference.get("token_logps"),
        pi_log_sum_sq_probs=tokens.get("log_sum_sq_probs"),
        **given,
    )


def _gathered(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes in the order of their ranks, and where this one's begin."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows.clone(), 0
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, rows.cpu())
    first = sum(len(part) for part in parts[: torch.distributed.get_rank()])
    return torch.cat(parts).to(rows.device), first


@dataclass(frozen=True)
class RandomState:
    """The state of the generators that dropout draws from. Not a tuple, whose tensors Trainer would move."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> "RandomState":
        """The state now."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        """Draw again what was drawn from here on."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
