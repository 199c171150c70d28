"""What only a CUDA device can show; run by scripts/gpu_check.sh."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from qlora_dpo import QLoRADPOTrainer, load_policy
from qlora_dpo.forward import install_scoring, score_batch, to_device
from qlora_dpo.layouts import LAYOUTS, Group, make_batch
from qlora_dpo.proof import prove_layout

from tiny_chat import CHAT_ROWS, ranked_row

pytestmark = pytest.mark.gpu

GROUPS = [Group([9, 12, 14], [[10, 11, 8, 2], [13, 9, 2]], [(0, 1)]), Group([20], [[10, 2], [15, 16, 2]], [(1, 0)])]


def random_policy(base_folder):
    policy = load_policy(base_folder, peft_config=LoraConfig(target_modules="all-linear", init_lora_weights=False))
    install_scoring(policy.get_base_model())
    return policy


def gradient(policy):
    policy.zero_grad()
    policy.train()
    score_batch(policy, to_device(make_batch(GROUPS, "tree"), "cuda"))["logps"].sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("layout", ["tree", "packed"])
def test_layouts_prove_themselves_on_the_gpu(base_folder, layout):
    assert prove_layout(random_policy(base_folder), GROUPS, layout, torch.device("cuda")).holds


def test_layouts_agree_on_a_four_bit_base_on_the_gpu(base_folder):
    policy = random_policy(base_folder)
    with torch.no_grad():
        logps = [score_batch(policy, to_device(make_batch(GROUPS, layout), "cuda"))["logps"] for layout in LAYOUTS]
    assert (logps[0] - logps[2]).abs().max() < 0.1
    assert (logps[1] - logps[2]).abs().max() < 0.1


def test_gradients_are_the_same_before_and_after_evaluation_and_generation_on_the_gpu(base_folder):
    policy = random_policy(base_folder)
    before = gradient(policy)
    policy.eval()
    with torch.no_grad():
        policy.generate(input_ids=torch.tensor([[9, 10, 11]], device="cuda"), max_new_tokens=4)
    assert (gradient(policy) - before).norm() < 1e-3 * before.norm()


def test_training_starts_with_margins_of_exactly_zero_on_the_gpu(base_folder, make_args):
    args = make_args(max_steps=3, bf16=None, learning_rate=1e-3)
    rows = Dataset.from_list([ranked_row(seed) for seed in range(12)])
    trainer = QLoRADPOTrainer(load_policy(base_folder), args=args, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0
    assert trainer.state.log_history[2]["rewards/ties"] == 0
    assert trainer.data_collator.layout == "tree"
    assert 0 <= trainer.evaluate(Dataset.from_list(CHAT_ROWS))["eval_rewards/accuracies"] <= 1
