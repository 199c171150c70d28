"""Accuracy and margin where people look while a training runs."""

import sys
import types

import pytest
from transformers.trainer_callback import ProgressCallback

from qlora_dpo.progress import PreferenceProgress, shown, with_preferences

from test_trainer import trainer_of
from tiny_chat import CHAT_ROWS


def test_only_what_a_bar_has_room_for_is_shown():
    line = {"loss": 0.69314, "rewards/accuracies": 0.625, "rewards/margins": float("nan"), "logps/chosen": -3.0}
    assert shown(line) == {"loss": "0.693", "accuracy": "0.625"}
    assert shown(line, "eval_") == {}


def test_the_bar_in_a_terminal_shows_loss_accuracy_and_margin(tokenizer, make_args, capsys):
    args = make_args(max_steps=3, eval_strategy="steps", eval_steps=2, disable_tqdm=False)
    trainer = trainer_of(tokenizer, args, eval_rows=CHAT_ROWS[:4])
    assert sum(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks) == 1
    trainer.train()
    bars = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "3/3" in line]
    assert all(f"{name}=" in bars[-1] for name in ("loss", "accuracy", "margin", "eval loss", "eval accuracy"))
    last = [line for line in trainer.state.log_history if "rewards/margins" in line][-1]
    assert f"margin={last['rewards/margins']:.3g}" in bars[-1].replace("eval margin=", "")


def test_a_bar_of_the_users_own_is_left_alone():
    class Own(ProgressCallback):
        pass

    own = Own()
    assert with_preferences(own) is own
    assert type(with_preferences(ProgressCallback(7))) is PreferenceProgress
    assert with_preferences(ProgressCallback(7)).max_str_len == 7


@pytest.fixture
def notebook(monkeypatch):
    """Transformers' notebook callback, with what IPython would show."""
    pages = []

    class Output:
        def update(self, page):
            pages.append(page)

    display = types.ModuleType("IPython.display")
    display.HTML = lambda text: text
    display.display = lambda page, display_id=False: (pages.append(page), Output())[1]
    package = types.ModuleType("IPython")
    package.display = display
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    from transformers.utils.notebook import NotebookProgressCallback

    yield NotebookProgressCallback, pages
    sys.modules.pop("transformers.utils.notebook", None)


def heads(page):
    return [part.split("</th>")[0] for part in page.split("<th>")[1:]]


@pytest.mark.parametrize("evaluates", [False, True])
def test_the_table_in_a_notebook_has_accuracy_and_margin(notebook, tokenizer, make_args, monkeypatch, evaluates):
    own, pages = notebook
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", own)
    options = {"eval_strategy": "steps", "eval_steps": 1} if evaluates else {}
    args = make_args(max_steps=3, disable_tqdm=False, **options)
    trainer = trainer_of(tokenizer, args, eval_rows=CHAT_ROWS[:4])
    trainer.train()
    table = [page for page in pages if "<table" in page][-1]
    validation = ["Validation Loss"] if evaluates else []
    assert heads(table) == ["Step", "Training Loss", *validation, "Accuracy", "Margin"]
    assert table.count("<tr>") == 3
    assert "No log" not in table
