"""Heads and routers other than plain: adapted, quantised, tied and padded heads, mixtures of experts."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer, load_policy, score_completions
from qlora_dpo.__main__ import main
from qlora_dpo.forward import ROUTER_LOSS, install_scoring, score_batch
from qlora_dpo.layouts import LAYOUTS, Group, make_batch
from qlora_dpo.losses import dpo_loss
from qlora_dpo.model import default_quantization, load_base
from qlora_dpo.record import read_record
from qlora_dpo.reference import make_reference
from qlora_dpo.score import load_scorer

from reference_impl import completion_logps, pair_loss
from tiny_chat import build_tiny_llama, chat_row
from tiny_models import build

BETA = 0.3
PROMPTS = [[9, 12, 14], [10]]
COMPLETIONS = [[[10, 11, 8, 2], [13, 9, 2], [7, 2]], [[5, 6, 2], [8, 9, 10, 11, 2]]]
PAIRS = [[(0, 1), (0, 2)], [(1, 0)]]
GROUPS = [Group(p, c, pairs, i) for i, (p, c, pairs) in enumerate(zip(PROMPTS, COMPLETIONS, PAIRS, strict=True))]


def quantised_head(tokenizer, folder):
    """A Llama whose head is 4-bit too."""
    build_tiny_llama(tokenizer).save_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["nothing"]
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    assert type(model.lm_head).__name__ == "Linear4bit"
    return model


MODELS = {
    "lora on the head": (lambda t, _: build_tiny_llama(t), {"target_modules": ["q_proj", "lm_head"]}),
    "lora on head and embeddings": (lambda t, _: build_tiny_llama(t), {"target_modules": ["embed_tokens", "lm_head"]}),
    "whole head trained": (
        lambda t, _: build_tiny_llama(t),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "tokens trained, head tied": (
        lambda t, _: build_tiny_llama(t, tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "trainable_token_indices": [8, 9]},
    ),
    "4-bit head": (quantised_head, {"target_modules": ["q_proj"]}),
    "lora on a 4-bit head": (quantised_head, {"target_modules": ["q_proj", "lm_head"]}),
    "tied embeddings": (lambda t, _: build_tiny_llama(t, tie_word_embeddings=True), {"target_modules": ["q_proj"]}),
    "tied bf16 embeddings": (
        lambda t, _: build_tiny_llama(t, tie_word_embeddings=True).bfloat16(),
        {"target_modules": ["q_proj"]},
    ),
    "padded vocabulary": (lambda t, _: padded_vocabulary(t), {"target_modules": ["q_proj"]}),
}


def padded_vocabulary(tokenizer):
    """Rows of the head beyond the tokenizer's vocabulary, which take part in the softmax."""
    model = build_tiny_llama(tokenizer)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    assert model.lm_head.out_features > len(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :].normal_()
    return model


def naive(policy, reference):
    """Log-probs and the gradient of the mean loss, one sequence at a time through the model's own logits."""
    pi = [completion_logps(policy, g.prompt_ids, g.completion_ids) for g in GROUPS]
    losses, first = [], 0
    for group, logps in zip(GROUPS, pi, strict=True):
        for w, l in group.pairs:
            ref = reference[first + w], reference[first + l]
            losses.append(pair_loss("sigmoid", logps[w], logps[l], *ref, 1, 1, BETA))
        first += len(group.completion_ids)
    return torch.cat(pi).detach(), gradient(policy, torch.stack(losses).mean())


def gradient(policy, loss):
    policy.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().float() for p in policy.parameters() if p.requires_grad])


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_head_equals_the_models_own_logits_in_values_and_gradients(name, chunk_size, tokenizer, tmp_path):
    """fp32: log-probs to 1e-5 of their size, gradients to 1e-4 of their norm; bf16 weights compute in bf16."""
    make, lora = MODELS[name]
    torch.manual_seed(0)
    model = make(tokenizer, tmp_path)
    policy = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **lora)).train()
    coarse = 2e-2 if model.dtype is torch.bfloat16 else None
    reference = make_reference("initial", policy)
    install_scoring(policy.get_base_model())
    with torch.no_grad():
        ref = torch.cat([completion_logps(policy, g.prompt_ids, g.completion_ids) for g in GROUPS]) - torch.tensor(
            [0.5, -0.25, 0.1, 0.3, -0.2]
        )
    logps, grad = naive(policy, ref)
    for layout in LAYOUTS:
        batch = make_batch(GROUPS, layout)
        scored = score_batch(policy, batch, chunk_size=chunk_size)["logps"]
        assert torch.equal(reference(policy, batch)["logps"], score_batch(policy, batch)["logps"].detach())
        assert ((scored - logps).abs() / logps.abs()).max() < (coarse or 1e-5), layout
        losses, _ = dpo_loss(scored, ref, batch["yw_idxs"], batch["yl_idxs"], BETA)
        found = gradient(policy, losses.mean())
        assert (found - grad).norm() < (coarse or 1e-4) * grad.norm(), layout
        assert grad.norm() > 1e-3


# ---- mixtures of experts ---------------------------------------------------------------------------------------------


def moe_run(trainer_class, config_class, tokenizer, folder, name, **options):
    """Three steps of a tiny mixture of experts; the log lines."""
    model = build(name)
    torch.manual_seed(1)
    policy = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    args = config_class(
        output_dir=str(folder), bf16=False, use_cpu=True, max_length=None, max_steps=3, per_device_train_batch_size=4,
        learning_rate=1e-2, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    rows = Dataset.from_list([chat_row(seed) for seed in range(12)])
    trainer = trainer_class(model=policy, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_router_loss_is_that_of_trl_in_padded_rows(tokenizer, tmp_path, name):
    """Loss and gradient norm to 1e-4 over three steps; the coefficient is large enough to show."""
    trl = pytest.importorskip("trl")
    run = {"tokenizer": tokenizer, "name": name, "router_aux_loss_coef": 0.5}
    theirs = moe_run(trl.DPOTrainer, trl.DPOConfig, folder=tmp_path / "trl", **run)
    ours = moe_run(QLoRADPOTrainer, QLoRADPOConfig, folder=tmp_path / "ours", batch_layout="padded", **run)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert mine["aux_loss"] == pytest.approx(other["aux_loss"], rel=1e-4)
    assert ours[0]["loss"] > 0.6931 + 0.5


def test_the_router_loss_over_unique_tokens_differs_by_little_and_is_the_models_own_on_them(tokenizer):
    """In `tree` a prompt counts once: another estimate of the balance, 0.2 to 3.2 % off in 12 batches of 2 models."""
    model = build("mixtral")
    install_scoring(model)
    found = {}
    with torch.no_grad():
        for layout in LAYOUTS:
            batch = make_batch(GROUPS, layout)
            found[layout] = score_batch(model, batch, (ROUTER_LOSS,))[ROUTER_LOSS].item()
        rows = make_batch(GROUPS, "padded")
        own = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], output_router_logits=True)
    assert found["padded"] == pytest.approx(own.aux_loss.item(), rel=1e-6)
    assert found["tree"] != found["padded"]
    assert found["tree"] == pytest.approx(found["padded"], rel=0.05)


def test_the_coefficient_of_the_models_config_is_the_default(tokenizer, tmp_path):
    run = {"trainer_class": QLoRADPOTrainer, "config_class": QLoRADPOConfig, "tokenizer": tokenizer, "name": "mixtral"}
    default = moe_run(folder=tmp_path, **run)
    off = moe_run(folder=tmp_path, router_aux_loss_coef=0.0, **run)
    assert default[0]["loss"] > off[0]["loss"]
    assert "aux_loss" not in off[0]


# ---- quantize_head ---------------------------------------------------------------------------------------------------


def test_a_head_is_quantised_on_request_and_never_adapted_by_default(base_folder):
    policy = load_policy(base_folder, quantize_head=True)
    head = policy.get_base_model().get_output_embeddings()
    assert type(head) is Linear4bit
    assert (head.weight.quant_state.quant_type, head.weight.quant_state.nested) == ("nf4", True)
    assert not head.support_avx512bf16_for_cpu
    adapted = [name for name, module in policy.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 2 * 7
    assert not any("lm_head" in name for name in adapted)
    assert type(load_policy(base_folder).get_base_model().lm_head) is torch.nn.Linear


def test_the_quantisation_given_is_kept_and_left_as_it_is(base_folder):
    given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["o_proj"])
    model = load_base(base_folder, given, quantize_head=True)
    assert model.lm_head.weight.quant_state.quant_type == "fp4"
    assert type(model.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    plain = default_quantization()
    load_base(base_folder, plain, quantize_head=True)
    assert plain.llm_int8_skip_modules is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": False}, "`quantize_head` must be False for a base that is not in 4 bit"),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "for a base that is not in 4 bit"),
        (
            {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"])},
            "`quantize_head` must be False for a head that stays as it is, got Linear",
        ),
    ],
)
def test_a_head_that_cannot_be_quantised_is_refused(base_folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_policy(base_folder, quantize_head=True, **options)


def test_a_tied_head_is_refused_by_name(tokenizer, tmp_path):
    build_tiny_llama(tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must not be tied to the embeddings.*Leave out `quantize_head`"):
        load_policy(str(tmp_path), quantize_head=True)


def test_training_with_a_four_bit_head_starts_at_its_reference_and_logs_exact_divergences(
    base_folder, make_args, chat_rows
):
    policy = load_policy(base_folder, quantize_head=True)
    args = make_args(max_steps=2, learning_rate=1e-3, bf16=None)
    trainer = QLoRADPOTrainer(policy, args=args, train_dataset=chat_rows, eval_dataset=chat_rows)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0
    assert trainer.state.log_history[1]["rewards/margins"] != 0
    assert trainer.data_collator.layout == "tree"
    assert trainer.evaluate()["eval_kl/chosen"] > 0


def test_evaluate_and_score_load_the_head_as_it_was_in_training(base_folder, rows_file, tmp_path, monkeypatch):
    """By `qlora_dpo.json`: the same rewards as at the end of the training."""
    run = tmp_path / "run"
    words = f"--model_name_or_path {base_folder} --dataset_name {rows_file} --output_dir {run} --quantize_head true"
    more = "--max_steps 2 --learning_rate 1e-3 --report_to none --dataset_test_split train --disable_tqdm true"
    assert main(["train", *words.split(), *more.split()]) == 0
    assert read_record(str(run)).quantization["llm_int8_skip_modules"] == []
    heads = []
    prepare = QLoRADPOTrainer.__init__

    def note(self, model, *args, **kwargs):
        heads.append(type(model.get_base_model().lm_head))
        prepare(self, model, *args, **kwargs)

    monkeypatch.setattr(QLoRADPOTrainer, "__init__", note)
    assert main(["evaluate", "--adapter", str(run), "--dataset_name", rows_file, "--report_to", "none"]) == 0
    assert heads == [Linear4bit]
    before = json.loads((run / "metrics.json").read_text())["after"]
    after = json.loads((run / "evaluations" / Path(rows_file).stem / "metrics.json").read_text())
    for key in ("eval_rewards/margins", "eval_logps/chosen", "eval_loss"):
        assert after[key] == pytest.approx(before[key], rel=1e-6), key
    scorer = load_scorer(str(run))
    assert type(scorer.policy.get_base_model().lm_head) is Linear4bit
    rows = [json.loads(line) for line in Path(rows_file).read_text().splitlines()]
    margins = [row["margin"] for row in score_completions(scorer, rows)]
    assert sum(margins) / len(margins) == pytest.approx(after["eval_rewards/margins"], rel=2e-2)
