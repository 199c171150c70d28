"""Everything that is said of a set of preference pairs, as numbers, as JSON and as text."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args, get_origin

import numpy as np

from qlora_dpo.measures import (
    LENGTH_CLASSES,
    Calibration,
    Distribution,
    Estimate,
    Pairs,
    Sides,
    Slice,
    accuracy_estimate,
    auc,
    by,
    calibration,
    distribution,
    length_classes,
    mean,
)


@dataclass(frozen=True)
class PreferenceReport:
    """What a policy's rewards say of a set of preference pairs."""

    name: str  # of the data
    beta: float  # factor of the rewards
    pairs: int
    groups: int  # rows with a pair
    ties: float  # share of pairs with equal rewards
    accuracy: Estimate  # of the rewards
    accuracy_per_token: Estimate  # of rewards divided by the tokens of their completion
    reference_accuracy: Estimate | None  # of the reference's own log-probabilities; None without a reference
    margin: Distribution  # of rewards, chosen minus rejected
    margin_per_token: Distribution  # the same of rewards divided by tokens
    rewards: Sides  # means
    drift: Sides  # means of a completion's log pi - log pi_ref, in nats; of log pi without a reference
    logratio_per_token: Sides  # sum of log pi - log pi_ref over sum of tokens, in nats
    kl_per_token: Sides | None  # sum of the exact KL over sum of tokens, in nats; None if unknown
    tokens: Sides  # means
    auc: float
    calibration: Calibration
    by_length: list[Slice]  # by `LENGTH_CLASSES`
    by_subset: list[Slice]  # empty if unknown
    by_turns: list[Slice]  # empty if unknown

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as JSON takes them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PreferenceReport":
        """The report that `to_dict` was called on, also after a trip through JSON."""
        if wrong := sorted({field.name for field in fields(cls)} ^ set(data)):
            raise ValueError(f"`data` must have the keys of `to_dict`, got other {wrong}. Make the report anew.")
        return _rebuilt(cls, data)

    def __str__(self) -> str:
        return _shown(self)


def preference_report(pairs: Pairs, name: str) -> PreferenceReport:
    """The report of some pairs, under a name to show."""
    chosen, rejected = pairs.reward_chosen, pairs.reward_rejected
    per_token = chosen / pairs.tokens_chosen - rejected / pairs.tokens_rejected
    tokens = Sides(mean(pairs.tokens_chosen), mean(pairs.tokens_rejected))
    rewards = Sides(mean(chosen), mean(rejected))
    drift = Sides(rewards.chosen / pairs.beta, rewards.rejected / pairs.beta)
    kl = None
    if pairs.kl_chosen is not None and pairs.kl_rejected is not None:
        kl = Sides(mean(pairs.kl_chosen) / tokens.chosen, mean(pairs.kl_rejected) / tokens.rejected)
    return PreferenceReport(
        name=name,
        beta=float(pairs.beta),
        pairs=len(chosen),
        groups=len(np.unique(pairs.row)),
        ties=mean(pairs.margins == 0),
        accuracy=accuracy_estimate(pairs.margins, pairs.prompts),
        accuracy_per_token=accuracy_estimate(per_token, pairs.prompts),
        reference_accuracy=accuracy_estimate(pairs.ref_margins, pairs.prompts) if pairs.referenced else None,
        margin=distribution(pairs.margins),
        margin_per_token=distribution(per_token),
        rewards=rewards,
        drift=drift,
        logratio_per_token=Sides(drift.chosen / tokens.chosen, drift.rejected / tokens.rejected),
        kl_per_token=kl,
        tokens=tokens,
        auc=auc(chosen, rejected),
        calibration=calibration(pairs.margins, pairs.label_probs),
        by_length=by(pairs, length_classes(pairs), LENGTH_CLASSES),
        by_subset=[] if pairs.subset is None else by(pairs, pairs.subset, sorted({*pairs.subset.tolist()} - {""})),
        by_turns=[] if pairs.turns is None else by(pairs, pairs.turns),
    )


def _rebuilt(kind: Any, found: Any) -> Any:
    """What `asdict` and JSON made plain, as the type it was."""
    if hasattr(kind, "__dataclass_fields__"):
        return kind(**{field.name: _rebuilt(field.type, found[field.name]) for field in fields(kind)})
    parts = get_args(kind)
    if get_origin(kind) is list:
        return [_rebuilt(parts[0], part) for part in found]
    if get_origin(kind) is tuple:
        return tuple(found)
    return _rebuilt(parts[0], found) if parts and found is not None else found


def _number(value: float) -> str:
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1e4 else f"{value:.2e}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _shown(report: PreferenceReport) -> str:
    size = f"{report.pairs:,} pairs of {report.groups:,} rows, beta {report.beta:g}, ties {100 * report.ties:.1f} %"
    lines = [f"{_short(report.name, 30)}: {size}", ""]

    def add(label: str = "", *cells: str, width: int = 10) -> None:
        lines.append((f"{_short(label, 27):<28}" + "".join(f"{cell:>{width}}" for cell in cells)).rstrip())

    shares = {"accuracy": report.accuracy, "  by reward per token": report.accuracy_per_token}
    shares |= {} if report.reference_accuracy is None else {"  of the reference": report.reference_accuracy}
    for label, share in shares.items():
        add(label, f"{share!s:>20}", f"  {share.method}")
    add("AUC across prompts", f"{report.auc:.3f}")
    drift = "log pi, nats" if report.reference_accuracy is None else "log-ratio, nats"
    sides = {"reward": report.rewards, drift: report.drift, "  per token": report.logratio_per_token}
    sides |= {} if report.kl_per_token is None else {"KL per token, nats": report.kl_per_token}
    numbers: dict[str, Mapping[str, Any]] = {
        "mean median std 5% 25% 75% 95%": {"margin": report.margin, "  per token": report.margin_per_token},
        "chosen rejected": sides | {"tokens": report.tokens},
    }
    for head, rows in numbers.items():
        add()
        add("", *head.split())
        for label, row in rows.items():
            add(label, *map(_number, asdict(row).values()))
    for title, parts in {"length": report.by_length, "subset": report.by_subset, "turns": report.by_turns}.items():
        if parts:
            add()
            add(f"by {title}", "pairs", "margin", f"{'accuracy':>20}")
        for part in parts:
            add(f"  {part.name}", f"{part.accuracy.count:,}", _number(part.margin), f"{part.accuracy!s:>20}")
    add()
    add("calibration", f"ECE {report.calibration.ece:.3f}", f"   Brier {report.calibration.brier:.3f}")
    columns = zip(*report.calibration.curve, strict=True)
    for label, values in zip(("confidence", "outcome", "pairs"), columns, strict=True):
        add(f"  {label}", *(f"{value:.3f}" if isinstance(value, float) else f"{value}" for value in values), width=7)
    return "\n".join(lines)
