"""Every loss and modifier against TRL 1.16 itself: its arithmetic on the same numbers, and its training (`bench`)."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer
from qlora_dpo.losses import loss_parameters
from qlora_dpo.objective import DIVERGENCES, make_objective
from qlora_dpo.scores import Scores

from tiny_chat import build_tiny_llama, chat_row

trl = pytest.importorskip("trl", reason="the extra `bench` is not installed")

SMOOTHING = 0.15
NAMES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
"""Losses that TRL smooths. Its sigmoid ignores `label_smoothing`, so that no smoothing is compared there."""
WITH_DIVERGENCE = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm")
WEIGHTED = tuple(name for name in NAMES if name not in ("aot", "aot_unpaired", "sft", "hinge"))
"""Losses that both weigh: TRL refuses the sorted ones and fails in hinge's backward pass, this library refuses sft."""


def test_every_loss_of_trl_is_compared():
    """TRL's config names its losses in the help of `loss_type`."""
    help_text = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert {name for name in help_text.split("'")[1::2] if name.islower()} == set(NAMES)


# ---- TRL's arithmetic on given numbers -------------------------------------------------------------------------------

PROMPT = 2
CHOSEN, REJECTED = (3, 7, 1, 4, 5), (5, 2, 4, 4, 6)
LENGTHS = [*CHOSEN, *REJECTED]


class Given(nn.Module):
    """A model whose forward returns given numbers."""

    is_gradient_checkpointing = False

    def __init__(self, **outputs):
        super().__init__()
        self.outputs = SimpleNamespace(**outputs)

    def forward(self, **kwargs):
        return self.outputs


def token_values(dtype, spread=1.5):
    """Token log-probs of policy (a leaf) and reference, and log sums of squared probabilities, `(N,)` each."""
    generator = torch.Generator().manual_seed(5)
    draw = torch.rand(3, sum(LENGTHS), generator=generator, dtype=torch.float64)
    noise = torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)
    ref = -0.3 - draw[0]
    pi = (ref + spread * noise).clamp(max=-0.05)
    return pi.to(dtype).requires_grad_(), ref.to(dtype), (-0.3 - draw[2]).to(dtype)


def in_rows(values):
    """`(2T, S - 1)` as TRL's model returns them: zeros at the prompt and at the padding."""
    rows = values.new_zeros(len(LENGTHS), PROMPT - 1 + max(LENGTHS))
    where = [(row, PROMPT - 1 + i) for row, length in enumerate(LENGTHS) for i in range(length)]
    row, column = torch.tensor(where).T
    return rows.index_put((row, column), values)


def trl_loss(names, options, dtype):
    """TRL's loss, the policy's token log-probs it is differentiable in, and its margin, from its own method."""
    pi, ref, squares = token_values(dtype)
    log_probs = in_rows(pi)
    zeros = torch.zeros_like(log_probs)
    statistics = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool(), "log_sum_sq_probs": in_rows(squares)}
    model, ref_model = Given(log_probs=log_probs, **statistics), Given(log_probs=in_rows(ref))
    mask = in_rows(torch.ones(sum(LENGTHS), dtype=torch.float64)).long()
    mask = torch.cat((torch.zeros(len(LENGTHS), 1, dtype=torch.long), mask), dim=1)
    args = trl.DPOConfig.__dataclass_fields__
    options = {"loss_weights": None, **options}
    trainer = SimpleNamespace(
        model=model,
        ref_model=ref_model,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, unwrap_model=lambda x: x
        ),
        args=SimpleNamespace(
            gradient_checkpointing_kwargs=None, discopop_tau=options.get("discopop_tau", args["discopop_tau"].default)
        ),
        loss_types=list(names),
        loss_weights=options["loss_weights"] or [1.0] * len(names),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **{
            name: options.get(name, args[name].default)
            for name in (
                *("beta", "label_smoothing", "ld_alpha", "use_weighting"),
                *("f_divergence_type", "f_alpha_divergence_coef"),
            )
        },
    )
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = trl.DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    (margin,) = trainer._metrics["train"]["rewards/margins"]
    return loss, pi, margin


def our_loss(names, options, dtype):
    """The same of this library."""
    pi, ref, squares = token_values(dtype)
    pairs = torch.arange(len(CHOSEN))
    sums = [torch.stack([run.sum() for run in tokens.split(LENGTHS)]) for tokens in (pi, ref)]
    scores = Scores(
        pi_logps=sums[0],
        ref_logps=sums[1],
        yw_idxs=pairs,
        yl_idxs=pairs + len(pairs),
        lengths=torch.tensor(LENGTHS),
        group=torch.cat((pairs, pairs)),
        pi_token_logps=pi,
        ref_token_logps=ref,
        pi_log_sum_sq_probs=squares,
    )
    options = {"beta": 0.1, **options}
    taken = {key for name in names for key in loss_parameters(name)} | {"beta"}
    hyperparameters = {key: options[key] for key in taken if key in options}
    modifiers = {key: value for key, value in options.items() if key not in (*hyperparameters, "loss_weights")}
    losses = make_objective(names, options.get("loss_weights"), hyperparameters, **modifiers)(scores)
    margin = scores.differences(scores.rewards(options["beta"])).mean().item()
    return losses.mean(), pi, margin


def assert_same_arithmetic(names, **options):
    """In fp64; TRL narrows exo_pair's label probability to fp32, and its alpha-divergence knows no fp64."""
    options = {"beta": 0.3, **options}
    if any(name in SMOOTHED for name in names):
        options["label_smoothing"] = SMOOTHING
    narrow = options.get("f_divergence_type") == "alpha_divergence"
    dtype, rtol = (torch.float32, 2e-5) if narrow else (torch.float64, 1e-6 if "exo_pair" in names else 1e-10)
    loss, leaf, margin = our_loss(names, options, dtype)
    their_loss, their_leaf, their_margin = trl_loss(names, options, dtype)
    (gradient,), (their_gradient,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(their_loss, their_leaf)
    torch.testing.assert_close(loss, their_loss, rtol=rtol, atol=0)
    torch.testing.assert_close(gradient, their_gradient, rtol=rtol, atol=rtol * their_gradient.abs().max().item())
    assert gradient.abs().max() > 0
    if options.get("ld_alpha") is None:  # TRL's rewards are of the desensitised log-probs, this library's never
        assert margin == pytest.approx(their_margin, rel=1e-5 if narrow else 1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_is_trls(name, beta):
    assert_same_arithmetic([name], beta=beta)


@pytest.mark.parametrize("tau", [0.01, 0.5, 1.0])
def test_discopop_of_every_temperature_is_trls(tau):
    assert_same_arithmetic(["discopop"], discopop_tau=tau)


@pytest.mark.parametrize("kind", DIVERGENCES[1:])
@pytest.mark.parametrize("name", WITH_DIVERGENCE)
def test_every_divergence_is_trls(name, kind):
    assert_same_arithmetic([name], f_divergence_type=kind)


@pytest.mark.parametrize("coef", [-1.0, 0.0, 0.3, 1.0, 2.0])
def test_every_alpha_is_trls(coef):
    assert_same_arithmetic(["sigmoid"], f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coef)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_every_desensitised_loss_is_trls(name, ld_alpha):
    assert_same_arithmetic([name], ld_alpha=ld_alpha)


@pytest.mark.parametrize("name", WEIGHTED)
def test_every_weighted_loss_is_trls(name):
    assert_same_arithmetic([name], use_weighting=True)


def test_weighted_hinge_is_trls_with_the_gradient_that_trl_fails_to_take():
    """TRL multiplies the weights into the output of relu in place, which its backward pass then refuses."""
    options = {"beta": 0.3, "use_weighting": True}
    loss, leaf, _ = our_loss(["hinge"], options, torch.float64)
    their_loss, their_leaf, _ = trl_loss(["hinge"], options, torch.float64)
    torch.testing.assert_close(loss, their_loss, rtol=1e-10, atol=0)
    assert torch.autograd.grad(loss, leaf)[0].abs().max() > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(their_loss, their_leaf)


LISTS = [
    (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0]}),
    (["sigmoid", "sft"], {}),
    (["aot", "ipo", "apo_down"], {"loss_weights": [2.0, -0.5, 0.0]}),
    (["ipo", "robust", "discopop"], {"loss_weights": [1.0, 0.3, 3.0], "use_weighting": True}),
    (["sigmoid_norm", "exo_pair"], {"loss_weights": [0.5, 0.5], "f_divergence_type": "js_divergence"}),
    (["sigmoid", "sft"], {"loss_weights": [1.0, 0.1], "ld_alpha": 0.4, "f_divergence_type": "forward_kl"}),
    (["ipo"], {"use_weighting": True, "ld_alpha": 0.4, "f_divergence_type": "js_divergence"}),
]


@pytest.mark.parametrize(("names", "options"), LISTS, ids=str)
def test_every_list_of_losses_with_modifiers_is_trls(names, options):
    assert_same_arithmetic(names, **options)


def test_label_smoothing_of_sigmoid_is_what_trl_leaves_out():
    """TRL's sigmoid is the same with and without it; here it is the loss of both labels."""
    smoothed, plain = ({"beta": 0.3, "label_smoothing": e} for e in (SMOOTHING, 0.0))
    theirs = [trl_loss(["sigmoid"], options, torch.float64)[0] for options in (smoothed, plain)]
    assert torch.equal(*theirs)
    ours = [our_loss(["sigmoid"], options, torch.float64)[0] for options in (smoothed, plain)]
    assert not torch.isclose(*ours)


# ---- TRL's training --------------------------------------------------------------------------------------------------

STEPS = 3


def policy(tokenizer):
    """The same policy at every call: seeded base, seeded LoRA."""
    model = build_tiny_llama(tokenizer)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def log_of(trainer_class, config_class, tokenizer, folder, options):
    args = config_class(
        output_dir=str(folder),
        bf16=False,
        use_cpu=True,
        max_length=None,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
        **options,
    )
    rows = Dataset.from_list([chat_row(seed) for seed in range(4 * STEPS)])
    trainer = trainer_class(model=policy(tokenizer), args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


TRAINED = [
    *[{"loss_type": [name]} | ({"label_smoothing": SMOOTHING} if name in SMOOTHED else {}) for name in NAMES],
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"},
    {"loss_type": ["ipo"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.4},
    {"loss_type": ["discopop", "robust"], "label_smoothing": SMOOTHING, "use_weighting": True},
]


@pytest.mark.parametrize("options", TRAINED, ids=lambda options: "-".join([*options["loss_type"], *list(options)[1:]]))
def test_three_steps_of_training_are_trls(tokenizer, tmp_path, options):
    theirs = log_of(trl.DPOTrainer, trl.DPOConfig, tokenizer, tmp_path / "trl", options)
    ours = log_of(QLoRADPOTrainer, QLoRADPOConfig, tokenizer, tmp_path / "ours", {**options, "batch_layout": "tree"})
    assert len(ours) == len(theirs) == STEPS
    keys = ["loss", "grad_norm"] + ["rewards/margins"] * ("ld_alpha" not in options)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for key in keys:
            assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), (step, key)
    assert ours[-1]["grad_norm"] > 0
    assert ours[-1]["rewards/margins"] != 0
