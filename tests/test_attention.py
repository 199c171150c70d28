"""The backend of attention: what it refuses."""

import pytest
import torch
from torch import nn

from qlora_dpo.attention import segment_attention


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ({"attention_mask": None}, "none"),
        ({"attention_mask": torch.ones(1), "segments": object()}, "a mask or bias of its own too"),
        (
            {"attention_mask": None, "position_bias": torch.ones(1), "segments": object()},
            "a mask or bias of its own too",
        ),
    ],
)
def test_a_model_that_does_not_hand_over_segments_alone_is_refused(given, got):
    row = torch.ones(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match=f"Linear must hand `segments` alone .*, got {got}. Use batch_layout"):
        segment_attention(nn.Linear(1, 1), row, row, row, **given)
