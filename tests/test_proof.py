"""What is checked before the first number is used, and how a failure is said."""

import pytest
import torch

from qlora_dpo.forward import install_scoring
from qlora_dpo.layouts import Group
from qlora_dpo.proof import check_logit_rule, check_vocabulary

from tiny_chat import build_tiny_llama


def test_a_token_that_the_model_has_no_embedding_for_is_named():
    groups = [Group([1, 2], [[3], [4, 29]], [(0, 1)])]
    check_vocabulary(30, groups)
    with pytest.raises(ValueError, match=r"Token ids must be below 29, .*, got 29. Use the model's own tokenizer"):
        check_vocabulary(29, groups)


def test_logits_that_the_config_does_not_describe_are_refused(tokenizer):
    """A model that does more to its logits than a scale and a soft-cap."""
    model = build_tiny_llama(tokenizer)
    install_scoring(model)
    ids, cpu = [9, 12, 14, 10], torch.device("cpu")
    check_logit_rule(model, ids, cpu)
    inner = model.forward

    def forward(*args, **kwargs):
        out = inner(*args, **kwargs)
        if "score" not in kwargs:
            out.logits = out.logits + torch.arange(out.logits.shape[-1])
        return out

    model.forward = forward
    with pytest.raises(
        NotImplementedError, match=r"The logits of LlamaForCausalLM must be .*, got .* nats. Report the"
    ):
        check_logit_rule(model, ids, cpu)
