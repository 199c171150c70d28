"""tree = packed = padded = one sequence at a time, and chunked = full: log-probabilities and gradients."""

import math

import pytest
import torch
from transformers import AttentionInterface

from qlora_dpo.adapters import adapters_disabled
from qlora_dpo.forward import install_scoring, score_batch
from qlora_dpo.layouts import LAYOUTS, Group, make_batch, positions
from qlora_dpo.losses import dpo_loss
from qlora_dpo.proof import prove_layout, prove_model, shortened
from qlora_dpo.recompute import checkpoint_activations

from reference_impl import completion_logps, groups_loss
from tiny_models import ARCHITECTURES, ROW_LOCAL, add_lora, build, make_groups

FP32_INSIDE = {"deepseek_v3": "its router", "mamba": "its scan", "bloom": "its softmax"}
"""What transformers computes in fp32 even in an fp64 model, so that a row's neighbours move the last digits."""

SHARED_ROW = sorted(set(ARCHITECTURES) - set(ROW_LOCAL))
BETA = 0.1
CPU = torch.device("cpu")


def wide_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, s_aux=None, **_
):
    """One causal sequence per row with a softmax in the dtype of the scores: eager attention narrows fp64 to fp32."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.mT * (scaling or 1 / math.sqrt(query.shape[-1]))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(scores.shape[-2])[:, None] - torch.arange(scores.shape[-1])[None]
    hidden = (distance < 0) | (distance >= (sliding_window or 10**9))
    scores = scores.masked_fill(hidden, -math.inf)
    if s_aux is not None:
        sink = s_aux.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), -1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2), None


AttentionInterface.register("wide_attention_of_tests", wide_attention)


def policy_of(name, dtype):
    """A policy with non-trivial adapters. In fp64 its own attention is the wide one, where the family can take it."""
    model = build(name, dtype)
    if dtype is torch.float64 and name not in ("mamba", "bloom"):
        model.config._attn_implementation = "wide_attention_of_tests"
    policy = add_lora(model)
    install_scoring(policy.get_base_model())
    return policy


def as_groups(rows):
    return [Group(r["prompt_ids"], r["completion_ids"], [tuple(p) for p in r["pairs"]], i) for i, r in enumerate(rows)]


def gradient(policy, loss):
    policy.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def naive(policy, rows):
    """Log-probabilities one sequence at a time, and the gradient of the mean loss over all pairs."""
    with torch.no_grad():
        logps = torch.cat([completion_logps(policy, r["prompt_ids"], r["completion_ids"]) for r in rows])
    return logps, gradient(policy, groups_loss(policy, rows, BETA))


def ours(policy, rows, layout, chunk_size=None):
    batch = make_batch(as_groups(rows), layout)
    with torch.no_grad(), adapters_disabled(policy):
        ref_logps = score_batch(policy, batch, chunk_size=chunk_size)["logps"]
    pi_logps = score_batch(policy, batch, chunk_size=chunk_size)["logps"]
    losses, _ = dpo_loss(pi_logps, ref_logps, batch["yw_idxs"], batch["yl_idxs"], BETA)
    return pi_logps.detach(), gradient(policy, losses.mean())


def layouts_for(name):
    return ("padded",) if name in ROW_LOCAL else LAYOUTS


def assert_equal_in_fp64(name):
    policy, rows = policy_of(name, torch.float64), make_groups(seed=3)
    logps, grad = naive(policy, rows)
    for layout in layouts_for(name):
        found_logps, found_grad = ours(policy, rows, layout)
        assert (found_logps - logps).abs().max() < 1e-9, layout
        assert (found_grad - grad).norm() < 1e-6 * grad.norm(), layout


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - set(FP32_INSIDE)))
def test_layouts_equal_one_sequence_at_a_time_in_fp64(name):
    """To 1e-9 nats, for families that compute in fp64 throughout but for norms and rotary embeddings.

    Gradients to 1e-6 of their norm, since those run in fp32 there and back.
    """
    assert_equal_in_fp64(name)


def test_multi_head_latent_attention_equals_one_sequence_at_a_time_in_fp64(monkeypatch):
    """DeepSeek-V3 without its fp32 router: query and value heads of different size."""
    config = ARCHITECTURES["deepseek_v3"]()
    config.first_k_dense_replace = config.num_hidden_layers
    monkeypatch.setitem(ARCHITECTURES, "deepseek_v3", lambda: config)
    assert_equal_in_fp64("deepseek_v3")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_layouts_equal_one_sequence_at_a_time_in_fp32(name):
    """Log-probabilities to 1e-6 of their size, gradients to 1e-4 of their norm, in the model's own attention."""
    policy, rows = policy_of(name, torch.float32), make_groups(seed=3)
    logps, grad = naive(policy, rows)
    for layout in layouts_for(name):
        found_logps, found_grad = ours(policy, rows, layout)
        assert ((found_logps - logps).abs() / logps.abs()).max() < 1e-6, layout
        assert (found_grad - grad).norm() < 1e-4 * grad.norm(), layout


@pytest.mark.parametrize("name", SHARED_ROW)
def test_tree_proves_itself(name):
    proof = prove_layout(policy_of(name, torch.float32), as_groups(make_groups(seed=5)), "tree", CPU)
    assert proof.holds, proof


@pytest.mark.parametrize("name", sorted(ROW_LOCAL))
def test_tokens_that_talk_along_the_row_fail_the_proof(name):
    proof = prove_layout(policy_of(name, torch.float32), as_groups(make_groups(seed=5)), "tree", CPU)
    assert not proof.holds
    assert proof.difference > 1e-2


LONG_AND_SHORT = [
    Group([*range(10, 40)], [[*range(10, 30)], [*range(20, 40)]], [(0, 1)]),
    Group([*range(10, 15)], [[*range(11, 47)], [*range(12, 48)], [*range(9, 30)]], [(0, 1)]),
]


@pytest.mark.parametrize("budget", [12, 24, 55, 90, 120, None])
@pytest.mark.parametrize("name", [*sorted(ROW_LOCAL), "llama", "gemma2"])
def test_a_token_budget_leaves_the_proof_rows_that_branch(name, budget):
    """Cut into forwards of one completion each, any model would pass."""
    policy = policy_of(name, torch.float32)
    if name not in ROW_LOCAL:
        assert prove_model(policy, LONG_AND_SHORT, "auto", None, CPU, budget)[0] == "tree"
        return
    with pytest.warns(UserWarning, match="falls back to 'padded'"):
        assert prove_model(policy, LONG_AND_SHORT, "auto", None, CPU, budget)[0] == "padded"


@pytest.mark.parametrize("budget", [24, 55, 90, 120, 148])
def test_what_is_proven_within_a_budget_fits_it_and_branches(budget):
    """From 24 positions on, as three tokens of each of two completions are always left."""
    groups = shortened(LONG_AND_SHORT, budget)
    assert positions(groups, "tree") <= budget
    for group, whole in zip(groups, LONG_AND_SHORT, strict=True):
        assert len(group.completion_ids) >= 2
        assert min(len(ids) for ids in group.completion_ids) >= 3
        assert whole.prompt_ids[-len(group.prompt_ids) :] == group.prompt_ids
    assert shortened(LONG_AND_SHORT, positions(LONG_AND_SHORT, "tree")) == LONG_AND_SHORT


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mistral"])
@pytest.mark.parametrize("layout", ["tree", "packed"])
def test_recomputed_layers_attend_as_their_forward_did(name, layout):
    policy, rows = policy_of(name, torch.float32), make_groups(seed=7)
    _, kept = ours(policy, rows, layout)
    checkpoint_activations(policy)
    _, recomputed = ours(policy, rows, layout)
    assert (recomputed - kept).norm() <= 1e-6 * kept.norm()


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("chunk_size", [1, 5, 10_000])
def test_every_chunk_size_gives_the_same_scores(name, chunk_size):
    policy, rows = policy_of(name, torch.float64), make_groups(seed=9)
    logps, grad = naive(policy, rows)
    found_logps, found_grad = ours(policy, rows, "tree", chunk_size)
    assert (found_logps - logps).abs().max() < 1e-9
    assert (found_grad - grad).norm() < 1e-6 * grad.norm()


def test_shared_completion_gets_the_summed_gradient():
    """A completion that loses two pairs is scored once; its gradient is that of two unshared copies."""
    policy = policy_of("llama", torch.float64)
    prompt, a, b, c = [5, 6, 7], [8, 9, 3], [10, 11], [12]
    shared = [{"prompt_ids": prompt, "completion_ids": [a, b, c], "pairs": [(0, 2), (1, 2)]}]
    copies = [{"prompt_ids": prompt, "completion_ids": [a, c, b, c], "pairs": [(0, 1), (2, 3)]}]
    _, once = ours(policy, shared, "tree")
    _, twice = ours(policy, copies, "tree")
    assert (once - twice).norm() < 1e-6 * twice.norm()


def test_a_wrong_mask_would_show():
    """The check on the checks: the tree's tokens under a plain causal mask are off by nats, not by rounding."""
    policy, rows = policy_of("llama", torch.float32), make_groups(seed=3)
    batch = make_batch(as_groups(rows), "tree")
    right = score_batch(policy, batch)["logps"]
    from qlora_dpo.layouts import Segment

    batch["segments"] = [Segment(0, batch["input_ids"].shape[1])]
    wrong = score_batch(policy, batch)["logps"]
    assert (right - wrong).abs().max() > 0.5


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_layouts_agree_over_a_thousand_tokens_in_fp32(name):
    """Two completions of 400 and 300 tokens behind a prompt of 300: gradients to 1e-4 of their norm."""
    policy = policy_of(name, torch.float32)
    generator = torch.Generator().manual_seed(0)
    prompt, a, b = (torch.randint(3, 60, (n,), generator=generator).tolist() for n in (300, 400, 300))
    rows = [{"prompt_ids": prompt, "completion_ids": [a, b], "pairs": [(0, 1)]}]
    logps, grad = naive(policy, rows)
    for layout in LAYOUTS:
        found_logps, found_grad = ours(policy, rows, layout)
        assert ((found_logps - logps).abs() / logps.abs()).max() < 1e-6, layout
        assert (found_grad - grad).norm() < 1e-4 * grad.norm(), layout
