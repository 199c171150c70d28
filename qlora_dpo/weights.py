"""What a saved adapter's file holds, and the model that it is for: its weights, and a vocabulary that was resized."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_dpo.adapters import trained_adapters
from qlora_dpo.paths import local_adapter

_BASE_ROWS = ("original_module.weight", "base_layer.weight", "token_adapter.base_layer.weight", "weight")
"""Where an adapter's file holds the base's own embeddings or head, by what changes them; the first that is there."""


def load_adapter_weights(policy: PeftModel, source: str, name: str) -> None:
    """Put a saved adapter's weights in place; copies of the base's weights beside them stay in the file.

    PEFT saves the embeddings or the head where an adapter changes one, packed if they are in 4 bit.

    Raises:
        ValueError: If its file is cut off, or the adapter is of another model: it lacks a weight, or has one that the
            model has no place for or that is of another shape there.
    """
    with _whole_file(source):
        state = load_peft_weights(local_adapter(source), device="cpu")
    own = get_peft_model_state_dict(policy, adapter_name=name, save_embedding_layers=False)
    given = {key: value for key, value in state.items() if policy.base_model.prefix in key or key in own}
    lacking, left = len(own.keys() - given.keys()), len(given.keys() - own.keys())
    other = [key for key in given if key in own and given[key].shape != own[key].shape]
    if lacking or left or other:
        shapes = f", as {other[0]}: {list(given[other[0]].shape)} for {list(own[other[0]].shape)}" if other else ""
        raise ValueError(
            f"The adapter {source} must fit the model, got {lacking} weights that it lacks, {left} that the model has "
            f"no place for and {len(other)} of another shape{shapes}. Load it on the base it was trained on."
        )
    set_peft_model_state_dict(policy, given, adapter_name=name)


def fit_vocabulary(base: PreTrainedModel, source: str) -> dict[str, Tensor]:
    """Resize a base as it was when a saved adapter was trained, with the rows that were made up for added tokens.

    PEFT saves embeddings and head of a resized base beside the adapter's weights.

    Returns:
        Weights, `(vocabulary, hidden)`, and biases of embeddings and head by name; empty if they have as many rows.

    Raises:
        ValueError: If the adapter's file is cut off, or holds only one of the two.
    """
    modules, found = _own_rows(base, source, _resized)
    if not found:
        return found
    tokens, now = len(next(iter(found.values()))), base.get_input_embeddings().weight.shape[0]
    if sum(name.endswith(".weight") for name in found) < len({module.weight for module in modules.values()}):
        raise ValueError(
            f"The base of the adapter {source} must have {tokens} tokens, got {now}, and the adapter holds only one of "
            "its embeddings and head. Save the base as it was resized with save_pretrained, and name that folder."
        )
    base.resize_token_embeddings(tokens, mean_resizing=False)
    for name, rows in found.items():
        base.get_parameter(name).data.copy_(rows)
    return found


def require_same_vocabulary(base: PreTrainedModel, source: str) -> None:
    """Refuse a saved adapter of a base with another vocabulary, beside those of a base that stays as it is.

    Raises:
        ValueError: If it is one.
    """
    _, found = _own_rows(base, source, _resized)
    if found:
        tokens, now = len(next(iter(found.values()))), base.get_input_embeddings().weight.shape[0]
        raise ValueError(
            f"The adapter {source} must be of the policy's base, got one of a base with {tokens} tokens for {now}. "
            "Name one that was trained on the same base."
        )


def require_same_rows(base: PreTrainedModel, source: str, value: Callable[[str], Tensor] | None = None) -> None:
    """Refuse a saved adapter whose file holds other embeddings, or another head, than its base: trained outside of it.

    PEFT would put them into the base, where adapters saved later and merges leave them out. A copy in another dtype is
    the same.

    Args:
        base: Perhaps without its weights.
        source: Folder or Hub id of the adapter.
        value: A weight of the base by its name; by default what is in `base`.

    Raises:
        ValueError: If it does.
    """
    modules, found = _own_rows(base, source, lambda saved, now: list(saved) == list(now))
    for name, saved in found.items():
        path, _, leaf = name.rpartition(".")
        own = value(name) if value else getattr(_unwrapped(modules[path]), leaf)
        saved = saved.to(own.device)
        if not (torch.equal(saved.to(own.dtype), own) or torch.equal(saved, own.to(saved.dtype))):
            raise ValueError(
                f"The adapter {source} must be of its base as it is, got another {name} in its file, trained outside "
                "the adapter. Put it into the base, save that with save_pretrained, and name the folder as the base."
            )


def _unwrapped(module: nn.Module) -> nn.Module:
    """A module of the base under what PEFT puts around it."""
    return getattr(module, "original_module", getattr(module, "base_layer", module))


def _own_rows(
    base: PreTrainedModel, source: str, wanted: Callable[[Sequence[int], Sequence[int]], bool]
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Embeddings and head of a base by path, and what an adapter's file holds of them that it does not train.

    Args:
        base: Whose they are.
        source: Folder or Hub id of the adapter.
        wanted: Whether to read a weight, by its shape there and in the base.
    """
    both = _vocabulary(base)
    modules = {name: module for name, module in base.named_modules() if module in both}
    config = PeftConfig.from_pretrained(local_adapter(source))
    whole = tuple(getattr(config, "modules_to_save", None) or ())
    if whole and getattr(config, "ensure_weight_tying", False):
        whole = tuple(modules)  # each is trained with the other
    found: dict[str, Tensor] = {}
    path = Path(local_adapter(source), SAFETENSORS_WEIGHTS_NAME)
    with _whole_file(source), safe_open(path, framework="pt") as file:
        known = set(file.keys())
        for name, module in modules.items():
            leaves = _BASE_ROWS[:-1] if name.endswith(whole) else _BASE_ROWS
            keys = (f"base_model.model.{name}.{leaf}" for leaf in leaves)
            key = next((key for key in keys if key in known), None)
            if key is None or not wanted(file.get_slice(key).get_shape(), module.weight.shape):
                continue
            stem = key.removesuffix("weight")
            found |= {
                f"{name}.{leaf}": file.get_tensor(stem + leaf) for leaf in ("weight", "bias") if stem + leaf in known
            }
    return modules, found


def _vocabulary(base: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """Embeddings and head."""
    return base.get_input_embeddings(), base.get_output_embeddings()


def _resized(saved: Sequence[int], now: Sequence[int]) -> bool:
    """Whether two shapes, none of them that of packed numbers, differ in their rows alone."""
    return list(saved[1:]) == list(now[1:]) and saved[0] != now[0]


def require_saved_vocabulary(policy: PeftModel) -> None:
    """Refuse to train on a base with added tokens whose embeddings and head no saved adapter would hold.

    PEFT saves them unless an adapter changes one of the two, or the base's config cannot be looked up.

    Raises:
        ValueError: If the base in memory has another vocabulary than on disk, and one of the two would be lost.
    """
    for name in trained_adapters(policy):
        _require_saved_vocabulary(policy, name)


def _require_saved_vocabulary(policy: PeftModel, name: str) -> None:
    adapter, base = policy.peft_config[name], policy.get_base_model()
    source = adapter.base_model_name_or_path
    if not source:
        return  # a base that was made in memory
    try:
        config = type(base.config).from_pretrained(source, revision=adapter.revision or "main")
    except (OSError, HFValidationError):
        return  # a name that leads to nothing
    stored, now = (one.get_text_config().vocab_size for one in (config, base.config))
    if stored == now:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's, on saving the embeddings
        held = get_peft_model_state_dict(policy, adapter_name=name)
    both = _vocabulary(base)
    paths = [path for path, module in base.named_modules() if module in both]
    if any(_holds(below, paths) for below in getattr(policy, "adapter_sources", {}).values()):
        return  # the base is resized again from there
    if not all(any(f"base_model.model.{path}.{leaf}" in held for leaf in _BASE_ROWS) for path in paths):
        raise ValueError(
            f"A base whose vocabulary was changed must be saved before it is trained on, got {now} tokens in memory "
            f"and {stored} in {source}. Save it with save_pretrained, and name that folder."
        )


def _holds(source: str, paths: Sequence[str]) -> bool:
    """Whether the file of a saved adapter holds the base's own rows of embeddings and head."""
    path = Path(local_adapter(source), SAFETENSORS_WEIGHTS_NAME)
    with _whole_file(source), safe_open(path, framework="pt") as file:
        known = set(file.keys())
    return all(any(f"base_model.model.{one}.{leaf}" in known for leaf in _BASE_ROWS) for one in paths)


@contextlib.contextmanager
def _whole_file(source: str) -> Iterator[None]:
    """Say plainly if the weights of an adapter cannot be read.

    Raises:
        ValueError: If so.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"The adapter {source} must have whole weights in {SAFETENSORS_WEIGHTS_NAME}, got a file that cannot be "
            f"read ({error}). Copy or download it again."
        ) from error


@contextlib.contextmanager
def shapes_checked_later(source: str) -> Iterator[dict[str, bool]]:
    """Options with which PEFT makes the layers of a saved adapter, whose weights `load_adapter_weights` checks next."""
    with _whole_file(source), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some weights of .* were not initialized from the model checkpoint")
        yield {"ignore_mismatched_sizes": True}
