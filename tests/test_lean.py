"""Norms and gated MLPs that keep less: the bits of the model's own forward, its gradients, and fewer bytes."""

import copy
import pickle

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from qlora_dpo import lean
from qlora_dpo.lean import STRIP_BYTES, is_gated_mlp, norm_rule, use_lean_layers
from qlora_dpo.lora import use_fast_lora

from tiny_models import ARCHITECTURES

BITS16, FP32 = torch.bfloat16, torch.float32
NORMS = [LlamaRMSNorm, Olmo2RMSNorm, Gemma2RMSNorm]


def draws(*shape, dtype=FP32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_of(kind, size=48, dtype=FP32, eps=1e-5):
    norm = kind(size, eps=eps).to(dtype).requires_grad_(False)
    norm.weight.copy_(draws(size, seed=1))
    return norm


def pulled(module, x, weight=None):
    """Output and gradients of the input and of what is trained."""
    x = x.clone().requires_grad_()
    y = module(x)
    (y.float() * draws(*y.shape, seed=2)).sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.fixture(params=[None, 1000], ids=["one strip", "strips"])
def strips(request, monkeypatch):
    if request.param:
        monkeypatch.setitem(STRIP_BYTES, "cpu", request.param)


# ---- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [FP32, BITS16], ids=str)
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 300, 48), (1, 33, 4, 48)], ids=str)
def test_a_norm_has_the_bits_of_its_own_forward(kind, dtype, shape, strips):
    norm, x = norm_of(kind, dtype=dtype), draws(*shape, dtype=dtype) * 3
    expected = pulled(norm, x)
    assert use_lean_layers(norm) == 1
    found = pulled(norm, x)
    assert torch.equal(found["y"], expected["y"])
    assert found["x"].dtype == dtype
    assert found["y"].shape == x.shape
    tolerance = 1e-5 if dtype is FP32 else 2e-2
    torch.testing.assert_close(found["x"], expected["x"], rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(norm(x), expected["y"])


@pytest.mark.parametrize("kind", NORMS)
def test_a_norms_gradient_in_bf16_is_as_close_to_the_truth_as_its_own(kind):
    x = draws(500, 48, dtype=BITS16)
    norm = norm_of(kind, dtype=BITS16)
    own = pulled(norm, x)["x"].float()
    truth = pulled(copy.deepcopy(norm).float(), x.float())["x"]
    use_lean_layers(norm)
    errors = [(g.float() - truth).norm() / truth.norm() for g in (own, pulled(norm, x)["x"])]
    assert errors[1] <= errors[0]


def test_a_strided_input_of_a_norm_is_taken_too():
    norm, x = norm_of(LlamaRMSNorm), draws(5, 48, 6).transpose(1, 2)
    expected = norm(x)
    use_lean_layers(norm)
    torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-6)
    assert norm(x[:0]).shape == (0, 6, 48)


def test_a_trained_norm_and_other_dtypes_take_the_models_own_forward():
    norm, x = norm_of(LlamaRMSNorm), draws(5, 48)
    mixed = norm(x.bfloat16())
    use_lean_layers(norm)
    assert norm(x.bfloat16()).dtype == mixed.dtype == FP32
    assert torch.equal(norm(x.bfloat16()), mixed)
    norm.weight.requires_grad_()
    norm(x).sum().backward()
    assert norm.weight.grad.abs().sum() > 0
    assert norm.double()(x.double()).dtype == torch.float64


class Shifted(LlamaRMSNorm):
    """Much like a norm."""

    def forward(self, x):
        return super().forward(x) + 1e-3


class Attentive(LlamaRMSNorm):
    """Another module with a weight and an eps."""

    def forward(self, x, other):
        return x + other


class EpsBeside(LlamaRMSNorm):
    """Differs where the input is small."""

    def forward(self, x):
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon))


class Bounded(LlamaRMSNorm):
    """Differs where the input is large."""

    def forward(self, x):
        return super().forward(x.clamp(-100, 100))


LOOK_ALIKES = [Shifted, Attentive, EpsBeside, Bounded, nn.LayerNorm, nn.RMSNorm]


@pytest.mark.parametrize("module", [*(kind(48) for kind in LOOK_ALIKES), nn.Linear(48, 48)])
def test_what_only_looks_like_a_norm_is_left_alone(module):
    assert norm_rule(module) is None
    assert use_lean_layers(module) == 0
    assert "forward" not in module.__dict__


class WithGate(LlamaRMSNorm):
    """A norm that may be given a gate, as those of state-space models are."""

    def forward(self, hidden_states, gate=None):
        normed = super().forward(hidden_states)
        return normed if gate is None else normed * gate


def test_a_call_in_another_way_takes_the_models_own_forward():
    norm, x = norm_of(WithGate), draws(5, 48)
    expected = norm(x)
    use_lean_layers(norm)
    assert torch.equal(norm(x, 2.0), 2 * expected)
    assert torch.equal(norm(hidden_states=x), expected)


def test_the_output_of_a_norm_may_be_changed_in_place():
    norm, x = norm_of(LlamaRMSNorm), draws(2, 5, 48).requires_grad_()
    use_lean_layers(norm)
    norm.register_forward_hook(lambda module, inputs, output: output.add_(0.1))
    norm(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_looking_draws_no_random_numbers_and_needs_no_device():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with torch.device("meta"):
        assert use_lean_layers(nn.ModuleList([LlamaRMSNorm(48), LlamaMLP(Sizes("silu"))])) == 2
    assert torch.equal(torch.get_rng_state(), state)


# ---- MLPs ------------------------------------------------------------------------------------------------------------


class Sizes:
    """What the MLPs read of a config."""

    hidden_size, intermediate_size, mlp_bias, resid_pdrop = 32, 96, False, 0.0  # rows of whole vector registers

    def __init__(self, act):
        self.hidden_act = act


def mlp_of(kind=LlamaMLP, act="silu", dtype=FP32, in_4bit=True, **options):
    """An MLP with LoRA over 4-bit layers."""
    torch.manual_seed(0)
    holder = nn.Module()
    holder.mlp = kind(Sizes(act)).to(dtype)
    if in_4bit:
        for name, plain in list(holder.mlp.named_children()):
            if isinstance(plain, nn.Linear):
                layer = Linear4bit(
                    plain.in_features, plain.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                )
                layer.load_state_dict(plain.state_dict())
                layer.support_avx512bf16_for_cpu = False
                setattr(holder.mlp, name, layer.to("cpu"))
        holder.is_loaded_in_4bit = True
    holder.requires_grad_(False)
    names = [name for name, child in holder.mlp.named_children() if name.endswith("proj")]
    settings = {"r": 4, "target_modules": names, "init_lora_weights": False} | options
    policy = get_peft_model(holder, LoraConfig(**settings))
    use_fast_lora(policy)
    return policy, policy.base_model.model.mlp


@pytest.mark.parametrize("dtype", [FP32, BITS16], ids=str)
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "relu2"])
@pytest.mark.parametrize("kind", [LlamaMLP, Phi3MLP])
def test_an_mlp_has_the_bits_of_its_own_forward(kind, act, dtype, strips):
    _, mlp = mlp_of(kind, act, dtype)
    x = draws(2, 70, 32, dtype=dtype)
    expected = pulled(mlp, x)
    assert use_lean_layers(mlp) == 1
    found = pulled(mlp, x)
    assert torch.equal(found["y"], expected["y"])
    assert found.keys() == expected.keys()
    assert len(found) == 2 + 2 * (3 if kind is LlamaMLP else 2)
    for name, value in expected.items():
        tolerance = (1e-5 if dtype is FP32 else 2e-2) * value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("dtype", [FP32, BITS16], ids=str)
def test_with_adapters_that_add_nothing_the_reference_has_the_policys_bits(dtype):
    policy, mlp = mlp_of(dtype=dtype, init_lora_weights=True)
    use_lean_layers(mlp)
    x = draws(90, 32, dtype=dtype)
    y = mlp(x)
    with policy.disable_adapter(), torch.no_grad():
        assert torch.equal(mlp(x), y)
    with policy.disable_adapter():
        assert torch.equal(mlp(x), y)


def kept_bytes(module, x):
    """Bytes that a forward keeps for the backward pass, beside weights and its input."""
    kept = {}

    def pack(tensor):
        own = isinstance(tensor, nn.Parameter) or tensor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        if not own and tensor.dtype != torch.uint8:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    found = sum(kept.values())
    y.sum().backward()
    return found


def test_a_norm_keeps_its_input_and_a_number_a_row_and_an_mlp_gate_and_up():
    norm, x = norm_of(LlamaRMSNorm, dtype=BITS16), draws(200, 48, dtype=BITS16).requires_grad_()
    assert kept_bytes(norm, x) >= 200 * 48 * 4
    use_lean_layers(norm)
    assert kept_bytes(norm, x) == 200 * 4

    _, mlp = mlp_of(dtype=FP32)
    x = draws(200, 32).requires_grad_()
    projections = 200 * 4 * 3 * 4
    assert kept_bytes(mlp, x) == 4 * 200 * 96 * 4 + projections
    use_lean_layers(mlp)
    assert kept_bytes(mlp, x) == 2 * 200 * 96 * 4 + projections


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_have_the_same_gradients(reentrant):
    _, mlp = mlp_of()
    layer = nn.Sequential(norm_of(LlamaRMSNorm, 32), mlp)
    use_lean_layers(layer)
    x = draws(50, 32)
    expected = pulled(layer, x)
    forward = layer.forward
    layer.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=reentrant)
    for name, value in pulled(layer, x).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("case", ["dropout", "16 bit", "hook"])
def test_other_kinds_of_layers_get_what_they_got(case):
    """Dropout draws the same numbers, a hook sees the product, and 16-bit layers take PEFT's forward."""
    policy, mlp = mlp_of(in_4bit=case != "16 bit", lora_dropout=0.5 * (case == "dropout"))
    policy.train()
    seen = []
    if case == "hook":
        mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    x = draws(50, 32)
    torch.manual_seed(3)
    expected = pulled(mlp, x)
    use_lean_layers(mlp)
    torch.manual_seed(3)
    for name, value in pulled(mlp, x).items():
        assert torch.equal(value, expected[name]), name
    assert seen == [(50, 96)] * (2 * (case == "hook"))


HOOKS = {
    "backward": lambda module, note: module.register_full_backward_hook(note),
    "before backward": lambda module, note: module.register_full_backward_pre_hook(note),
    "forward": lambda module, note: module.register_forward_hook(note),
}


@pytest.mark.parametrize("where", ["down_proj", "act_fn"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_run_once_a_pass(hook, where):
    _, mlp = mlp_of()
    use_lean_layers(mlp)
    seen = []
    HOOKS[hook](getattr(mlp, where), lambda *args: seen.append(1) and None)
    pulled(mlp, draws(3000, 32))
    assert len(seen) == 1


def test_a_forward_of_its_own_on_the_last_layer_is_called():
    _, mlp = mlp_of()
    use_lean_layers(mlp)
    mlp.down_proj.forward = lambda x: x
    assert mlp(draws(5, 32)).shape == (5, 96)


def test_an_activation_that_is_trained_gets_its_gradient():
    _, mlp = mlp_of(act="prelu", modules_to_save=["act_fn"])
    expected = pulled(mlp, draws(50, 32))
    use_lean_layers(mlp)
    found = pulled(mlp, draws(50, 32))
    name = "act_fn.modules_to_save.default.weight"
    assert expected[name].abs().sum() > 0
    assert torch.equal(found[name], expected[name])


def test_gate_and_up_of_two_dtypes_are_multiplied_as_ever():
    _, mlp = mlp_of()
    mlp.up_proj.register_forward_hook(lambda module, inputs, output: output.bfloat16())
    x = draws(9, 32)
    expected = pulled(mlp, x)
    use_lean_layers(mlp)
    assert all(torch.equal(value, expected[name]) for name, value in pulled(mlp, x).items())
    with torch.no_grad():
        assert torch.equal(mlp(x), expected["y"])


class Scaled(LlamaMLP):
    """Much like a gated MLP."""

    def forward(self, x):
        return super().forward(x) * 1.01


class Dropping(LlamaMLP):
    """With a module more."""

    def __init__(self, config):
        super().__init__(config)
        self.dropout = nn.Dropout(0.1)


class Clamped(LlamaMLP):
    """Does more to its gate."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp_min(0) * self.up_proj(x))


class Limited(LlamaMLP):
    """Differs where its gate is large."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=16) * self.up_proj(x))


class Wide(LlamaMLP):
    """Differs in 16 bit."""

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj((self.act_fn(gate.float()) * up.float()).to(gate.dtype))


@pytest.mark.parametrize("kind", [Scaled, Dropping, Clamped, Limited, Wide])
def test_what_only_looks_like_a_gated_mlp_is_left_alone(kind):
    mlp = kind(Sizes("silu"))
    assert not is_gated_mlp(mlp)
    assert use_lean_layers(mlp) == 0


# ---- models ----------------------------------------------------------------------------------------------------------

NONE_OF_BOTH = {"phi", "gpt_neox", "gpt2", "opt", "starcoder2", "bloom"}
NORMS_ONLY = {"mixtral", "qwen3_moe", "gpt_oss", "mamba", "lfm2"}
MLPS_ONLY = {"cohere", "cohere2"}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_which_families_are_lean_and_that_they_compute_the_same(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[family]()).eval()
    modules = list(model.modules())
    norms, mlps = sum(norm_rule(m) is not None for m in modules), sum(is_gated_mlp(m) for m in modules)
    assert (norms > 0) == (family not in NONE_OF_BOTH | MLPS_ONLY)
    assert (mlps > 0) == (family not in NONE_OF_BOTH | NORMS_ONLY)
    ids = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    with torch.no_grad():
        expected = model(ids).logits
    assert use_lean_layers(model) == norms + mlps
    assert use_lean_layers(model) == 0
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    if family not in ("mamba", "lfm2", "qwen3_next", "opt"):
        torch.testing.assert_close(model(inputs_embeds=embedded).logits, expected)


def test_a_copy_has_its_own_weights_and_a_replaced_forward_stays():
    norm = norm_of(LlamaRMSNorm)
    use_lean_layers(norm)
    x = draws(5, 48)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        twin.weight.mul_(2)
        assert torch.equal(twin(x), 2 * norm(x))
        assert twin.forward.args == (twin,)
    replaced = norm_of(LlamaRMSNorm)
    replaced.forward = lambda x: x
    assert use_lean_layers(replaced) == 0
    assert replaced(x) is x


def test_activations_of_transformers_can_be_pulled_through():
    """Whatever function a config names, its derivative is PyTorch's."""
    gate, up, upstream = (draws(9, 20, seed=seed) for seed in range(3))
    for name in ("silu", "gelu", "gelu_new", "relu", "mish", "sigmoid", "tanh"):
        act = ACT2FN[name]
        parts = [part.clone().requires_grad_() for part in (gate, up)]
        expected = torch.autograd.grad(act(parts[0]) * parts[1], parts, upstream)
        with torch.no_grad():
            found = lean._Gated(act).pull(upstream.clone(), gate, up)
        for ours, own in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-6)
