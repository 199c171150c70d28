"""QLoRA-DPO: Direct Preference Optimization of LoRA adapters on a 4-bit base, every token computed once."""

from qlora_dpo.config import QLoRADPOConfig
from qlora_dpo.losses import LOSSES, dpo_loss
from qlora_dpo.model import load_policy
from qlora_dpo.trainer import QLoRADPOTrainer

__version__ = "0.1.0"
__all__ = ["LOSSES", "QLoRADPOConfig", "QLoRADPOTrainer", "dpo_loss", "load_policy"]
