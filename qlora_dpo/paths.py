"""Where models and adapters lie: what a path or a Hub id, perhaps with a revision, leads to."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils.peft_utils import find_adapter_config_file

RECORD_NAME = "qlora_dpo.json"
METRICS_NAME = "metrics.json"
"""What a command found, as numbers: of a training in its folder, of an evaluation in its own."""
OF_WEIGHTS = "adapter_sha256"
"""Key of those numbers that tells which adapter's weights they are of."""
REPORT_NAME, PAIRS_NAME = "report.json", "pairs.jsonl"
"""The report of an evaluation, and a line for each of its pairs."""
JUDGED = {when: Path("evaluation", when) for when in ("before", "after")}
"""Folders of a run with the evaluations of its own data before and after the training."""
EVALUATIONS = "evaluations"
"""Folder beside an adapter with a folder for each data set that it was evaluated on later."""
UNKNOWN = "unknown"
"""What a record says of an adapter or a reference that was in memory only."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
)
"""Files of a tokenizer, as patterns."""
ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RECORD_NAME)
"""Files of an adapter; of its weights only safetensors, which cannot run code."""


def split_revision(path_or_id: str, what: str) -> tuple[str, str | None]:
    """A path, with `~` expanded, or a Hub id, and the revision that `id@revision` names.

    A path that is not there is refused before anything tries a download.

    Raises:
        FileNotFoundError: If it looks like a path and is not one.
        ValueError: If nothing stands before or behind the `@`.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return str(path), None
    name, at, revision = path_or_id.partition("@")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"The {what} must be a folder or a Hub id, got {path_or_id}. Check the path.")
    if at and not (name and revision):
        raise ValueError(f"The {what} must be id@revision, got {path_or_id}. Name a branch, tag or commit.")
    return name, revision or None


def check_path(path_or_id: str, what: str) -> str:
    """The path, with `~` expanded, or the id with its revision; as `split_revision` refuses them."""
    name, revision = split_revision(path_or_id, what)
    return name if revision is None else f"{name}@{revision}"


def lasting(path_or_id: str) -> str:
    """What leads to the same from every folder: a path that is there in full, an id as it is."""
    return str(Path(path_or_id).absolute()) if Path(path_or_id).exists() else path_or_id


def with_revision(path_or_id: str, options: dict[str, Any], what: str = "model") -> tuple[str, dict[str, Any]]:
    """A path or id, and keyword arguments of `from_pretrained` with the revision of `id@revision` among them.

    Raises:
        ValueError: If the keyword arguments name another revision.
    """
    name, revision = split_revision(path_or_id, what)
    asked = options.get("revision")
    if revision is not None and asked not in (None, revision):
        raise ValueError(f"`revision` must be left out for {path_or_id}, which names one, got {asked}. Name it once.")
    return name, options if revision is None else options | {"revision": revision}


@contextlib.contextmanager
def at_revision(what: str, name: str, revision: str | None) -> Iterator[None]:
    """Say plainly if a Hub id has no such revision."""
    try:
        yield
    except OSError as error:
        if RevisionNotFoundError in (type(error), type(error.__cause__)):
            raise ValueError(
                f"The {what} must be at a branch, tag or commit of {name}, got {revision!r}, which it does not have. "
                "Name another."
            ) from error
        raise


@contextlib.contextmanager
def naming(rule: str, way_out: str) -> Iterator[None]:
    """Say what named a path or id that nothing can be loaded from; what loads it, or the Hub's client, often does not.

    Args:
        rule: What must hold, and what was got.
        way_out: What to do.

    Raises:
        FileNotFoundError: If it cannot be loaded, with the first sentence of the reason.
    """
    try:
        yield
    except (OSError, HFValidationError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise FileNotFoundError(f"{rule} ({reason}). {way_out}") from error


def adapter_folder(path_or_id: str, token: str | bool | None = None) -> bool:
    """Whether a folder or a Hub id holds an adapter."""
    name, revision = split_revision(path_or_id, "model")
    with at_revision("model", name, revision):
        return find_adapter_config_file(name, revision=revision, token=token) is not None


def local_adapter(path_or_id: str, token: str | bool | None = None) -> str:
    """The folder of a saved adapter; that of an id lies in the cache, with nothing but the adapter's files.

    Raises:
        FileNotFoundError: If there is no such folder or id.
        ValueError: If its weights are not in safetensors.
    """
    name, revision = split_revision(path_or_id, "adapter")
    if Path(name).exists():
        folder = name
    else:
        # an adapter that is not named `default` lies in a sub-folder; so do checkpoints, which are not wanted
        wanted = [*ADAPTER_FILES, *(f"*/{file}" for file in ADAPTER_FILES), *TOKENIZER_FILES]
        unwanted = ["checkpoint-*", "last-checkpoint/*"]
        try:
            with at_revision("adapter", name, revision):
                folder = snapshot_download(
                    name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted, token=token
                )
        except (FileNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
            raise FileNotFoundError(
                f"The adapter must be a folder or a Hub id, got {path_or_id}: no such folder, and from the Hub "
                f"{type(error).__name__}. Check the path, or the id, and for a private one that you are logged in."
            ) from error
    if Path(folder, CONFIG_NAME).is_file():
        require_safetensors(folder, path_or_id)
    return folder


def saved_adapter(path_or_id: str) -> str:
    """What holds the adapter: PEFT puts one that is not named `default` in a sub-folder of its name."""
    local = Path(local_adapter(path_or_id))
    inside = [path.parent for path in local.glob(f"*/{CONFIG_NAME}") if not path.parent.name.startswith("checkpoint-")]
    itself = any(Path(local, name).is_file() for name in (CONFIG_NAME, "config.json"))  # an adapter, or a whole model
    return str(inside[0]) if len(inside) == 1 and not itself else path_or_id


def require_safetensors(folder: str, name: str) -> None:
    """Refuse an adapter without weights in safetensors: a `.bin` file is a pickle, which may run code when read.

    Raises:
        ValueError: If so.
    """
    if not Path(folder, SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"The adapter {name} must have its weights in {SAFETENSORS_WEIGHTS_NAME}, got none (a {WEIGHTS_NAME} is "
            "not read: it may run code). If you trust it, load it with PeftModel.from_pretrained, save it with "
            "save_pretrained, and name that folder."
        )


def base_of(adapter: str, token: str | bool | None = None) -> str:
    """The base model that an adapter names."""
    return str(PeftConfig.from_pretrained(local_adapter(adapter, token)).base_model_name_or_path)
