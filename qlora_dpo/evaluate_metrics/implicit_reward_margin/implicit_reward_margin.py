"""How far apart a reward puts the two completions of a preference pair."""

import datasets
import evaluate
import numpy

_DESCRIPTION = "Reward of the chosen completion minus that of the rejected one: mean, median and standard deviation."

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
    chosen_rewards: list of T floats, the reward of each pair's chosen completion: for a DPO policy the implicit
        reward beta (log pi - log pi_ref), in units of beta times nats.
    rejected_rewards: list of T floats, the reward of each pair's rejected completion.
Returns:
    implicit_reward_margin: float, the mean margin.
    implicit_reward_margin_median: float.
    implicit_reward_margin_std: float, over the T pairs (not T - 1).
Example:
    >>> margin = evaluate.load("qlora_dpo/evaluate_metrics/implicit_reward_margin")
    >>> margin.compute(chosen_rewards=[1.0, 2.0], rejected_rewards=[0.0, -1.0])["implicit_reward_margin"]
    2.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ImplicitRewardMargin(evaluate.Metric):
    """Reward margins as a metric of the `evaluate` library."""

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
        return {
            "implicit_reward_margin": float(numpy.mean(margins)),
            "implicit_reward_margin_median": float(numpy.median(margins)),
            "implicit_reward_margin_std": float(numpy.std(margins)),
        }
