"""What only a CUDA device can show; run by scripts/gpu_check.sh."""

import contextlib
import warnings
from dataclasses import replace

import pytest
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from peft import LoraConfig
from transformers.integrations.liger import apply_liger_kernel

from qlora_dpo import QLoRADPOTrainer, kernels, load_policy, score_completions
from qlora_dpo.forward import install_scoring, score_batch
from qlora_dpo.kernels import FLASH_ATTN, FLEX, FLEX_SMALL, VARLEN, Case, Recipe, by_segment, choose
from qlora_dpo.layouts import LAYOUTS, Group, Segment, make_batch
from qlora_dpo.lean import use_lean_layers
from qlora_dpo.lora import use_fast_lora
from qlora_dpo.offload import activations_moved
from qlora_dpo.proof import prove_layout
from qlora_dpo.recompute import checkpoint_activations
from qlora_dpo.score import load_scorer
from qlora_dpo.segments import RowPlan

from random_rows import random_groups
from tiny_chat import CHAT_ROWS, ranked_row
from tiny_models import add_lora, build

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
    score_batch(policy, send_to_device(make_batch(GROUPS, "tree"), "cuda"))["logps"].sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("layout", ["tree", "packed"])
def test_layouts_prove_themselves_on_the_gpu(base_folder, layout):
    assert prove_layout(random_policy(base_folder), GROUPS, layout, torch.device("cuda")).holds


def test_layouts_agree_on_a_four_bit_base_on_the_gpu(base_folder):
    policy = random_policy(base_folder)
    with torch.no_grad():
        logps = [score_batch(policy, send_to_device(make_batch(GROUPS, layout), "cuda"))["logps"] for layout in LAYOUTS]
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


# Attention: every implementation against the loop over segments

KERNELS = [VARLEN, FLASH_ATTN, FLEX]


def attention_case(dtype, heads, size, sinks=False, softcap=None):
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability()
    return Case(device, capability, dtype, heads, (size, size), softcap, sinks)


def value_and_gradients(run, segments, recipe, inputs, cotangent):
    """Of queries, keys and values, and of the sinks where there are any."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    sinks = None if recipe.sinks is None else recipe.sinks.to(inputs[0]).requires_grad_()
    output = run(*leaves, RowPlan(segments), replace(recipe, sinks=sinks))
    return output.detach(), *torch.autograd.grad(output, leaves + ([] if sinks is None else [sinks]), cotangent)


def assert_as_exact_as_the_loop(name, segments, recipe, dtype, heads, size):
    """Not further from attention in fp64 than twice the loop in the same dtype, or a few of its roundings."""
    generator = torch.Generator().manual_seed(0)
    length = segments[-1].start + segments[-1].length
    shapes = [(1, n, length, size) for n in (heads[0], heads[1], heads[1])] + [(1, length, heads[0], size)]
    *inputs, cotangent = (torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes)
    truth = value_and_gradients(by_segment, segments, recipe, [x.double() for x in inputs], cotangent.double())
    slow = value_and_gradients(by_segment, segments, recipe, inputs, cotangent)
    fast = value_and_gradients(kernels.IMPLEMENTATIONS[name], segments, recipe, inputs, cotangent)
    for exact, loop, found in zip(truth, slow, fast, strict=True):
        rounding = 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (found - exact).abs().max() <= 2 * (loop - exact).abs().max() + rounding


def require(name, case):
    if choose(case, kernels.installed_kernels() & {name}) != name:
        pytest.skip(f"{name} is not installed or not for this device")
    if name == FLEX and "out of resource" in (kernels.trial(name, case) or ""):
        pytest.skip(f"{name} takes more shared memory than this device has: it gets {FLEX_SMALL} instead")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("layout", ["tree", "packed"])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("heads", "size"), [((4, 4), 64), ((8, 2), 128), ((6, 1), 256)])
def test_one_kernel_call_is_as_exact_as_the_loop_in_bf16(name, layout, window, heads, size):
    require(name, attention_case(torch.bfloat16, heads, size))
    segments = make_batch(random_groups(1, scale=40), layout)["segments"]
    assert_as_exact_as_the_loop(name, segments, Recipe(0.11, window), torch.bfloat16, heads, size)


@pytest.mark.parametrize(
    ("layout", "window", "softcap", "sinks", "dtype"),
    [
        ("tree", None, None, False, torch.float32),
        ("packed", 50, None, False, torch.bfloat16),
        ("tree", 50, 5.0, False, torch.bfloat16),
        ("packed", None, 5.0, False, torch.float32),
        ("tree", None, None, True, torch.bfloat16),
        ("packed", 50, None, True, torch.float32),
        ("tree", 50, 5.0, True, torch.float32),
        ("packed", None, 5.0, True, torch.bfloat16),
    ],
)
def test_flex_attention_is_as_exact_as_the_loop(layout, window, softcap, sinks, dtype):
    """With soft-cap and sinks, whose gradient is compared too; every two of the choices meet, as each is compiled."""
    require(FLEX, attention_case(dtype, (4, 2), 64, sinks, softcap))
    segments = make_batch(random_groups(2, scale=40), layout)["segments"]
    recipe = Recipe(None, window, 0.0, softcap, torch.linspace(-1, 1, 4) if sinks else None)
    assert_as_exact_as_the_loop(FLEX, segments, recipe, dtype, (4, 2), 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_flex_attention_of_small_tiles_is_as_exact_as_the_loop(dtype):
    """With a head size of 256 and a soft-cap, as in Gemma 2, which cards of 99 KiB a block need small tiles for."""
    require(FLEX_SMALL, attention_case(dtype, (4, 2), 256, softcap=5.0))
    segments = make_batch(random_groups(2, scale=40), "tree")["segments"]
    assert_as_exact_as_the_loop(FLEX_SMALL, segments, Recipe(None, 50, 0.0, 5.0), dtype, (4, 2), 256)


@pytest.mark.parametrize("length", [9, 100])
@pytest.mark.parametrize("heads", [(8, 2), (16, 1)])
def test_flex_attention_takes_rows_of_less_than_a_block(heads, length):
    """PyTorch has another kernel for them, which would not compile for these numbers of heads."""
    require(FLEX, attention_case(torch.float32, heads, 64))
    segments = [Segment(0, length - 4), Segment(length - 4, 4, 0, 3)]
    assert_as_exact_as_the_loop(FLEX, segments, Recipe(), torch.float32, heads, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_the_kernel_that_is_chosen_passes_its_trial(dtype, softcap, sinks):
    """None is left out for failing; a warning would be an error here."""
    case = attention_case(dtype, (8, 2), 64, sinks, softcap)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert kernels.implementation_for(case) == choose(case, kernels.installed_kernels())


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype", "kernel", "tolerance"),
    [
        ("llama", torch.bfloat16, VARLEN, 0.1),
        ("mistral", torch.bfloat16, VARLEN, 0.1),
        ("qwen3", torch.bfloat16, VARLEN, 0.1),
        ("qwen3", torch.float32, FLEX, 1e-3),
    ],
)
def test_a_model_has_the_gradient_it_has_with_the_loop(monkeypatch, name, dtype, kernel, tolerance, checkpointed):
    """As a share of its norm; and the kernel is the one that should run."""
    if kernel not in kernels.installed_kernels():
        pytest.skip(f"{kernel} is not installed")
    policy = add_lora(build(name)).to("cuda", dtype)
    install_scoring(policy.get_base_model())
    if checkpointed:
        checkpoint_activations(policy)
    batch = send_to_device(make_batch(random_groups(5), "tree"), "cuda")

    def scored(implementation_for):
        used = set()

        def recorded(case):
            used.add(chosen := implementation_for(case))
            return chosen

        monkeypatch.setattr(kernels, "implementation_for", recorded)
        policy.zero_grad()
        logps = score_batch(policy, batch)["logps"]
        logps.sum().backward()
        gradients = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        return used, logps.detach().float(), torch.cat(gradients).float()

    used, logps, gradient = scored(kernels.implementation_for)
    _, loop_logps, loop_gradient = scored(lambda case: kernels.SEGMENTS)
    assert used == {kernel}
    assert (logps - loop_logps).norm() < tolerance * loop_logps.norm()
    assert (gradient - loop_gradient).norm() < tolerance * loop_gradient.norm()


LONG = [Group([9] * 300, [[10, 11, 8] * 100, [13, 9] * 80], [(0, 1)])]


def peak_and_gradient(policy, context=contextlib.nullcontext):
    """Bytes held between forward and backward, and the gradient."""
    policy.zero_grad()
    policy.train()
    before = torch.cuda.memory_allocated()
    with context():
        total = score_batch(policy, send_to_device(make_batch(LONG, "tree"), "cuda"))["logps"].sum()
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
    monkeypatch.setattr(
        "qlora_dpo.training.activations_moved", lambda model: activations_moved(model, least_bytes=2**8)
    )
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


def test_ligers_layers_give_the_same_step_on_the_gpu(base_folder):
    """Log-probs to 0.1 nats, as between layouts, and the gradient to 5 %."""
    pytest.importorskip("liger_kernel")
    policy = random_policy(base_folder)
    batch = send_to_device(make_batch(GROUPS, "tree"), "cuda")
    with torch.no_grad():
        plain = score_batch(policy, batch)["logps"]
    grad = gradient(policy)
    apply_liger_kernel(policy, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    assert any("Liger" in module.forward.__qualname__ for module in policy.modules())
    with torch.no_grad():
        assert (score_batch(policy, batch)["logps"] - plain).abs().max() < 0.1
    assert (gradient(policy) - grad).norm() < 0.05 * grad.norm()


def test_a_training_with_ligers_layers_starts_at_its_reference_on_the_gpu(base_folder, make_args):
    pytest.importorskip("liger_kernel")
    args = make_args(max_steps=1, bf16=None, use_liger_kernel=True)
    trainer = QLoRADPOTrainer(load_policy(base_folder), args=args, train_dataset=Dataset.from_list(CHAT_ROWS))
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0


def test_lean_layers_compute_what_the_models_own_do_on_the_gpu(base_folder):
    policy = random_policy(base_folder)
    batch = send_to_device(make_batch(GROUPS, "tree"), "cuda")
    with torch.no_grad():
        own = score_batch(policy, batch)["logps"]
    grad = gradient(policy)
    assert use_fast_lora(policy) > 0
    assert use_lean_layers(policy) > 0
    with torch.no_grad():
        assert (score_batch(policy, batch)["logps"] - own).abs().max() < 0.1
    assert (gradient(policy) - grad).norm() < 0.05 * grad.norm()


def test_the_paged_eight_bit_optimizer_trains_on_the_gpu(base_folder, make_args):
    """Of a rank at which matrices have the 100,000 weights that bitsandbytes pages."""
    lora = LoraConfig(r=2048, target_modules="all-linear", task_type="CAUSAL_LM")
    args = make_args(max_steps=3, bf16=None, learning_rate=1e-3, optim="paged_adamw_8bit")
    rows = Dataset.from_list([ranked_row(seed) for seed in range(12)])
    trainer = QLoRADPOTrainer(load_policy(base_folder, peft_config=lora), args=args, train_dataset=rows)
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad and p.numel() >= 4096]
    states = [trainer.optimizer.optimizer.state[p] for p in trained]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {state["state1"].dtype for state in states} == {torch.uint8}
    assert trainer.optimizer.optimizer.is_paged
    paged = {(p.numel() >= 1e5, hasattr(s["state1"], "is_paged")) for p, s in zip(trained, states, strict=True)}
    assert paged == {(True, True), (False, False)}
    assert trainer.state.log_history[2]["loss"] < trainer.state.log_history[0]["loss"]
