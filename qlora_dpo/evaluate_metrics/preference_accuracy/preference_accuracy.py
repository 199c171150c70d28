"""Share of preference pairs that a reward ranks right, a tie counting one half."""

import datasets
import evaluate
import numpy

_DESCRIPTION = "Share of pairs whose chosen completion has the higher reward; a tie counts one half."

_CITATION = """\
@inproceedings{rafailov2023direct,
  title = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Manning, Christopher D. and Ermon, Stefano and
            Finn, Chelsea},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023}
}
"""

_INPUTS = """
Args:
    chosen_rewards: list of T floats, the reward of each pair's chosen completion (from any model).
    rejected_rewards: list of T floats, the reward of each pair's rejected completion.
Returns:
    preference_accuracy: float in [0, 1].
    tie_share: float in [0, 1], the share of pairs with equal rewards.
Example:
    >>> accuracy = evaluate.load("qlora_dpo/evaluate_metrics/preference_accuracy")
    >>> accuracy.compute(chosen_rewards=[1.0, 0.5, 0.2], rejected_rewards=[0.0, 0.5, 0.9])
    {'preference_accuracy': 0.5, 'tie_share': 0.3333333333333333}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class PreferenceAccuracy(evaluate.Metric):
    """Preference accuracy as a metric of the `evaluate` library."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"chosen_rewards": datasets.Value("float64"), "rejected_rewards": datasets.Value("float64")}
            ),
        )

    def _compute(self, chosen_rewards, rejected_rewards):
        margins = numpy.asarray(chosen_rewards, dtype=numpy.float64) - numpy.asarray(rejected_rewards)
        ties = margins == 0
        return {
            "preference_accuracy": float(numpy.mean((margins > 0) + ties / 2)),
            "tie_share": float(numpy.mean(ties)),
        }
