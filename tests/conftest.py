"""Fixtures shared by all tests. The network is off, and one thread is fastest for models this small."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from datasets import Dataset

from qlora_dpo import QLoRADPOConfig

from tiny_chat import CHAT_ROWS, build_chat_tokenizer, build_tiny_llama


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return build_chat_tokenizer()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, tokenizer):
    """A folder with a tiny Llama and its tokenizer, as a user would name it."""
    folder = tmp_path_factory.mktemp("base")
    build_tiny_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def chat_rows():
    """Twelve rows of messages, each prompt another."""
    return Dataset.from_list(CHAT_ROWS)


@pytest.fixture
def rows_file(tmp_path):
    """The same rows as a .jsonl file."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHAT_ROWS))
    return str(path)


@pytest.fixture
def make_args(tmp_path):
    """A config that writes into the test's folder, in fp32, logs every step and reports nowhere."""

    def make(**options):
        defaults = {"bf16": False, "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
        defaults["keep_layers"] = 0  # so that recomputed layers are what most tests run
        output_dir = options.pop("output_dir", str(tmp_path / "run"))
        return QLoRADPOConfig(output_dir=output_dir, **(defaults | options))

    return make
