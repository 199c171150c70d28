"""Builds a 40M-parameter Llama with its own tokenizer and trains it for a few minutes on chats.

The result is a base for benchmarks and end-to-end checks where no published checkpoint is at hand: real layer
shapes, a chat template, text that is recognisable English and no more than that.

    python scripts/make_base.py --data preferences.jsonl --output_dir base --steps 150

Each line of a data file is an object whose `prompt` is a list of messages (`role`, `content`), with either `chosen`
and `rejected` (a list of messages each) or `completions` (a list of such lists).
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

Message = dict[str, str]

BOS, EOS, PAD, TURN = "<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"
VOCAB_SIZE = 16_384
ROW_TOKENS = 512
ROWS_PER_STEP = 2
PEAK_LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 10

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chats_of(row: dict[str, Any]) -> list[list[Message]]:
    """Gives every conversation of one preference row: its prompt followed by each of its completions.

    Raises:
        ValueError: If the row has neither `chosen` and `rejected` nor `completions`, or is not made of messages.
    """
    if "completions" in row:
        completions = row["completions"]
    elif "chosen" in row and "rejected" in row:
        completions = [row["chosen"], row["rejected"]]
    else:
        raise ValueError(f"a row must have `chosen` and `rejected`, or `completions`, got {sorted(row)}.")
    parts = [row.get("prompt"), *completions]
    if not all(isinstance(part, list) and all(isinstance(message, dict) for message in part) for part in parts):
        raise ValueError("`prompt` and every completion must be a list of messages, got plain text.")
    return [row["prompt"] + completion for completion in completions]


def read_chats(paths: list[Path]) -> list[list[Message]]:
    """Reads the conversations of all files in order, each once even where rows share it."""
    unique: dict[str, list[Message]] = {}
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                for chat in chats_of(json.loads(line)):
                    unique[json.dumps(chat, sort_keys=True)] = chat
    if not unique:
        raise ValueError(f"`--data` must hold at least one row, got none in {[str(path) for path in paths]}.")
    return list(unique.values())


def build_tokenizer(chats: list[list[Message]]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on the distinct messages; plain text gets one BOS, as with published Llamas."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = dict.fromkeys(message["content"] for chat in chats for message in chat)
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B:1",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pack(tokenizer: PreTrainedTokenizerFast, chats: list[list[Message]], generator: torch.Generator) -> torch.Tensor:
    """Renders the chats in a random order, joins them and cuts the stream into rows.

    Returns:
        int64 tokens of shape `(rows, ROW_TOKENS)`; a tail that fills no row is dropped.

    Raises:
        ValueError: If the text fills fewer than `ROWS_PER_STEP` rows.
    """
    order = torch.randperm(len(chats), generator=generator).tolist()
    texts = [str(tokenizer.apply_chat_template(chats[index], tokenize=False)) for index in order]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for ids in encoded for token in ids])
    rows = len(stream) // ROW_TOKENS
    if rows < ROWS_PER_STEP:
        raise ValueError(f"`--data` must fill {ROWS_PER_STEP} rows of {ROW_TOKENS} tokens, got {rows}. Add text.")
    return stream[: rows * ROW_TOKENS].view(rows, ROW_TOKENS)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Builds the fp32 model with random weights: 8 layers, grouped-query attention, an `lm_head` of its own."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(rows: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields `(ROWS_PER_STEP, ROW_TOKENS)` batches without end, in a new order each time through."""
    while True:
        for index in torch.randperm(len(rows), generator=generator).split(ROWS_PER_STEP):
            if len(index) == ROWS_PER_STEP:
                yield rows[index]


def learning_rate_scale(step: int, steps: int) -> float:
    """Gives the share of the peak learning rate at `step` (from 0): a linear warm-up, then a cosine to a tenth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def train(model: LlamaForCausalLM, rows: torch.Tensor, steps: int, generator: torch.Generator) -> None:
    """Trains the model in place as a causal language model and prints the loss (nats a token) and the time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_scale(step, steps))
    stream = batches(rows, generator)
    start = time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        batch = next(stream)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 1 or step % 10 == 0 or step == steps:
            seconds = time.perf_counter() - start
            print(f"step {step}/{steps}  loss {loss.item():.3f} nats/token  {seconds:.0f} s", flush=True)
    model.eval()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSONL preference files, as above")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model and the tokenizer")
    parser.add_argument("--steps", type=int, default=150, help=f"training steps of {ROWS_PER_STEP * ROW_TOKENS} tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the text")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"`--steps` must be at least 1, got {args.steps}.")
    return args


def main(argv: list[str] | None = None) -> None:
    """Trains the tokenizer and the model and saves both, the weights in bf16."""
    args = parse_args(argv)
    set_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    chats = read_chats(args.data)
    tokenizer = build_tokenizer(chats)
    rows = pack(tokenizer, chats, generator)
    model = build_model(tokenizer)
    print(f"{len(chats)} chats, {rows.numel():,} tokens, {model.num_parameters():,} parameters", flush=True)
    train(model, rows, args.steps, generator)
    model.bfloat16().save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
