"""What can be said of a set of preference pairs, and how surely.

Shapes: T pairs. Pairs of one prompt may share completions, so prompts, not pairs, are independent. Units:
nats for log-probabilities, beta times nats for rewards, tokens for lengths. Sums are correctly rounded (`math.fsum`),
so no number depends on the order of the pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any

import numpy as np

from qlora_dpo.metrics import outcomes

NAMES = ("prompt", "subset")
"""Columns of `Pairs` that hold text."""

WHOLE = ("row", "tokens_chosen", "tokens_rejected", "turns")
"""Columns of `Pairs` that hold whole numbers."""

RANGES = {"tokens_chosen": (1, np.inf), "tokens_rejected": (1, np.inf), "label_probs": (0, 1)}
"""Smallest and largest value of the columns of `Pairs` that have one."""

FEW_PROMPTS = 20  # below, a bootstrap's interval holds the truth too rarely: 81 % of the time at five
LENGTH_CLASSES = ("chosen shorter", "similar", "chosen longer")
"""Pairs by the lengths of their completions, similar ones differing by at most a tenth of the longer one."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Pairs:
    """Preference pairs as `(T,)` arrays; lists are converted.

    Raises:
        ValueError: If there is no pair, or a column has another length than `row` or a value out of its range.
    """

    row: np.ndarray  # whole numbers; pairs of one row share a prompt and perhaps completions
    prompt: np.ndarray | None = None  # name of the prompt, which several rows may have; None if each has its own
    reward_chosen: np.ndarray  # beta (log pi - log pi_ref)
    reward_rejected: np.ndarray
    logps_chosen: np.ndarray  # log pi, summed over the completion's tokens, in nats
    logps_rejected: np.ndarray
    tokens_chosen: np.ndarray  # scored tokens, at least one
    tokens_rejected: np.ndarray
    beta: float  # factor of the rewards, above 0
    kl_chosen: np.ndarray | None = None  # exact KL(policy || reference), summed over tokens, in nats; None if unknown
    kl_rejected: np.ndarray | None = None
    label_probs: np.ndarray | None = None  # probability that the chosen completion is the better one; None if unknown
    subset: np.ndarray | None = None  # name of the part of the data, "" where a row has none; None if unknown
    turns: np.ndarray | None = None  # turns of the conversation; None if unknown
    referenced: bool = True  # False where the rewards are beta log pi

    def __post_init__(self) -> None:
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"`beta` must be above 0, got {self.beta}. Pass the factor of the rewards.")
        if (self.kl_chosen is None) != (self.kl_rejected is None):
            absent = "kl_chosen" if self.kl_chosen is None else "kl_rejected"
            raise ValueError(f"`{absent}` must be given where the other side's is, got None. Pass both or neither.")
        given = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("beta", "referenced")
        }
        for name, values in given.items():
            if values is not None:
                object.__setattr__(self, name, _column(name, values))
                _check_length(name, getattr(self, name), len(self.row))

    @property
    def prompts(self) -> np.ndarray:
        """`(T,)` what pairs that are not independent share."""
        return self.row if self.prompt is None else self.prompt

    @property
    def margins(self) -> np.ndarray:
        """`(T,)` reward of the chosen completion minus that of the rejected one."""
        return self.reward_chosen - self.reward_rejected

    @property
    def ref_logps_chosen(self) -> np.ndarray:
        """`(T,)` log pi_ref of the chosen completion, in nats."""
        return self.logps_chosen - self.reward_chosen / self.beta

    @property
    def ref_logps_rejected(self) -> np.ndarray:
        """`(T,)` log pi_ref of the rejected completion, in nats."""
        return self.logps_rejected - self.reward_rejected / self.beta

    @property
    def ref_margins(self) -> np.ndarray:
        """`(T,)` log pi_ref of the chosen minus the rejected, 0 where rewards rounded to fp32 cannot tell, in nats."""
        differences = self.ref_logps_chosen - self.ref_logps_rejected
        rounding = 2.0**-22 * (np.abs(self.reward_chosen) + np.abs(self.reward_rejected)) / self.beta
        return np.where(np.abs(differences) <= rounding, 0.0, differences)


@dataclass(frozen=True)
class Estimate:
    """A share with its interval: `value`, `low`, `high`, the pairs it is of, and how the interval was made.

    >>> str(Estimate(0.6138, 0.4744, 0.7413, 57, "wilson"))
    '0.614 [0.47, 0.74]'
    """

    value: float
    low: float
    high: float
    count: int
    method: str

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Distribution:
    """Mean, median, standard deviation (of the T values, not T - 1) and quantiles."""

    mean: float
    median: float
    std: float
    q05: float
    q25: float
    q75: float
    q95: float


@dataclass(frozen=True)
class Calibration:
    """A reliability curve, `(mean confidence, mean outcome, pairs)` of each non-empty bin, and its summaries."""

    curve: list[tuple[float, float, int]]
    ece: float
    brier: float


@dataclass(frozen=True)
class Sides:
    """One number for the chosen and one for the rejected completions."""

    chosen: float
    rejected: float


@dataclass(frozen=True)
class Slice:
    """Accuracy and mean margin of the pairs that share a key."""

    name: str
    accuracy: Estimate
    margin: float


def wilson_interval(wins: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Low and high end of the shares p that the score test of `wins` in `count` independent trials does not reject.

    They are the roots p of (wins / count - p)^2 = z^2 p (1 - p) / count. A tie counts as half a win; as it varies
    less than a trial can, the interval is then if anything too wide.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    >>> [round(end, 4) for end in wilson_interval(0, 4)]  # without a win z^2 / (4 + z^2), and z^2 is 3.8415
    [0.0, 0.4899]
    """
    _check_confidence(confidence)
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}. Pass the number of trials.")
    if not 0 <= wins <= count:
        raise ValueError(f"`wins` must be in [0, {count}], got {wins}. Pass wins plus half the ties.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)

    def low(won: float) -> float:
        root = math.sqrt(won * (count - won) / count + z * z / 4)
        return max(0.0, (won + z * z / 2 - z * root) / (count + z * z))

    return low(wins), 1 - low(count - wins)


def bootstrap_interval(
    values: Any, clusters: Any, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Low and high end of a mean whose values come in clusters: percentiles over draws of whole clusters.

    Args:
        values: `(T,)`.
        clusters: `(T,)` labels. A single cluster resamples to itself, and its interval has no width.
        confidence: In (0, 1).
        samples: Bootstrap samples.
        seed: Of the draws. What the labels are called and the order of the values play no part.

    Source: Efron 1979; Davison and Hinkley 1997, section 3.8 (clusters as units).

    >>> bootstrap_interval([1, 0, 1, 0], [7, 7, 8, 8])  # every cluster has mean one half
    (0.5, 0.5)
    """
    _check_confidence(confidence)
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples}. Pass about 2000.")
    sums, counts = _cluster_sums(_column("values", values), clusters)
    random, units = np.random.default_rng(seed), len(sums)
    firsts = _firsts(sums, counts)
    means = []
    if 20 * len(firsts) < units:  # few kinds of cluster: how often each was drawn is all that matters, and far faster
        drawn = random.multinomial(units, np.diff(firsts, append=units) / units, size=samples)
        means.append((drawn @ sums[firsts]) / (drawn @ counts[firsts]))
    else:
        step = max(1, 2**17 // units)  # draws that fit the processor's cache
        for start in range(0, samples, step):
            picks = random.integers(0, units, size=(min(step, samples - start), units))
            means.append(sums.take(picks, mode="clip").sum(1) / counts.take(picks, mode="clip").sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def accuracy(margins: Any) -> float:
    """Mean of the `outcomes` of `(T,)` margins.

    >>> accuracy([2.0, 0.0, -1.0, 3.0])  # two wins and a tie of four
    0.625
    """
    return mean(outcomes(_column("margins", margins)))


def accuracy_estimate(margins: Any, prompts: Any) -> Estimate:
    """Accuracy of `(T,)` margins with its 95 % interval: Wilson's where each of `prompts` has one pair, else bootstrap.

    The bootstrap draws prompts. Of fewer than `FEW_PROMPTS`, or if all have the same accuracy, it sees too little of
    how they differ; the interval is then Wilson's with a prompt counted as one trial, which is too wide if anything.

    >>> print(accuracy_estimate([1.0, -1.0, 2.0, 0.0], [0, 1, 2, 3]))  # 2.5 of 4
    0.625 [0.22, 0.91]
    """
    found = outcomes(_column("margins", margins))
    value, count = mean(found), len(found)
    sums, counts = _cluster_sums(found, prompts)
    if counts.max() == 1:
        return Estimate(value, *wilson_interval(float(found.sum()), count), count, "wilson")
    shares = sums / counts
    if len(sums) < FEW_PROMPTS or shares.min() == shares.max():
        return Estimate(value, *wilson_interval(value * len(sums), len(sums)), count, "wilson over prompts")
    return Estimate(value, *bootstrap_interval(found, prompts), count, "bootstrap over prompts")


def calibration(margins: Any, label_probs: Any = None, bins: int = 10) -> Calibration:
    """Whether pairs that the Bradley-Terry model of the rewards is sure of are ranked right as often as it says.

    Confidence is s(|margin|), in [0.5, 1]. Outcome is how probable it is that the higher-rewarded completion is the
    better one: what `label_probs` says, for a tie as in `outcomes`.

    Args:
        margins: `(T,)` reward margins.
        label_probs: `(T,)` probability that the chosen completion is the better one; None for 1.
        bins: Bins of equal width over [0.5, 1].

    Returns:
        The curve, ECE (mean over pairs of |mean confidence - mean outcome| of their bin) and the Brier score (mean of
        (confidence - outcome)^2).

    Source: Brier 1950; Naeini et al. 2015 (ECE); Guo et al. 2017, equation 3.

    >>> found = calibration([math.log(3), math.log(3), -math.log(3), 0.0])  # confidence 3/4 three times, then 1/2
    >>> round(found.ece, 6), round(found.brier, 6)  # 3/4 |3/4 - 2/3|, and (1 + 1 + 9 + 0) / 16 / 4
    (0.0625, 0.171875)
    """
    if bins < 1:
        raise ValueError(f"`bins` must be at least 1, got {bins}. Pass about 10.")
    margins = _column("margins", margins)
    probs = np.ones_like(margins) if label_probs is None else _column("label_probs", label_probs)
    _check_length("label_probs", probs, len(margins))
    order = np.argsort(np.abs(margins), kind="stable")  # exp may round by an entry's place in the array
    margins, probs = margins[order], probs[order]
    wins = outcomes(margins)
    outcome = np.where(wins == 1, probs, np.where(wins == 0, 1 - probs, wins))
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    places = np.minimum((confidence - 0.5) * 2 * bins, bins - 1).astype(int)
    members = [places == place for place in np.unique(places)]
    curve = [(mean(confidence[of]), mean(outcome[of]), int(of.sum())) for of in members]
    ece = math.fsum(pairs * abs(sure - right) for sure, right, pairs in curve) / len(margins)
    return Calibration(curve, ece, mean((confidence - outcome) ** 2))


def auc(chosen: Any, rejected: Any) -> float:
    """Probability that a chosen completion of any pair has a higher reward than a rejected one of any; ties one half.

    Unlike accuracy it compares across prompts: `(T,)` rewards with `(S,)` rewards, in O((T + S) log(T + S)).

    Source: Mann and Whitney 1947; their U, in whole numbers, over T S.

    >>> auc([1.0, 3.0], [0.0, 1.0])  # 1 > 0, 1 = 1, 3 > 0, 3 > 1
    0.875
    """
    chosen, rejected = _column("chosen", chosen), np.sort(_column("rejected", rejected))
    below, not_above = (np.searchsorted(rejected, chosen, side) for side in ("left", "right"))
    return int(below.sum() + not_above.sum()) / (2 * len(chosen) * len(rejected))


def distribution(values: Any) -> Distribution:
    """Where `(T,)` values lie.

    >>> found = distribution([1.0, 2.0, 3.0, 6.0])
    >>> found.mean, found.median
    (3.0, 2.5)
    """
    values = _column("values", values)
    middle = mean(values)
    q05, q25, median, q75, q95 = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
    return Distribution(middle, median, math.sqrt(mean((values - middle) ** 2)), q05, q25, q75, q95)


def length_classes(pairs: Pairs) -> np.ndarray:
    """`(T,)` of `LENGTH_CLASSES`: which completion of each pair is the longer one, by more than a tenth of it."""
    difference = pairs.tokens_chosen - pairs.tokens_rejected
    similar = 10 * np.abs(difference) <= np.maximum(pairs.tokens_chosen, pairs.tokens_rejected)
    return np.array(LENGTH_CLASSES)[np.where(similar, 1, np.where(difference < 0, 0, 2))]


def by(pairs: Pairs, keys: Any, order: Sequence[Any] | None = None) -> list[Slice]:
    """Accuracy and mean margin of the pairs of each of `(T,)` keys, sorted, or of those in `order` that have a pair.

    >>> two = {name: [2.0, 1.0] for name in ("reward_chosen", "logps_chosen", "logps_rejected")}
    >>> pairs = Pairs(row=[0, 1], **two, reward_rejected=[1, 3], tokens_chosen=[9, 4], tokens_rejected=[10, 5], beta=1)
    >>> [(part.name, part.margin) for part in by(pairs, length_classes(pairs))]  # 10 % and 20 % of the longer
    [('chosen shorter', -2.0), ('similar', 1.0)]
    """
    keys, margins = np.asarray(keys), pairs.margins
    _check_length("keys", keys, len(margins))
    return [
        Slice(str(key), accuracy_estimate(margins[of], pairs.prompts[of]), mean(margins[of]))
        for key in (np.unique(keys) if order is None else order)
        if (of := keys == key).any()
    ]


def mean(values: np.ndarray) -> float:
    """Of `(T,)` values, their sum correctly rounded."""
    return math.fsum(values.tolist()) / len(values)


def _firsts(*columns: np.ndarray) -> np.ndarray:
    """Index of the first of each run of equal entries of sorted columns."""
    changes = [column[1:] != column[:-1] for column in columns]
    return np.flatnonzero(np.append(True, np.any(changes, axis=0)))


def _cluster_sums(values: np.ndarray, clusters: Any) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of each cluster, sorted by both, so that neither order nor labels play a part."""
    _check_length("clusters", clusters, len(values))
    labels = np.unique(np.asarray(clusters), return_inverse=True)[1]
    order = np.lexsort((values, labels))
    firsts = _firsts(labels[order])
    sums, counts = np.add.reduceat(values[order], firsts), np.diff(firsts, append=len(values))
    order = np.lexsort((sums, counts))
    return sums[order], counts[order]


def _column(name: str, values: Any) -> np.ndarray:
    """`(T,)` with T at least 1, of strings for names, else of whole or finite numbers in the column's range."""
    column = np.asarray(values, dtype=None if name in NAMES else np.float64)
    if column.ndim != 1 or not len(column):
        raise ValueError(f"`{name}` must have shape (T,), T at least 1, got {column.shape}. Pass one entry per pair.")
    if name in NAMES:
        wrong, rule = np.array([not isinstance(value, str) for value in values]), "hold strings"
    else:
        low, high = RANGES.get(name, (-np.inf, np.inf))
        wrong = ~np.isfinite(column) | (column < low) | (column > high) | ((name in WHOLE) & (column % 1 != 0))
        rule = f"hold {'whole' if name in WHOLE else 'finite'} numbers" + f" in [{low}, {high}]" * (name in RANGES)
    if wrong.any():
        pair = int(np.argmax(wrong))
        raise ValueError(f"`{name}` must {rule}, got {values[pair]}. Leave out pair {pair} or mend it.")
    return column.astype(np.int64) if name in WHOLE else column


def _check_length(name: str, values: Any, count: int) -> None:
    if len(values) != count:
        raise ValueError(f"`{name}` must have one entry for each of {count} pairs, got {len(values)}. Pass as many.")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}. Pass 0.95 for 95 %.")
