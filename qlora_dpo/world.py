"""The synthetic world of `qlora-dpo demo`: a small language, a base that speaks it, and a reward known in full.

Guests ask an innkeeper for things; the keeper answers in three clauses that carry two scored words each. Every scored
word is drawn from a pair of a kind and a gruff word, either side with probability one half, independently of the rest,
and the reward of a completion is its number of kind words minus its number of gruff words. The text a base learns from
holds each completion together with its mirror (every scored word swapped within its pair), so a trained base finds
a completion as likely as its mirror and knows nothing of the reward. Preference rows come with their mirrors too, so
that base ranks one of two rows right whatever it thinks of the wording: its accuracy is one half by construction.

Prompts are split once and for all: a held-out prompt occurs neither in the text of the base nor in the training rows,
while each of its words occurs in both.
"""

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Item = TypeVar("Item")

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"

GUESTS = (
    "A guest", "An old sailor", "A young couple", "A tired traveller", "A family of four",
    "A painter", "A student", "A merchant", "A lost shepherd", "The mayor",
)  # fmt: skip
THINGS = (
    "room", "table", "bed", "lamp", "blanket", "boat", "horse", "meal", "bath", "chair", "basket", "coat",
)  # fmt: skip
WISHES = (
    "by the sea", "for the night", "near the fire", "before dawn", "for two", "after the rain",
    "on market day", "at noon", "for the winter", "without a word",
)  # fmt: skip
HELDOUT_EVERY = 5

# Pairs of (kind, gruff), by the part of speech of the gap they fill.
PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "verb": (
        ("smiles", "scowls"), ("nods", "shrugs"), ("laughs", "grumbles"), ("bows", "frowns"), ("beams", "growls"),
    ),
    "adverb": (
        ("warmly", "coldly"), ("gladly", "grudgingly"), ("kindly", "rudely"), ("gently", "roughly"),
        ("cheerfully", "sourly"), ("politely", "gruffly"),
    ),
    "adjective": (
        ("lovely", "shabby"), ("fine", "poor"), ("splendid", "wretched"), ("good", "bad"), ("perfect", "useless"),
        ("charming", "dreadful"),
    ),
    "noun": (
        ("treasure", "nuisance"), ("joy", "bother"), ("delight", "disgrace"), ("beauty", "disaster"),
        ("pleasure", "burden"),
    ),
    "address": (
        ("friend", "fool"), ("neighbour", "stranger"), ("dear", "pest"), ("darling", "rascal"), ("master", "beggar"),
    ),
}  # fmt: skip

# The forms of the three clauses, the commonest first. A gap names its part of speech.
CLAUSES: tuple[tuple[str, ...], ...] = (
    (
        " The keeper {verb} {adverb}.",
        " The keeper {verb} and answers {adverb}.",
        " Behind the counter the keeper {verb} {adverb}.",
        " After a while the old keeper {verb} {adverb}.",
    ),
    (
        " Here is a {adjective} {thing}, a real {noun}.",
        " The {adjective} {thing} is yours, what a {noun}.",
        " We keep a {adjective} {thing} in the house, a {noun} to us all.",
        " People say that our {adjective} {thing} is a {noun}.",
    ),
    (
        " Take it, {address}, and go {adverb}.",
        " Sit down, {address}, and we shall talk {adverb}.",
        " Mind the step, {address}, and close the door {adverb}.",
        " Now pay, {address}, and we shall serve you {adverb}.",
    ),
)

_ALL_PAIRS = tuple(pair for pairs in PAIRS.values() for pair in pairs)
_OTHER = dict(_ALL_PAIRS) | {gruff: kind for kind, gruff in _ALL_PAIRS}
KIND = frozenset(kind for kind, _ in _ALL_PAIRS)
GRUFF = frozenset(gruff for _, gruff in _ALL_PAIRS)

_GAP = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"\w+")
_PIECE = r" ?\w+|[^\w\s]"  # A token is a word with the space before it, or a mark: decoding gives the text back.


def true_reward(completion: str) -> float:
    """Scores a completion: its number of kind words minus its number of gruff words, wherever they stand.

    Args:
        completion: Text in any case; words outside the two lists count nothing.

    Returns:
        The reward, in words; -6 to 6 for a completion of this world.

    >>> true_reward(" The keeper smiles warmly. Here is a shabby boat, a real joy.")
    2.0
    """
    words = _WORD.findall(completion.lower())
    return float(sum(word in KIND for word in words) - sum(word in GRUFF for word in words))


def mirror(completion: str) -> str:
    """Swaps every scored word within its pair, which turns the sign of the reward and leaves the rest alone.

    >>> mirror(" The keeper smiles coldly.")
    ' The keeper scowls warmly.'
    """
    return _WORD.sub(lambda word: _OTHER.get(word[0], word[0]), completion)


def _split_prompts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Gives all prompts as (training, held-out); every guest, thing and wish occurs on both sides."""
    training: list[str] = []
    heldout: list[str] = []
    for i, guest in enumerate(GUESTS):
        for j, thing in enumerate(THINGS):
            for k, wish in enumerate(WISHES):
                side = heldout if (i + j + k) % HELDOUT_EVERY == 0 else training
                side.append(f"{guest} asks for a {thing} {wish}.")
    assert not set(training) & set(heldout)
    return tuple(training), tuple(heldout)


TRAINING_PROMPTS, HELDOUT_PROMPTS = _split_prompts()
SAMPLE_PROMPTS: tuple[str, ...] = tuple(random.Random("samples").sample(HELDOUT_PROMPTS, 16))


def _pick(rng: random.Random, items: Sequence[Item]) -> Item:
    """Draws an item, the i-th (from 1) with a weight of 1/i, so that log-probs differ for reasons but the reward."""
    return rng.choices(items, weights=[1 / rank for rank in range(1, len(items) + 1)])[0]


def _draw_completion(rng: random.Random, prompt: str) -> str:
    """Draws an answer to `prompt`: three clauses about the thing asked for, a fair coin for each scored word."""
    thing = next(word for word in _WORD.findall(prompt) if word in THINGS)
    form = "".join(_pick(rng, forms) for forms in CLAUSES).replace("{thing}", thing)
    return _GAP.sub(lambda gap: rng.choice(_pick(rng, PAIRS[gap[1]])), form)


def _draw_row(rng: random.Random, prompt: str) -> dict[str, str]:
    """Draws two answers to `prompt` until their rewards differ, and puts the better one first."""
    while True:
        rejected, chosen = sorted((_draw_completion(rng, prompt) for _ in range(2)), key=true_reward)
        if true_reward(chosen) > true_reward(rejected):
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _draw_rows(rng: random.Random, prompts: Sequence[str], count: int) -> list[dict[str, str]]:
    """Draws `count` rows, each second one the mirror of the first, going through the prompts as often as it takes."""
    shuffled = rng.sample(prompts, len(prompts))
    rows = []
    for index in range((count + 1) // 2):
        row = _draw_row(rng, shuffled[index % len(shuffled)])
        rows += [row, row | {"chosen": mirror(row["rejected"]), "rejected": mirror(row["chosen"])}]
    return rows[:count]


def make_preferences(n_train: int, n_heldout: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Makes the preference rows of the world.

    Args:
        n_train: Number of training rows, two for each prompt drawn: a pair and its mirror, in which the mirror of the
            rejected completion is chosen. Prompts come again, with other completions, once all had their turn.
        n_heldout: Number of held-out rows, on prompts of `HELDOUT_PROMPTS` only.
        seed: Seed of both sets.

    Returns:
        Training and held-out rows of plain text, `prompt`, `chosen` and `rejected`; completions begin with a space,
        and the true reward of `chosen` is the higher one in every row.
    """
    training = _draw_rows(random.Random(f"training {seed}"), TRAINING_PROMPTS, n_train)
    heldout = _draw_rows(random.Random(f"heldout {seed}"), HELDOUT_PROMPTS, n_heldout)
    assert not {row["prompt"] for row in training} & {row["prompt"] for row in heldout}
    return training, heldout


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the word-level tokenizer of the world in memory; it adds one BOS, and decoding restores the text."""
    filled = [_GAP.sub("", form) for forms in CLAUSES for form in forms]
    spaced = [f" {word}" for word in (*THINGS, *sorted(KIND | GRUFF))]
    pieces = [piece for text in (*TRAINING_PROMPTS, *filled, *spaced) for piece in re.findall(_PIECE, text)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys((PAD, BOS, EOS, UNK, *pieces)))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), "isolated")
    words.decoder = decoders.Fuse()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Builds the untrained fp32 model; all widths are multiples of 64, the block size of NF4."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _draw_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws `count` prompts with an answer and its mirror each.

    Returns:
        int64 tokens and labels of shape `(2 * count, T)`, padded on the right; a padded label is -100.
    """
    texts = []
    for prompt in rng.sample(TRAINING_PROMPTS, count):
        completion = _draw_completion(rng, prompt)
        texts += [prompt + completion, prompt + mirror(completion)]
    rows = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokenizer(texts)["input_ids"]]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return tokens, tokens.masked_fill(tokens == tokenizer.pad_token_id, -100)


def train_base(
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int = 120,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> LlamaForCausalLM:
    """Trains a base of over a million parameters on the text of the world, from random weights.

    Args:
        tokenizer: The tokenizer of `build_tokenizer`.
        steps: Optimiser steps of 64 sequences each.
        seed: Seed of the weights and of the text; the global random state stays untouched.
        progress: Called after every step with its number (from 1) and its loss, in nats a token.

    Returns:
        The model in fp32, in evaluation mode.
    """
    rng = random.Random(f"base {seed}")
    model = _build_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps + 1, pct_start=0.1)
    model.train()
    for step in range(1, steps + 1):
        tokens, labels = _draw_batch(rng, tokenizer, 32)
        loss = model(input_ids=tokens, attention_mask=(labels >= 0).long(), labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            progress(step, loss.item())
    return model.eval()


def save_base(
    folder: str | Path, *, steps: int = 120, seed: int = 0, progress: Callable[[int, float], None] | None = None
) -> None:
    """Trains a base and writes it to `folder` with its tokenizer, for `from_pretrained`; arguments as `train_base`."""
    tokenizer = build_tokenizer()
    model = train_base(tokenizer, steps=steps, seed=seed, progress=progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
