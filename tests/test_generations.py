"""Answers written after evaluations: whose they are, where they go, and that training does not notice."""

import contextlib
import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from transformers.integrations import TensorBoardCallback

from qlora_dpo import QLoRADPOTrainer
from qlora_dpo.generations import GENERATIONS_NAME, WAYS, answers, first_prompts

from test_trainer import policy_of
from tiny_chat import CHAT_ROWS, build_tiny_llama


class Writer:
    """What TensorBoard's callback writes to."""

    def __init__(self):
        self.texts, self.scalars = {}, {}

    def add_text(self, key, text, step=None):
        self.texts[key, step] = text

    def add_scalar(self, key, value, step=None):
        self.scalars[key, step] = value

    def flush(self):
        pass

    close = flush


class Tracker(TrainerCallback):
    """Somebody's own tracker."""

    def __init__(self):
        self.texts = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.texts += [(state.global_step, text) for key, text in logs.items() if key.startswith("eval_generations/")]


@pytest.fixture
def make_trainer(tokenizer, make_args):
    def make(policy=None, callbacks=(), **options):
        rows = Dataset.from_list(CHAT_ROWS)
        eval_dataset = options.pop("eval_dataset", rows.select(range(6)))
        defaults = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-2}
        return QLoRADPOTrainer(
            policy_of(tokenizer) if policy is None else policy,
            args=make_args(**(defaults | options)),
            train_dataset=rows,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )

    return make


def lines_of(trainer):
    return [json.loads(line) for line in Path(trainer.args.output_dir, GENERATIONS_NAME).read_text().splitlines()]


def continuation(model, tokenizer, prompt, count):
    """Greedy tokens, one forward each: the slow truth."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("reference", ["base", "initial", "none"])
def test_greedy_answers_are_the_policys_and_the_references_own(make_trainer, tokenizer, reference):
    """Against one forward for each token, on 4 evaluations of which the first and the last are answered."""
    options = {"sample_generations": 3, "sample_generations_every": 3, "sample_max_new_tokens": 9}
    trainer = make_trainer(policy_of(tokenizer, random_b=True), reference=reference, **options)
    start = copy.deepcopy(trainer.model).eval()
    trainer.train()
    lines = lines_of(trainer)
    assert [line["step"] for line in lines] == [1, 1, 1, 4, 4, 4]
    policy = trainer.model.eval()
    before = start.get_base_model() if reference == "initial" else start
    prompts = first_prompts(trainer.eval_dataset, 3)
    for prompt, line in zip(prompts, lines[3:], strict=True):
        assert line["prompt"] == tokenizer.decode(prompt)
        assert line["policy"]["greedy"] == continuation(policy, tokenizer, prompt, 9)
        if reference == "none":
            assert "reference" not in line
            continue
        with start.disable_adapter() if reference == "base" else contextlib.nullcontext():
            assert line["reference"]["greedy"] == continuation(before, tokenizer, prompt, 9)
    assert any(line["policy"] != line.get("reference") for line in lines[3:])


def test_answers_do_not_depend_on_the_prompts_beside_them(tokenizer, make_trainer):
    trainer = make_trainer()
    prompts = first_prompts(trainer.eval_dataset, 4)
    assert len({len(prompt) for prompt in prompts}) > 1
    together = answers(trainer.model, tokenizer, prompts, 8, 0, do_sample=False)
    assert together == [answers(trainer.model, tokenizer, [p], 8, 0, do_sample=False)[0] for p in prompts]


def test_sampled_answers_are_drawn_from_the_distribution_that_is_trained(tokenizer):
    """Not sharpened, and the same for the same seed only."""
    assert WAYS["sampled"] == {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    model = build_tiny_llama(tokenizer)
    drawn = [answers(model, tokenizer, [[5, 6, 7]], 8, seed, **WAYS["sampled"])[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_answer_ends_where_the_models_positions_do(tokenizer):
    """GPT-2 has an embedding for each position, and none beyond: 40 tokens of the prompt, and 8 of the answer."""
    sizes = {"vocab_size": len(tokenizer), "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 48}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    prompt = tokenizer.convert_tokens_to_ids(["cat"] * 40)
    (answer,) = answers(model, tokenizer, [prompt], 20, 0, do_sample=False)
    assert len(answer.split()) == 8


def test_a_run_with_generations_is_the_same_run(make_trainer, tokenizer):
    weights = []
    for count in (0, 2):
        policy = policy_of(tokenizer, lora_dropout=0.1)
        trainer = make_trainer(policy, sample_generations=count, disable_dropout=False)
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
        weights[-1]["next random numbers"] = torch.rand(3)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_every_tracker_gets_the_table_and_the_log_the_text(make_trainer, capsys):
    writer, tracker = Writer(), Tracker()
    trainer = make_trainer(
        callbacks=[TensorBoardCallback(writer), tracker], sample_generations=2, sample_generations_every=2
    )
    trainer.train()
    steps = sorted({step for key, step in writer.texts if key.startswith("eval/generations/")})
    assert steps == [1, 3]
    table = writer.texts["eval/generations/0", 1]
    assert all(part in table for part in ("|  | policy | reference |", "| greedy |", "| sampled |"))
    assert [step for step, _ in tracker.texts] == [1, 1, 3, 3]
    shown = capsys.readouterr().err
    assert [shown.count(label) for label in ("greedy, policy: ", "sampled, reference: ")] == [4, 4]


def test_named_sets_count_as_one_evaluation_and_no_reference_is_no_column(make_trainer):
    rows = Dataset.from_list(CHAT_ROWS)
    trainer = make_trainer(
        sample_generations=2, reference="none", eval_dataset={"a": rows.select([0, 1]), "b": rows.select([2])}
    )
    trainer.evaluate()
    assert [sorted(line) for line in lines_of(trainer)] == [["policy", "prompt", "step"]] * 2


def test_generations_take_no_time_from_the_trainings_speed(make_trainer, monkeypatch):
    import time

    from qlora_dpo import generations

    real = generations.answers
    monkeypatch.setattr(generations, "answers", lambda *a, **k: (time.sleep(0.5), real(*a, **k))[1])
    trainer = make_trainer(sample_generations=1, sample_max_new_tokens=2, max_steps=3)
    trainer.train()
    speeds = [line["pairs_per_second"] for line in trainer.state.log_history if "pairs_per_second" in line]
    assert min(speeds[1:]) > 8 / 1.5  # 8 pairs a step; two seconds of sleep lie between two of them


def test_what_cannot_be_answered_is_refused(make_trainer, make_args):
    with pytest.raises(ValueError, match="without `eval_dataset`"):
        make_trainer(sample_generations=1, eval_dataset=None, eval_strategy="no")
    with pytest.raises(ValueError, match="0 or more"):
        make_args(sample_generations=-1)
