"""Publishing: an adapter with its tokenizer, record, card and charts, and nothing else, as one commit on the Hub."""

import contextlib
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from peft.utils import CONFIG_NAME
from transformers.trainer_utils import HubStrategy

from qlora_dpo.card import is_own, write_card
from qlora_dpo.cardtext import is_id
from qlora_dpo.errors import PushError
from qlora_dpo.paths import ADAPTER_FILES, RECORD_NAME, TOKENIZER_FILES, require_safetensors, saved_adapter
from qlora_dpo.record import read_record
from qlora_dpo.report import PICTURES

TRIES = 5
"""How often what the Hub refuses for now (status 429 or 503) is asked for."""
LONGEST_WAIT = 300.0
"""Seconds; when the Hub asks for more, the push fails and says so."""
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
_HINTS = {
    401: "Log in with `hf auth login`, or set HF_TOKEN to a token that may write.",
    403: "Use a token that may write there, or another `repo_id`.",
    404: "Check `repo_id`, and that the branch `revision` is there.",
    409: "Somebody else changed it at the same time: push again.",
    412: "Somebody else committed at the same time: push again.",
    429: "The Hub allows no more requests for now: wait some minutes.",
}
_Result = TypeVar("_Result")


def push_adapter(
    folder: str,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Push a saved adapter to the Hub, with a card made anew for its place there; the folder stays as it is.

    Weights in safetensors, configuration, tokenizer, `qlora_dpo.json`, card and charts are uploaded; never optimizer
    state, arguments, references, data or generated texts.

    Args:
        folder: Where the adapter lies, with its `qlora_dpo.json`.
        repo_id: `user/name`, or `name` for the user that the token belongs to; made if it is not there.
        private: Whether to make it private; None for what the user or organisation has as default.
        token: A token that may write; None for HF_TOKEN or that of `hf auth login`.
        revision: Branch to commit to; None for the main one.
        commit_message: First line of the commit.
        create_pr: Whether to open a pull request instead.

    Returns:
        The commit.

    Raises:
        FileNotFoundError: If there is no adapter with a record in the folder.
        ValueError: If its weights are not in safetensors.
        PushError: If the upload fails.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"`folder` must be a folder with a saved adapter, got {folder}. Check the path.")
    adapter_files(folder)
    repo_id = make_repository(repo_id, private=private, token=token, folder=folder)
    with tempfile.TemporaryDirectory() as staged:
        if not is_own(Path(folder, constants.REPOCARD_NAME)):
            write_card(folder, repo_id, draw=not Path(folder, PICTURES).is_dir(), target=staged)
        made = {path.relative_to(staged).as_posix(): path for path in Path(staged).rglob("*") if path.is_file()}
        return upload(folder, repo_id, private, token, revision, commit_message, create_pr=create_pr, made=made)


def adapter_files(folder: str) -> dict[str, Path]:
    """The files that belong to a saved adapter, by their place on the Hub.

    PEFT keeps an adapter that is not named `default` in a sub-folder, from where nothing else would load it: on the Hub
    its files are at the top.

    Raises:
        FileNotFoundError: If the folder holds no adapter with a record, or several.
        ValueError: If its weights are not in safetensors.
    """
    read_record(folder)
    adapter, top = Path(saved_adapter(folder)), Path(folder)
    if not Path(adapter, CONFIG_NAME).is_file():
        inside = sorted(path.parent.name for path in top.glob(f"*/{CONFIG_NAME}"))
        raise FileNotFoundError(f"`folder` must hold one adapter, got {inside or 'none'} in {folder}. Name its folder.")
    require_safetensors(str(adapter), folder)
    found = {name: adapter / name for name in ADAPTER_FILES if name != RECORD_NAME}
    patterns = (RECORD_NAME, constants.REPOCARD_NAME, *TOKENIZER_FILES, f"{PICTURES}/*.png")
    paths = [path for pattern in patterns for path in sorted(top.glob(pattern)) if path.is_file()]
    return found | {path.relative_to(top).as_posix(): path for path in paths}


def make_repository(repo_id: str, *, private: bool | None, token: str | None, folder: str) -> str:
    """Make a repository if it is not there; returns its whole id.

    Raises:
        PushError: If it cannot be made, or is public and was to be private.
    """
    api = _api(token)
    with _plainly(folder, repo_id, private, token):
        found = _patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        if private and not _patiently(lambda: api.repo_info(found)).private:
            raise ValueError("it is there already and public: make it private in its settings first, or name another")
    return str(found)


def upload(
    folder: str,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    path_in_repo: str = "",
    create_pr: bool = False,
    made: Mapping[str, Path] | None = None,
) -> CommitInfo:
    """Commit the files of a saved adapter to a repository that is there.

    `private` is for the error's way out only; `made` are files for this upload, by their place, before the folder's.
    """
    files = adapter_files(folder) | dict(made or {})
    _warn_of_paths(folder)

    def commit() -> CommitInfo:
        operations = [CommitOperationAdd(path_in_repo + name, path) for name, path in files.items()]
        return _api(token).create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload adapter",
            revision=revision,
            create_pr=create_pr,
        )

    with _plainly(folder, repo_id, private, token, revision):
        return _patiently(commit)


def places(strategy: HubStrategy, checkpoint: str) -> list[str]:
    """Folders of the repository that a checkpoint's adapter goes to."""
    named = {HubStrategy.CHECKPOINT: "last-checkpoint/", HubStrategy.ALL_CHECKPOINTS: f"{Path(checkpoint).name}/"}
    return ["", named[strategy]] if strategy in named else [""]


def upload_later(folder: str, *args: Any, **kwargs: Any) -> "Future[CommitInfo]":
    """As `upload`, in the background, of the files as they are now; a failure is a warning when it happens.

    The files are copied first: the next save may overwrite them, and an old checkpoint may be deleted.
    """
    copy = Path(tempfile.mkdtemp(prefix=".push-", dir=Path(folder).resolve().parent), Path(folder).resolve().name)
    for name, path in adapter_files(folder).items():
        Path(copy, name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy / name)

    def work() -> CommitInfo:
        try:
            return upload(str(copy), *args, **kwargs)
        except PushError as error:
            told = PushError(str(error).replace(str(copy), str(folder)))
            warnings.warn(str(told), stacklevel=2)
            raise told from None
        finally:
            shutil.rmtree(copy.parent, ignore_errors=True)

    return HfApi().run_as_future(work)


def without_secrets(text: str, *tokens: str | None) -> str:
    """A text without the tokens given, that of the environment or login, and what looks like one."""
    known = {token.strip() for token in (*tokens, get_token()) if token and token.strip()}
    for token in sorted(known, key=len, reverse=True):
        text = text.replace(token, "***")
    return _TOKEN.sub("hf_***", text)


def _api(token: str | None) -> HfApi:
    return HfApi(token=None if token is None else token.strip(), library_name="qlora_dpo")


def _warn_of_paths(folder: str) -> None:
    """Say so if the adapter can be loaded on this machine only."""
    record = read_record(folder)
    local = [name for name in (record.base, record.stacked_on, record.reference_source) if name and not is_id(name)]
    if local:
        warnings.warn(
            f"The adapter's files name {', '.join(dict.fromkeys(local))}, which others do not have. Train on a Hub id, "
            "or tell them which model it is.",
            stacklevel=3,
        )


def _patiently(call: Callable[[], _Result]) -> _Result:
    """Call again, after the time that the Hub names, as long as it refuses for now."""
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except HfHubHTTPError as error:
            status = None if error.response is None else error.response.status_code
            if status not in (429, 503) or attempt == TRIES:
                raise
            named = error.response.headers.get("Retry-After", "")
            seconds = float(named) if named.isdigit() else 2.0**attempt
            if seconds > LONGEST_WAIT:
                raise
            time.sleep(seconds)
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def _plainly(
    folder: str, repo_id: str, private: bool | None, token: str | None, revision: str | None = None
) -> Iterator[None]:
    """Turn whatever the client raises into one error: what it was, what to do, how to repeat it, and no token."""
    try:
        yield
    except Exception as error:  # the boundary to another library, an HTTP client below it, and a network
        again = f"qlora-dpo push --adapter {folder} --repo_id {repo_id}" + " --private" * bool(private)
        again += f" --revision {revision}" if revision else ""
        text = " ".join(without_secrets(f"{type(error).__name__}: {error}", token).split())
        raise PushError(
            f"The push to {repo_id} failed: {text.rstrip('.')}. {_hint(error)} Nothing in {folder} was changed by it; "
            f"push again with: {again}"
        ) from None  # the first error may show the token


def _hint(error: BaseException) -> str:
    """What to do about it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        return "Unset HF_HUB_OFFLINE."
    if not constants.HF_HUB_DISABLE_XET and any("xet" in f"{type(one).__module__} {one}".lower() for one in chain):
        return "Set HF_HUB_DISABLE_XET=1 to upload without Xet, or let the network reach its server."
    answers = [one.response for one in chain if isinstance(one, HfHubHTTPError) and one.response is not None]
    if isinstance(error, ValueError):  # the client's own checks, and ours, say what to do
        return ""
    return _HINTS.get(answers[0].status_code, "Try again later.") if answers else "Check the network."
