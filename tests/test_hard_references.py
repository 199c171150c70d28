"""Hard cases of references, records and caches. A docstring says what went wrong."""

import inspect
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import BitsAndBytesConfig

from qlora_dpo import QLoRADPOTrainer, load_policy
from qlora_dpo.__main__ import main
from qlora_dpo.adapters import frozen_adapters, stack_adapter, trained_adapters
from qlora_dpo.forward import install_scoring, score_batch
from qlora_dpo.reference import fingerprint, make_reference

from test_cli import QUIET, train_words
from test_hard_cases import trained_adapter
from test_reference import ALL, BATCH, logps, policy_of, trained, trainer_of
from tiny_chat import CHAT_ROWS, build_tiny_llama

REFUSED = (ValueError, NotImplementedError)
LORA = {"target_modules": ALL, "task_type": "CAUSAL_LM"}


def randomize(policy, seed=3, std=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    return policy


def saved(tokenizer, folder, **options):
    """A folder with a trained adapter of the tiny model."""
    policy = randomize(policy_of(tokenizer, LoraConfig(**(LORA | options))))
    policy.save_pretrained(folder)
    return str(folder)


# ---- stacks ----------------------------------------------------------------------------------------------------------


def test_sync_on_a_stack_with_the_base_as_reference_starts_at_the_base(tokenizer):
    """reference='base' + sync_ref_model on a stack: AverageReference zeroes the trained adapter only and leaves the
    frozen adapters in force, so the reference is base + SFT adapter."""
    bare = build_tiny_llama(tokenizer)
    install_scoring(bare)
    policy = trained(tokenizer, task_type="CAUSAL_LM")
    stack_adapter(policy, LoraConfig(**LORA))
    reference = make_reference("base", policy, average=(0.5, 64))
    assert torch.equal(reference(policy, BATCH)["logps"], logps(bare))


def test_sync_of_an_adapter_on_expert_parameters_is_refused(tokenizer):
    """`target_parameters`: A is (experts * r, in) and B (out, r * experts), expert by expert. Their weights have two
    dimensions, so `lora_linears` takes them for plain products, and stacked factors mix the experts."""
    config = hf.MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.MixtralForCausalLM(config)
    names = [n for n, p in model.named_parameters() if p.dim() == 3]
    assert names
    lora = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], task_type="CAUSAL_LM")
    policy = get_peft_model(model, lora)
    install_scoring(model)
    policy.train()
    with pytest.raises(REFUSED, match=r"must have a plain LoRA on linear layers.*target_parameters"):
        make_reference("auto", policy, average=(1.0, 64))


def test_sync_with_two_trained_adapters_says_what_to_do(tokenizer):
    """`(self.name,) = trained_adapters(policy)`: 'too many values to unpack'."""
    policy = policy_of(tokenizer, LoraConfig(**LORA))
    policy.add_adapter("two", LoraConfig(**LORA))
    policy.base_model.set_adapter(["default", "two"])
    with pytest.raises(REFUSED, match=r"sync_ref_model"):
        make_reference("auto", policy, average=(0.5, 64))


def test_a_continued_stack_is_evaluated_against_its_start(base_folder, rows_file, tmp_path, tokenizer, chat_rows):
    """Round 2 of DPO on a stack: the reference is base + SFT + DPO 1. The record says `initial` with source DPO 1, and
    evaluate loads that as base + DPO 1, without the SFT adapter below."""
    from qlora_dpo import QLoRADPOConfig

    sft = trained_adapter(base_folder, tmp_path / "sft", tokenizer)
    exact = {"quantize": False, "dtype": torch.float32}
    options = {"bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "max_steps": 2}

    def run(policy, name):
        args = QLoRADPOConfig(output_dir=str(tmp_path / name), learning_rate=1e-2, **options)
        trainer = QLoRADPOTrainer(
            model=policy, args=args, train_dataset=chat_rows, eval_dataset=chat_rows, processing_class=tokenizer
        )
        trainer.train()
        trainer.save_model()
        return trainer

    run(load_policy(base_folder, adapter=sft, peft_config=LoraConfig(**LORA), **exact), "one")
    below = {"stacked_on": sft} if "stacked_on" in inspect.signature(load_policy).parameters else {}
    two = run(load_policy(base_folder, adapter=str(tmp_path / "one"), **below, **exact), "two")
    assert two.reference.kind == "initial"
    expected = two.evaluate()["eval_rewards/margins"]
    words = ["evaluate", "--adapter", str(tmp_path / "two"), "--dataset_name", rows_file]
    code = main([*words, "--output_dir", str(tmp_path / "e"), *QUIET])
    if code == 0:
        found = json.loads((tmp_path / "e" / "metrics.json").read_text())["eval_rewards/margins"]
        assert found == pytest.approx(expected, rel=1e-4)


def test_an_unknown_adapter_below_is_not_left_out_by_evaluate(
    tokenizer, base_folder, rows_file, make_args, chat_rows, tmp_path
):
    """A PeftModel that the user stacked: the record's `stacked_on` is None, the same as 'not stacked'. With
    --reference base the policy is then loaded without what is below it, and numbers come out. record.write_record."""
    base = hf.AutoModelForCausalLM.from_pretrained(base_folder)
    policy = randomize(get_peft_model(base, LoraConfig(**LORA)), std=0.3)
    policy.base_model.requires_grad_(False)
    args = make_args(max_steps=2, learning_rate=1e-2, reference="base")
    trainer = QLoRADPOTrainer(
        model=policy, args=args, train_dataset=chat_rows, eval_dataset=chat_rows, processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    expected = trainer.evaluate()["eval_logps/chosen"]
    words = ["evaluate", "--adapter", args.output_dir, "--dataset_name", rows_file]
    code = main([*words, "--output_dir", str(tmp_path / "e"), *QUIET])
    if code == 0:
        found = json.loads((tmp_path / "e" / "metrics.json").read_text())["eval_logps/chosen"]
        assert found == pytest.approx(expected, rel=1e-4)


def test_going_on_with_a_stacked_adapter_by_its_folder_keeps_what_is_below(
    base_folder, tokenizer, make_args, chat_rows, tmp_path
):
    """load_policy(folder) of an adapter whose record names `stacked_on` loads it on the bare base, without a word:
    so does `qlora-dpo train --model_name_or_path folder`."""
    sft = trained_adapter(base_folder, tmp_path / "sft", tokenizer)
    exact = {"quantize": False, "dtype": torch.float32}
    policy = load_policy(base_folder, adapter=sft, peft_config=LoraConfig(**LORA), **exact)
    args = make_args(max_steps=2, learning_rate=1e-2)
    trainer = QLoRADPOTrainer(model=policy, args=args, train_dataset=chat_rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    assert json.loads(Path(args.output_dir, "qlora_dpo.json").read_text())["stacked_on"] == sft
    again = load_policy(args.output_dir, **exact)
    install_scoring(again.get_base_model())
    assert torch.allclose(logps(again.train()), logps(policy.train()), atol=1e-4)


def test_a_new_adapter_leaves_alone_what_the_one_below_replaced_whole(
    base_folder, tokenizer, make_args, chat_rows, tmp_path
):
    """`all-linear` took the head below for a layer: PEFT could not save it, which showed when the training was over."""
    whole = LoraConfig(**(LORA | {"modules_to_save": ["lm_head"]}))
    policy = load_policy(base_folder, peft_config=whole, quantize=False, dtype=torch.float32)
    randomize(policy).save_pretrained(tmp_path / "sft")
    exact = {"adapter": str(tmp_path / "sft"), "quantize": False, "dtype": torch.float32}
    every = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = load_policy(base_folder, peft_config=every, **exact)
    args = make_args(max_steps=2, learning_rate=1e-2)
    trainer = QLoRADPOTrainer(model=policy, args=args, train_dataset=chat_rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    again = load_policy(args.output_dir, quantize=False, dtype=torch.float32)
    install_scoring(again.get_base_model())
    assert torch.allclose(logps(again.train()), logps(policy.train()), atol=1e-4)
    with pytest.raises(NotImplementedError, match="must not be adapted above it, which PEFT cannot save, got lm_head"):
        load_policy(
            base_folder, peft_config=LoraConfig(target_modules="all-linear", exclude_modules=["k_proj"]), **exact
        )


def test_a_new_adapter_has_no_layer_that_nothing_calls(base_folder, tmp_path):
    """Beside the copy that an adapter below trained, the original was adapted, which no text goes through."""
    whole = LoraConfig(**(LORA | {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}))
    exact = {"quantize": False, "dtype": torch.float32}
    load_policy(base_folder, peft_config=whole, **exact).save_pretrained(tmp_path / "sft")
    every = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = load_policy(base_folder, adapter=str(tmp_path / "sft"), peft_config=every, **exact)
    install_scoring(policy.get_base_model())
    score_batch(policy.train(), BATCH)["logps"].sum().backward()
    trained = {name: weight.grad for name, weight in policy.named_parameters() if weight.requires_grad}
    assert any("v_proj" in name for name in trained)
    assert not [name for name, gradient in trained.items() if gradient is None]


def test_an_adapter_folder_as_base_beside_an_adapter_is_refused_or_honoured(base_folder, tokenizer, tmp_path):
    """load_policy(sft folder, adapter=dpo): transformers loads base + SFT adapter, PEFT wraps LoRA layers in LoRA
    layers. model.load_policy looks for an adapter folder only where `adapter` is None."""
    sft = trained_adapter(base_folder, tmp_path / "sft", tokenizer)
    dpo = trained_adapter(base_folder, tmp_path / "dpo", tokenizer)
    with pytest.raises(REFUSED):
        load_policy(sft, adapter=dpo, quantize=False)


def test_the_revision_of_a_stack_is_recorded(base_folder, tokenizer, make_args, chat_rows, tmp_path):
    """The record's base_revision is read from the new adapter's config, which `stack_adapter` leaves empty."""
    sft = trained_adapter(base_folder, tmp_path / "sft", tokenizer)
    policy = load_policy(
        base_folder, adapter=sft, peft_config=LoraConfig(**LORA), revision="abc123", quantize=False, dtype=torch.float32
    )
    trainer = QLoRADPOTrainer(model=policy, args=make_args(), train_dataset=chat_rows, processing_class=tokenizer)
    trainer.save_model()
    assert json.loads(Path(trainer.args.output_dir, "qlora_dpo.json").read_text())["base_revision"] == "abc123"


def test_an_adapter_folder_loads_its_base_at_its_revision(base_folder, tokenizer, tmp_path, monkeypatch):
    """The adapter's config names the revision of its base; load_policy(folder) looks up the name alone and loads
    `main`."""
    policy = load_policy(base_folder, revision="abc123", quantize=False)
    policy.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["revision"] == "abc123"
    from qlora_dpo import model

    seen = []
    load_base = model.load_base
    monkeypatch.setattr(model, "load_base", lambda *a, **k: seen.append(k.get("revision")) or load_base(*a, **k))
    load_policy(str(tmp_path / "a"), quantize=False)
    assert seen == ["abc123"]


def test_home_in_the_path_of_an_adapter(base_folder, tokenizer, tmp_path, monkeypatch):
    """`~` was expanded for a base, and not where load_policy looks for an adapter."""
    trained_adapter(base_folder, tmp_path / "sft", tokenizer)
    monkeypatch.setenv("HOME", str(tmp_path))
    policy = load_policy("~/sft", quantize=False)
    assert trained_adapters(policy) == ["default"]


# ---- reference by path -----------------------------------------------------------------------------------------------


def test_a_second_trainer_with_another_reference_adapter_has_its_scaling(tokenizer, make_args, tmp_path):
    """`load_adapter(path, 'reference')` on a policy that has such an adapter loads weights into it and keeps the old
    config: the second reference gets the first one's alpha (and the first trainer's reference changes)."""
    one = saved(tokenizer, tmp_path / "one", lora_alpha=8)
    two = randomize(policy_of(tokenizer, LoraConfig(lora_alpha=64, **LORA)), seed=9)
    two.save_pretrained(tmp_path / "two")
    policy = policy_of(tokenizer, LoraConfig(**LORA))
    first = trainer_of(tokenizer, make_args(reference=one), policy)
    kept = first.reference(policy, BATCH)["logps"]
    second = trainer_of(tokenizer, make_args(reference=str(tmp_path / "two")), policy)
    assert torch.equal(second.reference(policy, BATCH)["logps"], logps(two))
    assert torch.equal(first.reference(policy, BATCH)["logps"], kept)


def test_a_policy_whose_adapter_is_called_reference_keeps_it(tokenizer, make_args, tmp_path):
    """reference=path is loaded under the name 'reference': into the policy's own adapter of that name."""
    path = saved(tokenizer, tmp_path / "one")
    model = build_tiny_llama(tokenizer)
    policy = get_peft_model(model, LoraConfig(**LORA), adapter_name="reference")
    install_scoring(model)
    before = logps(policy.train())
    trainer = trainer_of(tokenizer, make_args(reference=path), policy)
    assert torch.equal(logps(policy), before)
    assert not torch.equal(trainer.reference(policy, BATCH)["logps"], before)


@pytest.mark.parametrize("layers", [3])
def test_a_reference_adapter_of_another_base_is_refused(tokenizer, tmp_path, layers):
    """PEFT's load_adapter ignores keys that are missing or left over: an adapter of a model with other layers loads in
    part, and where nothing fits the reference is the base."""
    config = build_tiny_llama(tokenizer).config
    config.num_hidden_layers = layers
    other = randomize(get_peft_model(hf.LlamaForCausalLM(config), LoraConfig(**LORA)))
    other.save_pretrained(tmp_path)
    with pytest.raises((*REFUSED, RuntimeError)):
        make_reference(str(tmp_path), policy_of(tokenizer, LoraConfig(**LORA)))


def test_trust_remote_code_reaches_a_reference_model_given_by_name(tokenizer, make_args, base_folder, monkeypatch):
    """ref_model='id' is loaded without the options that reference='id' gets."""
    from qlora_dpo import reference

    seen = []
    load_base = reference.load_base
    monkeypatch.setattr(
        reference, "load_base", lambda *a, **k: seen.append(k.get("trust_remote_code")) or load_base(*a, **k)
    )
    trainer_of(tokenizer, make_args(trust_remote_code=True), policy_of(tokenizer), ref_model=base_folder)
    assert seen == [True]


# ---- which adapter, which state --------------------------------------------------------------------------------------


def test_a_frozen_policy_is_refused_with_the_reason(tokenizer, make_args, tmp_path):
    """PeftModel.from_pretrained(base, folder) without is_trainable, the commonest slip: training must say so."""
    path = saved(tokenizer, tmp_path / "sft")
    policy = PeftModel.from_pretrained(build_tiny_llama(tokenizer), path)
    with pytest.raises(REFUSED, match=r"must have weights to train, got none. Load its adapter with is_trainable=True"):
        trainer_of(tokenizer, make_args(max_steps=1), policy).train()


def test_a_merged_adapter_is_refused_with_the_reason(tokenizer, make_args):
    """An SFT adapter merged in (not unloaded) under a fresh one: the reference pass with adapters disabled unmerges it
    for good, so policy and reference silently become the bare base."""
    policy = trained(tokenizer, task_type="CAUSAL_LM")
    before = logps(policy)
    policy.add_adapter("dpo", LoraConfig(**LORA))
    policy.set_adapter("dpo")
    policy.merge_adapter(["default"])
    assert torch.allclose(logps(policy), before, atol=1e-3)
    with pytest.raises(REFUSED, match=r"must be in force, got merged ones. Call unmerge_adapter"):
        trainer_of(tokenizer, make_args(max_steps=2, learning_rate=1e-2), policy)


def test_a_disabled_adapter_is_refused_with_the_reason(tokenizer, make_args):
    """The policy is then the base and nothing of it is trained."""
    policy = policy_of(tokenizer, LoraConfig(**LORA))
    policy.base_model.disable_adapter_layers()
    with pytest.raises(REFUSED, match=r"must be in force, got disabled ones. Call enable_adapter_layers"):
        trainer_of(tokenizer, make_args(max_steps=2, learning_rate=1e-2), policy)


def test_trained_base_weights_are_refused_by_name(tokenizer, make_args):
    """A base weight that is trainable (a norm) was trained, with 'initial' as reference, but no checkpoint and no saved
    adapter held it: resumed runs and saved policies had the old one."""
    policy = policy_of(tokenizer, LoraConfig(**LORA))
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(REFUSED, match=r"Only adapter weights must be trainable.*norm\.weight.*modules_to_save"):
        trainer_of(tokenizer, make_args(), policy)


def test_checkpointing_that_is_off_stays_off_for_an_adapter_by_name(
    base_folder, tokenizer, make_args, chat_rows, tmp_path
):
    """model='adapter folder' goes through load_policy, whose gradient_checkpointing=True args cannot switch off."""
    sft = trained_adapter(base_folder, tmp_path / "sft", tokenizer)
    args = make_args(gradient_checkpointing=False, bf16=True)
    trainer = QLoRADPOTrainer(model=sft, args=args, train_dataset=chat_rows, processing_class=tokenizer)
    assert not trainer.model.get_base_model().is_gradient_checkpointing


def test_resuming_with_another_reference_model_is_refused(tokenizer, make_args):
    """The record has a hash for adapters only: a run resumed with another reference model (or other base weights) goes
    on against it."""
    args = make_args(max_steps=2, save_strategy="steps", save_steps=2)
    lora = LoraConfig(**LORA)
    trainer_of(tokenizer, args, policy_of(tokenizer, lora), ref_model=build_tiny_llama(tokenizer, seed=1)).train()
    other = trainer_of(tokenizer, args, policy_of(tokenizer, lora), ref_model=build_tiny_llama(tokenizer, seed=2))
    with pytest.raises(ValueError, match=r"the reference was .* and is "):
        other.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")


# ---- given log-probabilities -----------------------------------------------------------------------------------------


def given_rows(value=-3.0):
    return [row | {"ref_logps": [value, value - 2]} for row in CHAT_ROWS[:4]]


def test_given_log_probabilities_with_precompute(tokenizer, make_args, tmp_path):
    """CachedReference asks the given sums for token values: KeyError 'token_logps'."""
    args = make_args(
        max_steps=1, per_device_train_batch_size=4, learning_rate=0.0, precompute_ref_log_probs=True,
        reference_cache=str(tmp_path / "c.sqlite"),
    )  # fmt: skip
    trainer = trainer_of(tokenizer, args, policy_of(tokenizer), given_rows())
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["rewards/chosen"] == pytest.approx(0.1 * (line["logps/chosen"] + 3), rel=1e-5)


def test_given_log_probabilities_are_not_replaced_by_cached_ones(tokenizer, make_args, tmp_path):
    """The identity of a given reference is that of the base behind it: what an earlier run cached is used instead."""
    options = {
        "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.0, "precompute_ref_log_probs": True,
        "reference_cache": str(tmp_path / "c.sqlite"),
    }  # fmt: skip
    trainer_of(tokenizer, make_args(**options), policy_of(tokenizer), CHAT_ROWS[:4]).train()
    trainer = trainer_of(tokenizer, make_args(**options), policy_of(tokenizer), given_rows())
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["rewards/chosen"] == pytest.approx(0.1 * (line["logps/chosen"] + 3), rel=1e-5)


def test_given_log_probabilities_of_a_set_passed_to_evaluate_are_used(tokenizer, make_args):
    """Only the constructor's sets are looked at; those of evaluate(set) and predict(set) are ignored in silence."""
    trainer = trainer_of(tokenizer, make_args(), policy_of(tokenizer), CHAT_ROWS[4:])
    found = trainer.evaluate(Dataset.from_list(given_rows()))
    assert found["eval_rewards/chosen"] == pytest.approx(0.1 * (found["eval_logps/chosen"] + 3), rel=1e-5)


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_the_scaling_of_a_reference_model_takes_part_in_its_identity(tokenizer):
    """ModelReference.weights() are parameters and buffers; the alpha of a PeftModel is neither, so the cached values
    of one alpha are used for another."""
    found = set()
    for alpha in (8, 64):
        other = randomize(policy_of(tokenizer, LoraConfig(lora_alpha=alpha, **LORA)))
        found.add(fingerprint(make_reference("auto", policy_of(tokenizer), ref_model=other)))
    assert len(found) == 2


def test_the_active_adapter_of_a_reference_model_takes_part_in_its_identity(tokenizer):
    """Nor is which adapter is active."""
    found = set()
    for active in ("default", "two"):
        other = policy_of(tokenizer, LoraConfig(**LORA))
        torch.manual_seed(5)
        other.add_adapter("two", LoraConfig(init_lora_weights=False, **LORA))
        other.set_adapter(active)
        found.add(fingerprint(make_reference("auto", policy_of(tokenizer), ref_model=other)))
    assert len(found) == 2


def test_the_constants_of_an_eight_bit_base_take_part_in_its_identity(tokenizer, tmp_path):
    """int8 codes are scaled by SCB, an attribute that is neither parameter nor buffer: a layer of twice the size has
    the same codes and the same identity."""
    found, values = set(), []
    for factor in (1.0, 2.0):
        model = build_tiny_llama(tokenizer)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(factor)
        model.save_pretrained(tmp_path / str(factor))
        tokenizer.save_pretrained(tmp_path / str(factor))
        policy = load_policy(
            str(tmp_path / str(factor)), quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
        )
        install_scoring(policy.get_base_model())
        found.add(fingerprint(make_reference("base", policy)))
        values.append(logps(policy.train()))
    assert not torch.allclose(*values)
    assert len(found) == 2


def test_a_fresh_adapter_beside_whole_modules_leaves_the_cache_as_it_is(tokenizer):
    """An `initial` reference whose LoRA adds nothing drops A and B from its identity, but keeps their scalings (by
    layer): another rank, alpha or target misses everything."""
    found = set()
    for rank in (4, 8):
        policy = policy_of(tokenizer, LoraConfig(r=rank, bias="all", **LORA), attention_bias=True)
        found.add(fingerprint(make_reference("auto", policy)))
    assert len(found) == 1


# ---- records ---------------------------------------------------------------------------------------------------------


def test_a_record_of_the_last_version_can_be_read(base_folder, rows_file, tmp_path):
    """Fields it lacks: TypeError from the dataclass, past main()."""
    run = tmp_path / "run"
    assert main(train_words(base_folder, rows_file, run)) == 0
    path = run / "qlora_dpo.json"
    record = json.loads(path.read_text())
    loss = record.pop("loss")
    for name in ("reference_source", "reference_hash", "stacked_on"):
        del record[name]
    record |= {"loss_type": loss["loss_type"][0], "label_smoothing": loss["label_smoothing"]}
    path.write_text(json.dumps(record))
    assert main(["evaluate", "--adapter", str(run), "--dataset_name", rows_file, *QUIET]) == 0


# ---- a second look ---------------------------------------------------------------------------------------------------


def test_sync_of_a_kasa_adapter_is_refused(tokenizer):
    """KaSA computes B diag(lora_diag) A: the average was taken of B and A alone, and the policy's trained diagonal
    stayed in force in the reference, which moved with every step."""
    config = pytest.importorskip("peft.tuners.lora.config")
    policy = policy_of(tokenizer, LoraConfig(r=4, kasa_config=config.KasaConfig(), **LORA))
    with pytest.raises(REFUSED, match=r"must have a plain LoRA on linear layers.*lora_diag"):
        make_reference("auto", policy, average=(0.5, 64))


def test_a_stack_on_trained_tokens_is_refused_before_it_is_trained(tokenizer, make_args):
    """An SFT adapter with trainable_token_indices: the stack trained, and its first save was a KeyError of PEFT's, that
    looks for the new adapter's tokens."""
    policy = randomize(policy_of(tokenizer, LoraConfig(trainable_token_indices=[9, 10], **LORA)))
    with pytest.raises(REFUSED, match=r"must not train tokens.*Merge it into its base first"):
        trainer_of(tokenizer, make_args(max_steps=1), policy, peft_config=LoraConfig(r=2, **LORA))


def test_a_reference_model_with_prompt_learning_is_refused_with_the_reason(tokenizer, make_args):
    """The policy is looked at, `ref_model` is not: its virtual tokens shift every row."""
    other = get_peft_model(build_tiny_llama(tokenizer), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(REFUSED, match="token"):
        trainer_of(tokenizer, make_args(max_steps=1), policy_of(tokenizer), ref_model=other).train()


def test_padding_that_trainer_writes_into_the_config_leaves_the_cache_as_it_is(tokenizer, make_args, tmp_path):
    """Trainer sets config.pad_token_id (and the others) to the tokenizer's, after the identity was computed: a second
    trainer on the same model computes everything again. They decide no log-probability. precomputed._WITHOUT_EFFECT."""
    options = {"max_steps": 1, "precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "c.sqlite")}
    policy = policy_of(tokenizer, LoraConfig(**LORA))
    policy.get_base_model().config.pad_token_id = None
    trainer_of(tokenizer, make_args(learning_rate=0.0, **options), policy).train()
    again = trainer_of(tokenizer, make_args(learning_rate=0.0, **options), policy)
    again.train()
    assert again.reference.misses == 0


def test_a_moving_reference_that_has_not_moved_is_checked_when_resuming(tokenizer, make_args):
    """Before its first update an average is its start, and the checkpoint holds neither factors nor a hash of it: a run
    resumed from another continued adapter goes on against another reference. resuming.check_same_run."""
    options = {"sync_ref_model": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    args = make_args(**options)
    trainer_of(tokenizer, args, trained(tokenizer, task_type="CAUSAL_LM")).train()
    other = trained(tokenizer, task_type="CAUSAL_LM")
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "lora_B" in n).mul_(2)
    with pytest.raises(ValueError, match=r"the reference was .* and is "):
        trainer_of(tokenizer, args, other).train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")


def test_a_checkpoint_of_three_layers_of_adapters_can_be_judged(
    base_folder, rows_file, tokenizer, tmp_path, chat_rows, make_args
):
    """SFT, DPO 1 and DPO 2 stacked by the library's own calls: `stacked_on` is None for two adapters below."""
    sft = trained_adapter(base_folder, tmp_path / "sft", tokenizer)
    one = trained_adapter(base_folder, tmp_path / "one", tokenizer)
    policy = load_policy(base_folder, adapter=sft, peft_config=LoraConfig(**LORA), quantize=False, dtype=torch.float32)
    randomize(policy, seed=5)
    args = make_args(max_steps=2, learning_rate=1e-2)
    trainer = QLoRADPOTrainer(
        model=policy, args=args, train_dataset=chat_rows, eval_dataset=chat_rows, processing_class=tokenizer,
        peft_config=LoraConfig(r=2, **LORA),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert len(frozen_adapters(trainer.model)) == 2
    assert one
    expected = trainer.evaluate()["eval_logps/chosen"]
    words = ["evaluate", "--adapter", args.output_dir, "--dataset_name", rows_file, "--reference", "base"]
    if main([*words, "--output_dir", str(tmp_path / "e"), *QUIET]) == 0:
        found = json.loads((tmp_path / "e" / "metrics.json").read_text())["eval_logps/chosen"]
        assert found == pytest.approx(expected, rel=1e-4)
