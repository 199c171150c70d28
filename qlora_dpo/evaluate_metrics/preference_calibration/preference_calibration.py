"""Whether a reward that is sure of a preference pair is right as often as it claims."""

import math

import datasets
import evaluate
import numpy

_DESCRIPTION = (
    "Calibration of the Bradley-Terry probabilities of a reward: confidence s(|margin|) against whether the completion "
    "with the higher reward is the chosen one; a tie counts one half."
)

_CITATION = """\
@inproceedings{guo2017calibration,
  title = {On Calibration of Modern Neural Networks},
  author = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {International Conference on Machine Learning},
  year = {2017}
}
"""

_INPUTS = """
Args:
    chosen_rewards: list of T floats, the reward of each pair's chosen completion, on the scale of log odds: for a DPO
        policy the implicit reward beta (log pi - log pi_ref).
    rejected_rewards: list of T floats, the reward of each pair's rejected completion.
    label_probs: list of T floats in [0, 1], the probability that the chosen completion is the better one, in the order
        the pairs were added; given to `compute` only, and not passed on by `evaluate.combine`. None for 1.
    bins: int, the number of bins of equal width over confidences of [0.5, 1]; likewise.
Returns:
    expected_calibration_error: float, the mean over pairs of |mean confidence - mean outcome| of their bin.
    brier_score: float, the mean of (confidence - outcome)^2.
Example:
    >>> calibration = evaluate.load("qlora_dpo/evaluate_metrics/preference_calibration")
    >>> calibration.compute(chosen_rewards=[1.0, 0.5, 0.0], rejected_rewards=[1.0, 0.5, 0.0], label_probs=[1.0, 0.0, 0.7])
    {'expected_calibration_error': 0.0, 'brier_score': 0.0}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class PreferenceCalibration(evaluate.Metric):
    """Calibration of preferences as a metric of the `evaluate` library."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"chosen_rewards": datasets.Value("float64"), "rejected_rewards": datasets.Value("float64")}
            ),
        )

    def _compute(self, chosen_rewards, rejected_rewards, label_probs=None, bins=10):
        if not len(chosen_rewards):
            raise ValueError("`chosen_rewards` must hold at least one reward, got none. Add pairs before `compute`.")
        margins = numpy.asarray(chosen_rewards, dtype=numpy.float64) - numpy.asarray(rejected_rewards)
        probs = numpy.ones_like(margins) if label_probs is None else numpy.asarray(label_probs, dtype=numpy.float64)
        if probs.shape != margins.shape or not ((probs >= 0) & (probs <= 1)).all():
            rule = f"hold a probability for each of {len(margins)} pairs"
            raise ValueError(f"`label_probs` must {rule}, got {label_probs}. Pass one number in [0, 1] per pair.")
        order = numpy.argsort(numpy.abs(margins), kind="stable")
        margins, probs = margins[order], probs[order]
        outcome = numpy.where(margins == 0, 0.5, numpy.where(margins > 0, probs, 1 - probs))
        confidence = 1 / (1 + numpy.exp(-numpy.abs(margins)))
        place = numpy.minimum((confidence - 0.5) * 2 * bins, bins - 1).astype(int)
        gaps = [
            (place == b).sum() * abs(_mean(confidence[place == b]) - _mean(outcome[place == b]))
            for b in numpy.unique(place)
        ]
        return {
            "expected_calibration_error": math.fsum(gaps) / len(margins),
            "brier_score": _mean((confidence - outcome) ** 2),
        }


def _mean(values):
    return math.fsum(values) / len(values)
