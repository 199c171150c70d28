"""Checkpoints that are known to be whole: a manifest written last, and the last whole one found again.

A run may be killed at any moment: while it writes a checkpoint, or while it deletes an old one. What a step has beside
weights, a moving reference or a running mean, is kept in a checkpoint's `reference/`.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qlora_dpo.errors import FixableError
from qlora_dpo.reference import AverageReference
from qlora_dpo.step import Step

MANIFEST_NAME = "manifest.json"
"""What lies in a checkpoint when all of it was written: every file's size and SHA-256."""

_UNFINISHED = f"{MANIFEST_NAME}.new"
_SAVING = "checkpoint-is-incomplete.txt"
"""What transformers has in a checkpoint while it saves one on a signal, and deletes after the manifest is written."""
_WITHOUT_OPTIMIZER = "it was saved with `save_only_model=True`, without the optimizer's state"


def checkpoint_folder(run: str, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(run, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def unmark(folder: Path) -> None:
    """Let a checkpoint count as unfinished, before it is written (again) or deleted."""
    Path(folder, MANIFEST_NAME).unlink(missing_ok=True)


def write_manifest(folder: Path, save_only_model: bool = False) -> None:
    """Mark a checkpoint as whole, in one stroke, when all its files are on disk.

    Args:
        folder: The checkpoint.
        save_only_model: Whether it has no state of the optimizer, so that no run can go on from it.
    """
    files = {path.relative_to(folder).as_posix(): _described(path) for path in _files(folder)}
    unfinished = Path(folder, _UNFINISHED)
    with unfinished.open("w") as file:
        json.dump({"save_only_model": save_only_model, "files": files}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, Path(folder, MANIFEST_NAME))


def _files(folder: Path) -> list[Path]:
    names = (MANIFEST_NAME, _UNFINISHED, _SAVING)
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in names)


def _described(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, which is on disk afterwards: an older checkpoint may be deleted then."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def damage(folder: Path) -> str | None:
    """Why no run can go on from a checkpoint; None if it is whole."""
    manifest = Path(folder, MANIFEST_NAME)
    if not manifest.is_file():
        return f"{MANIFEST_NAME}, which is written last, is missing: it was cut off, or another program wrote it"
    try:
        found = json.loads(manifest.read_text())
    except ValueError:
        return f"{MANIFEST_NAME} is not JSON"
    checked = [_damage_of(Path(folder, name), name, expected) for name, expected in found["files"].items()]
    if any(checked):
        return ", ".join(filter(None, checked))
    return _WITHOUT_OPTIMIZER if found["save_only_model"] else None


def _damage_of(path: Path, name: str, expected: dict[str, Any]) -> str | None:
    """What is wrong with a file of a manifest."""
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
    with path.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == expected["sha256"]
    return None if same else f"{name} is not what was written (its SHA-256 is another)"


def _checkpoints(run: str) -> list[Path]:
    """The checkpoints of a run, oldest step first."""
    steps = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(run).glob("*")}
    numbers = {path: int(match[1]) for path, match in steps.items() if match and path.is_dir()}
    return sorted(numbers, key=numbers.__getitem__)


def last_intact(run: str) -> tuple[Path, bool] | None:
    """The checkpoint with the highest step whose files are as they were written, and whether a run can go on from it.

    None if there is none: one that was cut off while it was written does not count.
    """
    found = ((folder, damage(folder)) for folder in reversed(_checkpoints(run)))
    return next(((folder, wrong is None) for folder, wrong in found if wrong in (None, _WITHOUT_OPTIMIZER)), None)


def checkpoint_to_resume(asked: str | bool | None, run: str) -> str | None:
    """The whole checkpoint that a run is to go on from; None to begin anew.

    Args:
        asked: True or "true" for the last one of the run; those that are not whole are skipped with a warning. A path
            for that one. None or False for none.
        run: Folder of the run.

    Raises:
        FileNotFoundError: If the path is no folder.
        ValueError: If the checkpoint is not whole, or there is none.
    """
    if asked in (None, False, "false", "False"):
        return None
    if asked in (True, "true", "True"):
        return str(_last_whole(run))
    folder = Path(str(asked)).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"`resume_from_checkpoint` must be a checkpoint's folder, got {asked}. Check the path.")
    wrong = damage(folder)
    if wrong is not None:
        raise ValueError(
            f"`resume_from_checkpoint` must be a complete checkpoint, got {folder}: {wrong}. Name another, or use True "
            "for the last complete one."
        )
    return str(folder)


def _last_whole(run: str) -> Path:
    """The whole checkpoint with the highest step; the others above it are named in warnings."""
    found = _checkpoints(run)
    for folder in reversed(found):
        wrong = damage(folder)
        if wrong is None:
            return folder
        warnings.warn(f"The checkpoint {folder} is skipped: {wrong}.", stacklevel=2)
    damaged = f" but {len(found)} that cannot be used" if found else ""
    raise ValueError(
        f"`resume_from_checkpoint=True` must find a complete checkpoint, got none{damaged} in {run}. Leave the option "
        "out to begin anew."
    )


def warn_of_others(run: str) -> None:
    """Say so if a run begins in a folder of another, whose checkpoints it would be confused with later."""
    found = _checkpoints(run)
    held = [f"checkpoints of another run, up to {found[-1].name}"] if found else []
    if Path(run, SAFETENSORS_WEIGHTS_NAME).is_file():
        held.append("an adapter, which will be written over")
    if held:
        warnings.warn(
            f"{run} holds {' and '.join(held)}, and this run begins anew. To go on with the other, stop and set "
            "`resume_from_checkpoint` to true; else name another `output_dir`.",
            stacklevel=3,
        )


def rotate(run: str, limit: int | None, kept: Sequence[str | Path | None]) -> None:
    """Delete the oldest checkpoints of a run beyond a limit, those that are not marked as whole first.

    What lies above the newest is older than the run: left there by another one in the same folder.

    Args:
        run: Folder of the run.
        limit: `save_total_limit`.
        kept: Checkpoints that stay, whatever the limit, the newest first.
    """
    if not limit or limit < 0:
        return
    stay = [Path(path).resolve() for path in kept if path is not None]
    found = [path.resolve() for path in _checkpoints(run)]
    newest = found.index(stay[0])
    others = [path for path in found[newest:] + found[:newest] if path not in stay]
    others.sort(key=lambda path: Path(path, MANIFEST_NAME).is_file())
    for folder in others[: max(len(found) - limit, 0)]:
        unmark(folder)
        shutil.rmtree(folder, ignore_errors=True)


def save_step_state(step: Step, folder: Path) -> None:
    """Keep a moving reference and a running mean in a checkpoint."""
    if isinstance(step.reference, AverageReference):
        Path(folder, "reference").mkdir(exist_ok=True)
        save_file(step.reference.state_dict(), Path(folder, "reference", "average.safetensors"))
    if step.objective.bco_running_mean:
        Path(folder, "reference").mkdir(exist_ok=True)
        state = {"total": step.bco_delta.total, "count": step.bco_delta.count}
        Path(folder, "reference", "bco_delta.json").write_text(json.dumps(state))


def load_step_state(step: Step, folder: Path) -> None:
    """Go on from what `save_step_state` kept.

    Raises:
        FixableError: If it is not there.
    """
    if isinstance(step.reference, AverageReference):
        step.reference.load_state_dict(load_file(_state_file(folder, "average.safetensors", "sync_ref_model")))
    if step.objective.bco_running_mean:
        state = json.loads(_state_file(folder, "bco_delta.json", "bco_running_mean").read_text())
        step.bco_delta.total, step.bco_delta.count = state["total"], state["count"]


def _state_file(folder: Path, name: str, option: str) -> Path:
    """A file of a checkpoint's `reference/`.

    Raises:
        FixableError: If it is not there.
    """
    path = Path(folder, "reference", name)
    if not path.is_file():
        raise FixableError(
            f"A checkpoint to go on from with `{option}` must hold reference/{name}, got none in {folder}. Go on with "
            "the options of the run that wrote it."
        )
    return path
