"""A run that is killed ten times and goes on each time, beside one that is left alone: `killed_run.py FOLDER`.

A process of its own for test_resume.py: it imports all that is needed, starts no thread, and forks a child for each
stretch of the run. A child writes a byte for every event of its training, so that its parent can kill it at a random
one of them and a random moment later, whatever the speed of the machine. Prints what happened as JSON.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import evaluate  # noqa: F401  (an evaluation imports it, which takes a child seconds)
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer
from qlora_dpo import saving as trainer_module
from qlora_dpo.checkpoints import MANIFEST_NAME, checkpoint_to_resume

from test_resume import outcome
from tiny_chat import CHAT_ROWS, build_chat_tokenizer, build_tiny_llama

KILLS = 10
HALTS = {3: "before the manifest", 7: "before the random state"}
"""Kills while a checkpoint is written, and where."""
MOST_EVENTS = 16
"""Of a stretch: about four steps."""
EVENTS = "step_begin pre_optimizer_step step_end log prediction_step evaluate save".split()


class Tell(TrainerCallback):
    """Writes a byte for every event."""

    def __init__(self, pipe):
        for name in EVENTS:
            setattr(self, f"on_{name}", lambda *args, **kwargs: os.write(pipe, b".") and None)


def trainer_in(folder, pipe):
    tokenizer = build_chat_tokenizer()
    model = build_tiny_llama(tokenizer)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.2)
    args = QLoRADPOConfig(
        output_dir=str(folder), bf16=False, use_cpu=True, report_to=[], disable_tqdm=True, disable_dropout=False,
        max_steps=40, save_strategy="steps", save_steps=2, save_total_limit=2, eval_strategy="steps", eval_steps=4,
        metric_for_best_model="eval_loss", logging_steps=3, learning_rate=1e-2, per_device_train_batch_size=2,
        sample_generations=1, sample_max_new_tokens=3, sync_ref_model=True, ref_model_sync_steps=3,
        gradient_checkpointing=False, eval_kl=False,
    )  # fmt: skip
    rows = Dataset.from_list(CHAT_ROWS)
    return QLoRADPOTrainer(
        get_peft_model(model, lora), args=args, train_dataset=rows.select(range(9)),
        eval_dataset=rows.select(range(9, 12)), processing_class=tokenizer, callbacks=[Tell(pipe)],
    )  # fmt: skip


def stretch(folder, pipe, halt):
    """What a child does: go on from the last whole checkpoint, to the end if it is let."""

    def stop(*args, **kwargs):
        os.write(pipe, b"!")
        time.sleep(600)

    trainer = trainer_in(folder, pipe)
    if halt == "before the manifest":
        trainer_module.write_manifest = stop
    elif halt == "before the random state":
        trainer._save_rng_state = stop
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            checkpoint = checkpoint_to_resume(True, str(folder))
        except ValueError:  # none yet
            checkpoint = None
    with Path(f"{folder}.log").open("a") as log:
        skipped = [str(one.message) for one in said if "is skipped" in str(one.message)]
        log.write(json.dumps({"from": checkpoint and Path(checkpoint).name, "skipped": skipped}) + "\n")
    trainer.train(resume_from_checkpoint=checkpoint)
    Path(f"{folder}.json").write_text(json.dumps(outcome(trainer)))


def forked(folder, halt=None):
    """A child at work, and the pipe it writes to."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    status = 1
    try:
        os.close(reader)
        output = os.open(f"{folder}.out", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        stretch(folder, writer, halt)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finished(folder):
    """Let a child run to its end."""
    child, pipe = forked(folder)
    while os.read(pipe, 4096):
        pass
    os.close(pipe)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(folder, events, moment, halt):
    """Kill a child at the start of some event and a moment later, or where it halts; how it ended, and what lay there.

    Returns:
        Its exit status, the number of events, and the checkpoints without a manifest.
    """
    child, pipe = forked(folder, halt)
    seen = 0
    while byte := os.read(pipe, 1):
        seen += 1
        if byte == b"!" or (not halt and seen == events):
            break
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(pipe)
    half = [path.name for path in sorted(folder.glob("checkpoint-*")) if not Path(path, MANIFEST_NAME).is_file()]
    return {"status": status, "events": seen, "halt": halt, "half": half}


def main(folder):
    torch.set_num_threads(1)
    rng = random.Random(0)
    report = {"whole": finished(folder / "whole")}
    moments = [(rng.randint(1, MOST_EVENTS), rng.uniform(0, 0.05)) for _ in range(KILLS)]
    report["kills"] = [killed(folder / "killed", *moments[n], HALTS.get(n)) for n in range(KILLS)]
    report["end"] = finished(folder / "killed")
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
