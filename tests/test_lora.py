"""The faster LoRA layer: PEFT's own numbers and gradients, PEFT's own forward wherever it cannot serve."""

import contextlib

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import nn

from qlora_dpo import load_policy, lora
from qlora_dpo.lora import FastLinear4bit, use_fast_lora

from test_trainer import trainer_of
from tiny_chat import build_tiny_llama

SIZES = {"first": (48, 80), "second": (80, 33)}


class Model(nn.Module):
    """Two 4-bit layers with something between them."""

    def __init__(self, dtype, bias, **quantization):
        super().__init__()
        torch.manual_seed(0)
        for name, (i, o) in SIZES.items():
            plain = nn.Linear(i, o, bias=bias).to(dtype)
            layer = Linear4bit(i, o, bias=bias, compute_dtype=dtype, **quantization)
            layer.load_state_dict(plain.state_dict())
            layer.support_avx512bf16_for_cpu = False
            setattr(self, name, layer.to("cpu"))
        self.is_loaded_in_4bit = True  # what PEFT looks at
        self.requires_grad_(False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def policy_of(dtype=torch.float32, bias=False, quantization=None, adapters=1, **options):
    """A PEFT model whose adapters do something, one or a frozen one below a trained one."""
    model = Model(dtype, bias, **(quantization or {"quant_type": "nf4", "compress_statistics": True}))
    defaults = {"r": 4, "lora_alpha": 12, "target_modules": list(SIZES), "init_lora_weights": False}
    policy = get_peft_model(model, LoraConfig(**(defaults | options)))
    if adapters == 2:
        policy.add_adapter("more", LoraConfig(**(defaults | {"r": 3} | options)))
        policy.base_model.set_adapter(["default", "more"])
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(".more." in name)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return policy


def results(policy, x, autocast=None):
    """Output, and gradients of the input and of every trained weight."""
    policy.zero_grad()
    x = x.clone().requires_grad_()
    mixed = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with mixed:
        y = policy(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    grads = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    assert grads.keys() == {name for name, p in policy.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **grads}


@pytest.fixture
def calls(monkeypatch):
    """How often the faster function ran."""
    counted, apply = [], lora._LoraOver4Bit.apply
    monkeypatch.setattr(lora._LoraOver4Bit, "apply", lambda *args: (counted.append(1), apply(*args))[1])
    return counted


CASES = {
    "fp32": {},
    "bias": {"bias": True},
    "fp4, single quantisation": {"quantization": {"quant_type": "fp4", "compress_statistics": False}},
    "two adapters": {"adapters": 2},
    "rslora": {"use_rslora": True},
    "dropout of zero": {"lora_dropout": 0.0},
}


@pytest.mark.parametrize("shape", [(7, 48), (2, 5, 48), (1, 48)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_pefts_own(case, shape, calls):
    policy, x = policy_of(**CASES[case]), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = results(policy, x)
    assert use_fast_lora(policy) == 2
    found = results(policy, x)
    assert len(calls) == 2
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-5 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_mixed_precision_is_as_close_to_fp32_as_pefts_own(dtype, autocast, calls):
    """Both round to bf16; the error of each against the same weights in fp32."""
    x = torch.randn(300, 48, generator=torch.Generator().manual_seed(1))
    truth = results(policy_of(), x)
    policy = policy_of(dtype)
    peft = results(policy, x.to(dtype), autocast)
    use_fast_lora(policy)
    fast = results(policy, x.to(dtype), autocast)
    assert len(calls) == 2
    for name, value in truth.items():
        errors = [((found[name].float() - value).norm() / value.norm()).item() for found in (peft, fast)]
        assert fast[name].dtype == peft[name].dtype
        assert errors[1] < 1.1 * errors[0] + 1e-6, (name, errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapters", [1, 2])
def test_an_adapter_that_adds_nothing_leaves_the_bits_of_what_is_below(dtype, adapters):
    """What makes margins before the first step exactly zero."""
    policy, x = policy_of(dtype, adapters=adapters), torch.randn(50, 48).to(dtype)
    use_fast_lora(policy)
    trained = "more" if adapters == 2 else "default"
    for layer in (policy.base_model.model.first, policy.base_model.model.second):
        nn.init.zeros_(layer.lora_B[trained].weight)
    y = policy(x)
    if adapters == 2:
        policy.base_model.set_adapter("default")
        assert torch.equal(policy(x), y)
    else:
        with policy.disable_adapter():
            assert torch.equal(policy(x), y)


OTHERS = {
    "dropout": {"lora_dropout": 0.5},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True},
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_kinds_take_pefts_forward(case, calls):
    policy, x = policy_of(**OTHERS[case]), torch.randn(9, 48)
    torch.manual_seed(2)
    expected = results(policy, x)
    use_fast_lora(policy)
    torch.manual_seed(2)
    found = results(policy, x)
    assert not calls
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_dropout_that_is_off_in_evaluation_is_no_hindrance(calls):
    policy, x = policy_of(lora_dropout=0.5), torch.randn(9, 48)
    use_fast_lora(policy)
    policy.eval()
    policy(x)
    assert len(calls) == 2


def test_disabled_and_merged_adapters_and_hooks_take_pefts_forward(calls):
    policy, x = policy_of(), torch.randn(9, 48)
    use_fast_lora(policy)
    with policy.disable_adapter():
        policy(x)
    seen = []
    hook = policy.base_model.model.first.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    policy(x)
    assert (len(calls), len(seen)) == (1, 1)  # the second layer only
    hook.remove()
    calls.clear()
    policy.merge_adapter()
    policy(x)
    assert not calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_have_the_same_gradient(reentrant):
    policy, x = policy_of(), torch.randn(9, 48)
    use_fast_lora(policy)
    expected = results(policy, x)
    inner = policy.base_model.model
    forward = inner.forward
    inner.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=reentrant)
    for name, value in results(policy, x).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def test_only_the_input_and_its_projection_are_kept():
    policy, x = policy_of(), torch.randn(500, 48, requires_grad=True)
    kept = {}

    def pack(tensor):
        if isinstance(tensor, nn.Parameter) or tensor.dtype == torch.uint8:
            return tensor
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def bytes_kept():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = policy(x)
        found = sum(kept.values())
        y.sum().backward()
        return found

    before = bytes_kept()
    use_fast_lora(policy)
    inputs, projections, tanh = (48 + 80) * 500 * 4, 2 * 4 * 500 * 4, 0  # tanh keeps its output, the second's input
    assert bytes_kept() == inputs + projections + tanh <= before


def test_adapters_stay_plain_peft_adapters(tmp_path):
    policy, x = policy_of(), torch.randn(9, 48)
    keys = list(policy.state_dict())
    use_fast_lora(policy)
    assert use_fast_lora(policy) == 2
    assert list(policy.state_dict()) == keys
    y = policy(x)
    policy.save_pretrained(str(tmp_path))
    plain = PeftModel.from_pretrained(Model(torch.float32, False, quant_type="nf4"), str(tmp_path))
    assert {type(m) for m in plain.modules() if isinstance(m, PeftLinear4bit)} == {PeftLinear4bit}
    torch.testing.assert_close(plain(x), y, rtol=2e-5, atol=2e-5)
    assert {type(m) for m in policy.modules() if isinstance(m, PeftLinear4bit)} == {FastLinear4bit}
    bare = policy.unload()
    assert isinstance(bare.first, Linear4bit)
    assert not isinstance(bare.first, FastLinear4bit)


def test_trained_biases_of_4_bit_layers_stay_in_fp32_and_move(tokenizer, make_args, tmp_path):
    """bitsandbytes casts a bias to the input's dtype in place: in bf16 it would lose every update."""
    base = build_tiny_llama(tokenizer, attention_bias=True)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM")
    policy = load_policy(str(tmp_path / "base"), peft_config=config)
    biases = [p for n, p in policy.named_parameters() if p.requires_grad and n.endswith("bias")]
    start = [bias.detach().clone() for bias in biases]
    args = make_args(bf16=True, max_steps=6, learning_rate=1e-6, lr_scheduler_type="constant")
    trainer_of(tokenizer, args, policy=policy).train()
    assert {bias.dtype for bias in biases} == {torch.float32}
    moved = sum(int((bias != old).sum()) for bias, old in zip(biases, start, strict=True))
    assert moved > 0.9 * sum(bias.numel() for bias in biases) > 0
