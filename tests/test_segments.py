"""What attention needs of the segments: right, and made once."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from qlora_dpo import segments as rows
from qlora_dpo.forward import install_scoring, score_batch
from qlora_dpo.layouts import Segment, make_batch
from qlora_dpo.recompute import checkpoint_activations
from qlora_dpo.segments import BLOCK, RowPlan, visible

from random_rows import random_groups
from tiny_models import add_lora, build

CPU = torch.device("cpu")
TREE = [Segment(0, 4), Segment(4, 2, 0, 3), Segment(6, 1), Segment(7, 1, 6, 1)]


def test_keys_are_gathered_as_prefix_and_own_run():
    row = RowPlan(TREE).end_to_end(CPU)
    assert row.keys.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5, 6, 6, 7]
    assert row.cu_q.tolist() == [0, 4, 6, 7, 8]
    assert row.cu_k.tolist() == [0, 4, 9, 10, 12]
    assert (row.max_q, row.max_k) == (4, 5)
    assert row.cu_q.dtype == row.cu_k.dtype == torch.int32
    assert row.own.tolist() == [0, 1, 2, 3, 7, 8, 9, 11]
    assert row.prefixes == [(4, 0, 3), (10, 6, 1)]


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_of_gathered_keys_is_that_of_indexing(seed):
    segments = make_batch(random_groups(seed, scale=5), "tree")["segments"]
    row = RowPlan(segments).end_to_end(CPU)
    assert len({start for _, start, _ in row.prefixes}) > 1
    x = torch.randn(segments[-1].start + segments[-1].length, 2, 8, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(len(row.keys), 2, 8, dtype=torch.float64)
    assert torch.equal(row.gather(x), x[row.keys])
    (found,), (expected,) = (torch.autograd.grad(run, x, cotangent) for run in (row.gather(x), x[row.keys]))
    assert (found - expected).abs().max() < 1e-12


def test_a_prompt_of_many_completions_gets_its_gradient_rounded_once():
    """64 completions, each with a share of 2^-9 beside the prompt's own 1: added up in bf16 they would be lost."""
    segments = [Segment(0, 1), *(Segment(i, 1, 0, 1) for i in range(1, 65))]
    row = RowPlan(segments).end_to_end(CPU)
    x = torch.ones(65, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    shares = torch.ones(len(row.keys), 1, 1, dtype=torch.bfloat16)
    shares[1::2] = 2**-9
    (found,) = torch.autograd.grad(row.gather(x), x, shares)
    assert found.flatten().tolist() == [1.125] + [1.0] * 64


def test_sequences_of_their_own_gather_nothing():
    row = RowPlan([Segment(0, 4), Segment(4, 5)]).end_to_end(CPU)
    assert row.keys is None
    assert row.cu_q.tolist() == row.cu_k.tolist() == [0, 4, 9]


def dense(segments, window):
    """`(L, L)` mask of a row, put together from the masks of its segments."""
    length = segments[-1].start + segments[-1].length
    mask = torch.zeros(length, length, dtype=torch.bool)
    for s in segments:
        seen = visible(s.length, s.prefix_length, window, CPU)
        seen = torch.ones(s.length, s.length).tril().bool() if seen is None else seen
        rows = slice(s.start, s.start + s.length)
        mask[rows, s.prefix_start : s.prefix_start + s.prefix_length] = seen[:, : s.prefix_length]
        mask[rows, rows] = seen[:, s.prefix_length :]
    return mask


@pytest.mark.parametrize("layout", ["tree", "packed"])
@pytest.mark.parametrize("window", [None, 1, 3, 150, 10_000])
@pytest.mark.parametrize("scale", [1, 40])
def test_block_mask_lets_each_query_see_what_its_segment_lets_it_see(layout, window, scale):
    """Element by element, and by blocks as torch's own function finds them in the full mask."""
    segments = make_batch(random_groups(scale, scale), layout)["segments"]
    expected = dense(segments, window)
    length = len(expected)
    ours = RowPlan(segments).block_mask(window, CPU)
    assert torch.equal(create_mask(ours.mask_mod, 1, 1, length, length, "cpu")[0, 0], expected)
    theirs = create_block_mask(lambda b, h, q, k: expected[q, k], 1, 1, length, length, "cpu", BLOCK_SIZE=BLOCK)
    assert ours.seq_lengths == theirs.seq_lengths
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    whole, torchs_whole = (chosen_blocks(m.full_kv_num_blocks, m.full_kv_indices) for m in (ours, theirs))
    assert whole <= torchs_whole
    assert len(whole) >= 0.9 * len(torchs_whole)


def chosen_blocks(counts, indices):
    return {(row, k) for row, n in enumerate(counts[0, 0]) for k in indices[0, 0, row, :n].tolist()}


def test_each_thing_is_made_once_per_window():
    plan = RowPlan(TREE)
    assert plan.end_to_end(CPU) is plan.end_to_end(CPU)
    assert plan.masks(2, CPU) is plan.masks(2, CPU)
    assert plan.block_mask(2, CPU) is plan.block_mask(2, CPU)
    assert plan.masks(2, CPU) is not plan.masks(None, CPU)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("name", "windows"), [("llama", 1), ("mistral", 1), ("gemma2", 2)])
def test_masks_are_made_once_per_forward_for_all_layers_and_their_recomputation(
    monkeypatch, name, windows, checkpointed
):
    made = []

    def counted(length, *rest):
        made.append(length)
        return visible(length, *rest)

    monkeypatch.setattr(rows, "visible", counted)
    policy = add_lora(build(name, torch.float64))  # which the loop over segments computes
    install_scoring(policy.get_base_model())
    if checkpointed:
        checkpoint_activations(policy)
    batch = make_batch(random_groups(0), "tree")
    score_batch(policy, batch)["logps"].sum().backward()
    assert len(made) == windows * len(batch["segments"])
