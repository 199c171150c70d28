"""What processes of their own run for test_hub_processes.py: the client reads its environment when it is imported.

Usage: `hub_scenes.py SCENE FOLDER`; the answer is the last line of stdout, as JSON.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer, evaluate_preferences, load_policy, load_scorer, push_adapter
from qlora_dpo.__main__ import main
from qlora_dpo.model import load_base, load_tokenizer
from qlora_dpo.reference import make_reference

from tiny_chat import CHAT_ROWS

ROWS = Dataset.from_list(CHAT_ROWS)


def config(folder, **options):
    defaults = {
        "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "bf16": False, "per_device_train_batch_size": 4,
    }  # fmt: skip
    return QLoRADPOConfig(output_dir=str(folder), **(defaults | options))


def logps(model, tokenizer):
    """Log-probabilities of a text's tokens, summed, in nats."""
    ids = torch.tensor([tokenizer("the red cat sees a blue bird today yes")["input_ids"]])
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(-1, ids[0, 1:, None]).sum().item()


def train(folder):
    """Train on a base of the Hub at a revision, push, and say what the adapter gives."""
    policy = load_policy("ada/base@v1", dtype=torch.float32, quantize=False)
    tokenizer = load_tokenizer("ada/base@v1")
    trainer = QLoRADPOTrainer(policy, None, config(folder / "run"), None, ROWS, ROWS, tokenizer)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    commit = push_adapter(str(folder / "run"), "ada/adapter")
    return {
        "commit": commit.oid,
        "logps": logps(policy.eval(), tokenizer),
        "margin": trainer.evaluate()["eval_rewards/margins"],
    }


def load(folder):
    """The same adapter from the Hub, in every way it can be named; no file of the run is at hand."""
    found, commit = {}, (folder / "commit").read_text()
    tokenizer = load_tokenizer("ada/adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    found["peft"] = logps(PeftModel.from_pretrained(base, "ada/adapter").eval(), tokenizer)
    plain = {"dtype": torch.float32, "quantize": False}
    found["local base"] = logps(load_policy(str(folder / "base"), adapter="ada/adapter", **plain).eval(), tokenizer)
    found["by itself"] = logps(load_policy("ada/adapter", **plain).eval(), tokenizer)
    found["at a commit"] = logps(load_policy(f"ada/adapter@{commit}", **plain).eval(), tokenizer)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in CHAT_ROWS))
    words = ["evaluate", "--adapter", f"ada/adapter@{commit}", "--dataset_name", str(rows), "--output_dir"]
    assert main([*words, str(folder / "e"), "--report_to", "none", "--disable_tqdm", "true"]) == 0
    found["margin"] = json.loads((folder / "e" / "metrics.json").read_text())["eval_rewards/margins"]
    found["scorer"] = load_scorer("ada/adapter").beta
    sources = load_policy(
        "ada/base@v1", adapter="ada/adapter", peft_config=LoraConfig(task_type="CAUSAL_LM", r=2), **plain
    )
    found["sources"] = sources.adapter_sources
    return found


def reference(folder):
    """An adapter and a model of the Hub as reference; the margins of a policy that is that adapter are 0."""
    plain, found = {"dtype": torch.float32, "quantize": False}, {}
    policy = load_policy("ada/adapter", **plain)
    tokenizer = load_tokenizer("ada/adapter")
    for name in ("ada/adapter", "ada/adapter@main", "ada/base@v1", "base"):
        args = config(folder / "r", reference=name, reference_in_4bit=name != "ada/base@v1", model_init_kwargs=None)
        report = evaluate_preferences(policy, ROWS, tokenizer, args)
        found[name] = report.margin.mean
    again = QLoRADPOTrainer(policy, None, config(folder / "again"), None, ROWS, None, tokenizer)
    again.train()
    again.save_model()
    found["record"] = json.loads((folder / "again" / "qlora_dpo.json").read_text())["reference_source"]
    return found


def mistakes(folder):
    """What is said of a revision, an id or a kind of file that is not there."""
    found = {}
    policy = get_peft_model(load_base("ada/base@v1", quantize=False), LoraConfig(task_type="CAUSAL_LM", r=2))
    tries = {
        "base": lambda: load_policy("ada/base@v9"),
        "adapter": lambda: load_policy("ada/adapter@v9"),
        "beside": lambda: load_policy("ada/base@v1", adapter="ada/adapter@v9"),
        "reference": lambda: make_reference("ada/adapter@v9", policy),
        "tokenizer": lambda: load_tokenizer("ada/base@v9"),
        "empty": lambda: load_policy("ada/base@"),
        "two": lambda: load_policy("ada/base@v1", revision="main"),
        "nobody": lambda: load_policy("ada/base@v1", adapter="ada/nobody"),
        "pickle": lambda: load_policy("ada/base@v1", adapter="ada/pickle"),
    }
    for name, attempt in tries.items():
        try:
            attempt()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    words = ["evaluate", "--adapter", "ada/adapter@v9", "--dataset_name", "x.jsonl"]
    found["status"] = main(words)
    return found


def token(folder):
    """A run that saves, checkpoints and pushes, and a push that fails; the token comes in three ways."""
    secret, errors = os.environ.pop("SECRET"), []
    way = os.environ["WAY"]
    if way == "environment":
        os.environ["HF_TOKEN"] = secret
    elif way == "login":
        from huggingface_hub import login

        login(secret)
    options = {"hub_token": secret} if way == "hub_token" else {}
    args = config(
        folder / "run", push_to_hub=True, hub_strategy="all_checkpoints", hub_model_id=f"ada/run-{way}", save_steps=1,
        save_strategy="steps", hub_always_push=True, report_to=["tensorboard"], **options,
    )  # fmt: skip
    print(args, repr(args), args.to_json_string())
    policy = load_policy("ada/base@v1", dtype=torch.float32, token=secret)
    trainer = QLoRADPOTrainer(policy, None, args, None, ROWS, ROWS, load_tokenizer("ada/base@v1"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
        trainer.evaluate()
        trainer.save_state()
        trainer.push_to_hub()
    errors += [str(one.message) for one in caught]
    for attempt in (
        lambda: trainer.push_to_hub(revision="refused"),
        lambda: push_adapter(str(folder / "run"), "ada/echo", token=secret),
        lambda: push_adapter(str(folder / "run"), "bob/other", token=secret),
        lambda: push_adapter(str(folder / "run"), "ada/x", token=f"{secret}\x07"),
    ):
        try:
            attempt()
        except Exception as error:
            import traceback

            errors.append("".join(traceback.format_exception(error)))
    return {"errors": errors}


if __name__ == "__main__":
    scene, place = sys.argv[1:]
    print(json.dumps(globals()[scene](Path(place))))
