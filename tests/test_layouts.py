"""Where tokens go, and which position predicts which."""

import pytest
import torch

from qlora_dpo.layouts import LAYOUTS, Group, GroupCollator, Segment, even_runs, make_batch, positions

GROUPS = [Group([1, 2, 3], [[4, 5], [6, 7, 8]], [(0, 1)], row=7), Group([9], [[10], [11, 12]], [(1, 0), (1, 0)], row=8)]


def test_tree_places_each_token_once():
    """Each prompt once; a completion's last token predicts nothing and is not placed."""
    batch = make_batch(GROUPS, "tree")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 6, 7, 9, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 3, 4, 0, 1]]
    assert batch["segments"] == [Segment(0, 4), Segment(4, 2, 0, 3), Segment(6, 1), Segment(7, 1, 6, 1)]
    assert batch["predictors"].tolist() == [2, 3, 2, 4, 5, 6, 6, 7]
    assert batch["targets"].tolist() == [4, 5, 6, 7, 8, 10, 11, 12]


def test_packed_places_sequences_end_to_end():
    batch = make_batch(GROUPS, "packed")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 1, 2, 3, 6, 7, 9, 9, 11]]
    assert batch["segments"] == [Segment(0, 4), Segment(4, 5), Segment(9, 1), Segment(10, 2)]
    assert batch["predictors"].tolist() == [2, 3, 6, 7, 8, 9, 10, 11]


def test_padded_places_one_row_per_completion():
    batch = make_batch(GROUPS, "padded", pad_token_id=99)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, 99],
        [1, 2, 3, 6, 7, 8],
        [9, 10, 99, 99, 99, 99],
        [9, 11, 12, 99, 99, 99],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [5, 6, 2, 3]
    assert batch["segments"] is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_asked_does_not_depend_on_the_layout(layout):
    batch = make_batch(GROUPS, layout)
    assert batch["targets"].tolist() == [4, 5, 6, 7, 8, 10, 11, 12]
    assert batch["lengths"] == [2, 3, 1, 2]
    assert batch["group"].tolist() == [0, 0, 1, 1]
    assert batch["yw_idxs"].tolist() == [0, 3, 3]
    assert batch["yl_idxs"].tolist() == [1, 2, 2]
    assert (batch["rows"], batch["pair_ids"]) == ([7, 8, 8], [0, 0, 1])
    assert batch["num_tokens"] == (5 + 6) + 2 * (2 + 3)
    assert batch["num_unique_tokens"] == {"tree": 8, "packed": 12, "padded": 16}[layout]
    predictors = batch["input_ids"].flatten()[batch["predictors"]]
    assert predictors.tolist() == [3, 4, 3, 6, 7, 9, 9, 11]


def test_collator_makes_the_batch_of_its_layout():
    row = {"prompt_ids": [1], "completion_ids": [[2], [3]], "pairs": [[0, 1]], "row": 0}
    collator = GroupCollator(pad_token_id=0)
    assert collator([row])["pieces"][0]["attention_mask"] is not None
    collator.layout = "tree"
    assert collator([row])["pieces"][0]["attention_mask"] is None


def test_batches_survive_what_trainer_and_accelerate_do_to_them():
    """Tensors are moved, host objects come back equal: Trainer and accelerate rebuild lists, tuples and dicts."""
    from accelerate.utils import send_to_device

    batch = make_batch(GROUPS, "tree")
    moved = send_to_device(batch, torch.device("cpu"))
    assert moved["segments"] == batch["segments"]
    assert moved["lengths"] == batch["lengths"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("limit", [1, 20, 45, 60, 100, 10_000])
def test_runs_hold_every_group_once_within_the_limit_and_are_even(layout, limit):
    groups = [Group([1] * p, [[2] * c, [3] * d], [(0, 1)], row) for row, (p, c, d) in enumerate(SIZES)]
    runs = even_runs(groups, layout, limit)
    assert sorted(group.row for run in runs for group in run) == list(range(len(groups)))
    assert all([g.row for g in run] == sorted(g.row for g in run) for run in runs)
    taken = [positions(run, layout) for run in runs]
    assert all(len(run) == 1 or size <= limit for run, size in zip(runs, taken, strict=True))
    if layout != "padded" and 45 <= limit < 200:
        assert max(taken) - min(taken) <= max(positions([group], layout) for group in groups)
    if limit == 10_000:
        assert len(runs) == 1


SIZES = [(3, 9, 4), (20, 5, 5), (1, 2, 2), (8, 8, 9), (2, 30, 3), (5, 5, 5), (12, 1, 1)]
