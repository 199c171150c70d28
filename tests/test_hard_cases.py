"""Hard cases, each of which went wrong once: A wrong numbers in silence, B crashes, C small."""

import copy
import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml
from datasets import Dataset, concatenate_datasets
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import TrainerCallback
from transformers.integrations.neftune import neftune_post_forward_hook

from qlora_dpo import QLoRADPOTrainer, load_policy
from qlora_dpo.__main__ import main
from qlora_dpo.cli import parse
from qlora_dpo.data import TokenLimits, prepare_dataset
from qlora_dpo.files import load_rows
from qlora_dpo.layouts import GroupCollator
from qlora_dpo.model import default_quantization
from qlora_dpo.preferences import parse_row

from test_cli import CLASSES, QUIET, REQUIRED, parsed, train_words
from tiny_chat import CHAT_ROWS, WORDS, build_tiny_llama, ranked_row
from tiny_models import ARCHITECTURES, COMMON, FOUR_EXPERTS, _refill, build

RANKED = [ranked_row(seed, count) for seed, count in enumerate([3, 5, 2, 4, 3, 6, 2, 5])]
LIMITS = TokenLimits(1024)
REFUSED = (ValueError, NotImplementedError)


def as_dataset(rows):
    return Dataset.from_list(rows) if isinstance(rows, list) else rows


def prep(rows, tokenizer, limits=LIMITS, **options):
    return prepare_dataset(as_dataset(rows), tokenizer, limits, **options)


def policy_of(tokenizer, random_b=False, **lora):
    model = build_tiny_llama(tokenizer)
    torch.manual_seed(1)
    defaults = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": not random_b}
    return get_peft_model(model, LoraConfig(**(defaults | lora)))


def trainer_of(tokenizer, args, rows=CHAT_ROWS, eval_rows=None, policy=None, **options):
    return QLoRADPOTrainer(
        model=policy or policy_of(tokenizer),
        args=args,
        train_dataset=as_dataset(rows),
        eval_dataset=as_dataset(eval_rows),
        processing_class=tokenizer,
        **options,
    )


def pairs_seen(tokenizer, args, eval_rows, rows=None):
    """How many pairs an evaluation hands to compute_metrics."""
    seen = []
    trainer = trainer_of(
        tokenizer, args, rows, eval_rows, compute_metrics=lambda p: seen.append(len(p.label_ids)) or {"x": 1}
    )
    trainer.evaluate()
    return seen[0]


def trained_adapter(base_folder, folder, tokenizer):
    """A folder with an adapter that is not fresh."""
    policy = load_policy(base_folder, quantize=False, dtype=torch.float32)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- A: wrong numbers, in silence ---------------------------------------------------------------------------------


def test_a_model_string_that_is_an_adapter_folder_keeps_the_adapter(tokenizer, base_folder, make_args, tmp_path):
    """transformers loads base + adapter, get_peft_model overwrites the adapter: the SFT weights are gone, no word."""
    folder = trained_adapter(base_folder, tmp_path / "sft", tokenizer)
    trainer = trainer_of(tokenizer, make_args(bf16=True), policy=folder)
    assert trainer.reference.kind == "initial"
    assert trainer.reference.source == folder


def test_a_model_with_an_integrated_adapter_and_peft_config_is_refused(tokenizer, base_folder, make_args, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(trained_adapter(base_folder, tmp_path / "sft", tokenizer))
    with pytest.raises(REFUSED):
        trainer_of(tokenizer, make_args(), policy=model, peft_config=LoraConfig(target_modules="all-linear"))


def test_a_deepcopy_of_the_model_uses_its_own_weights(tokenizer, make_args):
    trainer = trainer_of(tokenizer, make_args())
    twin = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
        assert twin(input_ids=torch.tensor([[1, 9, 10, 11]])).logits.abs().max() == 0


def test_a_dropout_stays_off_after_evaluate(tokenizer, make_args):
    """noise_off puts dropout back to train mode after Trainer has set the whole model to eval."""
    policy = policy_of(tokenizer, random_b=True, lora_dropout=0.5)
    args = make_args(disable_dropout=False, max_steps=1, reference="base")
    trainer = trainer_of(tokenizer, args, eval_rows=RANKED, policy=policy)
    trainer.train()
    trainer.evaluate()
    ids = torch.tensor([[1, 9, 10, 11]])
    with torch.no_grad():
        assert torch.equal(trainer.model(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
    assert {module.training for module in trainer.model.modules()} == {False}


def test_a_prompt_learning_without_reference_is_refused(tokenizer, make_args):
    """Predictors point into rows that PEFT has shifted by the virtual tokens; the check is shifted as well."""
    model = get_peft_model(build_tiny_llama(tokenizer), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(REFUSED):
        trainer_of(tokenizer, make_args(max_steps=1, reference="none"), policy=model).train()


def test_a_eval_rows_beyond_a_window_that_the_training_rows_do_not_reach(tokenizer, make_args):
    """Qwen2-MoE, PhiMoE and Doge know their window, Llama 4 its chunks, only in the mask."""
    rng = random.Random(0)

    def rows(length):
        words = [" ".join(rng.choices(WORDS, k=length)) for _ in range(4)]
        return [{"prompt": text, "chosen": " the cat yes", "rejected": " the dog no"} for text in words]

    short, long = rows(2), rows(30)
    options = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    window = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}
    found = {}
    for layout in ("auto", "padded"):
        torch.manual_seed(0)
        config = hf.Qwen2MoeConfig(**(COMMON | options | window | FOUR_EXPERTS | {"max_window_layers": 0}))
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        _refill(model, torch.Generator().manual_seed(0))
        policy = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        trainer = trainer_of(tokenizer, make_args(batch_layout=layout), short, long, policy)
        found[layout] = trainer.evaluate()["eval_logps/chosen"]
    assert found["auto"] == pytest.approx(found["padded"], rel=1e-4)


def test_a_fresh_activated_lora_is_refused(tokenizer, make_args):
    """aLoRA looks for its invocation tokens in input_ids; with B = 0 the proof of the layout cannot see the adapter."""
    ids = tokenizer("<assistant>", add_special_tokens=False)["input_ids"]
    config = LoraConfig(r=4, alora_invocation_tokens=ids, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(NotImplementedError, match="activated LoRA"):
        trainer_of(tokenizer, make_args(), policy=get_peft_model(build_tiny_llama(tokenizer), config))


def test_a_olora_in_capitals_is_refused(tokenizer, make_args):
    """PEFT takes the name in any case, the check does not; the run starts with a margin of 0.037 instead of 0."""
    with pytest.raises(ValueError, match="init_lora_weights"):
        trainer_of(tokenizer, make_args(reference="base"), policy=policy_of(tokenizer, init_lora_weights="OLoRA"))


def test_a_neftune_noise_on_an_adapted_embedding_is_off_in_the_reference(tokenizer, make_args):
    policy = policy_of(tokenizer, target_modules=["embed_tokens", "q_proj"])
    embedding = policy.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)
    trainer = trainer_of(tokenizer, make_args(max_steps=1), policy=policy)
    found = []

    class Twice(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            (batch,) = GroupCollator(0)([trainer.train_dataset[i] for i in range(3)])["pieces"]
            found.extend(trainer.reference(trainer.model, batch)["logps"] for _ in range(2))

    trainer.add_callback(Twice())
    trainer.train()
    assert torch.equal(found[0], found[1])


def test_a_layerdrop_is_off_in_the_reference(tokenizer, make_args):
    config = ARCHITECTURES["opt"]()
    config.layerdrop = 0.5
    policy = get_peft_model(hf.AutoModelForCausalLM.from_config(config), LoraConfig(target_modules="all-linear"))
    trainer = trainer_of(tokenizer, make_args(), policy=policy)
    trainer.model.train()
    (batch,) = GroupCollator(0)([trainer.train_dataset[i] for i in range(3)])["pieces"]
    found = [trainer.reference(trainer.model, batch)["logps"] for _ in range(6)]
    assert all(torch.equal(found[0], other) for other in found)


def test_a_tools_do_not_gain_the_null_fields_that_arrow_adds(tokenizer):
    """Two rows with different tools: Arrow gives each the other's parameters as null, and they reach the template."""
    tok = copy.deepcopy(tokenizer)
    keys = "{% for t in tools or [] %}{% for k in t.function.parameters.properties %} {{ k }} {% endfor %}{% endfor %}"
    tok.chat_template = keys + tok.chat_template

    def tool(name):
        parameters = {"type": "object", "properties": {name: {"type": "string"}}}
        return [{"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}]

    rows = [CHAT_ROWS[1] | {"tools": tool("red")}, CHAT_ROWS[2] | {"tools": tool("blue")}]
    assert prep(rows, tok)[0][1]["prompt_ids"] == prep(rows[1:], tok)[0][0]["prompt_ids"]


def test_a_tool_calls_do_not_gain_the_null_fields_that_arrow_adds(tokenizer):
    tok = copy.deepcopy(tokenizer)
    tok.chat_template = (
        "<s>{% for m in messages %}{{ '<' + m['role'] + '>' }} {{ m['content'] or '' }} "
        "{% for c in m.tool_calls or [] %}{% for k in c.function.arguments %} {{ k }} {% endfor %}{% endfor %}<end>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )

    def row(i, argument):
        call = {"type": "function", "function": {"name": "f", "arguments": {argument: "x"}}}
        chosen = [{"role": "assistant", "content": None, "tool_calls": [call]}]
        return {"prompt": CHAT_ROWS[i]["prompt"], "chosen": chosen, "rejected": CHAT_ROWS[i]["rejected"]}

    rows = [row(1, "red"), row(2, "blue")]
    assert prep(rows, tok)[0][1]["completion_ids"] == prep(rows[1:], tok)[0][0]["completion_ids"]


def test_a_chat_template_kwargs_of_other_rows_are_not_passed_as_none(tokenizer):
    tok = copy.deepcopy(tokenizer)
    default = "{% if fancy is not defined %}{% set fancy = true %}{% endif %}<s>{% if fancy %} yes {% endif %}"
    tok.chat_template = default + tok.chat_template.removeprefix("<s>")
    rows = [CHAT_ROWS[1] | {"chat_template_kwargs": {"fancy": True}}, CHAT_ROWS[2] | {"chat_template_kwargs": {"o": 1}}]
    assert prep(rows, tok)[0][1]["prompt_ids"] == prep(rows[1:], tok)[0][0]["prompt_ids"]


def test_a_scores_that_are_text_are_refused_or_read_as_numbers():
    """As text, "9" is above "10"."""
    with pytest.raises(ValueError, match="must be numbers"):
        parse_row({"prompt": "x", "completions": ["a", "b"], "scores": ["9", "10"]})


def test_a_completions_that_are_one_text_are_refused():
    """Else every character becomes a completion."""
    with pytest.raises(ValueError, match="completions"):
        parse_row({"prompt": "x", "completions": "ab", "pairs": [[0, 1]]})


def test_a_ties_make_no_pair_in_a_torch_formatted_set(tokenizer):
    """A set of 0-d tensors has no equal elements: 6 pairs instead of 2, each tie both ways round."""
    rows = [{"prompt": "the cat", "completions": [" a dog", " red bird", " ok yes"], "scores": [1.0, 1.0, 2.0]}]
    assert prep(Dataset.from_list(rows).with_format("torch"), tokenizer)[1].pairs == prep(rows, tokenizer)[1].pairs


def test_a_eval_stream_with_workers_counts_every_pair(tokenizer, make_args):
    """Each worker numbers its rows from 0, and pairs are keyed by that number: 23 pairs instead of 39."""
    whole = prep(RANKED, tokenizer)[1].pairs
    train = Dataset.from_list(CHAT_ROWS).to_iterable_dataset()
    stream = Dataset.from_list(RANKED).to_iterable_dataset(num_shards=4)
    assert pairs_seen(tokenizer, make_args(max_steps=1, dataloader_num_workers=2), stream, train) == whole


def test_a_concatenated_tokenised_sets_count_every_pair(tokenizer, make_args):
    (one, first), (two, second) = prep(RANKED, tokenizer), prep(RANKED[::-1], tokenizer)
    assert pairs_seen(tokenizer, make_args(), concatenate_datasets([one, two])) == first.pairs + second.pairs


@pytest.mark.parametrize(
    "more", [["--dtype", "float32", "--bf16", "false"], ["--no_load_in_4bit", "--dtype", "float32", "--bf16", "false"]]
)
def test_a_evaluate_repeats_the_numbers_of_a_float32_run(base_folder, rows_file, tmp_path, more):
    run = tmp_path / "run"
    assert main([*train_words(base_folder, rows_file, run), *more]) == 0
    words = ["evaluate", "--adapter", str(run), "--dataset_name", rows_file, "--dataset_test_split", "train[8:]"]
    assert main([*words, "--output_dir", str(tmp_path / "e"), *QUIET]) == 0
    found = json.loads((tmp_path / "e" / "metrics.json").read_text())
    after = json.loads((run / "metrics.json").read_text())["after"]
    assert found["eval_rewards/margins"] == pytest.approx(after["eval_rewards/margins"], rel=1e-6)


def test_a_evaluate_repeats_the_numbers_of_a_pair_strategy(base_folder, tmp_path):
    """`pair_strategy` decides which pairs are judged, and is not in qlora_dpo.json."""
    path, run = tmp_path / "ranked.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps(ranked_row(seed)) + "\n" for seed in range(6)))
    splits = ["--dataset_test_split", "train", "--dataset_train_split", "train"]
    assert main([*train_words(base_folder, str(path), run), "--pair_strategy", "best_vs_worst", *splits]) == 0
    words = ["evaluate", "--adapter", str(run), "--dataset_name", str(path)]
    assert main([*words, "--output_dir", str(tmp_path / "e"), *QUIET]) == 0
    found = json.loads((tmp_path / "e" / "metrics.json").read_text())
    after = json.loads((run / "metrics.json").read_text())["after"]
    assert found["eval_rewards/margins"] == pytest.approx(after["eval_rewards/margins"], rel=1e-6)


def test_a_model_revision_of_the_command_line_is_recorded(base_folder, rows_file, tmp_path):
    """`evaluate` would load `main` instead."""
    assert main([*train_words(base_folder, rows_file, tmp_path / "o"), "--model_revision", "abc123"]) == 0
    assert json.loads((tmp_path / "o" / "qlora_dpo.json").read_text())["base_revision"] == "abc123"


def test_a_revision_of_load_policy_is_recorded(base_folder, make_args, chat_rows):
    policy = load_policy(base_folder, revision="abc123")
    trainer = QLoRADPOTrainer(model=policy, args=make_args(bf16=True), train_dataset=chat_rows)
    trainer.save_model()
    assert json.loads(Path(trainer.args.output_dir, "qlora_dpo.json").read_text())["base_revision"] == "abc123"


def test_a_model_init_kwargs_with_a_model_object_are_refused(tokenizer, make_args):
    with pytest.raises(REFUSED):
        trainer_of(tokenizer, make_args(model_init_kwargs={"revision": "x"}))


def test_a_model_init_kwargs_of_the_command_line_are_used_or_refused(base_folder, rows_file, tmp_path):
    words = [*train_words(base_folder, rows_file, tmp_path / "o"), "--model_init_kwargs", '{"no_such_option": 1}']
    try:
        code = main(words)
    except TypeError:
        code = 2
    assert code != 0


def test_a_label_smoothing_factor_is_refused(tokenizer, make_args):
    """TrainingArguments' own smoothing: accepted and ignored."""
    with pytest.raises(REFUSED):
        trainer_of(tokenizer, make_args(label_smoothing_factor=0.1))


def test_a_fp16_on_a_cpu_is_refused(tokenizer, make_args):
    """Accepted, and everything is computed in fp32."""
    with pytest.raises(REFUSED):
        trainer_of(tokenizer, make_args(fp16=True))


def test_a_torch_dtype_is_honoured(base_folder):
    """transformers prefers `dtype`, for which load_base has put its own default."""
    policy = load_policy(base_folder, quantize=False, torch_dtype=torch.float32)
    assert policy.get_base_model().dtype == torch.float32


def test_a_trust_remote_code_in_model_init_kwargs_is_kept(monkeypatch, base_folder, make_args, chat_rows):
    import qlora_dpo.arguments as module

    given, load = {}, module.load_base
    monkeypatch.setattr(module, "load_base", lambda m, **k: given.update(k) or load(m, **k))
    args = make_args(model_init_kwargs={"trust_remote_code": True}, bf16=True)
    QLoRADPOTrainer(model=base_folder, args=args, train_dataset=chat_rows)
    assert given["trust_remote_code"] is True


def test_a_throughput_with_named_eval_sets_is_positive(tokenizer, make_args):
    """Trainer calls evaluate() for each named set from within evaluate(): evaluation time is taken off twice."""
    sets = {name: Dataset.from_list(RANKED) for name in "abc"}
    args = make_args(max_steps=6, eval_strategy="steps", eval_steps=1, logging_steps=3)
    start = time.perf_counter()
    trainer = trainer_of(tokenizer, args, eval_rows=sets)
    trainer.train()
    whole = time.perf_counter() - start
    logs = [log for log in trainer.state.log_history if "pairs_per_second" in log]
    assert all(log["pairs_per_second"] > 1 / whole for log in logs), [log["pairs_per_second"] for log in logs]


TWO_PROCESSES = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer
from tiny_chat import CHAT_ROWS, build_chat_tokenizer, build_tiny_llama
tokenizer, rows = build_chat_tokenizer(), Dataset.from_list(CHAT_ROWS)
args = QLoRADPOConfig(output_dir={out!r}, bf16=False, report_to=[], save_strategy="no", max_steps=2, learning_rate=1e-2)
assert args.world_size == 2
policy = get_peft_model(build_tiny_llama(tokenizer), LoraConfig(r=4, target_modules="all-linear"))
trainer = QLoRADPOTrainer(policy, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
trainer.evaluate()
trainer.train()
sums = [None, None]
total = sum(p.double().sum().item() for p in trainer.model.parameters() if p.requires_grad)
torch.distributed.all_gather_object(sums, total)
if args.process_index == 0:
    print("SUMS", *sums)
"""


def test_a_two_processes_stay_equal_after_an_evaluation_before_training(tmp_path):
    """`qlora-dpo train` evaluates first; the model then counts as prepared and is never wrapped in DDP."""
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(tests=str(Path(__file__).parent), out=str(tmp_path / "o")))
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29677",
        str(script),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    line = next(line for line in done.stdout.splitlines() if line.startswith("SUMS"))
    assert line.split()[1] == line.split()[2]


# ---- B: crashes on plausible input, errors that do not say what to do -----------------------------------------------


def test_b_a_thousand_rows_may_be_dropped_at_the_start(tokenizer):
    """Arrow takes the type of `pairs` and `completion_ids` from the first 1,000 rows: null if all were dropped."""
    tie = {"prompt": "the cat", "completions": [" a dog", " b dog"], "scores": [1.0, 1.0]}
    kept, _ = prep([tie] * 1001 + [RANKED[0]] * 3, tokenizer)
    assert len(kept) == 3


def test_b_a_stream_may_be_the_eval_set_of_a_map_style_train_set(tokenizer, make_args):
    """Dispatching is switched off for a train stream only: RuntimeError in split_with_sizes."""
    stream = Dataset.from_list(RANKED).to_iterable_dataset()
    trainer = trainer_of(tokenizer, make_args(per_device_eval_batch_size=4), eval_rows=stream)
    plain = trainer_of(tokenizer, make_args(per_device_eval_batch_size=4), eval_rows=RANKED)
    expected = plain.evaluate()["eval_logps/chosen"]
    assert trainer.evaluate()["eval_logps/chosen"] == pytest.approx(expected, rel=1e-5)


def test_b_numpy_values_of_compute_metrics_survive_a_checkpoint(tokenizer, make_args):
    """np.int64 reaches trainer_state.json: TypeError at the first save. Trainer denumpifies, this does not."""
    args = make_args(max_steps=1, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)

    def compute(prediction):
        return {"wins": (prediction.predictions[0] > prediction.predictions[1]).sum()}

    trainer = trainer_of(tokenizer, args, eval_rows=RANKED, compute_metrics=compute)
    trainer.train()
    assert (Path(args.output_dir) / "checkpoint-1" / "trainer_state.json").is_file()


def test_b_keys_of_compute_metrics_that_have_the_prefix_keep_it_once(tokenizer, make_args):
    """As in Trainer; else metric_for_best_model='eval_acc' fails."""
    trainer = trainer_of(tokenizer, make_args(), eval_rows=RANKED, compute_metrics=lambda p: {"eval_acc": 1.0})
    assert "eval_acc" in trainer.evaluate()


def test_b_an_empty_file_is_a_clear_error(base_folder, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="must have rows"):
        load_rows(str(path))


def test_b_an_empty_stream_is_a_clear_error(tokenizer, make_args):
    stream = Dataset.from_list(CHAT_ROWS).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"must keep at least one row|must have rows"):
        trainer_of(tokenizer, make_args(max_steps=1, max_length=2), stream).train()


def test_b_predict_works_on_raw_rows(tokenizer, make_args):
    found = trainer_of(tokenizer, make_args(), eval_rows=RANKED).predict(Dataset.from_list(RANKED))
    assert found.metrics["test_rewards/margins"] == 0


def test_b_an_adapter_of_another_name_can_be_evaluated_from_its_folder(base_folder, tokenizer, make_args, rows_file):
    """PEFT saves it in a sub-folder, the record lies above it."""
    base = hf.AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"), adapter_name="mine")
    trainer = trainer_of(tokenizer, make_args(max_steps=1), policy=model)
    trainer.train()
    trainer.save_model()
    out = Path(trainer.args.output_dir)
    folder = next(p.parent for p in out.rglob("adapter_config.json"))
    words = ["--dataset_name", rows_file, "--output_dir", str(out / "e"), "--bf16", "false", *QUIET]
    assert 0 in [main(["evaluate", "--adapter", str(path), *words]) for path in {out, folder}]


def test_b_a_trained_ia3_adapter_can_be_evaluated(tokenizer, make_args):
    """is_fresh looks at LoRA layers only, finds none, and the start is then checked: RuntimeError about PiSSA."""
    config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(build_tiny_llama(tokenizer), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ia3" in name:
                p.mul_(1.5)
    found = trainer_of(tokenizer, make_args(reference="base"), eval_rows=RANKED, policy=model).evaluate()
    assert found["eval_rewards/margins"] != 0


def test_b_weights_loaded_into_a_trainer_can_be_evaluated(tokenizer, make_args, tmp_path):
    """`starts_at_reference` is decided in the constructor, checked at the first evaluation."""
    options = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    one = trainer_of(tokenizer, make_args(output_dir=str(tmp_path / "a"), **options), eval_rows=RANKED)
    one.train()
    other = trainer_of(tokenizer, make_args(), eval_rows=RANKED)
    other.model.load_adapter(str(tmp_path / "a" / "checkpoint-2"), "default", is_trainable=True)
    key = "eval_rewards/margins"
    assert other.evaluate()[key] == pytest.approx(one.evaluate()[key])


def test_b_adalora_is_refused_with_a_reason(tokenizer, make_args):
    """AttributeError in is_fresh: its A and B are parameters, not layers. (And nobody updates its ranks.)"""
    config = AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", total_step=10)
    with pytest.raises(REFUSED):
        trainer_of(tokenizer, make_args(), policy=get_peft_model(build_tiny_llama(tokenizer), config))


def test_b_dora_on_a_four_bit_base_trains(base_folder, make_args, chat_rows):
    """It stopped with 'an initialisation that changes the base (PiSSA, ...)', which it is not."""
    config = LoraConfig(use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = load_policy(base_folder, peft_config=config)
    trainer = QLoRADPOTrainer(model=policy, args=make_args(max_steps=1, bf16=True), train_dataset=chat_rows)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == 0
    assert first["grad_norm"] > 0


def test_b_a_four_bit_head_that_is_tied_is_refused_with_the_reason(tokenizer, tmp_path):
    """An AssertionError without a word, from bitsandbytes, at the first forward."""
    build_tiny_llama(tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = default_quantization()
    config.llm_int8_skip_modules = ["nothing"]
    with pytest.raises(REFUSED, match="tied"):
        load_policy(str(tmp_path), quantization_config=config)


def test_b_config_and_adapter_with_an_equals_sign(base_folder, rows_file, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.dump(REQUIRED | {"beta": 0.3}))
    *_, args = parse(CLASSES, [f"--config={path}"], "qlora-dpo train")
    assert args.beta == 0.3


def test_b_adapter_with_an_equals_sign(base_folder, rows_file, tmp_path):
    assert main(train_words(base_folder, rows_file, tmp_path / "run")) == 0
    assert main(["evaluate", f"--adapter={tmp_path / 'run'}", "--dataset_name", rows_file, *QUIET]) == 0


def test_b_adapter_in_a_config_file(base_folder, rows_file, tmp_path):
    run, path = tmp_path / "run", tmp_path / "e.yaml"
    assert main(train_words(base_folder, rows_file, run)) == 0
    path.write_text(yaml.dump({"adapter": str(run), "dataset_name": rows_file}))
    assert main(["evaluate", "--config", str(path), *QUIET]) == 0


@pytest.mark.parametrize("words", [["train", "--config"], ["evaluate", "--dataset_name", "x", "--adapter"]])
def test_b_a_last_option_without_its_value(words):
    try:
        assert main(words) == 2
    except SystemExit as error:  # argparse's own
        assert error.code == 2


def test_b_malformed_yaml_is_an_error_not_a_traceback(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: [1\nb: {")
    assert main(["train", "--config", str(path)]) == 2


@pytest.mark.parametrize(
    ("option", "value"), [("--model_name_or_path", "nobody/none"), ("--dataset_name", "nobody/none")]
)
def test_b_a_hub_id_that_cannot_be_had_is_an_error_not_a_traceback(base_folder, rows_file, tmp_path, option, value):
    """OSError and ConnectionError pass main()."""
    assert main([*train_words(base_folder, rows_file, tmp_path / "o"), option, value]) == 2


def test_b_a_malformed_data_file_is_an_error_not_a_traceback(base_folder, rows_file, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "chosen": \n')
    assert main([*train_words(base_folder, rows_file, tmp_path / "o"), "--dataset_name", str(path)]) == 2


def test_b_training_on_an_adapter_folder_says_what_a_user_can_do(base_folder, rows_file, tmp_path, tokenizer, capsys):
    """The command line always passes a `peft_config`: the adapter is trained on, and options of a new one refused."""
    folder = trained_adapter(base_folder, tmp_path / "sft", tokenizer)
    assert main([*train_words(folder, rows_file, tmp_path / "o"), "--lora_r", "8"]) == 2
    assert "Add --new_adapter true" in capsys.readouterr().err
    assert main(train_words(folder, rows_file, tmp_path / "o")) == 0
    assert "frozen copy" in capsys.readouterr().err
    assert main([*train_words(base_folder, rows_file, tmp_path / "n"), "--new_adapter", "true"]) == 2
    assert "`new_adapter` must be False for" in capsys.readouterr().err


def test_b_text_prompt_with_whole_conversations(tokenizer):
    """HuggingFaceH4/ultrafeedback_binarized; the README's trl-lib copy has no `prompt`."""
    turn = {"role": "user", "content": "the cat"}
    sides = {
        name: [turn, {"role": "assistant", "content": word}] for name, word in [("chosen", "yes"), ("rejected", "no")]
    }
    kept, _ = prep([{"prompt": "the cat", **sides}], tokenizer)
    assert kept[0]["prompt_ids"] == prep([sides], tokenizer)[0][0]["prompt_ids"]


def test_b_ranked_rows_of_a_csv_file(tokenizer, tmp_path):
    """README: all forms, .csv among the files. Lists can only be JSON there, as `tools` may be."""
    path = tmp_path / "r.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completions", "pairs"])
        writer.writerow(["the cat", json.dumps([" a dog", " red bird"]), "[[0, 1]]"])
    assert len(prep(load_rows(str(path)), tokenizer)[0][0]["completion_ids"]) == 2


# ---- C: small -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_c_pairs_of_a_formatted_set(tokenizer, name):
    rows = [{"prompt": "the cat", "completions": [" a dog", " red bird"], "pairs": [[0, 1]]}]
    assert prep(Dataset.from_list(rows).with_format(name), tokenizer)[1].pairs == 1


def test_c_messages_of_a_numpy_formatted_set(tokenizer):
    assert prep(Dataset.from_list(CHAT_ROWS).with_format("numpy"), tokenizer)[1].pairs == len(CHAT_ROWS)


def test_c_ranks_that_are_text_name_their_row(tokenizer):
    with pytest.raises(ValueError, match="Row 0"):
        prep([{"prompt": "a", "completions": ["a", "b"], "ranks": ["1", "2"]}], tokenizer)


def test_c_chat_template_kwargs_that_clash_name_their_row(tokenizer):
    with pytest.raises(ValueError, match="Row 0"):
        prep([CHAT_ROWS[1] | {"chat_template_kwargs": {"add_generation_prompt": True}}], tokenizer)


def test_c_empty_tools_text_means_no_tools(tokenizer):
    assert len(prep([CHAT_ROWS[1] | {"tools": ""}], tokenizer)[0]) == 1


def test_c_messages_with_null_from_and_value():
    """A file that mixes ShareGPT and role/content rows: Arrow gives every message all four keys."""
    message = {"from": None, "value": None, "role": "user", "content": "the cat"}
    row = {"prompt": [message], "chosen": [{**message, "content": "a"}], "rejected": [{**message, "content": "b"}]}
    assert parse_row(row).prompt == [{"role": "user", "content": "the cat"}]


def test_c_an_empty_completion_behind_a_prompt_that_ends_with_eos(tokenizer):
    """Behind any other prompt an empty completion is its EOS; here it is lost and the row dropped."""
    rows = [
        {"prompt": "the cat </s>", "chosen": " yes", "rejected": ""},
        {"prompt": "the cat", "chosen": " yes", "rejected": ""},
    ]
    assert len(prep(rows, tokenizer)[0]) == 2


def test_c_home_in_a_data_path(tmp_path, monkeypatch):
    """Expanded for models and adapters, not for data; a YAML file has no shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.jsonl").write_text(json.dumps(CHAT_ROWS[0]))
    assert len(load_rows("~/p.jsonl")) == 1


def test_c_brackets_in_a_data_path(tmp_path):
    path = tmp_path / "p[1].jsonl"
    path.write_text(json.dumps(CHAT_ROWS[0]))
    assert len(load_rows(str(path))) == 1


def test_c_a_yaml_list_of_reporters(tmp_path):
    *_, args = parsed(tmp_path, REQUIRED | {"report_to": ["tensorboard", "mlflow"]})
    assert args.report_to == ["tensorboard", "mlflow"]


def test_c_an_empty_yaml_list(tmp_path):
    *_, args = parsed(tmp_path, REQUIRED | {"report_to": []})
    assert args.report_to == []


def test_c_a_yaml_text_that_begins_with_a_dash(tmp_path):
    *_, args = parsed(tmp_path, REQUIRED | {"run_name": "-v2"})
    assert args.run_name == "-v2"


def test_c_yaml_resume_from_checkpoint_true(tmp_path):
    """Becomes the folder 'True'."""
    *_, args = parsed(tmp_path, REQUIRED | {"resume_from_checkpoint": True})
    assert args.resume_from_checkpoint is True


def test_c_a_record_with_a_key_of_a_later_version(base_folder, rows_file, tmp_path):
    run = tmp_path / "run"
    assert main(train_words(base_folder, rows_file, run)) == 0
    path = run / "qlora_dpo.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new": 1}))
    assert main(["evaluate", "--adapter", str(run), "--dataset_name", rows_file, *QUIET]) == 0


def test_c_a_list_given_to_evaluate_is_a_clear_error(tokenizer, make_args):
    with pytest.raises(TypeError, match="Dataset"):
        trainer_of(tokenizer, make_args()).evaluate(CHAT_ROWS)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_c_sampling_by_length_is_refused(make_args, strategy):
    """Trainer asks for an `input_ids` column that the user cannot give."""
    with pytest.raises(NotImplementedError, match="train_sampling_strategy"):
        make_args(train_sampling_strategy=strategy)


def test_c_a_model_without_a_name_asks_for_a_tokenizer(tokenizer, make_args, chat_rows):
    """OSError: Repo id must use alphanumeric chars."""
    with pytest.raises(ValueError, match="processing_class"):
        QLoRADPOTrainer(model=policy_of(tokenizer), args=make_args(), train_dataset=chat_rows)


def test_c_the_revision_reaches_the_tokenizer(monkeypatch, base_folder, make_args, chat_rows):
    import qlora_dpo.arguments as module

    given, load = {}, module.load_tokenizer
    monkeypatch.setattr(module, "load_tokenizer", lambda m, **k: given.update(k) or load(m, **k))
    args = make_args(model_init_kwargs={"revision": "abc"}, bf16=True)
    QLoRADPOTrainer(model=base_folder, args=args, train_dataset=chat_rows)
    assert given.get("revision") == "abc"


def test_c_options_of_trl_at_their_defaults_are_accepted(make_args):
    """A field of TRL is accepted at its neutral value."""
    options = {"f_alpha_divergence_coef": 0.5, "discopop_tau": 0.05, "ref_model_sync_steps": 512, "pad_token": None}
    args = make_args(ref_model_mixup_alpha=0.6, **options)
    assert args.ref_model_mixup_alpha == 0.6


def test_c_samples_per_second_of_a_stream(tokenizer, make_args):
    """The tree layout has one row per batch, which Trainer counts as one sample."""
    train, stream = (Dataset.from_list(rows).to_iterable_dataset() for rows in (CHAT_ROWS, RANKED))
    found = trainer_of(tokenizer, make_args(max_steps=1), train, stream).evaluate()
    assert found["eval_samples_per_second"] * found["eval_runtime"] == pytest.approx(len(RANKED), rel=0.3)


def test_c_token_ids_beyond_the_embedding_are_a_clear_error(tokenizer, make_args):
    model = build("llama")
    model.resize_token_embeddings(20)
    with pytest.raises(ValueError, match=r"Token ids must be below"):
        trainer_of(
            tokenizer, make_args(max_steps=1), policy=get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        ).train()


def test_c_a_head_that_is_offloaded_is_trained_through(tokenizer, make_args, base_folder, tmp_path):
    """It stopped, and blamed the model's logit rule."""
    options = {"device_map": {"model": "cpu", "lm_head": "disk"}, "offload_folder": str(tmp_path / "off")}
    model = hf.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, **options)
    policy = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = trainer_of(tokenizer, make_args(max_steps=1), policy=policy)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == 0
    assert first["grad_norm"] > 0


def test_c_a_prompt_that_both_sides_repeat_is_not_doubled(tokenizer):
    """As TRL does; a check costs a comparison."""
    prompt = CHAT_ROWS[1]["prompt"]
    row = {"prompt": prompt, "chosen": prompt + CHAT_ROWS[1]["chosen"], "rejected": prompt + CHAT_ROWS[1]["rejected"]}
    assert prep([row], tokenizer)[0][0]["prompt_ids"] == prep(CHAT_ROWS[1:2], tokenizer)[0][0]["prompt_ids"]
