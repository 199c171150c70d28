"""A tiny chat model: a word-level tokenizer with a chat template, a Llama of two layers, and rows of messages."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "the a red blue cat dog bird sees finds likes tree house river today slowly gladly never always ok yes no".split()
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<system>", "<end>"]
TEMPLATE = (
    "<s>{% for m in messages %}{{ '<' + m['role'] + '>' }} {{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_chat_tokenizer(add_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word; adds BOS to plain text if asked to."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if add_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_tiny_llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **options) -> LlamaForCausalLM:
    """A random Llama whose matrices bitsandbytes can quantise, scaled so that completions differ by nats."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def _sentence(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length))


def chat_row(seed: int) -> dict:
    """A row of messages; every third has a system message and an earlier turn."""
    rng = random.Random(seed)
    prompt = [{"role": "user", "content": _sentence(rng, rng.randint(3, 9))}]
    if seed % 3 == 0:
        earlier = [
            {"role": "system", "content": _sentence(rng, 3)},
            {"role": "user", "content": _sentence(rng, 4)},
            {"role": "assistant", "content": _sentence(rng, 5)},
        ]
        prompt = earlier + prompt
    chosen, rejected = _sentence(rng, rng.randint(2, 8)) + " yes", _sentence(rng, rng.randint(2, 8)) + " no"
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


CHAT_ROWS = [chat_row(seed) for seed in range(12)]


def ranked_row(seed: int, count: int = 4) -> dict:
    """A row of plain text with `count` completions and scores."""
    rng = random.Random(seed)
    return {
        "prompt": _sentence(rng, 5),
        "completions": [f" {_sentence(rng, rng.randint(2, 7))}" for _ in range(count)],
        "scores": [float(rng.randint(0, 3)) for _ in range(count - 1)] + [9.0],
    }
