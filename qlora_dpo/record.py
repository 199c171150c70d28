"""`qlora_dpo.json`: what lies beside a saved adapter, and all that is needed to read its rewards again."""

import json
from dataclasses import asdict, dataclass, fields
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
        dtype: Dtype of the weights that are not quantised; 4-bit compute is in `quantization`.
        mixed_precision: `bf16`, `fp16` or `no`.
        reference: What rewards are relative to: `base` or `none`.
        beta: Factor of the rewards.
        loss_type: The objective.
        label_smoothing: Its label smoothing.
        max_length: Most tokens of prompt + completion in training, or None.
        max_prompt_length: Most tokens of a prompt, or None.
        pair_strategy: How scores or ranks became pairs.
    """

    base: str
    base_revision: str | None
    quantization: dict[str, Any] | None
    dtype: str
    mixed_precision: str
    reference: str
    beta: float
    loss_type: str
    label_smoothing: float
    max_length: int | None
    max_prompt_length: int | None
    pair_strategy: str


def write_record(folder: str, policy: PeftModel, args: QLoRADPOConfig, reference: str) -> None:
    """Write the record of a policy beside its adapter: PEFT saves one that is not named `default` in a sub-folder."""
    base = policy.get_base_model()
    quantization = getattr(base.config, "quantization_config", None)
    described = quantization.to_dict() if quantization is not None else None
    adapter = policy.peft_config[policy.active_adapter]
    record = AdapterRecord(
        base=adapter.base_model_name_or_path or base.config._name_or_path,
        base_revision=adapter.revision,
        quantization=described,
        dtype=str(base.dtype).removeprefix("torch."),
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        reference=reference,
        beta=args.beta,
        loss_type=args.loss_type[0],
        label_smoothing=args.label_smoothing,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        pair_strategy=args.pair_strategy,
    )
    text = json.dumps(asdict(record), indent=2, default=str)
    for name in {"", *(name for name in policy.active_adapters if name != "default")}:
        Path(folder, name).mkdir(parents=True, exist_ok=True)
        Path(folder, name, RECORD_NAME).write_text(text + "\n")


def read_record(folder: str) -> AdapterRecord:
    """The record beside an adapter.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(folder, RECORD_NAME)
    if not path.is_file():
        way_out = "Train it again." if Path(folder).is_dir() else "Check the path."
        raise FileNotFoundError(f"The adapter must lie beside its {RECORD_NAME}, got none in {folder}. {way_out}")
    known = {field.name for field in fields(AdapterRecord)}  # a later version may write more
    return AdapterRecord(**{name: value for name, value in json.loads(path.read_text()).items() if name in known})
