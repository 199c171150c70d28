"""Answers of policy and reference side by side, written after evaluations."""

import contextlib
import html
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from qlora_dpo.precomputed import CachedReference
from qlora_dpo.reference import LiveReference, ModelReference, Reference

GENERATIONS_NAME = "generations.jsonl"
PROMPT_END = 400
"""Characters of a prompt's end that the log shows."""
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
}
"""Ways to write an answer; `sampled` draws from the distribution that DPO trains, not a sharpened one."""


class SampleGenerations(TrainerCallback):
    """Writes answers to the first prompts of the evaluation set, by policy and reference, greedy and sampled.

    They go to `generations.jsonl` in the output folder, to the log, and as a Markdown text `eval_generations/<number>`
    to whatever tracker the trainer reports to, through its callbacks' `on_log`. The random numbers of the training are
    left as they were, and each evaluation draws the same ones.

    Args:
        trainer: The trainer; its reference answers too, if it is a model (not `none`, not given log-probabilities).
        num_prompts: Prompts to answer.
        every: Evaluations from one to the next; several sets evaluated at one step count as one.
        max_new_tokens: Most tokens of an answer.
    """

    def __init__(self, trainer: Any, num_prompts: int = 4, every: int = 1, max_new_tokens: int = 128) -> None:
        self.trainer = trainer
        self.num_prompts, self.every, self.max_new_tokens = num_prompts, every, max_new_tokens
        self._evaluations, self._last_step = 0, -1
        self._mode = "w"  # over what another run left in the folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where a run goes on: count what was evaluated before, and drop what will be written again."""
        if not state.global_step:
            return
        self._mode = "a"
        lines = [line for line in state.log_history if any(key.startswith("eval_") for key in line)]
        self._evaluations += len({line["step"] for line in lines})
        path = Path(args.output_dir, GENERATIONS_NAME)
        if state.is_world_process_zero and path.is_file():
            kept = [line for line in path.read_text().splitlines(True) if _written_by(line, state.global_step)]
            path.write_text("".join(kept))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer, every `every` evaluations."""
        if state.global_step == self._last_step:
            return
        self._last_step = state.global_step
        self._evaluations += 1
        if (self._evaluations - 1) % self.every:
            return
        lines = self._lines()  # by every process: a sharded model needs them all
        if not state.is_world_process_zero:
            return
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        with Path(args.output_dir, GENERATIONS_NAME).open(self._mode) as file:
            file.writelines(json.dumps({"step": state.global_step, **line}) + "\n" for line in lines)
        self._mode = "a"
        self._show(args, state, control, lines)

    def _lines(self) -> list[dict[str, Any]]:
        """For each prompt its text and, by who wrote it, the answers by way."""
        trainer, tokenizer = self.trainer, self.trainer.processing_class
        prompts = first_prompts(trainer.eval_dataset, self.num_prompts)
        lines: list[dict[str, Any]] = [{"prompt": tokenizer.decode(prompt)} for prompt in prompts]
        reference = None if trainer.given else trainer.reference
        with trainer.accelerator.autocast():
            for who, (model, in_force) in writers(trainer.model, reference).items():
                with in_force:
                    for way, options in WAYS.items():
                        texts = answers(model, tokenizer, prompts, self.max_new_tokens, trainer.args.seed, **options)
                        for line, text in zip(lines, texts, strict=True):
                            line.setdefault(who, {})[way] = text
        return lines

    def _show(self, args: Any, state: Any, control: Any, lines: list[dict[str, Any]]) -> None:
        """As text in the log, and as a table to every other callback."""
        for line in lines:
            tqdm.write(_as_text(line), file=sys.stderr)  # stdout is for results
        tables = {f"eval_generations/{number}": _as_table(line) for number, line in enumerate(lines)}
        for callback in self.trainer.callback_handler.callbacks:
            if not isinstance(callback, (ProgressCallback, PrinterCallback)):
                callback.on_log(args, state, control, logs=tables)


def _written_by(line: str, step: int) -> bool:
    """Whether a line of `generations.jsonl` is whole and was written until a step."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except ValueError:  # cut off where the run was stopped
        return False


def first_prompts(sets: Any, count: int) -> list[list[int]]:
    """Token ids of the first prompts that differ, of a tokenised data set or the first of several."""
    groups = next(iter(sets.values())) if isinstance(sets, dict) else sets
    found: dict[tuple[int, ...], None] = {}
    for group in groups:
        found[tuple(group["prompt_ids"])] = None
        if len(found) == count:
            break
    return [list(prompt) for prompt in found]


def writers(policy: PeftModel, reference: Reference | None) -> dict[str, tuple[Any, Any]]:
    """Who can write an answer: a model each, and the context that puts its weights in force."""
    if isinstance(reference, CachedReference):
        reference = reference.live
    found: dict[str, tuple[Any, Any]] = {"policy": (policy, contextlib.nullcontext())}
    if isinstance(reference, LiveReference):
        found["reference"] = (policy, reference.in_force())
    elif isinstance(reference, ModelReference):
        found["reference"] = (reference.model, contextlib.nullcontext())
    return found


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    seed: int,
    **options: Any,
) -> list[str]:
    """What a model writes after each prompt, as text without special tokens.

    Args:
        model: A causal LM, with or without adapters; its mode and the state of all random numbers are kept.
        tokenizer: Its tokenizer, with a padding token.
        prompts: Token ids, none empty.
        max_new_tokens: Most tokens of an answer; fewer where the model's positions end behind the longest prompt.
        seed: Of the random numbers a sampled answer draws.
        options: Of `generate`, such as `do_sample`.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    device, pad = model.device, tokenizer.pad_token_id
    width = max(map(len, prompts))
    room = (getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0) - width
    if room > 0:  # without any, it takes more than it was made for: it has just evaluated these prompts
        max_new_tokens = min(max_new_tokens, room)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), _evaluating(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            **options,
        )
    return tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside the block, and as it was after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _by_writer(line: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {who: line[who] for who in ("policy", "reference") if who in line}


def _as_text(line: dict[str, Any]) -> str:
    """The end of the prompt and each answer, for a terminal."""
    parts = [f"prompt: {line['prompt'][-PROMPT_END:]}"]
    parts += [f"{way}, {who}: {found[way]}" for way in WAYS for who, found in _by_writer(line).items()]
    return "\n".join(parts) + "\n"


def _as_table(line: dict[str, Any]) -> str:
    """A Markdown table: the prompt, and below it a column for each writer."""

    def cell(text: str) -> str:
        return html.escape(text, quote=False).replace("|", "&#124;").replace("\n", "<br>")

    writers = _by_writer(line)
    rows = [["", *writers], ["---"] * (1 + len(writers))]
    rows += [[way, *(cell(found[way]) for found in writers.values())] for way in WAYS]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{cell(line['prompt'])}\n\n{table}"
