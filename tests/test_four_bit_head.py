"""A 4-bit head by pieces of the vocabulary, against its dequantised weight as a plain head."""

import itertools
import math

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_dpo import four_bit_head, plan_memory
from qlora_dpo.four_bit_head import HeadRows, by_pieces, called_by_pieces, has_plain_rows
from qlora_dpo.logits import LogitRule
from qlora_dpo.logps import STATISTICS, frozen_head_token_scores, token_divergences, token_scores

from allocations import peak_of

H, V, N = 64, 301, 13
NAMES = (*STATISTICS, "log_sum_sq_probs")
RULES = [LogitRule(), LogitRule(scale=0.3), LogitRule(softcap=4.0), LogitRule(scale=1.7, softcap=2.0)]


def packed_head(plain, dtype=torch.float32, kind="nf4", nested=True, storage=torch.uint8):
    """A 4-bit head of the weight of a plain one."""
    bias = plain.bias is not None
    size = plain.in_features, plain.out_features
    packed = Linear4bit(
        *size, bias=bias, compute_dtype=dtype, quant_type=kind, compress_statistics=nested, quant_storage=storage
    )
    packed.load_state_dict(plain.state_dict())
    return packed.to(dtype).to("cpu").requires_grad_(False)


def heads(bias=False, scale=0.5, dtype=torch.float32, **options):
    """A 4-bit head, and a plain one with the weight that it is dequantised to."""
    torch.manual_seed(0)
    plain = nn.Linear(H, V, bias=bias, dtype=dtype).requires_grad_(False)
    plain.weight.normal_(0, scale)
    packed = packed_head(plain, dtype, **options)
    plain.weight.copy_(dequantize_4bit(packed.weight.data, packed.weight.quant_state))
    return packed, plain


def rows(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(N, H, dtype=dtype).requires_grad_(), torch.randint(0, V, (N,))


def found(head, hidden, targets, rule=RULES[0], chunk=None):
    """Scores, and the gradient of a weighted sum of them."""
    scores = frozen_head_token_scores(hidden, head, targets, rule, chunk, NAMES)
    weights = torch.linspace(-1, 2, N)
    (grad,) = torch.autograd.grad((scores["token_logps"] * weights).sum(), hidden)
    return {name: value.detach() for name, value in scores.items()}, grad


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("piece", "chunk", "strip"), [(V, None, 2**20), (100, 5, 300), (1, 100, 2**20), (37, 1, 1)])
def test_by_pieces_equals_the_dequantised_head(rule, bias, piece, chunk, strip, monkeypatch):
    monkeypatch.setattr(four_bit_head, "PIECE_ELEMENTS", piece * H)
    monkeypatch.setitem(four_bit_head.strip_length.__globals__["STRIP_ELEMENTS"], "cpu", strip)
    packed, plain = heads(bias)
    hidden, targets = rows()
    scores, grad = found(packed, hidden, targets, rule, chunk)
    expected, expected_grad = found(plain, hidden, targets, rule)
    assert list(scores) == list(expected)
    for name, values in expected.items():
        assert torch.allclose(scores[name], values, rtol=1e-5, atol=1e-5), name
    assert torch.allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_as_near_as_the_plain_head(dtype, monkeypatch):
    monkeypatch.setattr(four_bit_head, "PIECE_ELEMENTS", 100 * H)
    packed, plain = heads(dtype=dtype)
    hidden, targets = rows(dtype)
    wide = nn.Linear(H, V, bias=False)
    wide.weight = nn.Parameter(plain.weight.float(), requires_grad=False)
    exact = found(wide, hidden.detach().float().requires_grad_(), targets)[1]
    errors = [(found(head, hidden, targets)[1].float() - exact).norm() for head in (packed, plain)]
    assert errors[1] > 0
    assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize(("dtype", "unlikely"), [(torch.bfloat16, 1e-7), (torch.float16, 1e-4), (torch.float32, 1e-7)])
def test_the_gradient_of_a_likely_target_is_not_lost(dtype, unlikely):
    """1 - p is a rounding error beside 1, and a share of it for each of 4,000 other tokens is nothing in fp16."""
    torch.manual_seed(0)
    plain = nn.Linear(H, 4001, bias=False, dtype=dtype).requires_grad_(False)
    plain.weight.copy_(torch.where(torch.arange(4001)[:, None] == 7, -1.0, 1.0))
    packed = packed_head(plain, dtype)
    value = math.log(unlikely / 4000) / 2 / H
    hidden = torch.full((1, H), value, dtype=dtype, requires_grad=True)
    logps = token_scores(hidden, packed, torch.tensor([7]), RULES[0])["token_logps"]
    (grad,) = torch.autograd.grad(logps.sum(), hidden)
    wide = hidden.detach().double().requires_grad_()
    exact = (wide @ plain.weight.double().T).log_softmax(-1)[0, 7]
    assert -2 * unlikely < exact < -unlikely / 2
    expected = torch.autograd.grad(exact, wide)[0]
    assert (grad - expected).norm() <= 0.02 * expected.norm()


def test_the_top_token_is_the_first_of_equals_in_whatever_piece(monkeypatch):
    monkeypatch.setattr(four_bit_head, "PIECE_ELEMENTS", 100 * H)
    _, plain = heads()
    plain.weight[250] = plain.weight[20]
    packed = packed_head(plain)
    ids = torch.tensor([20, 120, 220, 300])
    hidden = plain.weight[ids] * 9
    for targets, expected in ((ids, [1, 1, 1, 1]), (torch.tensor([250, 20, 120, 220]), [0, 0, 0, 0])):
        scores = token_scores(hidden, packed, targets, RULES[0], None, ("is_top1",))
        assert scores["is_top1"].tolist() == expected


@pytest.mark.parametrize(("kind", "nested"), itertools.product(("nf4", "fp4"), (True, False)))
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_rows_are_those_of_the_whole_head(kind, nested, storage):
    packed, plain = heads(kind=kind, nested=nested, storage=storage)
    assert packed.weight.dtype is storage
    ids = torch.tensor([300, 0, 7, 7])
    taken = HeadRows(packed, torch.float32)
    assert torch.equal(taken[10:250], plain.weight[10:250])
    assert torch.equal(taken[ids], plain.weight[ids])


def test_the_head_is_never_dequantised_whole(monkeypatch):
    monkeypatch.setattr(four_bit_head, "PIECE_ELEMENTS", 40 * H)
    packed, _ = heads()
    hidden, targets = rows()
    floats = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                floats.append(out.numel())
            return out

    with Watch():
        token_scores(hidden, packed, targets, LogitRule(), None, NAMES)["token_logps"].sum().backward()
    assert max(floats) == 40 * H


def test_other_4_bit_heads_are_called_as_they_are():
    packed, _ = heads()
    assert has_plain_rows(packed)
    hooked, _ = heads()
    hooked.register_forward_hook(lambda *_: None)
    trained, _ = heads(bias=True)
    trained.bias.requires_grad_(True)
    narrow = packed_head(nn.Linear(32, V, bias=False))  # half a block a row
    for head in (hooked, trained, narrow, nn.Linear(H, V)):
        assert not has_plain_rows(head)
    calls = []
    hooked.register_forward_hook(lambda *_: calls.append(1))
    hidden, targets = rows()
    scores = token_scores(hidden, hooked, targets, LogitRule())["token_logps"]
    assert calls
    assert torch.allclose(scores, token_scores(hidden, packed, targets, LogitRule())["token_logps"], atol=1e-5)


def test_a_flat_distribution_does_not_pass_what_fp16_holds():
    """Weights with a common part: the sum over 16,384 equally likely tokens is that many times one."""
    torch.manual_seed(0)
    plain = nn.Linear(H, 2**14, bias=False, dtype=torch.float16).requires_grad_(False)
    plain.weight.normal_(0, 0.02).add_(0.05)
    packed = packed_head(plain, torch.float16)
    plain.weight.copy_(dequantize_4bit(packed.weight.data, packed.weight.quant_state))
    hidden, targets = rows(torch.float16)
    grad, expected = (found(head, hidden, targets)[1] for head in (packed, plain))
    assert grad.isfinite().all()
    assert (grad - expected).norm() <= 0.01 * expected.norm()


def test_divergences_and_the_check_of_the_logit_rule_call_it_by_pieces_too(monkeypatch):
    monkeypatch.setattr(four_bit_head, "PIECE_ELEMENTS", 40 * H)
    packed, plain = heads(bias=True)
    hidden, _ = rows()
    both = (hidden.detach(), hidden.detach() * 1.5)
    assert torch.allclose(by_pieces(packed)(hidden), plain(hidden), atol=1e-5)
    asked, take = [], HeadRows.__getitem__
    monkeypatch.setattr(HeadRows, "__getitem__", lambda self, ids: asked.append(ids) or take(self, ids))
    divergences = [token_divergences(both, head, RULES[0], None, V) for head in (packed, plain)]
    assert torch.allclose(*divergences, atol=1e-5)
    assert len(asked) == 2 * 8
    with called_by_pieces(packed):
        assert torch.allclose(packed(hidden), plain(hidden), atol=1e-5)
        assert not has_plain_rows(packed)
    assert len(asked) == 3 * 8
    assert has_plain_rows(packed)
    with called_by_pieces(plain):
        plain(hidden)
    assert len(asked) == 3 * 8


@pytest.mark.parametrize(
    ("hidden", "vocabulary", "scored"), [(8192, 2048, 1024), (4096, 4096, 1024), (1024, 16384, 1024)]
)
def test_wide_heads_are_foretold(hidden, vocabulary, scored):
    plain = nn.Linear(hidden, vocabulary, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    packed = packed_head(plain, torch.bfloat16)
    states = torch.randn(scored, hidden, dtype=torch.bfloat16).requires_grad_()
    targets = torch.zeros(scored, dtype=torch.long)
    measured = peak_of(lambda: token_scores(states, packed, targets, RULES[0], None, STATISTICS)).bytes
    sizes = {"hidden_size": hidden, "vocab_size": vocabulary, "intermediate_size": hidden, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=hidden // 64, tie_word_embeddings=False)
    options = {"quantize_head": True, "device": "cpu", "tokens": scored, "scored_tokens": scored}
    parts = plan_memory(config, **options).phases["policy and head"]
    foretold = sum(parts[name] for name in ("unit gradient", "logit tiles", "logit strips", "dequantised head"))
    assert foretold == pytest.approx(measured, rel=0.1)


def test_no_position_at_all_has_no_score():
    for head in heads():
        scores = token_scores(torch.zeros(0, H), head, torch.zeros(0, dtype=torch.long), RULES[0], None, NAMES)
        assert [len(values) for values in scores.values()] == [0] * 5
