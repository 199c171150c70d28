"""The plan made of the counts: what fits, what each option saves, which to set, and how it is told."""

import dataclasses
import json
import sys
import types

import pytest
import torch
import transformers

from qlora_dpo import QLoRADPOConfig, plan_memory, shapes
from qlora_dpo.__main__ import main
from qlora_dpo.cli import ModelArguments
from qlora_dpo.footprint import OPTIMIZERS, MemoryOptions
from qlora_dpo.memory import GIB, SAVERS, parse_bytes, peak_memory
from qlora_dpo.shapes import BUILT_IN, shape_of

PUBLISHED = {
    "llama-3.2-1b": 1.24e9,
    "llama-3.2-3b": 3.21e9,
    "llama-3.1-8b": 8.03e9,
    "llama-3.1-70b": 70.6e9,
    "qwen2.5-0.5b": 0.494e9,
    "qwen2.5-1.5b": 1.54e9,
    "qwen2.5-3b": 3.09e9,
    "qwen2.5-7b": 7.62e9,
    "qwen2.5-14b": 14.8e9,
    "qwen2.5-32b": 32.8e9,
    "qwen2.5-72b": 72.7e9,
    "qwen3-4b": 4.02e9,
    "qwen3-8b": 8.19e9,
    "qwen3-14b": 14.8e9,
    "qwen3-32b": 32.8e9,
    "mistral-7b": 7.25e9,
    "gemma-2-2b": 2.61e9,
    "gemma-2-9b": 9.24e9,
    "gemma-2-27b": 27.2e9,
    "gemma-3-1b": 1.0e9,
    "gemma-3-4b": 3.88e9,
    "gemma-3-12b": 11.77e9,
    "phi-4": 14.7e9,
}
"""Parameters as the model cards give them; Gemma 3 without the vision tower."""


def plan_of(name="llama-3.1-8b", gb=None, **options):
    return plan_memory(name, gpu_bytes=None if gb is None else gb * GIB, **options)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_shapes_have_the_published_number_of_parameters(name):
    assert shape_of(name).parameters == pytest.approx(PUBLISHED[name], rel=0.01)


def test_a_config_a_folder_and_a_name_are_one_way(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
    )
    config.save_pretrained(tmp_path)
    peaks = {plan_memory(source).peak_bytes for source in (config, str(tmp_path), "llama-3.1-8b", "Llama-3.1-8B")}
    assert len(peaks) == 1


def test_parts_of_a_known_model_by_hand():
    """Llama 3.1 8B has 6.98 B weights in 224 linear layers, and 41.9 M in adapters of rank 16."""
    plan = plan_of()
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    adapters = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert plan.held["4-bit weights"] == weights // 2
    assert plan.held["quantisation constants"] == weights // 64 + 4 * weights // 64 // 256 + 224 * (16 * 4 + 4)
    assert plan.held["LM head"] == plan.held["embeddings"] == 2 * 128256 * 4096
    assert plan.held["adapters"] == plan.held["gradients"] == 4 * adapters
    assert plan.held["optimizer state"] == 8 * adapters
    assert plan.phases["backward"]["layer inputs"] == 2 * 2048 * (32 * 4096 + 2 * 128)


@pytest.mark.parametrize("family", ["GPTNeoX", "Starcoder2", "GPT2", "OPT"])
def test_attention_is_no_part_of_the_mlp_whatever_a_family_calls_it(family):
    """An MLP without a gate has as many outputs as its last matrix has inputs."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "ffn_dim": 2048, "vocab_size": 1000, "num_hidden_layers": 2}
    shape = shape_of(getattr(transformers, f"{family}Config")(**sizes, num_attention_heads=8))
    assert shape.intermediate == shape.expanded == 2048


def test_the_peak_is_what_is_held_and_the_largest_phase():
    plan = plan_of()
    sums = {phase: sum(parts.values()) for phase, parts in plan.phases.items()}
    assert plan.peak_bytes == sum(plan.held.values()) + max(sums.values())
    assert sums[plan.peak_phase] == max(sums.values())


def test_the_largest_token_budget_fits_and_one_more_does_not():
    plan = plan_of(gb=12)
    most = plan.largest_tokens
    assert plan.changed(tokens=most).fits
    assert not plan.changed(tokens=most + 1).fits
    assert plan_of(gb=6).largest_tokens == 0
    assert plan_of().largest_tokens is None


def test_savings_are_differences_of_plans():
    plan = plan_of()
    savings = plan.savings()
    assert savings["--optim paged_adamw_8bit"] == plan.peak_bytes - plan_of(optim="paged_adamw_8bit").peak_bytes > 0
    assert savings["--embeddings_on_cpu true"] == plan.held["embeddings"]
    assert list(savings.values()) == sorted(savings.values(), reverse=True)


def test_a_cached_reference_saves_time_and_no_memory():
    """The reference runs before the policy and without graph, so it is never the fullest phase."""
    for name in BUILT_IN:
        assert plan_of(name).savings()["--precompute_ref_log_probs true"] == 0
    assert "reference" in plan_of().phases
    assert not plan_of(precompute_ref_log_probs=True).phases["reference"]


def test_advice_makes_it_fit_cheapest_first_and_with_nothing_needless():
    plan = plan_of(gb=8)
    assert plan.fits
    assert plan.changed(tokens=2500).advice() == ["--optim paged_adamw_8bit"]
    changes = {saver.flag: saver.change for saver in SAVERS}
    for tokens in (3000, 4096, 5000, 6000):
        wanted = plan.changed(tokens=tokens)
        flags = wanted.advice()
        assert flags == [flag for flag in changes if flag in flags]
        chosen = {name: value for flag in flags for name, value in changes[flag].items()}
        assert wanted.changed(**chosen).fits
        for flag in flags:
            fewer = {name: value for name, value in chosen.items() if name not in changes[flag]}
            assert not wanted.changed(**fewer).fits, (tokens, flag)


def test_advice_where_there_is_none_to_give():
    assert plan_of(gb=24).advice() == []
    assert plan_of("llama-3.1-70b", gb=24).advice() is None
    assert "the weights alone are too much" in str(plan_of("llama-3.1-70b", gb=24))
    assert "; with all of them," in str(plan_of(gb=8, tokens=10**6))
    assert plan_of().advice() is None


def test_nothing_is_moved_from_a_cpu_to_its_own_memory():
    """It was advised, and counted as saved; training on a CPU refuses it."""
    plan = plan_of(gb=7, device="cpu")
    flags = {"--embeddings_on_cpu true", "--activation_offloading true"}
    assert flags <= plan_of(gb=7).savings().keys()
    assert not flags & {*plan.savings(), *(plan.advice() or ())}


def test_kept_layers_lie_between_all_and_none():
    peaks = [plan_of(keep_layers=k).peak_bytes for k in (0, 1, 8, 31, 32)]
    layer_input = 2048 * 4096 * 2  # the last layer is at work when the peak is there, kept or not
    assert peaks[0] <= peaks[1] + layer_input
    assert peaks[1:] == sorted(peaks[1:])
    assert peaks[0] < peaks[2] < peaks[3]
    kept = plan_of(gradient_checkpointing=False)
    assert peaks[-1] == pytest.approx(kept.peak_bytes, rel=0.01)
    assert kept.savings()["--gradient_checkpointing true"] == kept.peak_bytes - plan_of().peak_bytes


def test_options_change_the_parts_that_they_are_about():
    plan = plan_of()
    assert (
        plan_of(use_bnb_nested_quant=False).held["quantisation constants"] > 3.5 * plan.held["quantisation constants"]
    )
    assert "4-bit weights" not in plan_of(quantize=False).held
    assert plan_of(quantize=False).held["other weights"] > 13 * 2**30
    assert "LM head" not in plan_of(quantize_head=True).held
    assert plan_of(lora_r=32).held["adapters"] == 2 * plan.held["adapters"]
    assert plan_of(activation_offloading=True).phases["backward"]["layer inputs"] < 0.07 * 2**30
    assert plan_of(dtype="float32").held["embeddings"] == 2 * plan.held["embeddings"]
    few, many = (plan_of(scored_tokens=n).phases["policy and head"]["unit gradient"] for n in (256, 2048))
    assert few < many
    eight = plan_of(optim="adamw_8bit").held["optimizer state"]
    assert eight == pytest.approx(plan.held["optimizer state"] / 4, rel=0.02)
    assert plan_of(optim="adamw_torch").phases["optimizer"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "`tokens` must be 1 or more, got 0"),
        ({"keep_layers": -1}, "`keep_layers` must be 0 or more, got -1"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"optim": "sgd"}, "`optim` must be one of"),
        ({"gpu_bytes": 0}, "`gpu_bytes` must be 1 or more"),
        ({"keep_layers": 2, "gradient_checkpointing": False}, "`keep_layers` must be 0 without"),
        ({"quantize_head": True, "quantize": False}, "`quantize_head` must be False for a base that is not in 4 bit"),
        ({"device": "cpu", "activation_offloading": True}, "`activation_offloading` must be False on a CPU"),
        ({"device": "cpu", "embeddings_on_cpu": True}, "`embeddings_on_cpu` must be False on a CPU"),
    ],
)
def test_values_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        plan_memory("llama-3.2-1b", **options)


def test_an_option_that_there_is_not_is_refused_by_name():
    with pytest.raises(TypeError, match=r"Options of plan_memory must be among .*'tokens'.*, got `token`"):
        plan_memory("llama-3.2-1b", token=1)


@pytest.mark.parametrize("option", ["quantize_head", "embeddings_on_cpu"])
def test_a_tied_head_rules_out_what_needs_its_own(option):
    with pytest.raises(ValueError, match=f"`{option}` must be False for llama-3.2-1b, whose head is its embeddings"):
        plan_of("llama-3.2-1b", **{option: True})
    assert not any(option in flag for flag in plan_of("llama-3.2-1b").savings())


def test_a_mixture_of_experts_is_refused_with_what_its_experts_weigh():
    """One layer of 8 experts of three matrices of 4,096 x 14,336 in 16 bit: 2.82 GB."""
    said = r"must be without experts, got mixtral.* leaves stacked experts in 16 bit, here 2\.82 GB of weights"
    with pytest.raises(NotImplementedError, match=said):
        plan_memory(transformers.MixtralConfig(num_hidden_layers=1))


_TINY = {
    "vocab_size": 29,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
_KINDS = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
_PER_LAYER = {"vocab_size_per_layer_input": 29, "hidden_size_per_layer_input": 16}
UNPLANNED = {
    "gemma4": (
        transformers.Gemma4TextConfig(**_TINY, **_KINDS, **_PER_LAYER, global_head_dim=32),
        "must have layers that are all alike to be planned, got gemma4_text with layers of several kinds",
    ),
    "gemma3n": (
        transformers.Gemma3nTextConfig(
            **_TINY | {"intermediate_size": [128, 128]},
            **_KINDS,
            **_PER_LAYER,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0, 0.0],
        ),
        "must have layers that run without data, on one state a token, to be planned, got gemma3n_text",
    ),
    "mamba": (
        transformers.MambaConfig(vocab_size=29, hidden_size=64, num_hidden_layers=2, state_size=4, pad_token_id=0),
        "must have layers of attention and an MLP alone to be planned, got mamba with a convolution in mixer.conv1d",
    ),
    "nemotron_h": (
        transformers.NemotronHConfig(layers_block_type=["mamba", "attention", "mlp", "mamba"]),
        "must have layers of attention and an MLP alone",
    ),
    "zamba": (
        transformers.ZambaConfig(),
        "must have layers of attention and an MLP alone",
    ),
    "qwen3.5": (
        transformers.Qwen3_5TextConfig(**_TINY, head_dim=16),
        "must have layers of attention and an MLP alone to be planned, got qwen3_5_text with a convolution",
    ),
    "doge": (
        transformers.DogeConfig(**_TINY, is_moe=False),
        "must attend once in a layer, by transformers' interface, to be planned, got doge with 0 times",
    ),
    "bloom": (
        transformers.BloomConfig(vocab_size=29, hidden_size=64, n_layer=2, n_head=4),
        "must attend once in a layer, by transformers' interface, to be planned, got bloom with 0 times",
    ),
    "doge with experts": (transformers.DogeConfig(**_TINY, is_moe=True), "must be without experts, got doge"),
    "bart": (
        transformers.BartConfig(vocab_size=29, d_model=64, decoder_layers=2, encoder_layers=1),
        "must have a list of decoder layers to be planned, got bart",
    ),
}


def test_a_layer_without_an_mlp_is_refused():
    with pytest.raises(
        NotImplementedError, match=r"must have an MLP in a layer to be planned, got x with .*'attn.q'.* Try"
    ):
        shapes._mlp_sizes({"attn.q": (64, 64)}, 64, "x")


def test_a_model_that_is_not_built_as_decoders_are_is_refused(monkeypatch):
    monkeypatch.setattr(shapes, "_counted", lambda config, name: config.no_such_size)
    config = transformers.LlamaConfig(**_TINY)
    with pytest.raises(
        NotImplementedError, match=r"must be built as transformers' decoders are .*'no_such_size'.* Try a"
    ):
        plan_memory(config)


@pytest.mark.parametrize("name", UNPLANNED)
def test_a_model_that_cannot_be_planned_is_refused_by_name_in_one_line(name, tmp_path, capsys):
    config, message = UNPLANNED[name]
    with pytest.raises(NotImplementedError) as error:
        plan_memory(config)
    assert message in str(error.value)
    config.save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_is_no_causal_language_model_is_refused():
    with pytest.raises(ValueError, match=r"`model` must be a causal LM of transformers, got t5 .*T5Config"):
        plan_memory(transformers.T5Config())


def test_scores_that_a_cpu_keeps_are_refused_there():
    """Soft-capped scores and values of another size than keys are linear in memory on a GPU only."""
    compressed = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
    config = transformers.MiniCPM3Config(**_TINY | {"num_key_value_heads": 4}, **compressed, v_head_dim=16)
    for model in ("gemma-2-2b", config):
        assert plan_memory(model).peak_bytes > 0
        with pytest.raises(NotImplementedError, match=r"`device` must be cuda to plan .*soft-capped.*, got cpu"):
            plan_memory(model, device="cpu")


def test_the_config_is_that_of_the_revision(tmp_path, monkeypatch, capsys):
    repo = tmp_path / "models--org--tiny"
    for name, commit, layers in (("main", "a" * 40, 2), ("v2", "b" * 40, 3)):
        transformers.LlamaConfig(**_TINY | {"num_hidden_layers": layers}).save_pretrained(repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert [plan_memory(name).shape.layers for name in ("org/tiny", "org/tiny@v2", "org/tiny@main")] == [2, 3, 2]
    assert main(["plan", "--model", "org/tiny@v2"]) == 0
    assert capsys.readouterr().out.startswith("org/tiny@v2: ")


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * GIB), ("24", 24 * GIB), ("23.5 GiB", 23.5 * GIB), ("8192MiB", 8 * GIB)]
)
def test_sizes_are_read_as_cards_are_sold(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "big", "-4GB", "0", "24TB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="`gpu` must be a size such as 24GB"):
        parse_bytes(text)


def test_options_of_a_plan_are_called_as_those_of_training():
    """But for what a training does not say, and `quantize`, which is that of `load_policy`."""
    known = {field.name for cls in (ModelArguments, QLoRADPOConfig) for field in dataclasses.fields(cls)}
    own = {"tokens", "scored_tokens", "quantize", "device", "device_context_bytes"}
    assert {field.name for field in dataclasses.fields(MemoryOptions)} - known == own
    assert {saver.name for saver in SAVERS} <= known
    assert [saver.flag for saver in SAVERS][:2] == ["--precompute_ref_log_probs true", "--optim paged_adamw_8bit"]


def test_every_optimizer_is_one_of_transformers():
    assert set(OPTIMIZERS) <= {optimizer.value for optimizer in transformers.training_args.OptimizerNames}


def test_the_command_prints_a_table_that_fits_a_terminal(capsys):
    assert main(["plan", "--model", "llama-3.1-8b", "--gpu", "8GB", "--tokens", "2500"]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 100
    assert "to fit 2,500 tokens: --optim paged_adamw_8bit" in table
    assert table == f"{plan_of(gb=8, tokens=2500)}\n"


def test_the_command_prints_all_numbers_as_json(capsys):
    assert main(["plan", "--model", "qwen2.5-7b", "--gpu", "16GB", "--tokens", "4096", "--json", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(plan_of("qwen2.5-7b", gb=16, tokens=4096).to_dict()))
    assert found["options"]["tokens"] == 4096


def test_the_command_lists_names_and_says_what_it_needs(capsys, monkeypatch):
    assert main(["plan", "--list"]) == 0
    assert capsys.readouterr().out.split() == list(BUILT_IN)
    for words, message in (
        ([], "`model` must be given"),
        (["--model", "llama-3.1-8"], "a built-in shape with a name like it is llama-3.1-8b"),
        (["--model", "./nowhere"], "must be a folder or a Hub id, got ./nowhere"),
        (["--model", "phi-4", "--gpu", "big"], "`gpu` must be a size"),
        (["--model", "phi-4", "--token", "1"], "Did you mean `tokens`?"),
    ):
        assert main(["plan", *words]) == 2
        assert message in capsys.readouterr().err


def test_the_card_that_is_there_is_taken(capsys, monkeypatch):
    card = types.SimpleNamespace(total_memory=10 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert main(["plan", "--model", "llama-3.1-8b"]) == 0
    assert "on a card of 10.00 GiB: fits" in capsys.readouterr().out


def test_peak_memory_on_windows_comes_from_psutil(monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    info = types.SimpleNamespace(peak_wset=5)
    monkeypatch.setattr("psutil.Process", lambda: types.SimpleNamespace(memory_info=lambda: info))
    assert peak_memory(torch.device("cpu")) == 5
