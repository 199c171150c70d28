"""The chunked head against full logits, in values and gradients."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qlora_dpo.logits import LogitRule, top_token
from qlora_dpo.logps import STATISTICS, any_head_token_scores, frozen_head_token_scores, sum_by_completion, token_scores

RULES = [LogitRule(), LogitRule(scale=0.3), LogitRule(softcap=4.0), LogitRule(scale=1.7, softcap=2.0)]


def full(hidden, head, targets, rule):
    """Log-probabilities and statistics from all logits at once, in plain PyTorch."""
    logits = head(hidden) * rule.scale
    if rule.softcap:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    logps = logits.log_softmax(-1)
    return {
        "token_logps": logps.gather(-1, targets[:, None])[:, 0],
        "entropy": -(logps.exp() * logps).sum(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": (logits.argmax(-1) == targets).double(),
    }


def setting(bias=False, n=13, h=8, v=31):
    torch.manual_seed(0)
    head = nn.Linear(h, v, bias=bias).double().requires_grad_(False)
    return torch.randn(n, h, dtype=torch.float64, requires_grad=True), head, torch.randint(0, v, (n,))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("scorer", [frozen_head_token_scores, any_head_token_scores])
def test_chunked_equals_full(scorer, rule, bias, chunk):
    hidden, head, targets = setting(bias)
    upstream = torch.randn(len(targets), dtype=torch.float64)
    expected = full(hidden, head, targets, rule)
    (expected["token_logps"] * upstream).sum().backward()
    grad, hidden.grad = hidden.grad, None
    found = scorer(hidden, head, targets, rule, chunk, statistics=STATISTICS)
    (found["token_logps"] * upstream).sum().backward()
    for name, values in expected.items():
        assert torch.allclose(found[name].detach(), values.detach(), rtol=1e-12, atol=1e-12), name
    assert torch.allclose(hidden.grad, grad, rtol=1e-10, atol=1e-12)


def test_a_frozen_head_gets_no_gradient_and_a_trainable_one_does():
    hidden, head, targets = setting()
    token_scores(hidden, head, targets, LogitRule())["token_logps"].sum().backward()
    assert head.weight.grad is None
    head.requires_grad_(True)
    full(hidden, head, targets, LogitRule())["token_logps"].sum().backward()
    expected, head.weight.grad = head.weight.grad, None
    token_scores(hidden, head, targets, LogitRule(), chunk_size=3)["token_logps"].sum().backward()
    assert torch.allclose(head.weight.grad, expected, rtol=1e-10)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_trained_head_scores_to_the_last_bit_as_a_frozen_one(rule, dtype):
    """So a policy with a trained head starts with margins of exactly zero beside a reference with a frozen one."""
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(40, 16), nn.Linear(16, 300), torch.randint(300, (40,))
    hidden, head = hidden.to(dtype), head.to(dtype).requires_grad_(False)
    for chunk in (7, 40):
        frozen = frozen_head_token_scores(hidden, head, targets, rule, chunk, statistics=STATISTICS)
        found = any_head_token_scores(hidden, head, targets, rule, chunk, statistics=STATISTICS)
        for name, values in frozen.items():
            assert torch.equal(found[name], values), name


def test_statistics_carry_no_gradient():
    hidden, head, targets = setting()
    found = token_scores(hidden, head, targets, LogitRule(), statistics=STATISTICS)
    assert found["token_logps"].requires_grad
    assert not any(found[name].requires_grad for name in ("entropy", "mean_logits", "is_top1"))


def test_logits_exist_one_tile_at_a_time():
    """No tensor as large as half of all logits is ever made, in the forward or the backward pass."""
    n, v, chunk = 512, 4000, 16
    hidden, head, targets = setting(n=n, v=v)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        token_scores(hidden, head, targets, LogitRule(), chunk, statistics=STATISTICS)["token_logps"].sum().backward()
    assert chunk * v <= largest < n * v / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_in_fp32(dtype):
    """A 1,000-token completion within 1e-3 nats of an fp64 sum of the same token values."""
    hidden, head, targets = setting(n=1000)
    found = token_scores(hidden.to(dtype), head.to(dtype), targets, LogitRule())["token_logps"]
    assert found.dtype is torch.float32
    total = sum_by_completion(found, [1000])
    assert total.dtype is torch.float32
    assert abs(total.item() - found.double().sum().item()) < 1e-3


def test_fp16_keeps_the_gradient_of_unlikely_tokens():
    """60,000 tokens of probability 2e-8, below what fp16 can hold, that together pull at the gradient.

    With head rows 3.2 for the target and 1 for the others it is (1 - p)(3.2 - 1); without their pull (1 - p) 3.2.
    """
    head = nn.Linear(8, 60_000, bias=False).requires_grad_(False).half()
    head.weight.fill_(1.0)
    head.weight[0] = 3.2
    hidden = torch.ones(1, 8, dtype=torch.float16, requires_grad=True)
    logp = frozen_head_token_scores(hidden, head, torch.tensor([0]), LogitRule())["token_logps"]
    logp.sum().backward()
    expected = -torch.expm1(logp.detach().double()).item() * (head.weight[0, 0].item() - 1)
    assert hidden.grad[0].tolist() == pytest.approx([expected] * 8, rel=0.02)


@pytest.mark.parametrize("scorer", [frozen_head_token_scores, any_head_token_scores])
def test_many_unlikely_tokens_count_beside_a_likely_one(scorer):
    """Of 60,000 tokens of probability 2e-8, a sum in fp32 that begins with the target's loses every one it adds.

    `torch.log_softmax` is 6 % off here. A logit of 17.6 has 2e-6 of rounding, hence the bound.
    """
    head = nn.Linear(1, 60_001, bias=False).requires_grad_(False)
    head.weight.fill_(0.0)
    head.weight[0] = 17.6
    hidden, target = torch.ones(1, 1), torch.tensor([0])
    truth = torch.log_softmax(head.double()(hidden.double()), -1)[0, 0].item()
    found = scorer(hidden, head.float(), target, LogitRule())["token_logps"].item()
    assert found == pytest.approx(truth, abs=2e-6)
    assert torch.log_softmax(head(hidden), -1)[0, 0].item() != pytest.approx(truth, abs=5e-5)


@pytest.mark.parametrize("vocabulary", [1, 17, 48, 256, 1000, 4096, 16_385])
def test_the_top_token_is_that_of_argmax(vocabulary):
    """Where several tokens are the largest, the first of them; 16-bit logits often tie."""
    torch.manual_seed(0)
    for logits in (torch.randn(64, vocabulary), torch.randint(0, 3, (64, vocabulary)).float()):
        assert torch.equal(top_token(logits), logits.argmax(-1))


def test_sum_by_completion_keeps_fp64():
    values = torch.rand(6, dtype=torch.float64)
    found = sum_by_completion(values, [1, 3, 2])
    assert found.dtype is torch.float64
    assert found.tolist() == pytest.approx([values[0].item(), values[1:4].sum().item(), values[4:].sum().item()])


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, LogitRule()),
        ({"logit_scale": 0.5}, LogitRule(0.5)),
        ({"logits_scaling": 4.0, "model_type": "granite"}, LogitRule(0.25)),
        ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, LogitRule(4.0)),
        ({"lm_head_multiplier": 2.0}, LogitRule(2.0)),
        ({"logit_scale": None, "final_logit_softcapping": 30.0}, LogitRule(1.0, 30.0)),
    ],
)
def test_rule_is_read_from_the_config(options, rule):
    assert LogitRule.from_config(SimpleNamespace(**options)) == rule


def test_autocast_narrows_the_product_alone():
    """Log-probabilities and statistics are those of the bf16 logits in fp32."""
    head = nn.Linear(64, 500, bias=False).requires_grad_(False)
    hidden, targets = 3 * torch.randn(20, 64), torch.randint(0, 500, (20,))
    with torch.autocast("cpu", torch.bfloat16):
        found = frozen_head_token_scores(hidden, head, targets, LogitRule(), 7, (*STATISTICS, "log_sum_sq_probs"))
        logits = head(hidden).double()
    logps = logits.log_softmax(-1)
    assert torch.allclose(found["entropy"].double(), -(logps.exp() * logps).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch.allclose(found["log_sum_sq_probs"].double(), (2 * logps).logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert torch.allclose(found["token_logps"].double(), logps.gather(-1, targets[:, None])[:, 0], atol=1e-5)


def test_what_acts_on_the_calls_of_a_head_is_not_passed_over():
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(5, 8), torch.nn.Linear(8, 11, bias=False), torch.arange(5)
    head.requires_grad_(False)
    head.register_forward_hook(lambda module, given, output: output * 2)
    found = token_scores(hidden, head, targets, LogitRule())["token_logps"]
    expected = (2 * hidden @ head.weight.T).log_softmax(-1)[torch.arange(5), targets]
    torch.testing.assert_close(found, expected)
