"""Where things come from: data sets, packages, the base's licence. What is not known is left out, never guessed."""

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from datasets.naming import camelcase_to_snakecase
from huggingface_hub import constants, hf_hub_download, metadata_load, try_to_load_from_cache

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "qlora_dpo")
LICENCE_KEYS = ("license", "license_name", "license_link")
_IN_CACHE = re.compile(r"/([^/]+)___([^/]+)/([^/]+)/[^/]+/([0-9a-f]{40})/[^/]+$")
"""Namespace, name, configuration and commit of a Hub data set in the path of its file in the cache."""


def data_origin(dataset: Any) -> dict[str, Any]:
    """What a data set says of itself: name, Hub id, revision, configuration, split, rows and fingerprint, if it does.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset`.
    """
    info = dataset.info
    found: dict[str, Any] = {"split": None if dataset.split is None else str(dataset.split)}
    if info.dataset_name != info.builder_name:  # else it is a file type, such as `json`
        found["name"] = info.dataset_name
    for file in getattr(dataset, "cache_files", []):
        if known := _IN_CACHE.search(Path(file["filename"]).as_posix()):
            namespace, name, config, commit = known.groups()
            found |= {"name": f"{namespace}/{name}", "config": config, "revision": commit}
            found |= {"name": exact, "id": exact} if (exact := _exact_id(namespace, name, commit)) else {}
    found["rows"] = len(dataset) if hasattr(dataset, "__len__") else None
    found["fingerprint"] = getattr(dataset, "_fingerprint", None)
    return {key: value for key, value in found.items() if value is not None}


def _exact_id(namespace: str, name: str, commit: str) -> str | None:
    """The id whose commit this is: the cache of data sets writes names in lower case, that of files as they are."""
    for folder in Path(constants.HF_HUB_CACHE).glob(f"datasets--{namespace}--*"):
        written = folder.name.split("--", 2)[2]
        if camelcase_to_snakecase(written) == name and (folder / "snapshots" / commit).is_dir():
            return f"{namespace}/{written}"
    return None


def named_origin(origin: dict[str, Any], name: str, config: str | None = None) -> dict[str, Any]:
    """The origin of a data set that was loaded by a name: a Hub id, or a path, of which the last part is kept."""
    path = Path(name).expanduser()
    config_named = {} if config is None else {"config": config}
    if path.exists():
        return origin | {"name": path.name}
    return origin | {"name": name, "id": name} | config_named


def versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers."""
    return {name: found for name in PACKAGES if (found := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def base_commit(base: str, revision: str | None = None) -> str | None:
    """The commit of a base model that was loaded from the Hub, as the cache has it."""
    try:
        found = try_to_load_from_cache(base, constants.CONFIG_NAME, revision=revision)
    except ValueError:  # a path, or no name at all
        return None
    commit = Path(found).parent.name if isinstance(found, str) else ""
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None


@cache
def base_licence(base: str, revision: str | None = None) -> dict[str, str]:
    """The licence in the card of a base model, as the card's metadata says it; empty if it does not, or has no card."""
    try:
        local = Path(base, constants.REPOCARD_NAME)
        card = local if Path(base).is_dir() else hf_hub_download(base, constants.REPOCARD_NAME, revision=revision)
        data = metadata_load(card) or {}
    except Exception:  # no card, no network, no metadata in it: a licence that is not known stops nothing
        return {}
    return {key: data[key] for key in LICENCE_KEYS if isinstance(data.get(key), str)}
