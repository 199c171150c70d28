"""A zoo of tiny random causal LMs, one per family of architecture, built from configs without a network.

Random weights of the usual size (std 0.02) are nearly blind to the attention mask and to positions: a model with a
broken mask then passes every comparison. The weights here are refilled so that mistakes cost nats; run this file to
see how many, family by family.

    python tests/tiny_models.py
"""

import copy
import inspect
import math
import random
from collections.abc import Callable

import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

try:
    from tests.reference_impl import completion_token_logps
except ImportError:  # run as a script, or collected by pytest with `tests/` itself on the path
    from reference_impl import completion_token_logps

VOCAB_SIZE = 97
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
FIRST_WORD_ID = 3
MAX_POSITIONS = 256
WINDOW = 6

SPECIAL_TOKENS = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
COMMON = SPECIAL_TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}
SLIDING_THEN_FULL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FOUR_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}


def _family(config_class: type[PreTrainedConfig], base: dict = COMMON, **options) -> Callable[[], PreTrainedConfig]:
    """Maker of fresh configs; options are copied since some configs complete their rope dict in place."""
    return lambda: config_class(**copy.deepcopy(base | options))


ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _family(hf.LlamaConfig),
    "qwen2": _family(hf.Qwen2Config, tie_word_embeddings=True),
    "qwen2_sliding": _family(hf.Qwen2Config, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": _family(hf.Qwen3Config, head_dim=16),
    "mistral": _family(hf.MistralConfig, sliding_window=WINDOW),
    "gemma2": _family(
        hf.Gemma2Config,
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
        **SLIDING_THEN_FULL,
    ),
    "gemma3": _family(hf.Gemma3TextConfig, head_dim=8, query_pre_attn_scalar=4, **SLIDING_THEN_FULL),
    "phi": _family(hf.PhiConfig, num_key_value_heads=4),
    "phi3": _family(hf.Phi3Config, sliding_window=WINDOW + 2, original_max_position_embeddings=MAX_POSITIONS),
    "olmo2": _family(hf.Olmo2Config),
    "granite": _family(
        hf.GraniteConfig,
        attention_multiplier=0.5,
        embedding_multiplier=3.0,
        residual_multiplier=0.6,
        logits_scaling=1.7,
    ),
    "cohere": _family(hf.CohereConfig, logit_scale=0.6, use_qk_norm=True),
    "cohere2": _family(hf.Cohere2Config, logit_scale=0.7, **SLIDING_THEN_FULL),
    "gpt_neox": _family(hf.GPTNeoXConfig),
    "gpt2": _family(
        hf.GPT2Config,
        base=SPECIAL_TOKENS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=48,
        n_positions=MAX_POSITIONS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "opt": _family(hf.OPTConfig, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "mixtral": _family(hf.MixtralConfig, num_local_experts=4, **FOUR_EXPERTS),
    "qwen3_moe": _family(hf.Qwen3MoeConfig, head_dim=8, num_experts=4, moe_intermediate_size=24, **FOUR_EXPERTS),
    "gpt_oss": _family(
        hf.GptOssConfig,
        head_dim=8,
        num_local_experts=4,
        rope_parameters=YARN,
        **FOUR_EXPERTS,
        **SLIDING_THEN_FULL,
    ),
    "starcoder2": _family(hf.Starcoder2Config, sliding_window=WINDOW),
    "smollm3": _family(hf.SmolLM3Config, no_rope_layers=[1, 0]),
    "glm4": _family(hf.Glm4Config, head_dim=8),
    "deepseek_v3": _family(
        hf.DeepseekV3Config,
        num_key_value_heads=4,
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        num_mtp_layers=0,
        **FOUR_EXPERTS,
    ),
    "mamba": _family(hf.MambaConfig, base=SPECIAL_TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4),
    "bloom": _family(hf.BloomConfig, base=SPECIAL_TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "qwen3_next": _family(
        hf.Qwen3NextConfig,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        **FOUR_EXPERTS,
    ),
    "lfm2": _family(hf.Lfm2Config, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
}

ROW_LOCAL: dict[str, str] = {
    "mamba": "a state runs along the row",
    "bloom": "ALiBi distances are built from the row, `position_ids` are not taken",
    "qwen3_next": "its linear layers run a state along the row",
    "lfm2": "its convolutions mix neighbours of the row",
}
EAGER_ONLY: dict[str, str] = {
    "gemma2": "SDPA has no soft-cap on the scores",
    "gpt_oss": "SDPA has no attention sinks",
    "bloom": "its attention is written out, with ALiBi",
    "mamba": "it has no attention",
}
MIXTURES = {"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next"}

KEPT_AT_INIT = ("A_log", ".D", "dt_proj", "dt_bias")
MAMBA_NOT_ADAPTED = ["out_proj", "dt_proj"]  # PEFT refuses the first; of the second only the weight is read
MATRIX_GAIN = 1.5
HEAD_GAIN = 2.0


def _fan_in(module: torch.nn.Module, weight: Tensor) -> int:
    """Inputs summed by one output of the weight; a stack of experts is taken to be (experts, out, in)."""
    if isinstance(module, torch.nn.Conv1d):
        return math.prod(weight.shape[1:])
    if type(module).__name__ == "Conv1D":  # GPT-2's transposed linear layer
        return weight.shape[0]
    return weight.shape[-1]


@torch.no_grad()
def _refill(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Makes attention peaked, norms and biases uneven and sinks non-zero, so that masks and positions matter."""
    heads = {id(model.get_output_embeddings().weight), id(model.get_input_embeddings().weight)}
    for name, param in model.named_parameters():
        if any(kept in name for kept in KEPT_AT_INIT):  # a random state decay need not be stable
            continue
        noise = torch.randn(param.shape, generator=generator)
        if name.endswith("sinks"):
            param.copy_(noise)
        elif param.ndim == 1:
            param.add_(0.2 * noise)
        else:
            module = model.get_submodule(name.rsplit(".", 1)[0])
            gain = HEAD_GAIN if id(param) in heads else MATRIX_GAIN
            param.copy_(noise * gain / math.sqrt(_fan_in(module, param)))


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Tiny random model of a family; the same seed gives the same weights in each dtype, up to rounding.

    Args:
        name: Key of `ARCHITECTURES`.
        dtype: Type of the parameters. Buffers (rope frequencies) stay float32, as `from_pretrained` leaves them.
        seed: Seed of the weights; the global generator is left alone.

    Returns:
        Causal LM in training mode, without dropout.
    """
    options = {"attn_implementation": "eager" if name in EAGER_ONLY else "sdpa"}
    if name in MIXTURES:
        options["experts_implementation"] = "eager"  # the grouped kernels take no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name](), dtype=torch.float32, **options)
    _refill(model, torch.Generator().manual_seed(seed))
    for param in model.parameters():
        param.data = param.data.to(dtype)
    model.config.dtype = dtype
    return model


def add_lora(model: PreTrainedModel, r: int = 4, seed: int = 0, zero_b: bool = False) -> PeftModel:
    """Model with LoRA on every linear layer but the head.

    Args:
        model: Model as `build` gives it.
        r: Rank of the adapters; alpha is 2r.
        seed: Seed of the adapter weights; the global generator is left alone.
        zero_b: Whether B is zero, so that policy and reference are equal, as at the start of training.

    Returns:
        Model whose adapters are float64 if the model is, else float32.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules="all-linear",
        lora_dropout=0.0,
        exclude_modules=MAMBA_NOT_ADAPTED if model.config.model_type == "mamba" else None,
        fan_in_fan_out=model.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
    )
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    with torch.random.fork_rng(devices=[]):
        peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in peft_model.named_parameters():
            if "lora_" not in name:
                continue
            std = 1 / math.sqrt(param.shape[-1]) if "lora_A" in name else 0.1 * (not zero_b)
            param.data = (std * torch.randn(param.shape, generator=generator)).to(param.device, dtype)
    return peft_model


def _random_ids(rng: random.Random, length: int, vocab: int) -> list[int]:
    """Ordinary words only: no padding, BOS or EOS."""
    return [rng.randrange(FIRST_WORD_ID, vocab) for _ in range(length)]


def _draw_pairs(rng: random.Random, k: int, shared: bool) -> list[tuple[int, int]]:
    """Pairs among K completions in random order, with completions in several pairs or with disjoint pairs."""
    first, *others = rng.sample(range(k), k)
    if not shared:
        return list(zip([first, *others[1::2]], others[::2], strict=False))
    pairs = [(first, other) for other in others]
    return pairs + [(others[0], others[-1])] * (len(others) > 1)


def make_groups(
    seed: int,
    ks: tuple[int, ...] = (2, 5),
    vocab: int = VOCAB_SIZE,
    shared: bool = True,
    one_token_prompt: bool = True,
) -> list[dict]:
    """Random groups of a prompt, K completions and pairs.

    Args:
        seed: Seed of everything drawn.
        ks: K of each group, at least 2 and at most 14. Lengths 1 to 14 are drawn without repetition in a group.
        vocab: Number of token ids.
        shared: Whether one completion is chosen against all others and, from K = 3 on, another one is both rejected
            and chosen. Otherwise pairs are disjoint, and an odd K leaves one completion without a pair.
        one_token_prompt: Whether the first group's prompt is a single token; other prompts have 2 to 12.

    Returns:
        Dicts with `prompt_ids`, `completion_ids` (K lists) and `pairs` (index of chosen, of rejected).
    """
    rng = random.Random(seed)
    groups = []
    for index, k in enumerate(ks):
        prompt_length = 1 if one_token_prompt and index == 0 else rng.randint(2, 12)
        groups.append(
            {
                "prompt_ids": _random_ids(rng, prompt_length, vocab),
                "completion_ids": [_random_ids(rng, length, vocab) for length in rng.sample(range(1, 15), k)],
                "pairs": _draw_pairs(rng, k, shared),
            }
        )
    return groups


def _row_logps(model: PreTrainedModel, ids: list[int], positions: list[int], completion_length: int) -> Tensor:
    """Summed log-prob (nats) of the last tokens of a plain causal row with the given positions."""
    input_ids = torch.tensor([ids])
    options = {"position_ids": torch.tensor([positions])} if takes_positions(model) else {}
    # an explicit mask of ones, since without one transformers takes restarting positions for packing and masks rightly
    logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False, **options).logits[0]
    log_probs = logits.double().log_softmax(-1)[:-1].gather(-1, input_ids[0, 1:, None])
    return log_probs[-completion_length:].sum()


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the forward of the model has `position_ids`."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


@torch.no_grad()
def _largest_change(model: PreTrainedModel, corrupt: Callable[[random.Random, list[int]], tuple]) -> float:
    """Largest |change| (nats), over 8 sequences, of a 6-token completion after a 4-token prompt in a corrupted row.

    Args:
        model: Causal LM.
        corrupt: Maps a sequence of 10 ids to the ids and positions of the wrong row that ends in it.
    """
    rng = random.Random(0)
    changes = []
    for _ in range(8):
        ids = _random_ids(rng, 10, model.config.vocab_size)
        right = _row_logps(model, ids, list(range(10)), 6)
        wrong = _row_logps(model, *corrupt(rng, ids), 6)
        changes.append(float((wrong - right).abs()))
    return max(changes)


def mask_sensitivity(model: PreTrainedModel) -> float:
    """Nats a wrong mask costs: an unrelated sequence in front in the same causal row, with restarted positions."""

    def behind_a_stranger(rng: random.Random, ids: list[int]) -> tuple[list[int], list[int]]:
        stranger = _random_ids(rng, 7, model.config.vocab_size)
        return stranger + ids, [*range(7), *range(10)]

    return _largest_change(model, behind_a_stranger)


def position_sensitivity(model: PreTrainedModel) -> float:
    """Nats wrong positions cost: a completion that starts 3 positions late; 0 where no `position_ids` are taken."""
    return _largest_change(model, lambda _, ids: (ids, [*range(4), *range(7, 13)]))


def _print_table() -> None:
    """One line per family: attention, size, log-prob per token, and what mistakes cost in nats."""
    print(f"{'family':14} {'attention':9} {'params':>7} {'logp/token':>10} {'mask':>6} {'position':>8}")
    for name in ARCHITECTURES:
        model = build(name)
        group = make_groups(seed=0)[1]
        with torch.no_grad():
            rows = [completion_token_logps(model, group["prompt_ids"], ids) for ids in group["completion_ids"]]
        mask, position = mask_sensitivity(model), position_sensitivity(model)
        attention, size = model.config._attn_implementation, model.num_parameters()
        print(f"{name:14} {attention:9} {size:7d} {torch.cat(rows).mean():10.2f} {mask:6.2f} {position:8.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # these models are too small to share among threads
    _print_table()
