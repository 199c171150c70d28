"""What only a CUDA device can show; run by scripts/gpu_check.sh."""

import contextlib

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from qlora_dpo import QLoRADPOTrainer, load_policy, score_completions
from qlora_dpo.forward import install_scoring, score_batch, to_device
from qlora_dpo.layouts import LAYOUTS, Group, make_batch
from qlora_dpo.offload import activations_moved
from qlora_dpo.proof import prove_layout
from qlora_dpo.score import load_scorer

from tiny_chat import CHAT_ROWS, ranked_row

pytestmark = pytest.mark.gpu

GROUPS = [Group([9, 12, 14], [[10, 11, 8, 2], [13, 9, 2]], [(0, 1)]), Group([20], [[10, 2], [15, 16, 2]], [(1, 0)])]


def random_policy(base_folder, **options):
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    policy = load_policy(base_folder, peft_config=lora, **options)
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


LONG = [Group([9] * 300, [[10, 11, 8] * 100, [13, 9] * 80], [(0, 1)])]


def peak_and_gradient(policy, context=contextlib.nullcontext):
    """Bytes held between forward and backward, and the gradient."""
    policy.zero_grad()
    policy.train()
    before = torch.cuda.memory_allocated()
    with context():
        total = score_batch(policy, to_device(make_batch(LONG, "tree"), "cuda"))["logps"].sum()
    held = torch.cuda.memory_allocated() - before
    total.backward()
    return held, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_moved_activations_leave_the_gradient_and_free_memory_on_the_gpu(base_folder, checkpointing):
    policy = random_policy(base_folder, gradient_checkpointing=checkpointing)
    held, expected = peak_and_gradient(policy)
    less, found = peak_and_gradient(policy, lambda: activations_moved(policy, least_bytes=2**12))
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert less < held


def test_a_run_with_offloading_and_kept_layers_is_the_same_run_on_the_gpu(
    base_folder, make_args, monkeypatch, tmp_path
):
    monkeypatch.setattr("qlora_dpo.trainer.activations_moved", lambda model: activations_moved(model, least_bytes=2**8))
    rows = Dataset.from_list([ranked_row(seed) for seed in range(12)])
    logs = []
    for options in ({}, {"activation_offloading": True}, {"activation_offloading": True, "keep_layers": 1}):
        args = make_args(max_steps=3, bf16=None, learning_rate=1e-3, output_dir=str(tmp_path), **options)
        torch.manual_seed(0)
        trainer = QLoRADPOTrainer(load_policy(base_folder), args=args, train_dataset=rows)
        trainer.train()
        logs.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert logs[1] == pytest.approx(logs[0], rel=1e-2)
    assert logs[2] == pytest.approx(logs[0], rel=1e-2)


@pytest.mark.parametrize("quantize", [True, False])
def test_embeddings_in_cpu_memory_train_evaluate_and_generate_on_the_gpu(base_folder, make_args, quantize, tmp_path):
    rows = Dataset.from_list(CHAT_ROWS)
    logs, written = [], []
    for on in (False, True):
        torch.manual_seed(0)
        policy = load_policy(base_folder, quantize=quantize, embeddings_on_cpu=on)
        args = make_args(max_steps=3, bf16=None, learning_rate=1e-3, output_dir=str(tmp_path))
        trainer = QLoRADPOTrainer(policy, args=args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        logs.append([*(x["loss"] for x in trainer.state.log_history if "loss" in x), trainer.evaluate()["eval_loss"]])
        ids = torch.tensor([[9, 10, 11]], device=policy.device)
        written.append(policy.generate(input_ids=ids, max_new_tokens=4, do_sample=False).tolist())
        places = {n: p.device.type for n, p in policy.named_parameters()}
        assert {n for n, place in places.items() if place == "cpu"} == {n for n in places if on and "embed" in n}
        assert policy.device.type == "cuda"
        trainer.save_model(str(tmp_path / "saved"))
    assert logs[1] == pytest.approx(logs[0], rel=1e-2)
    assert written[0] == written[1]
    rewards = [
        [
            row["margin"]
            for row in score_completions(load_scorer(str(tmp_path / "saved"), embeddings_on_cpu=on), CHAT_ROWS)
        ]
        for on in (False, True)
    ]
    assert rewards[1] == pytest.approx(rewards[0], abs=1e-2)


def test_a_four_bit_head_trains_on_the_gpu(base_folder, make_args):
    rows = Dataset.from_list([ranked_row(seed) for seed in range(12)])
    policy = load_policy(base_folder, quantize_head=True)
    args = make_args(max_steps=3, bf16=None, learning_rate=1e-3)
    trainer = QLoRADPOTrainer(policy, args=args, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0
    assert trainer.state.log_history[2]["rewards/ties"] == 0


def test_the_paged_eight_bit_optimizer_trains_on_the_gpu(base_folder, make_args):
    lora = LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
    args = make_args(max_steps=3, bf16=None, learning_rate=1e-3, optim="paged_adamw_8bit")
    rows = Dataset.from_list([ranked_row(seed) for seed in range(12)])
    trainer = QLoRADPOTrainer(load_policy(base_folder, peft_config=lora), args=args, train_dataset=rows)
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad and p.numel() >= 4096]
    states = [trainer.optimizer.optimizer.state[p] for p in trained]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {state["state1"].dtype for state in states} == {torch.uint8}
    assert trainer.optimizer.optimizer.is_paged
    assert trainer.state.log_history[2]["loss"] < trainer.state.log_history[0]["loss"]
