"""The demo's world, and the demo with a step limit; in full under `slow`."""

import json

import pytest

from qlora_dpo.__main__ import main
from qlora_dpo.world import SAMPLE_PROMPTS, build_tokenizer, make_preferences, mirror, true_reward


def test_reward_counts_kind_and_gruff_words_of_the_whole_completion():
    """Kind: smiles, warmly, lovely; gruff: fool. 3 - 1 = 2, wherever they stand."""
    text = "The keeper smiles warmly. Here is a lovely lamp. Go, fool."
    assert true_reward(text) == 2
    assert true_reward(" ".join(reversed(text.replace(".", "").replace(",", "").split()))) == 2
    assert true_reward(mirror(text)) == -2


def test_no_held_out_prompt_occurs_in_training():
    train, heldout = make_preferences(400, 100, seed=1)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    assert set(SAMPLE_PROMPTS) <= {row["prompt"] for row in make_preferences(0, 2000, seed=0)[1]}


def test_chosen_always_has_the_higher_reward():
    for rows in make_preferences(200, 50, seed=2):
        assert all(true_reward(row["chosen"]) > true_reward(row["rejected"]) for row in rows)


def test_text_survives_the_tokenizer():
    tokenizer = build_tokenizer()
    for row in make_preferences(50, 2, seed=3)[0]:
        text = row["prompt"] + row["chosen"]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_demo_writes_adapter_and_metrics(tmp_path, capsys):
    words = ["demo", "--output_dir", str(tmp_path), "--base_steps", "3", "--max_steps", "2"]
    assert main(words) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for when in ("before", "after", "control"):
        assert {"eval_rewards/accuracies", "eval_rewards/margins", "eval_loss"} <= set(metrics[when])
    assert metrics["before"]["eval_rewards/margins"] == 0
    assert metrics["after"]["eval_rewards/margins"] != 0
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert "after DPO" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo_learns_the_preference(tmp_path, seed):
    """Held-out accuracy from one half to 0.9 or more, samples that follow, and a control that stays at one half."""
    assert main(["demo", "--output_dir", str(tmp_path), "--seed", str(seed)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["before"]["eval_rewards/accuracies"] == 0.5
    assert abs(metrics["control"]["eval_rewards/accuracies"] - 0.5) < 0.1
    assert metrics["after"]["eval_rewards/accuracies"] >= 0.9
    assert metrics["true_reward"]["after"] - metrics["true_reward"]["before"] > 3
    assert sum(metrics["seconds"].values()) < 180
