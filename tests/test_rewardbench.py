"""RewardBench: sections, weights and the strict comparison."""

import copy
import doctest
import importlib.util
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_judge import policy_of

from qlora_dpo import QLoRADPOTrainer, rewardbench
from qlora_dpo.__main__ import main
from qlora_dpo.rewardbench import SECTIONS, as_conversations, section_scores

from test_cli import QUIET, train_words
from tiny_chat import CHAT_ROWS


def test_the_doctests_hold():
    assert doctest.testmod(rewardbench).failed == 0


def test_sections_weigh_what_the_benchmark_says():
    """Math weighs as much as the six code subsets: 984 = 6 x 164."""
    reasoning = SECTIONS["Reasoning"]
    assert reasoning["math-prm"] == sum(weight for name, weight in reasoning.items() if name != "math-prm")
    assert sum(len(weights) for weights in SECTIONS.values()) == 23
    totals = {name: sum(weights.values()) for name, weights in SECTIONS.items()}
    assert totals == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}


def test_a_tie_is_wrong_here():
    assert section_scores(np.array([0.0, 1.0]), ["donotanswer", "donotanswer"])["Safety"] == 0.5


def test_other_subsets_are_refused():
    with pytest.raises(ValueError, match="Subsets must be RewardBench's"):
        section_scores(np.array([1.0]), ["mine"])


def test_files_without_its_columns_are_refused():
    with pytest.raises(ValueError, match="must have the columns prompt, chosen, rejected and subset"):
        as_conversations(Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]))


def test_an_adapter_is_judged_on_a_local_copy(base_folder, rows_file, tmp_path, capsys):
    """Text rows are rendered by the chat template; the sections are printed and written beside the report."""
    assert main(train_words(base_folder, rows_file, tmp_path / "run")) == 0
    words = ["the cat sees", "a blue tree", "gladly finds", "never likes"]
    rows = [
        {
            "prompt": words[i % 4],
            "chosen": words[(i + 1) % 4],
            "rejected": words[(i + 2) % 4],
            "subset": subset,
            "id": i,
        }
        for i, subset in enumerate(["mt-bench-easy", "hep-go", "math-prm", "donotanswer"])
    ]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    folder = str(tmp_path / "e")
    options = ["--dataset_name", str(path), "--benchmark", "rewardbench", "--output_dir", folder, *QUIET]
    words = ["evaluate", "--adapter", str(tmp_path / "run"), *options]
    assert main(words) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "e" / "metrics.json").read_text())["rewardbench"]
    assert [line.split()[0] for line in shown.splitlines()[-len(found) :]] == list(found)
    assert main([*words, "--benchmark", "other"]) == 2
    assert "`benchmark` must be rewardbench, got other. Leave it out" in capsys.readouterr().err
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rewardbench"] == found
    lines = [json.loads(line) for line in (tmp_path / "e" / "pairs.jsonl").read_text().splitlines()]
    assert found == section_scores(np.array([line["margin"] for line in lines]), [line["subset"] for line in lines])
    assert "<user>" in lines[0]["prompt"]


def padded_batch(groups, pad):
    """Both sides of pairs as the benchmark's collator lays them out: labels of -100 on the prompt and the padding."""
    batch = {}
    for side, name in enumerate(("chosen", "rejected")):
        rows = [(group["prompt_ids"], group["completion_ids"][group["pairs"][0][side]]) for group in groups]
        width = max(len(prompt) + len(completion) for prompt, completion in rows)
        fill = [width - len(prompt) - len(completion) for prompt, completion in rows]
        kinds = {
            "input_ids": [p + c + [pad] * n for (p, c), n in zip(rows, fill, strict=True)],
            "attention_mask": [[1] * (len(p) + len(c)) + [0] * n for (p, c), n in zip(rows, fill, strict=True)],
            "labels": [[-100] * len(p) + c + [-100] * n for (p, c), n in zip(rows, fill, strict=True)],
        }
        batch |= {f"{name}_{kind}": torch.tensor(values) for kind, values in kinds.items()}
    return batch


def summed(model, batch, side):
    """Log-probabilities of the labelled tokens of each row."""
    ids, mask, labels = (batch[f"{side}_{kind}"] for kind in ("input_ids", "attention_mask", "labels"))
    with torch.no_grad():
        logps = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    return (logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)).sum(-1)


class Logratios:
    """What the benchmark's DPO inference computes: no beta, sums over the labelled tokens."""

    def __init__(self, model, ref_model, tokenizer, accelerator):
        self.models = model.eval(), ref_model.eval()

    def inference_step(self, batch):
        return tuple(summed(self.models[0], batch, side) - summed(self.models[1], batch, side) for side in SIDES)


SIDES = ("chosen", "rejected")


def benchmarks_own():
    """`DPOInference` of the package `rewardbench`, without the rest of it; None if it is not installed."""
    package = importlib.util.find_spec("rewardbench")
    if package is None:
        return None
    spec = importlib.util.spec_from_file_location("rewardbench_dpo", Path(package.origin).with_name("dpo.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DPOInference


@pytest.mark.parametrize("inference", [Logratios, benchmarks_own()], ids=["equations", "package"])
def test_logratios_are_those_of_the_benchmarks_inference_on_the_same_tokens(inference, tokenizer, make_args):
    if inference is None:
        pytest.skip("the package rewardbench is not installed")
    policy = policy_of(tokenizer)
    trainer = QLoRADPOTrainer(
        copy.deepcopy(policy),
        args=make_args(reference="base", beta=0.3, per_device_eval_batch_size=5),
        eval_dataset=Dataset.from_list(CHAT_ROWS),
        processing_class=tokenizer,
    )
    trainer.evaluate()
    groups = {group["row"]: group for group in trainer.eval_dataset}
    batch = padded_batch([groups[row] for row in trainer.last_pairs.rows().tolist()], tokenizer.pad_token_id)
    base = copy.deepcopy(policy).unload()
    theirs = inference(policy, base, tokenizer, types.SimpleNamespace(device="cpu")).inference_step(batch)
    ours = [trainer.last_pairs.column(f"reward_{side}") / 0.3 for side in SIDES]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-5)
    subsets = [list(SECTIONS["Safety"])[i % 2] for i in range(len(ours[0]))]
    wins = (theirs[0] > theirs[1]).numpy()
    assert section_scores(ours[0] - ours[1], subsets) == section_scores(np.where(wins, 1.0, -1.0), subsets)
    assert 0 < wins.sum() < len(wins)
