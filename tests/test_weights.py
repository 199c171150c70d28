"""Files of saved adapters: read whole, put where they fit, and nowhere else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_merge import error, four_bit, logits, merged, moved, saved, trained

from qlora_dpo import load_policy
from qlora_dpo.__main__ import main
from qlora_dpo.model import add_saved_adapter, attach_adapter, load_base
from qlora_dpo.offload import has_embeddings_on_cpu
from qlora_dpo.weights import require_saved_vocabulary

from tiny_chat import build_tiny_llama
from tiny_models import build as build_tiny

TOKENS = 33
"""Of the base after resizing; 29 before."""


def lora(**options):
    return LoraConfig(**({"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options))


@pytest.fixture
def adapter(base_folder, tmp_path):
    return trained(base_folder, tmp_path / "adapter", lora())[1]


@pytest.fixture
def other_base(tokenizer, tmp_path):
    """With as many layers, of another size."""
    build_tiny_llama(tokenizer, head_dim=8).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_an_adapter_of_another_size_is_refused(adapter, other_base, base_folder):
    said = (
        r"0 weights that it lacks, 0 that the model has no place for and 2 of another shape, as .*: \[64, 4\] for \[\d+"
    )
    with pytest.raises(ValueError, match=said):
        load_policy(other_base, adapter=adapter)
    with pytest.raises(ValueError, match=said):
        load_policy(other_base, adapter=adapter, peft_config=lora())
    stacked = trained(base_folder, Path(adapter).with_name("above"), lora(), adapter=adapter)[1]
    with pytest.raises(ValueError, match=said):
        load_policy(other_base, adapter=stacked)


def test_an_adapter_that_lacks_a_weight_is_refused(adapter, base_folder):
    path = Path(adapter, "adapter_model.safetensors")
    weights = load_file(path)
    weights.pop(next(iter(weights)))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights that it lacks, 0 that the model has no place for and 0 of another"):
        load_policy(base_folder, adapter=adapter)


@pytest.mark.parametrize("what", ["cut off", "another base"])
@pytest.mark.parametrize("command", ["evaluate", "score", "merge"])
def test_on_the_command_line_it_is_one_line(command, what, adapter, other_base, rows_file, tmp_path, capsys):
    path = Path(adapter, "adapter_model.safetensors")
    if what == "cut off":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        record = Path(adapter, "qlora_dpo.json")
        record.write_text(json.dumps(json.loads(record.read_text()) | {"base": other_base}))
    quiet = ["--dataset_name", rows_file, "--report_to", "none", "--disable_tqdm", "true"]
    words = {
        "evaluate": quiet,
        "score": ["--source", rows_file, "--target", str(tmp_path / "scored")],
        "merge": ["--output_dir", str(tmp_path / "merged")],
    }[command]
    assert main([command, "--adapter", adapter, *words]) == 2
    said = "must have whole weights in adapter_model.safetensors" if what == "cut off" else "must fit the model"
    assert said in capsys.readouterr().err


def test_a_head_in_4_bit_that_an_adapter_changes_is_left_in_the_file(base_folder, tmp_path):
    """Also for a base whose head is not."""
    config = lora(target_modules=["q_proj", "lm_head"])
    policy, adapter = trained(base_folder, tmp_path / "adapter", config, quantize_head=True)
    options = {"quantization_config": four_bit(), "dtype": torch.float32}
    again = load_policy(base_folder, adapter=adapter, quantize_head=True, **options).eval()
    assert torch.equal(logits(again), logits(policy))
    assert error(logits(load_policy(base_folder, adapter=adapter, **options).eval()), logits(policy)) < 0.2


# ---- a vocabulary that was resized -----------------------------------------------------------------------------------


def resized(folder, config, out, tokens=TOKENS):
    """A policy on a base with made-up rows for added tokens, and where its adapter is saved."""
    base = load_base(folder, four_bit(), dtype=torch.float32)
    torch.manual_seed(3)
    base.resize_token_embeddings(tokens, mean_resizing=False)
    policy = moved(attach_adapter(base, config))
    return policy, saved(policy, out)


HELD = {
    "lora": lora(),
    "whole embeddings": lora(modules_to_save=["embed_tokens"]),
    "whole embeddings and head": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": lora(trainable_token_indices=[4, TOKENS - 1]),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", HELD)
def test_an_adapter_is_loaded_and_merged_with_the_rows_its_base_had(kind, tied, tokenizer, tmp_path):
    """Also what it is compared with: the base's own rows, which are made up where tokens were added."""
    build_tiny_llama(tokenizer, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    policy, adapter = resized(str(tmp_path / "base"), HELD[kind], tmp_path / "adapter")
    again = load_policy(adapter, quantization_config=four_bit(), dtype=torch.float32).eval()
    assert again.config.vocab_size == TOKENS
    assert torch.equal(logits(again), logits(policy))
    with policy.disable_adapter(), again.disable_adapter():
        assert torch.equal(logits(again), logits(policy))
    _, model = merged(adapter, tmp_path / "merged")
    assert error(logits(model), logits(policy)) < 2e-5
    assert model.config.vocab_size == TOKENS


def test_a_head_with_a_bias_is_resized_with_it(tokenizer, tmp_path):
    build_tiny("phi").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    policy, adapter = resized(str(tmp_path / "base"), lora(), tmp_path / "adapter", 70)
    assert policy.get_output_embeddings().bias.shape == (70,)
    again = load_policy(adapter, quantization_config=four_bit(), dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(policy))
    _, model = merged(adapter, tmp_path / "merged")
    assert error(logits(model), logits(policy)) < 2e-5


def test_resized_embeddings_stay_in_cpu_memory(base_folder, tmp_path):
    policy, adapter = resized(base_folder, lora(), tmp_path / "adapter")
    options = {"quantization_config": four_bit(), "dtype": torch.float32, "embeddings_on_cpu": True}
    again = load_policy(adapter, **options).eval()
    assert has_embeddings_on_cpu(again.get_base_model())
    assert torch.equal(logits(again), logits(policy))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_rows_that_no_file_holds_are_missed_before_training_and_when_loaded(target, base_folder, tmp_path):
    policy, adapter = resized(base_folder, lora(target_modules=["q_proj", target]), tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=f"must be saved before it is trained on, got {TOKENS} tokens in memory and 29"
    ):
        require_saved_vocabulary(policy)
    with pytest.raises(ValueError, match=f"must have {TOKENS} tokens, got 29, and the adapter holds only one"):
        load_policy(base_folder, adapter=adapter)


def refused(policy):
    """Whether training on a policy's base is refused for its vocabulary."""
    try:
        require_saved_vocabulary(policy)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("kind", HELD)
def test_rows_that_the_file_will_hold_may_be_trained_on(kind, base_folder, tmp_path):
    assert not refused(resized(base_folder, HELD[kind], tmp_path / "adapter")[0])


@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head", "embed_tokens"]], ids=str)
def test_a_base_as_it_is_saved_may_be_trained_on(targets, base_folder):
    assert not refused(load_policy(base_folder, peft_config=lora(target_modules=targets)))


def test_a_base_that_is_saved_as_it_was_resized_needs_nothing(base_folder, tmp_path):
    """The way out of both messages."""
    base = load_base(base_folder, quantize=False, dtype=torch.float32)
    base.resize_token_embeddings(TOKENS)
    base.save_pretrained(tmp_path / "base")
    shutil.copy(Path(base_folder, "tokenizer.json"), tmp_path / "base")
    shutil.copy(Path(base_folder, "tokenizer_config.json"), tmp_path / "base")
    policy, adapter = trained(str(tmp_path / "base"), tmp_path / "adapter", lora(target_modules=["q_proj", "lm_head"]))
    require_saved_vocabulary(policy)
    _, model = merged(adapter, tmp_path / "merged")
    assert error(logits(model), logits(policy)) < 2e-5


def test_a_reference_of_a_base_with_another_vocabulary_is_refused(base_folder, tmp_path):
    """Its rows would be left out, and the reference be another one."""
    resized(base_folder, HELD[next(iter(HELD))], tmp_path / "adapter")
    policy = load_policy(base_folder, peft_config=lora())
    with pytest.raises(ValueError, match="must be of the policy's base, got one of a base with"):
        add_saved_adapter(policy, str(tmp_path / "adapter"), "reference")


def test_a_head_may_be_adapted_on_top_of_an_adapter_that_holds_the_rows(base_folder, tmp_path):
    resized(base_folder, HELD[next(iter(HELD))], tmp_path / "adapter")
    above = lora(target_modules=["lm_head"])
    assert not refused(load_policy(base_folder, adapter=str(tmp_path / "adapter"), peft_config=above))


# ---- copies of the base's weights ------------------------------------------------------------------------------------


@pytest.fixture
def trained_head(base_folder, tmp_path):
    """An adapter whose file holds a head that was trained beside it, as PEFT saves it where it is asked to."""
    _, folder = trained(base_folder, tmp_path / "adapter", lora())
    path = Path(folder, "adapter_model.safetensors")
    head = load_base(base_folder, quantize=False, dtype=torch.float32).lm_head.weight
    copy = {"base_model.model.lm_head.weight": (head + 0.01).detach()}
    save_file(load_file(path) | copy, path, metadata={"format": "pt"})
    return folder


def test_a_head_that_was_trained_beside_the_adapter_is_not_left_out_in_silence(trained_head, base_folder, tmp_path):
    said = "must be of its base as it is, got another lm_head.weight in its file"
    with pytest.raises(ValueError, match=said):
        load_policy(trained_head, quantization_config=four_bit(), dtype=torch.float32)
    with pytest.raises(ValueError, match=said):
        load_policy(base_folder, adapter=trained_head, peft_config=lora())
    with pytest.raises(ValueError, match=said):
        add_saved_adapter(load_policy(base_folder, peft_config=lora()), trained_head, "reference")
    for into in ("quantized", "original"):
        with pytest.raises(ValueError, match=said):
            merged(trained_head, tmp_path / into, into=into)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_copy_of_the_base_in_another_dtype_is_the_same(dtype, base_folder, tmp_path):
    """PEFT saves the head beside an adapter of it, in the dtype of training."""
    config = lora(target_modules=["q_proj", "lm_head"])
    base = attach_adapter(load_base(base_folder, four_bit(), dtype=dtype), config)
    adapter = saved(moved(base), tmp_path / "adapter")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(Path(adapter, "adapter_model.safetensors"))
    for other in (torch.bfloat16, torch.float32):
        load_policy(adapter, quantization_config=four_bit(), dtype=other)
    merged(adapter, tmp_path / "merged", into="original")


def test_a_reference_with_a_head_of_its_own_is_held_to_the_base_below_the_policys(base_folder, tmp_path):
    """Of a policy whose head is another module by now, and whose file holds the base's too."""
    _, folder = trained(base_folder, tmp_path / "adapter", lora(modules_to_save=["lm_head"]))
    path = Path(folder, "adapter_model.safetensors")
    head = load_base(base_folder, quantize=False, dtype=torch.float32).lm_head.weight.detach()
    copy = {"base_model.model.lm_head.original_module.weight": head}
    save_file(load_file(path) | copy, path, metadata={"format": "pt"})
    policy = moved(load_policy(base_folder, peft_config=lora(modules_to_save=["lm_head"])))
    assert add_saved_adapter(policy, folder, "reference") == "reference"
