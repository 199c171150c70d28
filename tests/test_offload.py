"""What lies in CPU memory instead of the device's: the same losses and gradients, and weights that stay in place."""

import contextlib
import copy
import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from safetensors.torch import load_file

from qlora_dpo import QLoRADPOTrainer, load_policy, training
from qlora_dpo import model as model_module
from qlora_dpo.__main__ import main
from qlora_dpo.config import QLoRADPOConfig
from qlora_dpo.forward import install_scoring, score_batch
from qlora_dpo.layouts import LAYOUTS, Group, make_batch
from qlora_dpo.model import default_quantization, load_base
from qlora_dpo.offload import activations_moved, keep_embeddings_on_cpu
from qlora_dpo.recompute import checkpoint_activations

from one_step import one_step
from tiny_chat import build_tiny_llama
from tiny_models import add_lora, build

REENTRANT = {"use_reentrant": True}
GROUPS = [
    Group([9, 12, 14], [[10, 11, 8, 2], [13, 9, 2]], [(0, 1)]),
    Group([20, 9], [[10, 2], [15, 16, 17, 2], [9, 2]], [(1, 0), (1, 2)]),
]


class Elsewhere:
    """A fake other memory: copies with the same numbers in other places, and a note of what came and went."""

    def __init__(self):
        self.sizes, self.storages, self.returned = [], [], 0

    def __call__(self, tensor):
        copy = tensor.clone()
        self.sizes.append(tensor.nbytes)
        self.storages.append(tensor.untyped_storage().data_ptr())

        def bring_back():
            self.returned += 1
            return copy.clone()

        return bring_back


def gradient(policy, layout, moved=None, least_bytes=1):
    policy.zero_grad()
    policy.train()
    context = activations_moved(policy, "cpu", least_bytes, moved) if moved else contextlib.nullcontext()
    with context:
        total = score_batch(policy, make_batch(GROUPS, layout))["logps"].sum()
    total.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def weight_storages(policy):
    tensors = [*policy.parameters(), *policy.buffers()]
    states = [p.quant_state for p in policy.parameters() if getattr(p, "quant_state", None) is not None]
    constants = [t for state in states for t in (state.absmax, state.code, state.state2.absmax)]
    return {tensor.untyped_storage().data_ptr() for tensor in (*tensors, *constants)}


@pytest.fixture(params=["4 bit", "16 bit", "fp32", "mixture"])
def policy(request, base_folder):
    torch.manual_seed(0)
    if request.param in ("fp32", "mixture"):
        policy = add_lora(build("llama" if request.param == "fp32" else "mixtral"))
    else:
        policy = load_policy(base_folder, quantize=request.param == "4 bit", gradient_checkpointing=False)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    install_scoring(policy.get_base_model())
    return policy


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moved_activations_leave_the_gradient_as_it_is_and_no_weight_is_moved(policy, layout, checkpointing):
    if checkpointing:
        checkpoint_activations(policy)
    expected, moved = gradient(policy, layout), Elsewhere()
    assert torch.equal(gradient(policy, layout, moved), expected)
    assert len(moved.sizes) >= 2
    assert moved.returned >= len(moved.sizes) / 2
    assert not set(moved.storages) & weight_storages(policy)


def test_with_checkpointing_the_inputs_of_layers_are_moved_and_little_else(base_folder):
    policy = load_policy(base_folder)
    install_scoring(policy.get_base_model())
    recomputed, kept = Elsewhere(), Elsewhere()
    gradient(policy, "tree", recomputed)
    policy.get_base_model().model.layers[1].gradient_checkpointing = False
    gradient(policy, "tree", kept)
    assert len(kept.sizes) > len(recomputed.sizes) + 10


def test_small_tensors_and_those_of_other_devices_stay(policy):
    everything, large, elsewhere = Elsewhere(), Elsewhere(), Elsewhere()
    gradient(policy, "tree", everything)
    bound = sorted(everything.sizes)[len(everything.sizes) // 2]
    gradient(policy, "tree", large, least_bytes=bound)
    assert sorted(large.sizes) == [size for size in sorted(everything.sizes) if size >= bound]
    with activations_moved(policy, "cuda", 1, elsewhere):
        score_batch(policy, make_batch(GROUPS, "tree"))["logps"].sum().backward()
    assert not elsewhere.sizes


def test_nothing_is_moved_without_gradient(policy):
    moved = Elsewhere()
    with torch.no_grad(), activations_moved(policy, "cpu", 1, moved):
        score_batch(policy, make_batch(GROUPS, "tree"))
    assert not moved.sizes


@pytest.mark.parametrize(
    "options",
    [{}, {"max_tokens_per_forward": 12}, {"loss_type": "aot"}, {"keep_layers": 1}, {"gradient_checkpointing": False}],
    ids=str,
)
def test_a_training_step_with_offloading_has_the_same_loss_and_gradient(options, monkeypatch):
    """The trainer's own step, with the CPU in the part of the device."""
    (expected,), log = one_step(**options)
    moved = Elsewhere()
    monkeypatch.setattr(QLoRADPOConfig, "_check_memory", lambda self: None)
    monkeypatch.setattr(training, "activations_moved", lambda model: activations_moved(model, "cpu", 1, moved))
    (found,), found_log = one_step(activation_offloading=True, **options)
    assert torch.equal(found, expected)
    assert found_log[0]["loss"] == log[0]["loss"]
    assert moved.returned >= len(moved.sizes) / 2 > 0


def saved(function, x, least_bytes=1):
    """What a function's backward pass is given, and how many bytes went elsewhere."""
    given, moved = [], Elsewhere()

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            given.append(ctx.saved_tensors[0])
            return upstream

    x = x.requires_grad_()
    view = function(x)
    with activations_moved(torch.nn.Identity(), "cpu", least_bytes, moved):
        y = Keep.apply(view)
    y.sum().backward()
    return view.detach(), given[0], moved


@pytest.mark.parametrize(
    ("function", "moved_bytes"),
    [
        (lambda x: x * 1, 96),
        (lambda x: (x * 1).t(), 96),
        (lambda x: x[:, 1:3] * 1, 48),
        (lambda x: (x * 1)[:, 1:3], 48),
        (lambda x: (x * 1)[:, None].expand(6, 5, 4), 96),
        (lambda x: (x * 1)[:, 1:2].expand(6, 4), 24),
    ],
)
def test_a_view_comes_back_with_the_numbers_and_the_strides_it_had(function, moved_bytes):
    """Kernels choose how to sum by the strides they find; repeated rows travel once."""
    before, after, moved = saved(function, torch.randn(6, 4))
    assert torch.equal(before, after)
    assert before.stride() == after.stride()
    assert before.data_ptr() != after.data_ptr()
    assert moved.sizes == [moved_bytes]


def test_overlapping_windows_stay():
    before, after, moved = saved(lambda x: (x * 1).flatten().unfold(0, 3, 1), torch.randn(6, 4))
    assert torch.equal(before, after)
    assert not moved.sizes


# ---- input embeddings ------------------------------------------------------------------------------------------------


def on_cpu(folder, on=True, **options):
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return load_policy(folder, embeddings_on_cpu=on, **({"peft_config": lora} | options))


@pytest.mark.parametrize("quantize", [True, False])
def test_embeddings_in_cpu_memory_change_nothing_on_a_cpu(base_folder, quantize):
    policies = [on_cpu(base_folder, on, quantize=quantize) for on in (False, True)]
    found = []
    for policy in policies:
        install_scoring(policy.get_base_model())
        ids = torch.tensor([[9, 10, 11]])
        written = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        found.append((gradient(policy, "tree"), policy.dtype, policy.device, written.tolist()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    names = [[name for name, _ in policy.named_parameters()] for policy in policies]
    assert names[0] == names[1]


def test_embeddings_stay_where_they_are_when_the_model_moves_and_are_cast_with_it(base_folder):
    """`meta` stands for the device: the only other one that a CPU has."""
    policy = on_cpu(base_folder, quantize=False)
    table = policy.get_base_model().get_input_embeddings()
    before = table.weight.detach().clone()
    policy.to("meta")
    assert {p.device.type for p in policy.parameters() if p is not table.weight} == {"meta"}
    assert table.weight.device.type == "cpu"
    assert torch.equal(table.weight, before)
    assert [m.device.type for m in (policy, policy.get_base_model(), policy.get_base_model().model)] == ["meta"] * 3
    policy.to(torch.float64)
    assert (table.weight.dtype, table.weight.device.type) == (torch.float64, "cpu")
    assert torch.equal(table.weight, before.double())


def test_a_scaled_table_keeps_its_scale(tmp_path):
    """Gemma's embeddings multiply what they look up."""
    torch.manual_seed(0)
    model = build("gemma3")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    ids = torch.tensor([[9, 10, 11]])
    expected = model(input_ids=ids).logits
    keep_embeddings_on_cpu(model)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert isinstance(copy.deepcopy(model).get_input_embeddings(), type(model.get_input_embeddings()))


def test_adapter_and_base_are_saved_and_loaded_as_ever(base_folder, tmp_path):
    policy = on_cpu(base_folder)
    policy.save_pretrained(tmp_path / "adapter")
    assert not [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "embed" in name]
    again = load_policy(str(tmp_path / "adapter"), embeddings_on_cpu=True)
    install_scoring(policy.get_base_model())
    install_scoring(again.get_base_model())
    assert torch.equal(gradient(policy, "tree"), gradient(again, "tree"))
    plain = on_cpu(base_folder, quantize=False).unload()
    plain.save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    weights = load_base(str(tmp_path / "base"), quantize=False).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing_kwargs": REENTRANT}])
def test_a_run_with_embeddings_in_cpu_memory_is_the_same_run(base_folder, make_args, chat_rows, tmp_path, options):
    logs, weights = [], []
    for on in (False, True):
        args = make_args(max_steps=3, learning_rate=1e-3, output_dir=str(tmp_path / str(on)), **options)
        rows = chat_rows.select(range(4))
        run = QLoRADPOTrainer(on_cpu(base_folder, on), args=args, train_dataset=rows, eval_dataset=rows)
        run.train()
        run.save_model()
        logs.append([run.evaluate()["eval_loss"], *(x["loss"] for x in run.state.log_history if "loss" in x)])
        weights.append((tmp_path / str(on) / "adapter_model.safetensors").read_bytes())
    assert logs[0] == logs[1]
    assert weights[0] == weights[1]


TRAINED = [
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [8, 9]},
]


@pytest.mark.parametrize("lora", TRAINED, ids=str)
def test_embeddings_that_are_trained_are_refused(base_folder, make_args, chat_rows, lora):
    config = LoraConfig(task_type="CAUSAL_LM", **lora)
    with pytest.raises(ValueError, match="`embeddings_on_cpu` must be False where the embeddings are trained"):
        load_policy(base_folder, peft_config=config, embeddings_on_cpu=True)
    base = load_base(base_folder, embeddings_on_cpu=True)
    with pytest.raises(ValueError, match="`embeddings_on_cpu` must be False where the embeddings are trained"):
        QLoRADPOTrainer(base, args=make_args(), train_dataset=chat_rows, peft_config=config)


def test_tied_embeddings_are_refused(tokenizer, tmp_path):
    build_tiny_llama(tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`embeddings_on_cpu` must be False where the head shares their weight"):
        load_policy(str(tmp_path), embeddings_on_cpu=True)


def test_embeddings_of_another_kind_are_refused():
    model = build("llama")
    model.set_input_embeddings(torch.nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match=r"no nn\.Embedding, got Linear"):
        keep_embeddings_on_cpu(model)


def test_several_processes_on_cuda_and_spread_models_are_refused(monkeypatch):
    model = build("llama")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(NotImplementedError, match="`embeddings_on_cpu` must be False on several processes, got 2"):
        keep_embeddings_on_cpu(model)
    model.get_input_embeddings()._hf_hook = object()
    with pytest.raises(ValueError, match="`embeddings_on_cpu` must be False for a model that `device_map` spreads"):
        keep_embeddings_on_cpu(model)


@pytest.mark.parametrize("command", ["train", "model_init_kwargs"])
def test_the_options_of_loading_reach_it_from_the_command_line_and_from_a_string(
    base_folder, rows_file, tmp_path, make_args, chat_rows, monkeypatch, command
):
    kept = []
    monkeypatch.setattr(model_module, "keep_embeddings_on_cpu", lambda model: kept.append(model.lm_head))
    if command == "train":
        words = f"--model_name_or_path {base_folder} --dataset_name {rows_file} --output_dir {tmp_path} --max_steps 1"
        options = "--report_to none --embeddings_on_cpu true --quantize_head true"
        assert main(["train", *words.split(), *options.split()]) == 0
    else:
        options = {"embeddings_on_cpu": True, "quantize_head": True}
        QLoRADPOTrainer(
            base_folder,
            args=make_args(model_init_kwargs=options),
            train_dataset=chat_rows,
            quantization_config=default_quantization(),
        )
    assert [type(head) for head in kept] == [Linear4bit]


# ---- optimizer states ------------------------------------------------------------------------------------------------


def test_the_paged_eight_bit_optimizer_trains_fp32_adapters_and_goes_on_from_a_checkpoint(
    base_folder, make_args, chat_rows, tmp_path
):
    """On a CPU bitsandbytes keeps the states in 8 bit too, without pages; below 4,096 weights in 32 bit."""

    def run(folder, **options):
        args = make_args(
            output_dir=str(tmp_path / folder), optim="paged_adamw_8bit", learning_rate=1e-3, max_steps=4,
            save_strategy="steps", save_steps=2, **options,
        )  # fmt: skip
        lora = LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        return QLoRADPOTrainer(load_policy(base_folder, peft_config=lora), args=args, train_dataset=chat_rows)

    whole, resumed = run("whole"), run("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    trained = [p for p in whole.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    states = {p.numel() >= 4096: whole.optimizer.optimizer.state[p]["state1"].dtype for p in trained}
    assert states[True] is torch.uint8
    losses = [[x["loss"] for x in t.state.log_history if "loss" in x][-2:] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.68
    for one, other in zip(trained, [p for p in resumed.model.parameters() if p.requires_grad], strict=True):
        assert torch.equal(one, other)
