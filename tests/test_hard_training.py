"""Hard cases of training and evaluation: processes, streams, resuming, records. A docstring says what went wrong.

As a script it is what torchrun starts: `test_hard_training.py FOLDER` serves cases from a folder.
"""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, EarlyStoppingCallback, TrainerCallback

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer
from qlora_dpo.__main__ import main
from qlora_dpo.checkpoints import damage

from one_step import RANKED, KeepGradients
from tiny_chat import CHAT_ROWS, build_chat_tokenizer, build_tiny_llama
from tiny_models import ARCHITECTURES, build


def free_port():
    """One of 29700 to 29720 that nobody listens on: another run of this file may be under way."""
    for port in range(29700 + os.getpid() % 10, 29721):
        with socket.socket(socket.AF_INET6) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("::", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port")


def policy_of(tokenizer, model=None, **lora):
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False} | lora
    return get_peft_model(model or build_tiny_llama(tokenizer), LoraConfig(**options))


def trainer_of(
    folder, train=None, test=None, model=None, callbacks=None, compute_metrics=None, optimizers=(None, None), **options
):
    """A trainer of a policy that is not at its reference, in fp32."""
    tokenizer = build_chat_tokenizer()
    defaults = {
        "reference": "base", "max_grad_norm": 0.0, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "bf16": False, "use_cpu": True, "max_length": None,
    }  # fmt: skip
    return QLoRADPOTrainer(
        model=model or policy_of(tokenizer),
        args=QLoRADPOConfig(output_dir=str(folder), **(defaults | options)),
        train_dataset=Dataset.from_list(train) if isinstance(train, list) else train,
        eval_dataset=Dataset.from_list(test) if isinstance(test, list) else test,
        processing_class=tokenizer,
        callbacks=callbacks,
        compute_metrics=compute_metrics,
        optimizers=optimizers,
    )


def lines(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


# ---- what two processes run, and one process in the same way ---------------------------------------------------------


def evaluated(folder, world, rows=8, shards=0, batch=2, **options):
    """Rows and pairs that an evaluation counts, and its loss."""
    seen = []
    rows = Dataset.from_list(RANKED[:rows])
    trainer = trainer_of(
        folder,
        test=rows.to_iterable_dataset(num_shards=shards) if shards else rows,
        per_device_eval_batch_size=batch,
        compute_metrics=lambda p: seen.append(p.label_ids.tolist()) or {},
        **options,
    )
    metrics = trainer.evaluate()
    return {"pairs": len(seen[0]), "loss": metrics["eval_loss"], "rows": seen[0]}


def stepped(folder, world, rows=8, batch=8, shards=0, **options):
    """Gradient norms and log lines of training, `batch` groups over all processes."""
    keep = KeepGradients()
    rows = Dataset.from_list(RANKED[:rows])
    trainer = trainer_of(
        folder,
        train=rows.to_iterable_dataset(num_shards=shards) if shards else rows,
        per_device_train_batch_size=batch // world,
        callbacks=[keep],
        **options,
    )
    trainer.train()
    norms = [gradient.norm().item() for gradient in keep.gradients]
    found = {key: [line[key] for line in lines(trainer)] for key in ("loss", "num_unique_tokens")}
    return {"norms": norms} | found


def resumed(folder, world, save_at, **options):
    """Log lines of a run, and of the same run resumed from a checkpoint of it."""
    runs = []
    options |= {"save_strategy": "steps", "save_steps": save_at, "per_device_train_batch_size": 1}
    for name in ("a", "b"):
        trainer = trainer_of(folder / name, train=RANKED, **options)
        trainer.train(resume_from_checkpoint=str(folder / "a" / f"checkpoint-{save_at}") if name == "b" else None)
        runs.append([[line["step"], line["loss"], line["num_tokens"]] for line in lines(trainer)])
    return runs


def not_resumed(folder, world, **options):
    """Nothing: there is no checkpoint, which only the first process looks for."""
    trainer_of(folder, train=RANKED, max_steps=1, **options).train(resume_from_checkpoint=True)


class TwoProcesses:
    """Two processes started once by torchrun, which run the cases of all tests one after the other."""

    def __init__(self):
        self.folder, self.count = Path(tempfile.mkdtemp()), 0
        here = Path(__file__).parent
        words = ["--nproc_per_node", "2", "--master_port", str(free_port()), str(Path(__file__)), str(self.folder)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words],
            env=os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def run(self, name, folder, options):
        """What rank 0 returns of a case."""
        case, out = self.folder / f"case-{self.count}.json", self.folder / f"out-{self.count}.json"
        self.count += 1
        case.with_suffix(".new").write_text(json.dumps([name, str(folder), options]))
        case.with_suffix(".new").rename(case)
        until = time.monotonic() + 180
        while not out.exists() and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert out.exists(), f"{name} did not end"
        return json.loads(out.read_text())


@pytest.fixture(scope="module")
def two():
    """Runs a case on two processes."""
    processes = TwoProcesses()
    yield processes.run
    processes.process.terminate()


def serve(folder):
    """What each of the two processes does: the cases as they come, until it is stopped."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for number in itertools.count():
        case = folder / f"case-{number}.json"
        while not case.exists():
            time.sleep(0.05)
        name, where, options = json.loads(case.read_text())
        try:
            result = globals()[name](Path(where), 2, **options)
            assert torch.distributed.get_world_size() == 2
        except Exception as error:  # what a test asks about, or its reason to fail
            result = {"error": str(error)}
        if rank == 0:
            out = folder / f"out-{number}.json"
            out.with_suffix(".new").write_text(json.dumps(result))
            out.with_suffix(".new").rename(out)


@pytest.mark.parametrize(("rows", "batch"), [(1, 2), (3, 4), (5, 2)])
def test_two_processes_evaluate_every_pair_once(two, tmp_path, rows, batch):
    """`PairRecords.add` counts a pair again when the same process sees it again, and accelerate fills the last batch of
    a rank with groups that this very rank has already scored (5 rows at batch size 2: rank 0 gets [0, 1], [4, 0]). So
    eval_loss, accuracies, margins and compute_metrics depend on the batch size with two ranks.
    """
    one = evaluated(tmp_path, 1, rows=rows, batch=batch)
    both = two("evaluated", tmp_path, {"rows": rows, "batch": batch})
    assert both["pairs"] == one["pairs"]
    assert both["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize("loss_type", ["aot", "sft", "plackett_luce"])
def test_two_processes_evaluate_losses_over_the_whole_set_exactly(two, tmp_path, loss_type):
    """The same cause: repeated pairs enter the sort of aot, the tokens of sft and the groups of plackett_luce."""
    options = {"rows": 5, "batch": 2, "loss_type": loss_type}
    expected = evaluated(tmp_path, 1, **options)["loss"]
    assert two("evaluated", tmp_path, options)["loss"] == pytest.approx(expected, rel=1e-5)


def test_two_processes_evaluate_every_row_of_a_stream_in_shards(two, tmp_path):
    """A stream of as many shards as processes is sharded by accelerate, so `with_indices` counts from 0 in each
    process: rows of different processes have the same number, and `PairRecords.gathered` keeps one of them. Half the
    data set is lost in silence (22 of 39 pairs).
    """
    options = {"shards": 2}
    expected = evaluated(tmp_path, 1, **options)
    found = two("evaluated", tmp_path, options)
    assert found["pairs"] == expected["pairs"] == 39
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_process_with_nothing_but_fillers_cuts_to_the_shorter_side(two, tmp_path):
    """`desensitized` concatenates a list of runs that is empty when a batch has no pairs, as fillers have none:
    ValueError "torch.cat(): expected a non-empty list of Tensors" on that rank, the other one is left waiting. Any
    data set with a rank of fillers only in some micro-batch.
    """
    options = {"rows": 1, "batch": 2, "max_steps": 1, "ld_alpha": 0.3}
    expected = stepped(tmp_path, 1, **options)
    found = two("stepped", tmp_path, options)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)


def test_two_processes_resume_in_the_order_of_the_epoch(two, tmp_path):
    """Resumed in the middle of the second epoch, two processes shuffle as in the first: groups are trained on twice and
    others not at all. `DataLoaderShard.set_epoch` reaches the sampler through SkipBatchSampler only if accelerate has
    put it on the BatchSamplerShard too, which it does for its own SeedableRandomSampler and not for `FilledSampler`.
    """
    whole, again = two("resumed", tmp_path, {"save_at": 6, "max_steps": 8})  # four steps an epoch
    assert [line[1] for line in again[6:]] == [line[1] for line in whole[6:]]


def test_two_processes_go_on_counting_tokens_after_resuming(two, tmp_path):
    """`state.num_input_tokens_seen` is each process's own count, but trainer_state.json has rank 0's and every rank
    loads that: `num_tokens` after resuming is wrong by the difference (it may even fall).
    """
    whole, again = two(
        "resumed", tmp_path, {"save_at": 2, "max_steps": 4}
    )  # within the first epoch, so the order is right
    assert [line[2] for line in again] == [line[2] for line in whole]


def test_two_processes_write_whole_checkpoints_and_pool_the_log_over_them(two, tmp_path):
    """The manifest was not to be written before each process has written the state of its random numbers, and what one
    process had not logged yet must not be lost: a log line of steps 3 and 4 over a checkpoint at 3.
    """
    whole, again = two("resumed", tmp_path, {"save_at": 3, "max_steps": 4, "logging_steps": 2})
    assert again[1] == [4, pytest.approx(whole[1][1], rel=1e-12), whole[1][2]]
    folder = tmp_path / "a" / "checkpoint-3"
    assert damage(folder) is None
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(json.loads((folder / "manifest.json").read_text())["files"])
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4, "per_device_train_batch_size": 2}
    with pytest.raises(ValueError, match=r"got another: the number of processes was 2 and is 1. Set back"):
        trainer_of(tmp_path / "c", train=RANKED, **options).train(resume_from_checkpoint=str(folder))


def test_two_processes_end_alike_without_a_checkpoint(two, tmp_path):
    assert "must find a complete checkpoint, got none" in two("not_resumed", tmp_path, {})["error"]
    assert two("evaluated", tmp_path, {"rows": 3, "batch": 2})["pairs"] > 0  # both are still there


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("drop", [False, True])
def test_two_processes_train_on_a_stream_as_one_does(drop, shards, two, tmp_path):
    """A stream's last batch was filled with its first groups: 5 groups at 2 x 2 were trained on as 8. Shards of other
    sizes ended at other steps. With `dataloader_drop_last`, which Trainer keeps from a stream, the second step is the
    first of the second pass.
    """
    options = {"rows": 5, "batch": 4, "shards": shards, "max_steps": 2, "learning_rate": 0.0}
    options["dataloader_drop_last"] = drop
    alone, found = stepped(tmp_path, 1, **options), two("stepped", tmp_path, options)
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert found["num_unique_tokens"] == alone["num_unique_tokens"]
    assert (alone["loss"][0] == alone["loss"][1]) == drop


def test_two_processes_score_the_reference_of_a_single_row_beforehand(two, tmp_path):
    """One of them has none."""
    options = {"rows": 1, "batch": 2, "max_steps": 1, "precompute_ref_log_probs": True}
    found = two("stepped", tmp_path, options | {"reference_cache": str(tmp_path / "two")})
    alone = stepped(tmp_path, 1, **options, reference_cache=str(tmp_path / "one"))
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_fillers_are_no_tokens_that_are_counted(two, tmp_path):
    options = {"rows": 5, "batch": 4, "max_steps": 2}
    assert (
        two("stepped", tmp_path, options)["num_unique_tokens"] == stepped(tmp_path, 1, **options)["num_unique_tokens"]
    )


@pytest.mark.parametrize("shards", [2, 3])
def test_two_processes_evaluate_the_shards_of_a_stream_as_one_does(shards, two, tmp_path):
    """Rows of two shards had the same numbers, by which a report looks them up."""
    options = {"rows": 7, "shards": shards}
    alone, found = evaluated(tmp_path, 1, **options), two("evaluated", tmp_path, options)
    assert found["rows"] == alone["rows"]
    assert sorted(set(found["rows"])) == list(range(7))
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_two_processes_train_with_reentrant_checkpointing(two, tmp_path):
    """DDP raises "Expected to mark a variable ready only once": Trainer sets find_unused_parameters for what is no
    PreTrainedModel, thus for every PeftModel, and that cannot go with reentrant checkpointing. With
    ddp_find_unused_parameters=False it works, two stages too.
    """
    options = {"max_steps": 1, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    expected = stepped(tmp_path, 1, **options)
    assert two("stepped", tmp_path, options)["norms"] == pytest.approx(expected["norms"], rel=1e-4)


# ---- one process: columns --------------------------------------------------------------------------------------------


def weighted(count=4):
    return [row | {"weights": 3.0 * i} for i, row in enumerate(RANKED[:count])]


def test_a_stream_of_a_generator_may_have_weights(tmp_path):
    """`IterableDataset.from_generator` does not know its columns (column_names is None), so `prepare_dataset` finds no
    `weights`, does not remove the raw column, and the collator takes it for the tokenised one: TypeError "'float'
    object is not iterable".
    """

    def rows():
        yield from weighted()

    options = {"per_device_train_batch_size": 4, "max_steps": 1, "train_sampling_strategy": "sequential"}
    known = trainer_of(tmp_path, weighted(), **options)
    known.train()
    stream = trainer_of(tmp_path, IterableDataset.from_generator(rows), **options)
    stream.train()
    assert lines(stream)[0]["loss"] == pytest.approx(lines(known)[0]["loss"], rel=1e-6)


def test_a_stream_of_a_generator_may_have_offsets(tmp_path):
    """The same: a stream with offsets is refused for having none."""

    def rows():
        yield from (row | {"offsets": 0.5} for row in RANKED)

    trainer = trainer_of(tmp_path, IterableDataset.from_generator(rows), loss_type="odpo", max_steps=1)
    trainer.train()
    assert lines(trainer)


def given_logps(rows):
    return [row | {"ref_logps": [-1.5 * i for i in range(len(row["completions"]))]} for row in rows]


@pytest.mark.parametrize("way", ["evaluate", "predict"])
def test_given_reference_log_probabilities_are_used_wherever_a_set_comes_from(tmp_path, way):
    """A column `ref_logps` of a set that is passed to `evaluate()` or `predict()` was accepted and ignored."""
    rows = given_logps(RANKED[:4])
    expected = trainer_of(tmp_path, test=rows, reference="auto").evaluate()["eval_rewards/margins"]
    trainer = trainer_of(tmp_path, RANKED[:4], reference="auto")
    found = getattr(trainer, way)(Dataset.from_list(rows), metric_key_prefix="eval")
    metrics = found if way == "evaluate" else found.metrics
    assert metrics["eval_rewards/margins"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_tokenised_sets_with_and_without_weights_may_be_put_together(tmp_path, batch):
    """Put together, tokenised rows of the set without the column have null. `_pairs` drops the values of a whole batch
    if one group of it has none, so weights count or not by what falls into the same batch: eval_loss is 1.2459 at batch
    sizes 1 and 2 and 0.6719 at 4. Raw rows are right (null is 1).
    """
    raw = concatenate_datasets([Dataset.from_list(weighted(2)), Dataset.from_list(RANKED[2:4])])
    expected = trainer_of(tmp_path, test=raw).evaluate()["eval_loss"]
    both = [trainer_of(tmp_path, rows).train_dataset for rows in (weighted(2), RANKED[2:4])]
    found = trainer_of(tmp_path, test=concatenate_datasets(both), per_device_eval_batch_size=batch).evaluate()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_without_reference_says_why_given_log_probabilities_are_refused(tmp_path):
    """`simpo` with a column `ref_logps`: "`reference` must be 'auto' ..., got 'none'", though it is 'auto'. The loss is
    the reason, and nobody can tell.
    """
    with pytest.raises(ValueError, match="simpo"):
        trainer_of(tmp_path, given_logps(RANKED[:2]), reference="auto", loss_type="simpo")


def test_a_tokenised_group_without_pairs_adds_nothing(tmp_path):
    """A micro-batch of a tokenised group without pairs divided by 0 items: loss, gradient and adapters were NaN."""
    rows = trainer_of(tmp_path, RANKED[:2]).train_dataset
    rows = rows.map(lambda row: {"pairs": [] if row["row"] == 0 else row["pairs"]})
    trainer = trainer_of(
        tmp_path, rows, max_steps=2, per_device_train_batch_size=1, train_sampling_strategy="sequential",
        logging_steps=2,
    )  # fmt: skip
    trainer.train()
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


# ---- one process: state, checkpoints, records ------------------------------------------------------------------------


def test_a_second_training_does_not_log_pairs_of_the_first(tmp_path):
    """Steps after the last log line of a run stay in `_sums` and are pooled into the first line of the next `train()`
    (3 steps of loss in a line of 2).
    """
    options = {"per_device_train_batch_size": 2, "logging_steps": 2, "learning_rate": 0.0}
    once = trainer_of(tmp_path, RANKED, max_steps=2, **options)
    once.train()
    trainer = trainer_of(tmp_path, RANKED, max_steps=3, **options)
    trainer.train()
    trainer.train()
    first = {key: lines(trainer)[0][key] for key in ("loss", "num_unique_tokens")}
    assert first == {key: lines(once)[0][key] for key in ("loss", "num_unique_tokens")}


@pytest.mark.parametrize(
    "more",
    [
        {"loss_type": "bco_pair", "bco_running_mean": True},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "reference": "initial"},
    ],
    ids=["bco_running_mean", "sync_ref_model"],
)
def test_the_best_model_comes_with_its_state(tmp_path, more):
    """`load_best_model_at_end` loads the adapter of the best checkpoint and leaves the running mean (or the moving
    reference) of the last step in force, so that evaluate() does not give `best_metric` again.
    """
    trainer = trainer_of(
        tmp_path, RANKED, RANKED, max_steps=4, learning_rate=1e-2, eval_strategy="steps", save_strategy="steps",
        eval_steps=1, save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True, per_device_train_batch_size=2, **more,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint != str(tmp_path / "checkpoint-4")  # the highest loss, for the test
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_a_checkpoint_without_a_running_mean_is_refused_with_the_reason(tmp_path):
    """Resuming with `bco_running_mean` from a checkpoint of a run without it ends in a bare FileNotFoundError about
    reference/bco_delta.json.
    """
    options = {"loss_type": "bco_pair", "save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, RANKED, max_steps=1, **options).train()
    trainer = trainer_of(tmp_path, RANKED, max_steps=2, bco_running_mean=True, **options)
    with pytest.raises((ValueError, RuntimeError), match="bco_running_mean"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def cli_loss(folder, adapter, rows, *more):
    """eval_loss of `qlora-dpo evaluate` from a saved adapter."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", "--adapter", str(adapter), "--dataset_name", str(path), "--dataset_test_split", "train"]
    assert (
        main([*words, "--output_dir", str(folder / "e"), "--report_to", "none", "--disable_tqdm", "true", *more]) == 0
    )
    return json.loads((folder / "e" / "metrics.json").read_text())


def saved(tmp_path, model, train, **options):
    """A trained and saved adapter on a base in a folder, and its trainer."""
    tokenizer = build_chat_tokenizer()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    loaded = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32)
    targets = ["q_proj", "v_proj"]
    policy = policy_of(tokenizer, loaded, init_lora_weights=True, target_modules=targets)
    trainer = trainer_of(tmp_path / "run", train, train, policy, max_steps=2, learning_rate=1e-1, **options)
    trainer.train()
    trainer.save_model()
    return trainer


def test_evaluate_repeats_the_loss_of_a_running_mean(tmp_path, base_folder):
    """`save_model` keeps no running mean beside the adapter (checkpoints do, in reference/), so `qlora-dpo evaluate` of
    a run with `bco_running_mean` gives another eval_loss than the run, without a word: delta is 0.
    """
    trainer = saved(
        tmp_path,
        build_tiny_llama(build_chat_tokenizer()),
        RANKED,
        loss_type="bco_pair",
        bco_running_mean=True,
        beta=1.0,
    )
    expected = trainer.evaluate()["eval_loss"]
    assert cli_loss(tmp_path, tmp_path / "run", RANKED)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluate_repeats_the_router_loss(tmp_path):
    """`router_aux_loss_coef` changes the loss and is not in qlora_dpo.json: `qlora-dpo evaluate` takes the config's
    coefficient.
    """
    trainer = saved(tmp_path, build("mixtral"), RANKED, router_aux_loss_coef=0.5)
    expected = trainer.evaluate()["eval_loss"]
    found = cli_loss(tmp_path, tmp_path / "run", RANKED)
    assert found["eval_rewards/margins"] == pytest.approx(trainer.evaluate()["eval_rewards/margins"], rel=1e-4)
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_evaluate_takes_given_log_probabilities_again(tmp_path):
    """An adapter trained with a column `ref_logps` could not be evaluated on that very file, which brings it."""
    rows = given_logps(RANKED)
    trainer = saved(tmp_path, build_tiny_llama(build_chat_tokenizer()), rows, reference="auto")
    expected = trainer.evaluate()["eval_rewards/margins"]
    found = cli_loss(tmp_path, tmp_path / "run", rows)
    assert found["eval_rewards/margins"] == pytest.approx(expected, rel=1e-4)


def test_evaluating_given_log_probabilities_leaves_the_reference_as_it_is(tmp_path):
    """evaluate() of a set with `ref_logps` made `given` the trainer's reference for good, in its record too."""
    trainer = trainer_of(tmp_path, RANKED[:4], reference="auto", max_steps=1)
    trainer.train()
    kind = trainer.reference.kind
    trainer.evaluate(Dataset.from_list(given_logps(RANKED[:2])))
    trainer.save_model()
    assert json.loads((tmp_path / "qlora_dpo.json").read_text())["reference"] == kind


# ---- one process: options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"loss_type": None}, {"beta": None}, {"beta": "much"}, {"loss_weights": [None]}], ids=str
)
def test_values_of_the_wrong_kind_name_their_option(tmp_path, options):
    """Files pass what is written: an empty value was a bare TypeError that named no option."""
    (name,) = options
    with pytest.raises(TypeError, match=f"`{name}` must"):
        QLoRADPOConfig(output_dir=str(tmp_path), **options)


def test_numbers_are_read_as_the_command_line_reads_them(tmp_path):
    """`1e-1` is text in YAML, and one loss has one weight."""
    args = QLoRADPOConfig(output_dir=str(tmp_path), beta="1e-1", loss_type="sft", loss_weights=0.5, report_to=[])
    assert (args.beta, args.objective.weights) == (0.1, (0.5,))


def test_an_evaluation_keeps_its_last_batch(tmp_path):
    """`dataloader_drop_last` is meant for training, but Trainer applies it to evaluation too: pairs of the last batch
    are not counted, and the exact evaluation depends on the batch size.
    """
    expected = evaluated(tmp_path, 1, rows=5)
    found = evaluated(tmp_path, 1, rows=5, dataloader_drop_last=True)
    assert found["rows"] == expected["rows"]
    assert found["loss"] == pytest.approx(expected["loss"])


def test_metrics_computed_batch_by_batch_are_refused(tmp_path):
    """`batch_eval_metrics=True` was accepted: compute_metrics was then called without `compute_result`, a TypeError
    after the whole evaluation.
    """
    with pytest.raises(NotImplementedError, match="`batch_eval_metrics` must be False"):
        trainer_of(tmp_path, test=RANKED, compute_metrics=lambda prediction: {}, batch_eval_metrics=True)


# ---- one process: steps ----------------------------------------------------------------------------------------------


def gradients(folder, rows, steps=1, callbacks=(), **options):
    """The gradient of each optimizer step, at weights that do not move."""
    keep = KeepGradients()
    defaults = {"max_steps": steps, "learning_rate": 0.0, "per_device_train_batch_size": 1}
    trainer_of(folder, rows, callbacks=[keep, *callbacks], **(defaults | options)).train()
    return keep.gradients


def mean_over(folder, rows):
    return gradients(folder, rows, per_device_train_batch_size=len(rows))[0]


def test_a_stream_that_ends_within_a_step_leaves_nothing_in_the_next(tmp_path):
    """What was left of the first pass was added to the next step, whose gradient was then about twice too large."""
    rows = CHAT_ROWS[:3]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    found = gradients(tmp_path, stream, steps=2, gradient_accumulation_steps=2)
    torch.testing.assert_close(found[0], mean_over(tmp_path, rows[:2]), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_an_epoch_that_a_callback_ends_within_a_step_leaves_nothing_in_the_next(tmp_path):
    class Stop(TrainerCallback):
        done = False

        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1 and not self.done:
                control.should_epoch_stop = self.done = True

    options = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential", "max_steps": 3}
    found = gradients(tmp_path, CHAT_ROWS[:8], callbacks=[Stop()], per_device_train_batch_size=2, **options)
    torch.testing.assert_close(found[1], mean_over(tmp_path, CHAT_ROWS[:4]), rtol=1e-4, atol=1e-7)


class OtherWeights(torch.optim.SGD):
    """As optimizers without a schedule: `eval` puts other weights in place, `train` the trained ones back."""

    factor = 1.0

    def _put(self, factor):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(factor / self.factor)
        self.factor = factor

    def eval(self):
        self._put(0.5)

    def train(self):
        self._put(1.0)


@pytest.mark.parametrize(
    "options", [{"loss_type": "aot", "gradient_accumulation_steps": 2}, {"max_tokens_per_forward": 20}]
)
def test_both_stages_score_the_weights_that_are_trained(tmp_path, options):
    """After an evaluation the first stage scored those that the optimizer had put in place for it."""
    found = []
    for more in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        keep, policy = KeepGradients(), policy_of(build_chat_tokenizer())
        optimizer = OtherWeights([one for one in policy.parameters() if one.requires_grad], lr=1e-3)
        how = {"max_steps": 2, "per_device_train_batch_size": 2, "optimizers": (optimizer, None), **options, **more}
        trainer_of(tmp_path, RANKED, CHAT_ROWS[:2], policy, [keep], **how).train()
        found.append(keep.gradients[1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_weights_in_fp32_are_measured_by_the_arithmetic_they_compute_in(tmp_path, prepared, precompute):
    """Under bf16 they were held to rounding in fp32: the tree was refused, and so was the new cache of a reference."""
    tokenizer = build_chat_tokenizer()
    build_tiny_llama(tokenizer).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    if prepared:  # as many a script for training in 4 bit does
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bit, device_map="cpu")
        model = prepare_model_for_kbit_training(model)
    options = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "cache")} if precompute else {}
    policy = policy_of(tokenizer, model, init_lora_weights=True)
    trainer = trainer_of(tmp_path, CHAT_ROWS, model=policy, bf16=True, max_steps=1, **options)
    trainer.train()
    assert trainer.data_collator.layout == "tree", trainer.layout_proof


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"num_train_epochs": 0.25}, {"num_train_epochs": 1.5}])
def test_a_finished_run_that_goes_on_has_nothing_to_do(tmp_path, length):
    """In the middle of an epoch it made one step more."""
    options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", **length}
    options["per_device_train_batch_size"] = 6 if length == {"num_train_epochs": 1.5} else 1
    first = trainer_of(tmp_path, CHAT_ROWS, **options)
    first.train()
    again = trainer_of(tmp_path, CHAT_ROWS, **options)
    assert again.train(resume_from_checkpoint=True).global_step == again.state.global_step == 3
    weights = [[p for p in one.model.parameters() if p.requires_grad] for one in (first, again)]
    assert all(map(torch.equal, *weights))


def test_the_configuration_may_say_where_to_go_on_from(tmp_path):
    """It began anew, with a warning that said to set the option that was set."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    first = trainer_of(tmp_path, CHAT_ROWS, **options)
    first.train()
    again = trainer_of(tmp_path, CHAT_ROWS, **options, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again.add_callback(Counted())
    again.train()
    assert (again.state.global_step, again.callback_handler.callbacks[-1].steps) == (3, 1)


class Counted(TrainerCallback):
    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def test_a_callback_with_a_state_may_come_with_a_run_that_goes_on(tmp_path):
    """transformers looked for its state in the checkpoint, and stopped at the next one."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer_of(tmp_path, CHAT_ROWS, CHAT_ROWS[:2], **options).train()
    shutil.rmtree(tmp_path / "checkpoint-3")
    again = trainer_of(tmp_path, CHAT_ROWS, CHAT_ROWS[:2], callbacks=[EarlyStoppingCallback(5)], **options)
    assert again.train(resume_from_checkpoint=True).global_step == 3
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["EarlyStoppingCallback"]["args"]["early_stopping_patience"] == 5


def test_a_run_can_go_on_from_the_checkpoint_of_a_signal(tmp_path):
    """transformers keeps a file in it while it is saved, which was then missed."""

    class Signal(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                found = trainer.callback_handler.callbacks
                saving = next(one for one in found if type(one).__name__ == "JITCheckpointCallback")
                saving.jit_manager.is_checkpoint_requested = True

    trainer = trainer_of(tmp_path, CHAT_ROWS, callbacks=[Signal()], max_steps=4, enable_jit_checkpoint=True)
    trainer.train()
    assert damage(tmp_path / "checkpoint-2") is None


@pytest.mark.parametrize("when", ["on_step_begin", "on_pre_optimizer_step"])
def test_the_checkpoint_of_a_signal_within_a_step_is_of_the_step_before(when, tmp_path):
    """The pairs, tokens, running mean and random numbers of the step under way were in it already, and again later."""

    class Signal(TrainerCallback):
        jit_manager = None

        def signal(self, args, state, control, **kwargs):
            if self.jit_manager is not None and state.global_step == 2:
                self.jit_manager.is_checkpoint_requested = True

    setattr(Signal, when, Signal.signal)

    def run(name, signal=None, **options):
        options |= {"max_steps": 5, "logging_steps": 5, "loss_type": "bco_pair", "bco_running_mean": True}
        policy = policy_of(build_chat_tokenizer(), lora_dropout=0.3)
        callbacks = [] if signal is None else [signal]
        trainer = trainer_of(
            tmp_path / name, CHAT_ROWS, model=policy, callbacks=callbacks, disable_dropout=False,
            enable_jit_checkpoint=True, gradient_accumulation_steps=2, per_device_train_batch_size=2, **options,
        )  # fmt: skip
        handler = trainer.callback_handler
        saving = next(one for one in handler.callbacks if type(one).__name__ == "JITCheckpointCallback")
        if signal is not None:
            signal.jit_manager = saving.jit_manager
            handler.callbacks.insert(0, handler.callbacks.pop(handler.callbacks.index(signal)))
        trainer.train(resume_from_checkpoint=(signal is None and name == "stopped") or None)
        return trainer

    whole = run("whole")
    run("stopped", Signal())
    assert damage(tmp_path / "stopped" / "checkpoint-2") is None
    again = run("stopped")
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    keys = ("loss", "num_tokens", "num_unique_tokens", "rewards/margins")
    first, second = ([line[key] for line in lines(trainer) for key in keys] for trainer in (whole, again))
    assert second == pytest.approx(first, rel=1e-9)
    assert again.step.bco_delta.mean == pytest.approx(whole.step.bco_delta.mean, rel=1e-9)


def test_lasting_workers_read_the_set_that_is_given(tmp_path):
    """They served the rows of the first set for every other that was passed."""
    policy = policy_of(build_chat_tokenizer())
    expected = trainer_of(tmp_path, test=RANKED[:4], model=policy).evaluate(Dataset.from_list(CHAT_ROWS[:6]))
    lasting = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = trainer_of(tmp_path, test=RANKED[:4], model=policy, **lasting)
    trainer.evaluate()
    found = trainer.evaluate(Dataset.from_list(CHAT_ROWS[:6]))
    assert found["eval_rewards/margins"] == pytest.approx(expected["eval_rewards/margins"])


def test_equal_rows_of_a_stream_count_one_by_one(tmp_path):
    rows = Dataset.from_list([CHAT_ROWS[0]] * 3 + [CHAT_ROWS[1]])
    trainer = trainer_of(tmp_path, test=rows.to_iterable_dataset(num_shards=2), dataloader_num_workers=2)
    trainer.evaluate()
    assert len(trainer.last_pairs.rows()) == 4


@pytest.mark.parametrize("fresh", [False, True])
def test_dropout_that_attention_reads_from_its_layer_is_off_for_the_reference(tmp_path, fresh):
    """GPT-2 passes the `p` of a layer to a function: the same reference scored twice differed."""
    config = ARCHITECTURES["gpt2"]()
    config.attn_pdrop = 0.5
    torch.manual_seed(0)
    tokenizer = build_chat_tokenizer()
    policy = policy_of(tokenizer, AutoModelForCausalLM.from_config(config), init_lora_weights=fresh)
    trainer = trainer_of(tmp_path, CHAT_ROWS, model=policy, max_steps=1, disable_dropout=False)
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])["pieces"][0]
    trainer.model.train()
    one, two = (trainer.reference(trainer.model, batch)["logps"] for _ in range(2))
    assert torch.equal(one, two)


def test_only_the_trainers_own_sets_have_names(tmp_path):
    """Of a single set it was the name of a column."""
    several = {"easy": Dataset.from_list(CHAT_ROWS[:2]), "hard": Dataset.from_list(CHAT_ROWS[2:4])}
    for sets, name in ((CHAT_ROWS[:2], "row"), (several, "test")):
        with pytest.raises(ValueError, match=f"the name of one of the trainer's own sets .*, got {name!r}"):
            trainer_of(tmp_path, test=sets).evaluate(name)
    assert "eval_loss" in trainer_of(tmp_path, test=several).evaluate("hard")
    with pytest.raises(ValueError, match="`eval_dataset` must hold a data set, got no name of one"):
        trainer_of(tmp_path, CHAT_ROWS, {})


def test_metrics_that_are_none_are_refused(tmp_path):
    trainer = trainer_of(tmp_path, test=CHAT_ROWS[:2], compute_metrics=lambda prediction: None)
    with pytest.raises(TypeError, match="`compute_metrics` must return a dict, got NoneType"):
        trainer.evaluate()


def test_the_base_is_not_written_over(tmp_path):
    """Later runs loaded it with the adapter on it, and took that for the start."""
    tokenizer = build_chat_tokenizer()
    build_tiny_llama(tokenizer).save_pretrained(tmp_path)
    policy = policy_of(tokenizer, AutoModelForCausalLM.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="`output_dir` must be another folder than that of the base"):
        trainer_of(tmp_path, CHAT_ROWS, model=policy)
    assert "eval_loss" in trainer_of(tmp_path, test=CHAT_ROWS[:2], model=policy).evaluate()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
