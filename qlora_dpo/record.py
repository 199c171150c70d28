"""`qlora_dpo.json`: what lies beside a saved adapter, and all that is needed to read its rewards again."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from qlora_dpo.config import QLoRADPOConfig

RECORD_NAME = "qlora_dpo.json"


@dataclass(frozen=True)
class AdapterRecord:
    """How an adapter was trained.

    Attributes:
        base: Hub id or folder of the base model.
        base_revision: Its revision, if one was named.
        quantization: The base's quantisation as a dict, or None.
        compute_dtype: What 4-bit weights are multiplied in, or the dtype of the weights.
        reference: What rewards are relative to: `base` or `none`.
        beta: Factor of the rewards.
        loss_type: The objective.
        label_smoothing: Its label smoothing.
        max_length: Most tokens of prompt + completion in training, or None.
        max_prompt_length: Most tokens of a prompt, or None.
    """

    base: str
    base_revision: str | None
    quantization: dict[str, Any] | None
    compute_dtype: str
    reference: str
    beta: float
    loss_type: str
    label_smoothing: float
    max_length: int | None
    max_prompt_length: int | None


def write_record(folder: str, policy: PeftModel, args: QLoRADPOConfig, reference: str) -> None:
    """Write the record of a policy into an adapter's folder."""
    base = policy.get_base_model()
    quantization = getattr(base.config, "quantization_config", None)
    described = quantization.to_dict() if quantization is not None else None
    kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    record = AdapterRecord(
        base=policy.peft_config[policy.active_adapter].base_model_name_or_path or base.config._name_or_path,
        base_revision=kwargs.get("revision"),
        quantization=described,
        compute_dtype=str((described or {}).get("bnb_4bit_compute_dtype", base.dtype)).removeprefix("torch."),
        reference=reference,
        beta=args.beta,
        loss_type=args.loss_type[0],
        label_smoothing=args.label_smoothing,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
    )
    text = json.dumps(asdict(record), indent=2, default=str)
    Path(folder, RECORD_NAME).write_text(text + "\n")


def read_record(folder: str) -> AdapterRecord:
    """The record beside an adapter.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(folder, RECORD_NAME)
    if not path.is_file():
        raise FileNotFoundError(f"The adapter must lie beside its {RECORD_NAME}, got none in {folder}. Train it again.")
    return AdapterRecord(**json.loads(path.read_text()))
