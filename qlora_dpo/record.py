"""`qlora_dpo.json`: what lies beside a saved adapter, and all that is needed to read its rewards again."""

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import BitsAndBytesConfig
from transformers.utils import CONFIG_NAME, cached_file

from qlora_dpo.adapters import frozen_adapters, trained_adapters
from qlora_dpo.checkpoints import last_intact
from qlora_dpo.config import LOSS_FIELDS, REFERENCES, QLoRADPOConfig
from qlora_dpo.model import is_quantized, load_policy
from qlora_dpo.origins import base_licence, versions
from qlora_dpo.paths import (
    RECORD_NAME,
    UNKNOWN,
    at_revision,
    lasting,
    local_adapter,
    naming,
    saved_adapter,
    split_revision,
)
from qlora_dpo.reference import ModelReference, Reference, reference_hash


@dataclass(frozen=True)
class AdapterRecord:
    """How an adapter was trained.

    Attributes:
        base: Hub id or folder of the base model.
        base_revision: Its revision, if one was named.
        quantization: The base's quantisation as a dict, or None.
        dtype: Dtype of the weights that are not quantised; 4-bit compute is in `quantization`.
        mixed_precision: `bf16`, `fp16` or `no`.
        reference: What rewards are relative to: `base`, `initial`, `adapter`, `model`, `average`, `given` or `none`.
        reference_source: Path or id that the reference can be loaded from again, if it has one.
        reference_hash: Hash of the reference adapter's weights, if it is or has one.
        reference_in_4bit: Whether a model that is the reference was in 4 bit, whoever loaded it; True of other kinds.
        stacked_on: Path or id of the frozen adapter that this one was trained on top of, `unknown` if it was in memory
            only; None without one.
        beta: Factor of the rewards.
        loss: The options that made the loss, by name.
        bco_delta: Running mean of rewards at the end, with `bco_running_mean`.
        max_length: Most tokens of prompt + completion in training, or None.
        max_prompt_length: Most tokens of a prompt, or None.
        pair_strategy: How scores or ranks became pairs.
        base_commit: Commit of the base that was loaded, if it came from the Hub.
        licence: `license`, `license_name`, `license_link` of the base, as its card has them.
        datasets: `data_origin` of each data set, by its use: `train`, `eval`, `eval_<name>` of several, or the prefix
            that an evaluation was given; and what became of its rows.
        evaluations: What `GatheredPairs.evaluation` says of each evaluation at the step of these weights, by the same.
        training: `TRAINING_FIELDS`, and the number of processes.
        versions: Of the packages that decide the numbers.
        run: What else must stay as it is for a run to go on; empty for a policy that was not trained.
    """

    base: str
    base_revision: str | None
    quantization: dict[str, Any] | None
    dtype: str
    mixed_precision: str
    reference: str
    beta: float
    max_length: int | None
    max_prompt_length: int | None
    pair_strategy: str
    loss: dict[str, Any] = field(default_factory=dict)
    bco_delta: float = 0.0
    reference_source: str | None = None
    reference_hash: str | None = None
    reference_in_4bit: bool = True
    stacked_on: str | None = None
    base_commit: str | None = None
    licence: dict[str, str] = field(default_factory=dict)
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


TRAINING_FIELDS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "seed"),
)
"""Fields of the configuration that the model card shows."""


def record_of(
    policy: PeftModel,
    args: QLoRADPOConfig,
    reference: Reference,
    given: bool = False,
    bco_delta: float = 0.0,
    datasets: dict[str, dict[str, Any]] | None = None,
    evaluations: dict[str, dict[str, Any]] | None = None,
    run: dict[str, Any] | None = None,
) -> AdapterRecord:
    """The record of a policy.

    Args:
        policy: The policy.
        args: The configuration.
        reference: What the policy was compared with.
        given: Whether the training data brought its own log-probabilities instead.
        bco_delta: The running mean of rewards.
        datasets: `data_origin` of each data set, by its use.
        evaluations: What evaluations of these very weights gave, by the same.
        run: What else must stay as it is for the run to go on.
    """
    names, below = trained_adapters(policy), frozen_adapters(policy)
    sources = getattr(policy, "adapter_sources", {})
    base = policy.get_base_model()
    quantization = getattr(base.config, "quantization_config", None)
    described = quantization.to_dict() if quantization is not None else None
    adapter = policy.peft_config[names[0]]
    name = adapter.base_model_name_or_path or base.config._name_or_path
    training = {key: getattr(args, key, None) for key in TRAINING_FIELDS} | {"processes": args.world_size}
    return AdapterRecord(
        base=name,
        base_revision=adapter.revision,
        base_commit=getattr(base, "commit", None),  # of a model that was loaded elsewhere it is not known
        licence=base_licence(name, adapter.revision),
        datasets=datasets or {},
        evaluations=evaluations or {},
        training={key: getattr(value, "value", value) for key, value in training.items()},
        versions=versions(),
        quantization=described,
        dtype=str(base.dtype).removeprefix("torch."),
        mixed_precision=args.arithmetic,
        reference="given" if given else reference.kind,
        reference_source=reference.source and lasting(reference.source),
        reference_hash=reference_hash(reference),
        reference_in_4bit=_in_4bit(reference),
        stacked_on=lasting(sources.get(below[-1], UNKNOWN)) if below else None,
        beta=args.beta,
        loss={name: getattr(args, name) for name in LOSS_FIELDS},
        bco_delta=bco_delta,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        pair_strategy=args.pair_strategy,
        run=run or {},
    )


def _in_4bit(reference: Reference) -> bool:
    """Whether a model that is the reference is in 4 bit; True of what has no bits of its own."""
    live = getattr(reference, "live", reference)  # behind a cache
    return not isinstance(live, ModelReference) or is_quantized(live.model)


def write_record(folder: str, policy: PeftModel, record: AdapterRecord) -> None:
    """Write the record of a policy beside its adapter: PEFT saves one that is not named `default` in a sub-folder."""
    text = json.dumps(asdict(record), indent=2, default=str)
    for name in {"", *(name for name in trained_adapters(policy) if name != "default")}:
        Path(folder, name).mkdir(parents=True, exist_ok=True)
        Path(folder, name, RECORD_NAME).write_text(text + "\n")


def read_record(folder: str) -> AdapterRecord:
    """The record beside an adapter, in a folder or on the Hub.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(local_adapter(folder), RECORD_NAME)
    if not path.is_file():
        raise FileNotFoundError(
            f"The adapter must lie beside its {RECORD_NAME}, got {folder}, {_without_record(path.parent)}"
        )
    found = json.loads(path.read_text())
    known = {field.name for field in fields(AdapterRecord)}  # a later version may write more
    return AdapterRecord(**{name: value for name, value in found.items() if name in known})


def evaluations_of(checkpoint: str, run: str) -> dict[str, dict[str, Any]]:
    """What evaluations of a checkpoint's weights gave: then, or after the training, where the run's end has them."""
    for folder in (run, checkpoint):
        files = [Path(folder, name) for name in (RECORD_NAME, SAFETENSORS_WEIGHTS_NAME)]
        if all(path.is_file() for path in files) and weights_hash(folder) == weights_hash(checkpoint):
            return read_record(folder).evaluations
    return {}


def _without_record(folder: Path) -> str:
    """What a folder without a record is, and what to do."""
    intact = last_intact(str(folder))
    if intact is not None:
        go_on = ", or finish the training with --resume_from_checkpoint true" if intact[1] else ""
        return f"where a training was stopped. Name its last complete checkpoint, {intact[0]}{go_on}."
    if Path(folder, ADAPTER_CONFIG_NAME).is_file():
        return "an adapter that was not saved here. Save it with QLoRADPOTrainer.save_model()."
    if Path(folder, CONFIG_NAME).is_file():
        return "a whole model. Name an adapter that was trained on it."
    return "which holds no adapter. Check the path."


def require_base(record: AdapterRecord, folder: str, **options: Any) -> None:
    """See that the base of a record can be found, before anything is loaded.

    Args:
        record: The record.
        folder: Folder or Hub id that it lies in.
        **options: For the Hub (`token`, `cache_dir`, ...).

    Raises:
        FileNotFoundError: If it cannot.
    """
    with naming(
        f"The base of the adapter {folder} must be a folder or a Hub id, got {record.base} from its {RECORD_NAME}",
        f"Put it there, log in for a private one, or write where it is as `base` into {RECORD_NAME}.",
    ):
        name, revision = split_revision(record.base, "base")
        with at_revision("base", name, revision or record.base_revision):
            cached_file(name, CONFIG_NAME, revision=revision or record.base_revision, **options)


def weights_hash(folder: str) -> str:
    """SHA-256 of the weights of a saved adapter, by which an evaluation is known to be of them."""
    with Path(local_adapter(saved_adapter(folder)), SAFETENSORS_WEIGHTS_NAME).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash_of(folder: Path) -> str | None:
    """The same of whatever lies in a folder; None of one without an adapter."""
    try:
        return weights_hash(str(folder))
    except (FileNotFoundError, ValueError):
        return None


def recorded_reference(record: AdapterRecord, given: bool) -> str:
    """The option `reference` that gives the reference of a record again.

    It is `unknown` where it cannot be had again, which only matters if no other is asked for.

    Args:
        record: The record.
        given: Whether the data at hand brings its own reference log-probabilities.
    """
    if record.reference == "given" and given:
        return "auto"
    return record.reference if record.reference in ("base", "none") else record.reference_source or UNKNOWN


def recorded_options(record: AdapterRecord, given: bool) -> dict[str, Any]:
    """The options of `QLoRADPOConfig` that judge an adapter as it was trained: lengths, loss, precision, reference.

    Args:
        record: The record.
        given: Whether the data at hand brings its own reference log-probabilities.
    """
    lengths = {name: getattr(record, name) for name in ("max_length", "max_prompt_length", "pair_strategy")}
    precision = {name: record.mixed_precision == name for name in ("bf16", "fp16")}
    reference = recorded_reference(record, given)
    in_4bit = {} if reference in REFERENCES else {"reference_in_4bit": record.reference_in_4bit}
    return lengths | record.loss | precision | {"beta": record.beta, "reference": reference} | in_4bit


def require_known(record: AdapterRecord, asked: str) -> None:
    """Say what is missing where a record's reference cannot be had again and no other is asked for.

    Raises:
        ValueError: If so.
    """
    if asked == UNKNOWN:
        raise ValueError(
            f"The reference of the adapter must be there to give rewards, got a record of `{record.reference}` (hash "
            f"{record.reference_hash}) that was in memory only. Name it, or another, with --reference."
        )


def policy_of(record: AdapterRecord, adapter: str, base: str | None = None, **model_kwargs: Any) -> PeftModel:
    """A saved adapter on its base, quantised and in the dtype as in training.

    Args:
        record: What lies beside the adapter.
        adapter: Folder or Hub id.
        base: Folder or Hub id of the base, if it is not where it was in training.
        **model_kwargs: Passed to `load_policy`.
    """
    quantization = BitsAndBytesConfig.from_dict(record.quantization) if record.quantization else None
    options: dict[str, Any] = {"dtype": getattr(torch, record.dtype)}
    if base is None:  # the revision is of the recorded one
        options["revision"] = record.base_revision or "main"
    return load_policy(
        base or record.base,
        adapter=saved_adapter(adapter),
        quantize=quantization is not None,
        quantization_config=quantization,
        gradient_checkpointing=False,
        **options | model_kwargs,
    )


def warn_of_reference(record: AdapterRecord, reference: Reference) -> None:
    """Say so if an adapter of the recorded path is not the one that was the reference."""
    found, sources = reference_hash(reference), (reference.source, record.reference_source)
    same = None not in sources and Path(str(sources[0])) == Path(str(sources[1]))
    if same and record.reference_hash not in (None, found):
        warnings.warn(
            f"The reference {reference.source} has changed since the adapter was trained (hash {found} instead of "
            f"{record.reference_hash}): its rewards are relative to another one. Put the old one back, or name it as "
            "`reference`.",
            stacklevel=2,
        )
