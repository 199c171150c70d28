"""QLoRA-DPO: Direct Preference Optimization of LoRA adapters on a 4-bit base, every token computed once."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_dpo.config import QLoRADPOConfig
    from qlora_dpo.hub import push_adapter
    from qlora_dpo.judge import evaluate_preferences
    from qlora_dpo.losses import LOSSES, dpo_loss
    from qlora_dpo.memory import MemoryPlan, plan_memory
    from qlora_dpo.merge import MergeReport, merge_adapter
    from qlora_dpo.model import load_policy
    from qlora_dpo.preference_report import PreferenceReport
    from qlora_dpo.score import load_scorer, score_completions
    from qlora_dpo.trainer import QLoRADPOTrainer

from qlora_dpo.terminal import hush_bitsandbytes

hush_bitsandbytes()  # before anything imports it

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

_HOMES = {
    "config": ("QLoRADPOConfig",),
    "hub": ("push_adapter",),
    "judge": ("evaluate_preferences",),
    "losses": ("LOSSES", "dpo_loss"),
    "memory": ("MemoryPlan", "plan_memory"),
    "merge": ("MergeReport", "merge_adapter"),
    "model": ("load_policy",),
    "preference_report": ("PreferenceReport",),
    "score": ("load_scorer", "score_completions"),
    "trainer": ("QLoRADPOTrainer",),
}


def _found(name: str) -> Any:
    """A public name or a module, imported when it is first asked for: it takes seconds, as it imports transformers."""
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"qlora_dpo.{home}"), name)
            return value
    if not name.startswith("_") and find_spec(f"qlora_dpo.{name}"):
        return import_module(f"qlora_dpo.{name}")
    raise AttributeError(f"module 'qlora_dpo' has no attribute {name!r}")


if not TYPE_CHECKING:  # or else no misspelt name would be an error to a type checker
    __getattr__ = _found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
