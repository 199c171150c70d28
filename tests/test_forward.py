"""Scoring leaves the model what it was."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qlora_dpo.forward import _router_loss, install_scoring, score_batch
from qlora_dpo.layouts import Group, make_batch

from tiny_chat import build_tiny_llama

GROUPS = [Group([9, 12, 14], [[10, 11, 8, 2], [13, 9, 2]], [(0, 1)])]
BATCH = make_batch(GROUPS, "tree")
IDS = torch.tensor([[9, 10, 11]])


class ElsewhereUntilSent:
    """Indices that are on another device than the hidden states, as of a model whose layers are spread over GPUs."""

    device = torch.device("cpu")

    def __init__(self, indices):
        self.indices, self.sent_to = indices, []

    def to(self, device):
        self.sent_to.append(device)
        return self.indices


def test_scored_positions_and_targets_go_where_the_hidden_states_are(tokenizer):
    model = build_tiny_llama(tokenizer)
    install_scoring(model)
    batch = make_batch(GROUPS, "padded")
    score = {name: ElsewhereUntilSent(batch[name]) for name in ("predictors", "targets")}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = model(**inputs, score={**score, "chunk_size": None, "statistics": ()})["token_logps"]
    assert torch.equal(found, score_batch(model, batch)["token_logps"])
    assert [indices.sent_to for indices in score.values()] == [[found.device]] * 2


def test_without_score_the_forward_is_the_models_own(tokenizer):
    model = build_tiny_llama(tokenizer)
    with torch.no_grad():
        before = model(IDS).logits
        install_scoring(model)
        install_scoring(model)
        assert torch.equal(model(IDS).logits, before)
        score_batch(model, BATCH)
        assert torch.equal(model(IDS).logits, before)
    assert model.config._attn_implementation == "sdpa"


def test_generation_is_the_same_after_scoring(tokenizer):
    model = build_tiny_llama(tokenizer).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    before = model.generate(IDS, **options)
    install_scoring(model)
    with torch.no_grad():
        score_batch(model, BATCH)
    assert torch.equal(model.generate(IDS, **options), before)


def test_the_attention_is_put_back_after_an_error(tokenizer):
    model = build_tiny_llama(tokenizer)
    install_scoring(model)
    try:
        score_batch(model, BATCH | {"segments": "nonsense"})
    except AttributeError:
        pass
    else:
        raise AssertionError("nonsense was taken for segments")
    assert model.config._attn_implementation == "sdpa"


def test_a_copy_of_the_model_runs_on_its_own_weights(tokenizer):
    policy = get_peft_model(build_tiny_llama(tokenizer), LoraConfig(target_modules="all-linear"))
    install_scoring(policy.get_base_model())
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        twin.get_base_model().model.norm.weight.mul_(2)
        assert not torch.equal(twin(IDS).logits, policy(IDS).logits)
        assert not torch.equal(score_batch(twin, BATCH)["logps"], score_batch(policy, BATCH)["logps"])


def test_a_router_loss_that_the_models_code_does_not_have_is_refused():
    with pytest.raises(
        NotImplementedError, match=r"`router_aux_loss_coef` must be 0 for Linear, .*, got another. Set it"
    ):
        _router_loss(nn.Linear(1, 1), None, {})
