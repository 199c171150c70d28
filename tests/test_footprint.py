"""Memory foretold against memory measured, byte for byte, on the library's own step."""

import functools
import itertools

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer, kernels, load_policy, plan_memory, training
from qlora_dpo.callbacks import KeepLayers
from qlora_dpo.layouts import Group, make_batch
from qlora_dpo.lean import STRIP_BYTES
from qlora_dpo.logits import STRIP_ELEMENTS, LogitRule
from qlora_dpo.logps import frozen_head_token_scores
from qlora_dpo.offload import activations_moved
from qlora_dpo.recompute import checkpoint_activations

from allocations import bytes_of, peak_of
from tiny_chat import CHAT_ROWS, build_chat_tokenizer

MODELS = {
    "llama-41m": transformers.LlamaConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "qwen2-87m": transformers.Qwen2Config(
        vocab_size=32000,
        hidden_size=640,
        intermediate_size=2560,
        num_hidden_layers=10,
        num_attention_heads=10,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}

_SMALL = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": transformers.LlamaConfig(**_SMALL),
    "qwen3": transformers.Qwen3Config(**_SMALL, head_dim=128),
    "gemma2": transformers.Gemma2Config(**_SMALL, head_dim=64, attn_logit_softcapping=None),
    "gemma3": transformers.Gemma3TextConfig(**_SMALL, head_dim=64),
    "phi3": transformers.Phi3Config(**_SMALL),
    "cohere": transformers.CohereConfig(**_SMALL),
    "gpt2": transformers.GPT2Config(**_SMALL, n_inner=1024),
    "starcoder2": transformers.Starcoder2Config(**_SMALL),
    "apertus": transformers.ApertusConfig(**_SMALL),
    "gpt_neox": transformers.GPTNeoXConfig(**_SMALL),
    "phi": transformers.PhiConfig(**_SMALL),
    "bitnet": transformers.BitNetConfig(**_SMALL),
    "granite": transformers.GraniteConfig(**_SMALL),
    "bert": transformers.BertConfig(**_SMALL, is_decoder=True),
}
SLOW = "qwen3", "gemma2", "gemma3", "phi", "bitnet", "granite", "bert"
COMPRESSED = {
    name: getattr(transformers, f"{name}Config")(
        **_SMALL | {"num_key_value_heads": 6},
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
    )
    for name in ("MiniCPM3", "Youtu")
}
"""Keys and values from a smaller state, keys larger than values."""


def random_model(config, folder):
    """A folder with a model of random weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def trainer_on(model, folder, dtype, optim="adamw_torch", **options):
    """A trainer of a model on a 4-bit base, optimizer state and gradients in place as after a step."""
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    policy = load_policy(
        str(model),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        quantization_config=BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype),
        dtype=dtype,
        **options,
    )
    bf16, on_cpu = dtype is torch.bfloat16, policy.device.type == "cpu"
    quiet = {"report_to": [], "disable_tqdm": True}
    args = QLoRADPOConfig(output_dir=str(folder / "run"), bf16=bf16, use_cpu=on_cpu, optim=optim, **quiet)
    rows, tokenizer = Dataset.from_list(CHAT_ROWS), build_chat_tokenizer()
    trainer = QLoRADPOTrainer(policy, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)  # computes in bf16 where asked to
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    trainer.create_optimizer().step()
    return trainer


def trainer_of(config, folder, dtype=torch.float32, **options):
    """The same of a random model."""
    random_model(config, folder)
    return trainer_on(folder, folder, dtype, **options)


def batch_of(tokens, vocabulary):
    """A pair in the tree layout: half of the tokens a prompt, a quarter each completion."""
    generator = torch.Generator().manual_seed(0)
    prompt, chosen = tokens // 2, tokens // 4 + 1  # the last token of a completion is not placed
    lengths = prompt, chosen, tokens - prompt - (chosen - 1) + 1
    ids = [torch.randint(10, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    batch = make_batch([Group(ids[0], ids[1:], [(0, 1)])], "tree")
    assert batch["num_unique_tokens"] == tokens
    return batch


def held_by(trainer):
    """Bytes of the loaded model, its adapters, their gradients and the optimizer's state."""
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    tensors += [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    tensors += [value for state in trainer.optimizer.state.values() for value in state.values()]
    for module in trainer.model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return bytes_of(tensors)


def step_peak(trainer, tokens, checkpointing, chunk):
    """Bytes at the peak of a training step above what is held."""
    if checkpointing:
        checkpoint_activations(trainer.model)
    elif checkpointing is not None:  # else as it is
        trainer.model.get_base_model().gradient_checkpointing_disable()
    trainer.step.chunk_size = trainer.reference.chunk_size = chunk
    batch = batch_of(tokens, trainer.model.config.get_text_config().vocab_size)
    inputs = {"pieces": [batch], "groups": [], "max_tokens": None}
    return peak_of(lambda: trainer.training_step(trainer.model_wrapped, inputs, 1)).bytes


class CopyAway:
    """Moves a tensor into memory that PyTorch's allocator knows nothing of, as another device's would be."""

    def __init__(self, tensor):
        self.kept = tensor.numpy(force=True).copy()

    def __call__(self):
        return torch.from_numpy(self.kept).clone()


def foretold(config, tokens, device="cpu", **options):
    scored = tokens - tokens // 2 + 2
    return plan_memory(config, tokens=tokens, scored_tokens=scored, device=device, device_context_bytes=0, **options)


@pytest.fixture
def gathered(monkeypatch):
    """Attention that keeps gathered keys, and strips, as on a GPU."""
    monkeypatch.setattr(kernels, "implementation_for", lambda case: kernels.SEGMENTS)
    for strips in (STRIP_ELEMENTS, STRIP_BYTES):
        monkeypatch.setitem(strips, "cpu", strips["cuda"])


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """A trainer of each model, made when it is first asked for."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = trainer_of(MODELS[name], tmp_path_factory.mktemp(name))
        return made[name]

    return get


CELLS = [
    pytest.param(*cell, marks=[pytest.mark.slow] if cell[1] > 512 or cell[::3] == ("qwen2-87m", None) else [])
    for cell in itertools.product(MODELS, (512, 1024, 2048), (True, False), (None, 16))
]


@pytest.mark.parametrize(("name", "tokens", "checkpointing", "chunk"), CELLS)
def test_the_foretold_peak_of_a_step_is_the_measured_one(trainers, name, tokens, checkpointing, chunk):
    """With a chunk of 16 the tiles of logits are small, so that the layers decide."""
    trainer = trainers(name)
    options = {"gradient_checkpointing": checkpointing, "logps_chunk_size": chunk, "dtype": "float32"}
    plan = foretold(MODELS[name], tokens, **options)
    held, step = held_by(trainer), step_peak(trainer, tokens, checkpointing, chunk)
    above = plan.peak_bytes - sum(plan.held.values())
    assert above == pytest.approx(step, rel=0.1)
    assert plan.peak_bytes == pytest.approx(held + step, rel=0.1)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_keys_that_a_gpu_gathers_are_foretold(trainers, gathered, name, checkpointing):
    options = {"gradient_checkpointing": checkpointing, "logps_chunk_size": 16, "dtype": "float32"}
    plan, own = (foretold(MODELS[name], 512, device=device, **options) for device in ("cuda", "cpu"))
    step = step_peak(trainers(name), 512, checkpointing, 16)
    assert plan.peak_bytes - sum(plan.held.values()) == pytest.approx(step, rel=0.1)
    assert own.peak_bytes < plan.peak_bytes


@pytest.mark.parametrize("name", MODELS)
def test_what_is_held_is_foretold_to_a_thousandth(trainers, name):
    plan = foretold(MODELS[name], 512, dtype="float32")
    assert sum(plan.held.values()) == pytest.approx(held_by(trainers(name)), rel=1e-3)


@pytest.mark.parametrize("chunk", [None, 16])
def test_the_reference_pass_alone_is_foretold(trainers, chunk):
    trainer = trainers("llama-41m")
    trainer.reference.chunk_size = chunk
    batch = batch_of(512, trainer.model.config.vocab_size)
    measured = peak_of(lambda: trainer.step.compared(trainer.model_wrapped, batch)).bytes
    plan = foretold(MODELS["llama-41m"], 512, dtype="float32", logps_chunk_size=chunk)
    assert sum(plan.phases["reference"].values()) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.slow] if f in SLOW else []) for f in FAMILIES],
)
def test_other_families_and_bf16_are_foretold(family, tmp_path):
    """Norms of heads, norms behind the MLP or within, fused matrices, soft-capped logits, attention beside the MLP,
    MLPs without a gate, activations of several operations, norms of PyTorch's own; in bf16."""
    trainer = trainer_of(FAMILIES[family], tmp_path, torch.bfloat16)
    for checkpointing, chunk in itertools.product((True, False), (None, 16)):
        plan = foretold(FAMILIES[family], 512, gradient_checkpointing=checkpointing, logps_chunk_size=chunk)
        above = plan.peak_bytes - sum(plan.held.values())
        step = step_peak(trainer, 512, checkpointing, chunk)
        assert above == pytest.approx(step, rel=0.1)
    assert sum(plan.held.values()) == pytest.approx(held_by(trainer), rel=5e-3)


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_keys_and_values_are_foretold(name, tmp_path, gathered, monkeypatch):
    """Values filled up to the size of keys stand for a GPU's kernel, which keeps no score of each pair of tokens."""

    def filled(query, key, value, plan, recipe):
        missing = query.shape[-1] - value.shape[-1]
        wide = torch.nn.functional.pad(value, (0, missing))
        return kernels.by_segment(query, key, wide, plan, recipe)[..., : value.shape[-1]]

    monkeypatch.setitem(kernels.IMPLEMENTATIONS, kernels.SEGMENTS, filled)
    trainer = trainer_of(COMPRESSED[name], tmp_path, torch.bfloat16)
    for checkpointing in (True, False):
        options = {"gradient_checkpointing": checkpointing, "logps_chunk_size": 16}
        plan = foretold(COMPRESSED[name], 512, device="cuda", **options)
        step = step_peak(trainer, 512, checkpointing, 16)
        assert plan.peak_bytes - sum(plan.held.values()) == pytest.approx(step, rel=0.1)
    assert sum(plan.held.values()) == pytest.approx(held_by(trainer), rel=5e-3)


def test_a_model_with_a_vision_tower_is_counted_whole(tmp_path):
    """Its weights are there, and the default LoRA leaves them as they are: no text goes through them."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config=FAMILIES["gemma3"].to_dict(),
        vision_config=tower | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        **{f"{name}_token_index": 5 for name in ("image", "boi", "eoi")},
    )
    trainer = trainer_of(config, tmp_path, torch.bfloat16)
    plan, text = foretold(config, 512), foretold(FAMILIES["gemma3"], 512)
    assert plan.shape.layer_linears == text.shape.layer_linears
    assert plan.shape.parameters == AutoModelForCausalLM.from_config(config).num_parameters() > text.shape.parameters
    assert plan.held["adapters"] == text.held["adapters"]
    assert plan.held["adapters"] == 4 * sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert sum(plan.held.values()) == pytest.approx(held_by(trainer), rel=5e-3)
    for checkpointing in (True, False):
        plan = foretold(config, 512, gradient_checkpointing=checkpointing)
        step = step_peak(trainer, 512, checkpointing, None)
        assert plan.peak_bytes - sum(plan.held.values()) == pytest.approx(step, rel=0.1)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scored", [100, 300, 512])
def test_tiles_of_logits_are_counted(softcap, dtype, scored):
    """One tile, one and a part, two: 256 positions each, in strips of 128."""
    hidden, vocabulary = 64, 8192
    head = torch.nn.Linear(hidden, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
    rows, targets = torch.randn(scored, hidden, dtype=dtype).requires_grad_(), torch.zeros(scored, dtype=torch.long)
    names = ("entropy", "mean_logits", "is_top1")
    rule = LogitRule(softcap=softcap)
    measured = peak_of(lambda: frozen_head_token_scores(rows, head, targets, rule, 256, names)).bytes
    config = transformers.Gemma2Config(
        **(_SMALL | {"hidden_size": hidden, "num_attention_heads": 4}),
        final_logit_softcapping=softcap or None,
        attn_logit_softcapping=None,
    )
    width = str(dtype).removeprefix("torch.")
    options = {"scored_tokens": scored, "logps_chunk_size": 256, "dtype": width, "device": "cpu"}
    parts = plan_memory(config, tokens=600, **options).phases["policy and head"]
    assert sum(parts[name] for name in ("logit tiles", "logit strips", "unit gradient")) == pytest.approx(
        measured, rel=0.03
    )


@pytest.mark.parametrize("chunk", [None, 16])
def test_kept_layers_are_foretold(trainers, chunk):
    trainer = trainers("llama-41m")
    checkpoint_activations(trainer.model)
    KeepLayers(trainer.model, 3).begin()
    plan = foretold(MODELS["llama-41m"], 512, keep_layers=3, logps_chunk_size=chunk, dtype="float32")
    step = step_peak(trainer, 512, None, chunk)
    assert plan.peak_bytes - sum(plan.held.values()) == pytest.approx(step, rel=0.1)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("chunk", [None, 16])
def test_activations_elsewhere_are_foretold(trainers, checkpointing, chunk, monkeypatch, gathered):
    """With a smaller least size, as these activations are smaller than those that are worth moving."""
    trainer = trainers("llama-41m")
    move = functools.partial(activations_moved, device_type="cpu", least_bytes=2**18, move=CopyAway)
    monkeypatch.setattr(training, "activations_moved", move)
    monkeypatch.setattr(trainer.args, "activation_offloading", True)
    options = {"gradient_checkpointing": checkpointing, "logps_chunk_size": chunk, "activation_offloading": True}
    plan = foretold(MODELS["llama-41m"], 512, device="cuda", dtype="float32", **options)
    step = step_peak(trainer, 512, checkpointing, chunk)
    assert plan.peak_bytes - sum(plan.held.values()) == pytest.approx(step, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_in_4_bit_is_foretold(dtype, tmp_path):
    trainer = trainer_of(FAMILIES["llama"], tmp_path, getattr(torch, dtype), quantize_head=True)
    for chunk in (None, 16):
        plan = foretold(FAMILIES["llama"], 512, quantize_head=True, logps_chunk_size=chunk, dtype=dtype)
        step = step_peak(trainer, 512, True, chunk)
        assert plan.peak_bytes - sum(plan.held.values()) == pytest.approx(step, rel=0.1)
    assert sum(plan.held.values()) == pytest.approx(held_by(trainer), rel=5e-3)
