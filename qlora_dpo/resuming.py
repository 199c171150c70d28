"""What must stay as it is for a run to go on from a checkpoint, and what of it is another now.

Free to change are where and how often a run writes, its length, and how a step is computed (token budget, layout,
micro-batches of the same step): the objective, the data and their order stay.
"""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from qlora_dpo.adapters import (
    adapter_weights,
    base_weights,
    changes_base,
    computed_buffers,
    frozen_adapters,
    trained_adapters,
)
from qlora_dpo.cache import weights_fingerprint
from qlora_dpo.config import QLoRADPOConfig
from qlora_dpo.data import VALUE_COLUMNS
from qlora_dpo.record import AdapterRecord

RUN_FIELDS = (
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "disable_dropout",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "ref_model_max_rank",
)
"""Options that decide the steps of a run, beside those of the loss."""

ADAPTER_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Entries of an adapter's config that decide what its weights do."""

FROZEN_ON = "frozen_on"
"""Entry of a run's facts with the kind of device that `frozen_hash` was computed on."""
_BASE_NAMES = ("base", "base_revision")
_TOKEN_OPTIONS = ("max_length", "max_prompt_length", "pair_strategy")
"""Options that matter by what they make of the data."""

_LABELS = {
    "data": "the training data",
    "frozen_hash": "the hash of the frozen weights",
    "groups_per_step": "groups in a step (per_device_train_batch_size x gradient_accumulation_steps x processes)",
    "processes": "the number of processes",
    "base": "the base model",
    "reference": "the reference",
    "mixed_precision": "mixed precision (`bf16`, `fp16`)",
}


def run_facts(args: QLoRADPOConfig, dataset: Any, policy: PeftModel, sharded: bool = False) -> dict[str, Any]:
    """What an `AdapterRecord` keeps of a run so that it can go on.

    Args:
        args: The configuration.
        dataset: The tokenised training data.
        policy: The policy.
        sharded: Whether a process holds parts of the weights only, which are then not hashed.
    """
    per_process = args.per_device_train_batch_size * args.gradient_accumulation_steps
    facts = {"groups_per_step": per_process * args.world_size, "processes": args.world_size}
    if args.dataloader_drop_last:  # what is dropped depends on it
        facts["per_device_train_batch_size"] = args.per_device_train_batch_size
    adapter = policy.peft_config[trained_adapters(policy)[0]]
    facts |= {name: getattr(adapter, name, None) for name in ADAPTER_FIELDS}
    facts |= {name: getattr(args, name) for name in RUN_FIELDS if hasattr(args, name)}
    if isinstance(dataset, Dataset):  # a stream's end is not known
        facts["data"] = f"{len(dataset):,} groups ({groups_fingerprint(dataset)[:16]})"
    frozen = frozen_weights(policy)
    if not sharded and not any(tensor.is_meta for tensor in frozen.values()):
        facts["frozen_hash"] = weights_fingerprint(frozen.items())
        facts[FROZEN_ON] = policy.device.type
    return facts


def warn_of_base(record: AdapterRecord, policy: PeftModel) -> None:
    """Say so if an adapter is not on the weights that it was trained on.

    Not to be told of weights that were quantised on another kind of device, which may round otherwise, nor of an
    adapter that trains parts of the base or lies on another.
    """
    run, frozen = record.run, _stored(policy)
    comparable = run.get(FROZEN_ON) == policy.device.type and record.stacked_on is None and changes_base(policy) is None
    if not comparable or any(tensor.is_meta for tensor in frozen.values()):
        return
    if weights_fingerprint(frozen.items()) != run.get("frozen_hash"):
        warnings.warn(
            f"The weights of {record.base} are not those that the adapter was trained on: they have changed since, or "
            "were changed in memory before the training. Its rewards say little on other ones. Put those back there.",
            stacklevel=2,
        )


def frozen_weights(policy: PeftModel) -> dict[str, Tensor]:
    """What a policy's adapter is trained on top of: the base and the frozen adapters in force.

    The constants of 4-bit weights are left out: their last bits depend on the GPU that quantised them.
    """
    named = {**_stored(policy), **adapter_weights(policy, frozen_adapters(policy))}
    return {name: tensor for name, tensor in named.items() if not tensor.requires_grad}


def _stored(policy: PeftModel) -> dict[str, Tensor]:
    """The base's weights, without what it computes anew."""
    computed = computed_buffers(policy)
    return {name: tensor for name, tensor in base_weights(policy).items() if name not in computed}


def groups_fingerprint(dataset: Dataset) -> str:
    """SHA-256 of tokenised groups in their order: tokens, pairs, and the numbers that come with them.

    What rows were made of them, from which file and with which columns besides, does not matter.
    """
    names = ["prompt_ids", "completion_ids", "pairs", *(n for n in VALUE_COLUMNS if n in dataset.column_names)]
    digest = hashlib.sha256(" ".join(names).encode())
    for table in dataset.select_columns(names).with_format("arrow").iter(1000):
        for name in names:
            _feed(digest, table[name].combine_chunks())
    return digest.hexdigest()


def _feed(digest: Any, array: Any) -> None:
    """Lengths of lists and the values in them, whatever buffers hold them."""
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        digest.update(array.value_lengths().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        array = array.flatten()
    digest.update(np.ascontiguousarray(array.to_numpy(zero_copy_only=False)).tobytes())


def check_within_first_pass(folder: str) -> None:
    """Refuse to go on with a stream that was gone through before: transformers counts batches from its first row.

    Raises:
        ValueError: If so.
    """
    state = TrainerState.load_from_json(str(Path(folder, TRAINER_STATE_NAME)))
    if state.epoch is not None and state.epoch * state.max_steps > state.global_step + 0.5:
        raise ValueError(
            f"A run over a stream must be in its first pass to go on, got {folder} in a later one, where the place in "
            "the stream is not known. Set `ignore_data_skip` to go on from the stream's first row, or load the rows as "
            "a data set."
        )


def check_same_run(folder: str, then: AdapterRecord, now: AdapterRecord) -> None:
    """Refuse to go on from a checkpoint of another run.

    Args:
        folder: The checkpoint.
        then: Its record.
        now: That of the run that is to go on.

    Raises:
        ValueError: If objective, base, data, or the order of data would change on the way; it lists all that would.
    """
    found = differences(then, now)
    if found:
        raise ValueError(
            f"A run must go on from {folder} as it began, got another: {'; '.join(found)}. Set back what changed, or "
            "begin a new run with the checkpoint's adapter as its model."
        )


def differences(then: AdapterRecord, now: AdapterRecord) -> list[str]:
    """What has changed, each as "`beta` was 0.1 and is 0.2"; what only one of the records knows is not compared."""
    old, new = _fixed(then), _fixed(now)
    same = {name for name in old.keys() & new.keys() if old[name] == new[name]}
    unimportant: set[str] = set()
    if "frozen_hash" in same:
        unimportant |= set(_BASE_NAMES)
    if "data" in same:
        unimportant |= set(_TOKEN_OPTIONS)
    changed = [name for name in old if name in new and name not in same | unimportant]
    drawn = "reference" in changed and then.reference == now.reference == "initial"
    hint = {"reference": " (of an adapter with a random start: seed before it is made)"} if drawn else {}
    return [
        f"{_LABELS.get(name, f'`{name}`')} was {old[name]} and is {new[name]}{hint.get(name, '')}" for name in changed
    ]


def _fixed(record: AdapterRecord) -> dict[str, Any]:
    """By name, what must not change, as a file has it: plain values."""
    quantization = {name: value for name, value in (record.quantization or {}).items() if not name.startswith("_")}
    kind, weights = record.reference, record.reference_hash
    names = (*_BASE_NAMES, "dtype", "mixed_precision", *_TOKEN_OPTIONS)
    found = {
        "reference": f"{kind} ({weights[:16]})" if weights else kind,
        **{name: getattr(record, name) for name in names},
        "quantization": quantization.pop("quant_method", None),
        **quantization,
        **record.loss,
        **{name: value for name, value in record.run.items() if name != FROZEN_ON},
    }
    return dict(json.loads(json.dumps(found, default=str)))
