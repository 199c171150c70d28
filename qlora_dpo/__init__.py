"""QLoRA-DPO: Direct Preference Optimization of LoRA adapters on a 4-bit base, every token computed once."""

from qlora_dpo.terminal import hush_bitsandbytes, is_command_line

if is_command_line():
    hush_bitsandbytes()  # which the imports below import

from qlora_dpo.config import QLoRADPOConfig
from qlora_dpo.hub import push_adapter
from qlora_dpo.judge import evaluate_preferences
from qlora_dpo.losses import LOSSES, dpo_loss
from qlora_dpo.measures import PreferenceReport
from qlora_dpo.memory import MemoryPlan, plan_memory
from qlora_dpo.merge import MergeReport, merge_adapter
from qlora_dpo.model import load_policy
from qlora_dpo.score import load_scorer, score_completions
from qlora_dpo.trainer import QLoRADPOTrainer

__version__ = "0.1.0"
__all__ = [
    "LOSSES",
    "MemoryPlan",
    "MergeReport",
    "PreferenceReport",
    "QLoRADPOConfig",
    "QLoRADPOTrainer",
    "dpo_loss",
    "evaluate_preferences",
    "load_policy",
    "load_scorer",
    "merge_adapter",
    "plan_memory",
    "push_adapter",
    "score_completions",
]
