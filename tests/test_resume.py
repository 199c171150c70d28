"""A run that is stopped goes on as if it had not been, from the last whole checkpoint, or it does not go on."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer, load_policy
from qlora_dpo.__main__ import main
from qlora_dpo.checkpoints import (
    MANIFEST_NAME,
    checkpoint_to_resume,
    damage,
    load_step_state,
    rotate,
    save_step_state,
    write_manifest,
)
from qlora_dpo.generations import GENERATIONS_NAME
from qlora_dpo.objective import make_objective
from qlora_dpo.reference import NoReference, make_reference
from qlora_dpo.resuming import groups_fingerprint
from qlora_dpo.step import Step

from test_cli import train_words
from test_trainer import RANKED, policy_of, trainer_of, weights
from tiny_chat import CHAT_ROWS, chat_row

NF4_IN_FP32 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
NOISY = {"lora_dropout": 0.2, **LORA}
SPEED = ("_per_second", "runtime", "peak_memory_gib")
GIVEN = [row | {"ref_logps": [-3.0 * i - n for n in range(2)]} for i, row in enumerate(CHAT_ROWS)]


def curve(trainer):
    """All that a log shows but for speed and the line that sums up a call of `train`."""
    lines = [line for line in trainer.state.log_history if "train_loss" not in line]
    return [{key: value for key, value in line.items() if not key.endswith(SPEED)} for line in lines]


def random_states():
    name, numbers, *rest = np.random.get_state()
    return [random.getstate(), (name, numbers.tolist(), *rest), torch.get_rng_state().tolist()]


def outcome(trainer):
    """What must be the same whether or not a run was stopped."""
    state = trainer.state
    return curve(trainer), state.best_metric, state.best_global_step, weights(trainer).tolist(), random_states()


def disturb():
    """Random numbers as those of a new process: others."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


@pytest.fixture(scope="module")
def sft(base_folder, tokenizer, tmp_path_factory):
    """A folder with an adapter that adds something."""
    folder = tmp_path_factory.mktemp("sft")
    policy = load_policy(base_folder, peft_config=LoraConfig(**LORA), quantize=False, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    policy.save_pretrained(folder)
    return str(folder)


# ---- to the last bit -----------------------------------------------------------------------------------------------

MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_max_rank": 8}
CASES = {
    "base": {"reference": "base"},
    "initial": {"adapter": True, "kind": "initial"},
    "stacked on a frozen adapter": {"adapter": True, "peft_config": LoraConfig(**NOISY), "kind": "adapter"},
    "path of an adapter": {"reference": "SFT", "kind": "adapter"},
    "path of a model": {"reference": "MODEL", "kind": "model"},
    "precomputed": {"precompute_ref_log_probs": True},
    "given": {"rows": GIVEN},
    "average, moved before the checkpoint": MOVING | {"kind": "average"},
    "average, moved after it": MOVING | {"ref_model_sync_steps": 4, "kind": "average"},
    "average of a continued adapter": MOVING
    | {"adapter": True, "kind": "average", "ref_model_sync_steps": 3, "ref_model_max_rank": 5},
    "bco_running_mean": {"loss_type": "bco_pair", "bco_running_mean": True, "gradient_accumulation_steps": 2},
    "coupled pairs in two micro-batches": {"loss_type": "aot", "gradient_accumulation_steps": 2},
    "a group beyond the token budget": {"rows": RANKED, "max_tokens_per_forward": 20},
    "no reference": {"loss_type": "simpo", "kind": "none"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_run_goes_on_to_the_last_bit(case, base_folder, sft, tokenizer, make_args, tmp_path):
    """In the middle of an epoch and of a log line's pairs, on an NF4 base, with dropout, evaluations and answers."""
    case = {"rows": CHAT_ROWS[:8], "adapter": None, "kind": "base", "peft_config": None} | case
    rows, adapter, kind, stacked = (case.pop(name) for name in ("rows", "adapter", "kind", "peft_config"))
    case["reference"] = case.get("reference", "auto").replace("SFT", sft).replace("MODEL", base_folder)
    options = {
        "max_steps": 5, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 1,
        "logging_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "disable_dropout": False,
        "sample_generations": 1, "sample_generations_every": 2, "sample_max_new_tokens": 3,
        "metric_for_best_model": "eval_loss", "warmup_steps": 2,
    }  # fmt: skip
    if case.get("precompute_ref_log_probs"):
        case["reference_cache"] = str(tmp_path / "cache.sqlite")
    if case.get("gradient_accumulation_steps"):
        options["per_device_train_batch_size"] = 1

    def run(name, resume=None):
        torch.manual_seed(1)
        policy = load_policy(
            base_folder,
            adapter=sft if adapter else None,
            peft_config=stacked if adapter else LoraConfig(**NOISY),
            quantization_config=NF4_IN_FP32,
            dtype=torch.float32,
        )
        for module in policy.modules():  # an adapter from a folder has its own, none
            if hasattr(module, "lora_dropout"):
                module.lora_dropout.update({name: torch.nn.Dropout(0.2) for name in module.lora_dropout})
        trainer = QLoRADPOTrainer(
            model=policy,
            args=make_args(output_dir=str(tmp_path / name), **(options | case)),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(CHAT_ROWS[8:]),
            processing_class=tokenizer,
        )
        if resume:
            disturb()
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("a")
    expected = outcome(whole)
    assert whole.reference.kind == kind
    assert len({line["loss"] for line in expected[0] if "loss" in line}) > 1
    again = run("b", str(tmp_path / "a" / "checkpoint-3"))
    for one, other in zip(expected[0], curve(again), strict=True):
        assert one == other
    assert outcome(again) == expected
    lines = [[json.loads(line) for line in (tmp_path / n / GENERATIONS_NAME).read_text().splitlines()] for n in "ab"]
    assert [line["step"] for line in lines[0]] == [1, 3, 5]
    assert lines[1] == lines[0][2:]


# ---- what is whole -------------------------------------------------------------------------------------------------

SAVING = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2}


def args_in(folder):
    """The fixture `make_args` for another folder."""
    defaults = {"bf16": False, "logging_steps": 1, "report_to": [], "disable_tqdm": True}
    return lambda **options: QLoRADPOConfig(output_dir=str(folder / "run"), **(defaults | options))


@pytest.fixture(scope="module")
def three_checkpoints(tokenizer, tmp_path_factory):
    """A run of three steps with a checkpoint after each, one with a moving reference."""
    folder = tmp_path_factory.mktemp("three")
    make = args_in(folder)
    trainer_of(tokenizer, make(max_steps=3, sync_ref_model=True, ref_model_sync_steps=1, **SAVING)).train()
    return folder / "run"


@pytest.fixture
def three(three_checkpoints, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(three_checkpoints, tmp_path / "run"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = [
    "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "qlora_dpo.json", "reference/average.safetensors",
]  # fmt: skip
HURT = {
    "missing": (Path.unlink, "is missing"),
    "truncated": (cut, r"has [\d,]+ bytes instead of"),
    "one bit": (flip, "is not what was written"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("hurt", HURT)
def test_a_damaged_checkpoint_is_named_and_skipped(three, name, hurt):
    do, words = HURT[hurt]
    do(three / "checkpoint-3" / name)
    with pytest.warns(UserWarning, match=rf"checkpoint-3 is skipped: {name} {words}"):
        assert checkpoint_to_resume(True, str(three)) == str(three / "checkpoint-2")
    with pytest.raises(ValueError, match=rf"must be a complete checkpoint, got .*checkpoint-3: {name} {words}"):
        checkpoint_to_resume(str(three / "checkpoint-3"), str(three))


@pytest.mark.parametrize("content", ["", '{"files": {'])
def test_a_damaged_manifest_is_damage(three, content):
    (three / "checkpoint-3" / MANIFEST_NAME).write_text(content)
    assert damage(three / "checkpoint-3") == "manifest.json is not JSON"


def test_a_checkpoint_that_was_never_finished_is_skipped(three):
    """The manifest is written last: without one it is not whole, even if every other file is."""
    (three / "checkpoint-3" / MANIFEST_NAME).unlink()
    said = (
        "checkpoint-3 is skipped: manifest.json, which is written last, is missing: it was cut off, or another program"
    )
    with pytest.warns(UserWarning, match=said):
        assert checkpoint_to_resume("true", str(three)) == str(three / "checkpoint-2")


def test_with_no_whole_checkpoint_left_the_error_says_so(three, tmp_path):
    for folder in three.glob("checkpoint-*"):
        cut(folder / "optimizer.pt")
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(ValueError, match=r"got none but 3 that cannot be used in .*/run. Leave the option out"),
    ):
        checkpoint_to_resume(True, str(three))
    with pytest.raises(ValueError, match=r"got none in .*empty. Leave"):
        checkpoint_to_resume(True, str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"must be a checkpoint's folder, got .*checkpoint-9. Check the path"):
        checkpoint_to_resume(str(three / "checkpoint-9"), str(three))


def test_a_run_begins_anew_when_nothing_is_asked():
    assert [checkpoint_to_resume(asked, "nowhere") for asked in (None, False, "false")] == [None] * 3


def test_the_last_checkpoint_is_that_of_the_highest_step(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        write_manifest(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint_to_resume(True, str(tmp_path)) == str(tmp_path / "checkpoint-100")


def test_the_command_line_skips_a_damaged_checkpoint_and_shows_an_error_in_a_line(
    base_folder, rows_file, tmp_path, capsys
):
    run = tmp_path / "run"
    words = train_words(base_folder, rows_file, run)
    words[words.index("--save_strategy") + 1] = "steps"
    words += ["--save_steps", "1", "--max_steps", "2"]
    assert main(words) == 0
    last = (run / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    cut(run / "checkpoint-2" / "optimizer.pt")
    with pytest.warns(UserWarning, match="checkpoint-2 is skipped: optimizer.pt has"):
        assert main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert (run / "checkpoint-2" / "adapter_model.safetensors").read_bytes() == last
    assert damage(run / "checkpoint-2") is None
    capsys.readouterr()
    assert main([*words, "--resume_from_checkpoint", "true", "--beta", "0.3"]) == 2
    assert "`beta` was 0.1 and is 0.3" in capsys.readouterr().err


# ---- what must stay as it is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"beta": 0.2}, "`beta` was 0.1 and is 0.2"),
        ({"loss_type": "ipo"}, r"`loss_type` was \['sigmoid'\] and is \['ipo'\]"),
        ({"label_smoothing": 0.1}, "`label_smoothing` was 0.0 and is 0.1"),
        ({"seed": 7}, "`seed` was 42 and is 7; `data_seed` was 42 and is 7"),
        ({"learning_rate": 1e-3}, "`learning_rate` was 0.01 and is 0.001"),
        ({"lr_scheduler_type": "cosine"}, "`lr_scheduler_type` was linear and is cosine"),
        ({"warmup_steps": 3}, "`warmup_steps` was 0 and is 3"),
        ({"weight_decay": 0.1}, "`weight_decay` was 0.0 and is 0.1"),
        ({"max_grad_norm": 0.5}, "`max_grad_norm` was 1.0 and is 0.5"),
        ({"optim": "adamw_torch"}, "`optim` was adamw_torch_fused and is adamw_torch"),
        ({"gradient_accumulation_steps": 2}, r"groups in a step \(.*\) was 2 and is 4"),
        ({"bf16": True}, r"mixed precision \(`bf16`, `fp16`\) was no and is bf16"),
        ({"disable_dropout": False}, "`disable_dropout` was True and is False"),
        ({"reference": "none", "loss_type": "simpo"}, "the reference was base and is none"),
        ({"max_length": 20}, r"`max_length` was 1024 and is 20; .*the training data was 12 groups \(\w{16}\) and is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_change_the_run_is_refused_by_name(tokenizer, make_args, first_step, changed, said):
    other = trainer_of(tokenizer, make_args(max_steps=2, **(SAVING | changed)))
    with pytest.raises(ValueError, match=f"as it began, got another: (.*; )?{said}.*Set back what changed, or begin a"):
        other.train(resume_from_checkpoint=first_step)


def first_step_of(tokenizer, make_args):
    """The checkpoint of a run of one step."""
    args = make_args(max_steps=1, **SAVING)
    trainer_of(tokenizer, args).train()
    return f"{args.output_dir}/checkpoint-1"


@pytest.fixture(scope="module")
def first_step(tokenizer, tmp_path_factory):
    """The checkpoint of a run of one step, which no test changes."""
    return first_step_of(tokenizer, args_in(tmp_path_factory.mktemp("first")))


def test_all_that_changed_is_listed_at_once(tokenizer, make_args, first_step):
    policy = policy_of(tokenizer, lora_alpha=16)
    with torch.no_grad():
        policy.get_base_model().lm_head.weight.mul_(2)
    rows = [*CHAT_ROWS[1:], CHAT_ROWS[0]]
    other = trainer_of(tokenizer, make_args(max_steps=2, beta=0.2, **SAVING), rows, policy=policy)
    with pytest.raises(ValueError, match="as it began") as error:
        other.train(resume_from_checkpoint=first_step)
    for said in (
        "`beta` was 0.1 and is 0.2",
        "`lora_alpha` was 8 and is 16",
        "the hash of the frozen weights was",
        "the training data was 12 groups",
    ):
        assert said in str(error.value)
    assert str(error.value).count(" was ") == 4


def test_a_start_that_is_drawn_anew_is_refused_with_what_to_do(tokenizer, make_args):
    policy = policy_of(tokenizer, random_b=True)
    trainer_of(tokenizer, make_args(max_steps=1, **SAVING), policy=policy).train()
    other = policy_of(tokenizer, random_b=True)
    with torch.no_grad():
        next(p for p in other.parameters() if p.requires_grad).add_(1)
    with pytest.raises(
        ValueError, match=r"the reference was initial \(\w+\) and is initial \(\w+\) \(of .*: seed before"
    ):
        trainer_of(tokenizer, make_args(max_steps=2, **SAVING), policy=other).train(resume_from_checkpoint=True)


def test_another_quantisation_is_refused(base_folder, chat_rows, make_args):
    def trainer(steps, **options):
        config = BitsAndBytesConfig(**{**NF4_IN_FP32.to_dict(), **options})
        policy = load_policy(base_folder, quantization_config=config, dtype=torch.float32)
        return QLoRADPOTrainer(policy, args=make_args(max_steps=steps, **SAVING), train_dataset=chat_rows)

    trainer(1).train()
    with pytest.raises(ValueError, match="`bnb_4bit_quant_type` was nf4 and is fp4"):
        trainer(2, bnb_4bit_quant_type="fp4").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "free",
    [
        {"output_dir": "elsewhere"},
        {"max_steps": -1, "num_train_epochs": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"max_tokens_per_forward": 30, "batch_layout": "padded", "logps_chunk_size": 3},
        {"eval_strategy": "steps", "eval_steps": 1, "eval_kl": False, "per_device_eval_batch_size": 3},
        {"logging_steps": 3, "save_steps": 2, "save_total_limit": 1, "gradient_checkpointing": False},
        {"precompute_ref_log_probs": True},
        {"max_length": 500},  # which cuts nothing more
    ],
    ids=lambda free: next(iter(free)),
)
def test_what_leaves_the_run_as_it_is_may_change(tokenizer, make_args, first_step, tmp_path, free):
    if "precompute_ref_log_probs" in free:
        free = free | {"reference_cache": str(tmp_path / "cache.sqlite")}
    if "output_dir" in free:
        free = {"output_dir": str(tmp_path / "elsewhere")}
    args = make_args(**({"max_steps": 2} | SAVING | free))
    trainer = trainer_of(tokenizer, args, eval_rows=RANKED)
    trainer.train(resume_from_checkpoint=first_step)
    assert trainer.state.global_step >= 2


def test_data_are_known_by_their_tokens_whatever_holds_them(tokenizer, make_args):
    rows = trainer_of(tokenizer, make_args()).train_dataset
    same = [
        Dataset.from_list(rows.to_list(), features=rows.features),
        rows.select(range(len(rows))[::-1]).select(range(len(rows))[::-1]),
        rows.add_column("more", range(len(rows))).with_format("numpy"),
    ]
    assert {groups_fingerprint(one) for one in same} == {groups_fingerprint(rows)}
    others = [rows.select(range(11)), rows.select([1, 0, *range(2, 12)])]
    moved = rows.to_list()
    moved[0]["completion_ids"][0], moved[0]["completion_ids"][1] = moved[0]["completion_ids"][::-1]
    others += [Dataset.from_list(moved, features=rows.features)]
    others += [rows.add_column("weights", [[float(i)] for i in range(12)])]
    shifted = rows.to_list()  # a token from the end of the prompt to the start of its completions
    shifted[0]["prompt_ids"], last = shifted[0]["prompt_ids"][:-1], shifted[0]["prompt_ids"][-1]
    shifted[0]["completion_ids"][0].insert(0, last)
    others += [Dataset.from_list(shifted, features=rows.features)]
    assert len({groups_fingerprint(one) for one in [rows, *others]}) == 6


# ---- what a checkpoint holds, and which stay -----------------------------------------------------------------------


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


PLAIN = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "log_sums.json",
    "manifest.json", "optimizer.pt", "qlora_dpo.json", "rng_state.pth", "scheduler.pt", "tokenizer.json",
    "tokenizer_config.json", "trainer_state.json",
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, set()),
        ({"reference": "initial"}, set()),
        ({"sync_ref_model": True}, {"reference/average.safetensors"}),
        ({"loss_type": "bco_pair", "bco_running_mean": True}, {"reference/bco_delta.json"}),
    ],
    ids=["base", "initial", "average", "running mean"],
)
def test_a_checkpoint_holds_the_policys_adapter_and_no_other(tokenizer, make_args, options, more):
    folder = Path(first_step_of(tokenizer, lambda **more: make_args(**(options | more))))
    assert files(folder) == PLAIN | more
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert set(manifest["files"]) == PLAIN - {MANIFEST_NAME} | more
    assert not [path for path in (folder / "adapter_config.json").read_text().split('"') if path == "reference"]


def test_a_running_mean_is_found_again_to_the_last_bit(tmp_path):
    objective = make_objective(["bco_pair"], None, {"beta": 0.1}, bco_running_mean=True)
    before, after = (Step(NoReference(), objective, 0.1) for _ in range(2))
    before.bco_delta.add(torch.tensor([0.1, 0.2, -1 / 3]))
    save_step_state(before, tmp_path)
    load_step_state(after, tmp_path)
    assert vars(after.bco_delta) == vars(before.bco_delta)


def test_a_checkpoint_of_a_run_with_other_options_is_named(tokenizer, tmp_path):
    moving = make_reference("auto", policy_of(tokenizer), average=(0.5, 8))
    plain = make_objective(["sigmoid"], None, {"beta": 0.1})
    shifted = make_objective(["bco_pair"], None, {"beta": 0.1}, bco_running_mean=True)
    save_step_state(Step(NoReference(), plain, 0.1), tmp_path)
    assert not files(tmp_path)
    load_step_state(Step(NoReference(), plain, 0.1), tmp_path)
    for step, option, name in (
        (Step(moving, plain, 0.1), "sync_ref_model", "average.safetensors"),
        (Step(NoReference(), shifted, 0.1), "bco_running_mean", "bco_delta.json"),
    ):
        said = f"with `{option}` must hold reference/{name}, got none in {tmp_path}. Go on with the options of the run"
        with pytest.raises(RuntimeError, match=re.escape(said)):
            load_step_state(step, tmp_path)


def test_a_reference_adapter_is_not_in_the_checkpoint(base_folder, sft, chat_rows, tokenizer, make_args):
    policy = load_policy(base_folder, quantize=False, dtype=torch.float32)
    args = make_args(max_steps=1, reference=sft, **SAVING)
    QLoRADPOTrainer(policy, args=args, train_dataset=chat_rows).train()
    assert files(Path(args.output_dir, "checkpoint-1")) == PLAIN


def test_only_model_checkpoints_cannot_be_gone_on_from(tokenizer, make_args):
    args = make_args(max_steps=2, save_only_model=True, **SAVING)
    trainer_of(tokenizer, args).train()
    with (
        pytest.warns(UserWarning, match="checkpoint-2 is skipped: it was saved with `save_only_model=True`"),
        pytest.raises(ValueError, match="got none but 2 that cannot be used"),
    ):
        trainer_of(tokenizer, args).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"without the optimizer's state. Name another"):
        trainer_of(tokenizer, args).train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")


@pytest.mark.parametrize("only_model", [False, True])
@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_and_the_last_outlive_the_limit(tokenizer, make_args, limit, only_model):
    """The first step is made the best one: a loss that is higher is better here, and it only falls."""
    args = make_args(
        max_steps=4, eval_strategy="steps", eval_steps=1, save_total_limit=limit, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True, save_only_model=only_model, **SAVING,
    )  # fmt: skip
    trainer = trainer_of(tokenizer, args, eval_rows=CHAT_ROWS)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    left = {path.name for path in Path(args.output_dir).glob("checkpoint-*")}
    assert left == ({"checkpoint-1"} if limit == 1 else {"checkpoint-1", "checkpoint-4"})  # 1: as Trainer's, at the end
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    if not only_model:
        resumed = trainer_of(tokenizer, args, eval_rows=CHAT_ROWS)
        resumed.train(resume_from_checkpoint=True)
        assert (resumed.state.best_metric, resumed.state.best_global_step) == (trainer.state.best_metric, 1)


def test_rotation_never_deletes_the_new_checkpoint_for_one_that_is_not_whole(tmp_path):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 6:
            write_manifest(tmp_path / f"checkpoint-{step}")
    rotate(str(tmp_path), 2, kept=(tmp_path / "checkpoint-4", None))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-2"}
    rotate(str(tmp_path), 1, kept=(tmp_path / "checkpoint-4", tmp_path / "checkpoint-2"))
    assert len(list(tmp_path.iterdir())) == 2
    rotate(str(tmp_path), None, kept=())
    assert len(list(tmp_path.iterdir())) == 2


def test_older_checkpoints_go_when_the_new_one_is_whole(tokenizer, make_args, monkeypatch):
    """With `save_total_limit=1` there would be a moment without any that a run can go on from."""
    from qlora_dpo import saving as module

    seen = []

    def watched(run, limit, kept):
        seen.append({path.name: damage(path) for path in Path(run).glob("checkpoint-*")})
        rotate(run, limit, kept)

    monkeypatch.setattr(module, "rotate", watched)
    args = make_args(max_steps=3, save_total_limit=1, **SAVING)
    trainer_of(tokenizer, args).train()
    assert seen[1:] == [{"checkpoint-1": None, "checkpoint-2": None}, {"checkpoint-2": None, "checkpoint-3": None}]
    assert [path.name for path in Path(args.output_dir).glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_checkpoint_is_pushed_when_it_is_whole(tokenizer, make_args, monkeypatch):
    trainer = trainer_of(tokenizer, make_args(max_steps=1, sync_ref_model=True, **SAVING))
    pushed = []
    monkeypatch.setattr(trainer, "_push_from_checkpoint", lambda folder: pushed.append((folder, damage(Path(folder)))))
    trainer.args.push_to_hub = True  # the constructor would ask the Hub
    trainer.train()
    assert pushed == [(f"{trainer.args.output_dir}/checkpoint-1", None)]


def test_answers_after_the_checkpoint_are_written_once(tokenizer, make_args):
    options = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "sample_generations": 1}
    args = make_args(**(SAVING | options))
    trainer_of(tokenizer, args, eval_rows=RANKED).train()
    path = Path(args.output_dir, GENERATIONS_NAME)
    before = path.read_text()
    with path.open("a") as file:
        file.write('{"step": 4, "prom')  # cut off where the run was killed
    resumed = trainer_of(tokenizer, args, eval_rows=RANKED)
    resumed.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    assert path.read_text() == before


# ---- killed --------------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_ten_times_ends_as_one_that_was_not(tmp_path):
    """By SIGKILL at random moments, two of them while a checkpoint is written; `killed_run.py` does the killing."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(here / "killed_run.py"), str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["whole"], report["end"]) == (0, 0), (tmp_path / "killed.out").read_text()[-2000:]
    kills = report["kills"]
    assert [kill["status"] for kill in kills] == [-signal.SIGKILL] * 10
    stretches = [json.loads(line) for line in (tmp_path / "killed.log").read_text().splitlines()]
    assert len(stretches) == 11
    assert len({stretch["from"] for stretch in stretches}) > 4
    for number, kill in enumerate(kills):
        if kill["halt"]:
            (half,) = kill["half"]
            assert f"{half} is skipped: manifest.json, which is written last" in stretches[number + 1]["skipped"][0]
    assert [kill["halt"] is not None for kill in kills].count(True) == 2
    assert json.loads((tmp_path / "killed.json").read_text()) == json.loads((tmp_path / "whole.json").read_text())
    answers = [(tmp_path / name / GENERATIONS_NAME).read_text() for name in ("killed", "whole")]
    assert answers[0] == answers[1]


def test_a_stream_in_a_later_pass_is_not_gone_on_with(tokenizer, make_args):
    """transformers takes `max_steps` for the length of an epoch, and skips behind the end of the stream."""

    def trainer(steps, **more):
        stream = Dataset.from_list([chat_row(seed) for seed in range(8)]).to_iterable_dataset()  # four steps a pass
        args = make_args(max_steps=steps, reference="initial", **SAVING, **more)
        policy = policy_of(tokenizer, random_b=True)
        return QLoRADPOTrainer(policy, args=args, train_dataset=stream, processing_class=tokenizer)

    first = trainer(6)
    first.train()
    whole = weights(first)
    again = trainer(6)
    again.train(f"{first.args.output_dir}/checkpoint-3")
    assert torch.equal(weights(again), whole)
    with pytest.raises(ValueError, match="must be in its first pass to go on"):
        trainer(6).train(f"{first.args.output_dir}/checkpoint-5")
    trainer(6, ignore_data_skip=True).train(f"{first.args.output_dir}/checkpoint-5")


def test_a_longer_run_goes_on_by_its_own_schedule(tokenizer, make_args, tmp_path):
    def rates(name, steps, resume=None):
        args = make_args(output_dir=str(tmp_path / name), max_steps=steps, reference="initial", **SAVING)
        trainer = trainer_of(tokenizer, args, policy=policy_of(tokenizer, random_b=True))
        trainer.train(resume)
        return [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]

    whole = rates("whole", 8)
    rates("short", 4)
    with pytest.warns(
        UserWarning, match="for another number of steps .* goes on with 0.005 instead of 0. Set them back"
    ):
        found = rates("short", 8, True)
    assert found[4:] == whole[4:]
    assert len(set(whole)) == 8


def test_a_new_run_in_an_old_folder_keeps_its_own_checkpoints(tokenizer, make_args):
    for steps in (6, 4):
        trainer = trainer_of(tokenizer, make_args(max_steps=steps, save_total_limit=2, **SAVING))
        trainer.train()
    left = {path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")}
    assert left == {"checkpoint-3", "checkpoint-4"}


def test_the_evaluation_of_the_best_checkpoint_outlives_a_stop(tokenizer, make_args):
    options = SAVING | {
        "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }  # fmt: skip
    trainer_of(tokenizer, make_args(max_steps=3, **options), eval_rows=CHAT_ROWS).train()
    trainer = trainer_of(tokenizer, make_args(max_steps=4, **options), eval_rows=CHAT_ROWS)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    record = json.loads(Path(trainer.args.output_dir, "qlora_dpo.json").read_text())
    assert trainer.state.best_global_step == 1
    assert record["evaluations"]["eval"]["margin"] == pytest.approx(trainer.evaluate()["eval_rewards/margins"])


def test_an_evaluation_before_another_training_is_not_of_its_weights(tokenizer, make_args):
    """Both end at step 2, by which evaluations are remembered."""
    trainer = trainer_of(tokenizer, make_args(max_steps=2, learning_rate=1e-2), eval_rows=CHAT_ROWS)
    trainer.train()
    trainer.evaluate()
    trainer.train()
    trainer.save_model()
    record = json.loads(Path(trainer.args.output_dir, "qlora_dpo.json").read_text())
    assert record["evaluations"] == {}


def test_the_best_model_comes_with_a_reference_that_had_not_moved_yet(tokenizer, make_args):
    options = SAVING | {
        "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_rewards/margins", "sync_ref_model": True, "ref_model_sync_steps": 3,
    }  # fmt: skip
    trainer = trainer_of(tokenizer, make_args(max_steps=4, **options), CHAT_ROWS, CHAT_ROWS)
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
