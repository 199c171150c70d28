"""Reference log-probabilities that are computed once and kept on disk."""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from qlora_dpo.cache import LogpsCache, default_cache_path
from qlora_dpo.logps import sum_by_completion
from qlora_dpo.reference import ModelReference, NoReference, Reference, fingerprint

_WITHOUT_EFFECT = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "use_cache",
    "id2label",
    "label2id",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Entries of a model's config that decide no log-probability."""


class CachedReference:
    """Another reference whose log-probabilities are kept on disk, a value per token, and computed once.

    Attributes:
        misses: Completions that were computed so far.
    """

    def __init__(self, live: Reference, cache: LogpsCache, identity: str) -> None:
        self.live, self.cache, self.identity = live, cache, identity
        self.kind, self.source = live.kind, live.source
        self.description = f"{live.description}, cached on disk"
        self.misses = 0

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`logps` `(B,)` and `token_logps` `(N,)`, in nats.

        A batch with a completion that is not cached is computed, and kept.
        """
        keys, lengths = batch["keys"], batch["lengths"]
        found = self.cache.get(self.identity, keys)
        missing = [i for i, value in enumerate(found) if value is None or len(value) != lengths[i]]
        if missing:
            self.misses += len(missing)
            computed = self.live(model, batch)["token_logps"]
            runs = [run.cpu().numpy() for run in computed.split(lengths)]
            self.cache.put(self.identity, [keys[i] for i in missing], [runs[i] for i in missing])
            for i in missing:
                found[i] = runs[i]
        token_logps = torch.from_numpy(np.concatenate([v for v in found if v is not None])).to(batch["yw_idxs"].device)
        return {"logps": sum_by_completion(token_logps, lengths), "token_logps": token_logps}

    def weights(self) -> dict[str, Tensor]:
        """Those of the reference behind it."""
        return self.live.weights()


def cached_reference(live: Reference, path: str | None, rounding: str) -> CachedReference:
    """A reference whose log-probabilities are kept on disk under what decides them and nothing else.

    That is its weights (quantised as they are), the config that says how they are used, and the precision of the
    computation; the tokens of prompt and completion are the key of each value.

    Args:
        live: What computes the values that are missing.
        path: File of the cache; None for the default one.
        rounding: What decides how numbers are rounded, as `QLoRADPOConfig.rounding` says it.

    Raises:
        ValueError: If there is nothing to keep.
    """
    if isinstance(live, NoReference):
        raise ValueError("`precompute_ref_log_probs` must be False without a reference, got True. Set it to False.")
    model = live.model if isinstance(live, ModelReference) else live.policy  # type: ignore[attr-defined]
    config = {name: value for name, value in model.config.to_dict().items() if name not in _WITHOUT_EFFECT}
    described = json.dumps([fingerprint(live), config, rounding], sort_keys=True, default=str)
    identity = hashlib.sha256(described.encode()).hexdigest()
    return CachedReference(live, LogpsCache(path or default_cache_path()), identity)


def precompute(
    reference: CachedReference,
    model: nn.Module,
    datasets: Sequence[Any],
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
    silent: bool = False,
) -> None:
    """Score data sets under a cached reference; what is on disk already is not scored again.

    Args:
        reference: Keeps what it computes.
        model: The policy.
        datasets: Tokenised groups.
        collator: Makes their batches.
        batch_size: Groups in a batch.
        device: The model's device.
        share: This process and the number of them: each scores its own groups.
        silent: Whether to show no progress.

    Raises:
        ValueError: For a stream.
    """
    loaders = []
    for dataset in datasets:
        if not isinstance(dataset, Dataset):
            raise ValueError(
                "`precompute_ref_log_probs` must be False for a stream, whose end is not known, got True. Set "
                "it to False."
            )
        mine = dataset.select(range(share[0], len(dataset), share[1]))  # none, where there are more processes than rows
        loaders.append(DataLoader(mine, batch_size=batch_size, collate_fn=collator))
    total = sum(len(loader) for loader in loaders)
    for batch in tqdm(itertools.chain(*loaders), total=total, desc="Reference log-probs", disable=silent):
        for piece in batch["pieces"]:
            if "ref_logps" not in piece:
                reference(model, send_to_device(piece, device))
