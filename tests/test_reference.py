"""The reference: whatever it is, bit for bit, never moving unless it should, and everything as it was afterwards."""

import copy
import re
import warnings

import pytest
import torch
from datasets import Dataset
from peft import (
    BOFTConfig,
    EvaConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PeftType,
    PromptTuningConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from transformers import AutoModelForCausalLM

from qlora_dpo import QLoRADPOTrainer
from qlora_dpo.adapters import (
    adapters_active,
    adapters_disabled,
    frozen_adapters,
    require_token_adapter,
    trained_adapters,
    weights_replaced,
)
from qlora_dpo.averaging import averaged, recompressed
from qlora_dpo.forward import disable_dropout, install_scoring, noise_off, score_batch
from qlora_dpo.layouts import Group, make_batch
from qlora_dpo.model import load_policy
from qlora_dpo.reference import fingerprint, make_reference, reference_hash
from qlora_dpo.score import load_scorer

from tiny_chat import CHAT_ROWS, build_tiny_llama

BATCH = make_batch([Group([9, 12, 14], [[10, 11, 8, 2], [13, 9, 2]], [(0, 1)])], "tree")
ALL = "all-linear"


def policy_of(tokenizer, lora=None, **options):
    model = build_tiny_llama(tokenizer, **options)
    torch.manual_seed(1)
    policy = get_peft_model(model, lora or LoraConfig(target_modules=ALL, task_type="CAUSAL_LM"))
    install_scoring(model)
    return policy.train()


def trained(tokenizer, **options):
    """A policy whose adapter already adds something."""
    return policy_of(tokenizer, LoraConfig(target_modules=ALL, init_lora_weights=False, **options))


def logps(model, batch=BATCH):
    with torch.no_grad():
        return score_batch(model, batch)["logps"]


def trainer_of(tokenizer, args, policy, rows=CHAT_ROWS, **options):
    return QLoRADPOTrainer(
        model=policy, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **options
    )


def state_of(policy):
    flags = {name: p.requires_grad for name, p in policy.named_parameters()}
    modes = {name: m.training for name, m in policy.named_modules()}
    off = {name: m.disable_adapters for name, m in policy.named_modules() if hasattr(m, "disable_adapters")}
    active = {name: m.active_adapters for name, m in policy.named_modules() if hasattr(m, "active_adapters")}
    dropout = {name: m.attention_dropout for name, m in policy.named_modules() if hasattr(m, "attention_dropout")}
    weights = {name: (p.data_ptr(), p.double().sum().item()) for name, p in policy.named_parameters()}
    scaling = {
        name: dict(m.scaling) for name, m in policy.named_modules() if isinstance(getattr(m, "scaling", 0), dict)
    }
    return flags, modes, off, active, dropout, weights, scaling


def reference_of(kind, tokenizer):
    """A policy and a reference of every live kind."""
    lora = LoraConfig(target_modules=ALL, lora_dropout=0.5)
    policy = policy_of(tokenizer, lora, attention_dropout=0.4)
    if kind == "average":
        reference = make_reference("base", policy, average=(0.5, 8))
        with torch.no_grad():
            for name, p in policy.named_parameters():
                if "lora_B" in name:
                    p.normal_()
        reference.update()
        return policy, reference
    if kind == "stacked":
        from qlora_dpo.adapters import stack_adapter

        policy = trained(tokenizer)
        stack_adapter(policy, LoraConfig(target_modules=ALL, lora_dropout=0.5))
        return policy, make_reference("auto", policy)
    return policy, make_reference(kind, policy)


LIVE = ("base", "initial", "average", "stacked")


def test_reference_is_the_base_before_the_adapter_came(tokenizer):
    bare = build_tiny_llama(tokenizer)
    install_scoring(bare)
    policy = trained(tokenizer)
    assert torch.equal(make_reference("base", policy)(policy, BATCH)["logps"], logps(bare))
    assert not torch.equal(logps(policy), logps(bare))


@pytest.mark.parametrize("kind", LIVE)
def test_reference_scored_twice_is_bit_equal_in_spite_of_dropout_and_noise(tokenizer, kind):
    from transformers.integrations.neftune import neftune_post_forward_hook

    policy, reference = reference_of(kind, tokenizer)
    embedding = policy.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)
    assert not torch.equal(logps(policy), logps(policy))
    assert torch.equal(reference(policy, BATCH)["logps"], reference(policy, BATCH)["logps"])


@pytest.mark.parametrize("kind", LIVE)
def test_everything_is_as_before_after_the_reference_pass_and_after_an_error_in_it(tokenizer, kind):
    policy, reference = reference_of(kind, tokenizer)
    next(p for n, p in policy.named_parameters() if "lora_A" in n).requires_grad_(False)
    before = state_of(policy)
    reference(policy, BATCH)
    assert state_of(policy) == before
    with pytest.raises(IndexError):
        reference(policy, BATCH | {"predictors": torch.tensor([10**6] * 7)})
    assert state_of(policy) == before


def test_a_frozen_tensor_stays_frozen(tokenizer):
    """PEFT's own context manager makes every tensor of the adapter trainable again."""
    policy = policy_of(tokenizer)
    frozen = next(p for n, p in policy.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    with adapters_disabled(policy), adapters_active(policy, ["default"]), weights_replaced([(frozen, frozen.data)]):
        pass
    assert not frozen.requires_grad
    with policy.disable_adapter():
        pass
    assert frozen.requires_grad


def test_noise_off_keeps_layers_in_train_mode(tokenizer):
    policy = policy_of(tokenizer)
    with noise_off(policy):
        assert policy.training
        assert all(m.training for m in policy.modules() if type(m).__name__ == "LlamaDecoderLayer")


def test_no_reference_is_zero(tokenizer):
    reference = make_reference("none", policy_of(tokenizer))
    assert reference(None, BATCH)["logps"].tolist() == [0.0, 0.0]
    assert reference(None, BATCH)["token_logps"].tolist() == [0.0] * 7


# ---- which reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "kind"),
    [
        (LoraConfig(target_modules=ALL), "base"),
        (LoraConfig(target_modules=ALL, use_rslora=True), "base"),
        (LoraConfig(target_modules=ALL, init_lora_weights="gaussian"), "base"),
        (LoraConfig(target_modules=ALL, init_lora_weights=False), "initial"),
        (LoraConfig(target_modules=ALL, init_lora_weights="pissa"), "initial"),
        (LoraConfig(target_modules=ALL, init_lora_weights="olora"), "initial"),
        (LoraConfig(target_modules=ALL, bias="all"), "initial"),
        (LoraConfig(target_modules=ALL, bias="lora_only"), "initial"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "initial"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[9, 10]), "initial"),
        (LoraConfig(target_modules=ALL, use_dora=True), "initial"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "initial"),
    ],
    ids="fresh rslora gaussian trained pissa olora bias_all bias_lora modules_to_save tokens dora ia3".split(),
)
def test_auto_is_the_policys_own_start_and_never_moves(tokenizer, make_args, lora, kind):
    """Step-0 margins are exactly 0, and the reference's log-probs bit-equal before and after three training steps."""
    lora = copy.deepcopy(lora)
    lora.task_type = "CAUSAL_LM"
    policy = policy_of(tokenizer, lora, attention_bias=True)
    trainer = trainer_of(tokenizer, make_args(max_steps=3, learning_rate=1e-2, per_device_train_batch_size=4), policy)
    assert trainer.reference.kind == kind
    start = trainer.reference(policy.train(), BATCH)["logps"]
    assert torch.equal(logps(policy), start)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0
    assert torch.equal(trainer.reference(policy, BATCH)["logps"], start)
    assert not torch.equal(logps(policy), start)


def corda(tokenizer):
    """CorDA splits the base by the covariance of its inputs."""
    model = build_tiny_llama(tokenizer)
    config = CordaConfig(corda_method="kpm")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="corda", corda_config=config)
    generator = torch.Generator().manual_seed(0)

    def run():
        for _ in range(64):
            model(torch.randint(0, len(tokenizer), (1, 64), generator=generator))

    preprocess_corda(model, lora, run_model=run)
    return get_peft_model(model, lora)


def eva(tokenizer):
    """EVA takes A from the activations and leaves B at zero."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    policy = get_peft_model(build_tiny_llama(tokenizer), lora)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, len(tokenizer), (4, 16), generator=generator) for _ in range(8)]
    initialize_lora_eva_weights(policy, [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids])
    return policy


def loftq(tokenizer):
    """PEFT's LoftQ needs a CUDA device: what it leaves behind is another base and factors that are not zero."""
    policy = trained(tokenizer)
    policy.peft_config["default"].init_lora_weights = "loftq"
    return policy


@pytest.mark.parametrize(("make", "kind"), [(corda, "initial"), (eva, "base"), (loftq, "initial")])
def test_initialisations_from_data_start_at_their_reference_and_leave_it(tokenizer, make_args, make, kind):
    policy = make(tokenizer)
    trainer = trainer_of(tokenizer, make_args(max_steps=3, learning_rate=1e-2), policy)
    assert trainer.reference.kind == kind
    start = trainer.reference(policy.train(), BATCH)["logps"]
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0
    assert torch.equal(trainer.reference(policy, BATCH)["logps"], start)
    assert not torch.equal(logps(policy), start)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_base_is_refused_as_reference_of_an_initialisation_that_changes_it(tokenizer, start):
    policy = policy_of(tokenizer, LoraConfig(target_modules=ALL, init_lora_weights=start))
    with pytest.raises(ValueError, match="must have a base that stays as it is"):
        make_reference("base", policy)


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(target_modules=["q_proj"], bias="all"),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["bias", "modules_to_save"],
)
def test_the_base_is_refused_as_reference_where_training_changes_it(tokenizer, lora):
    with pytest.raises(ValueError, match="trains parts of the base"):
        make_reference("base", policy_of(tokenizer, lora))


def test_base_weights_that_are_trainable_are_refused(tokenizer):
    policy = policy_of(tokenizer)
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    for kind in ("auto", "initial", "none"):
        with pytest.raises(ValueError, match="which no saved adapter would hold"):
            make_reference(kind, policy)


def test_adapters_that_are_not_layers_on_tokens_are_refused(tokenizer):
    lora = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    for kind in ("auto", "none", "initial"):
        with pytest.raises(NotImplementedError, match="act on each token"):
            make_reference(kind, policy_of(tokenizer, lora))


@pytest.mark.parametrize("kind", ["LILY", "PVERA", "POLY", "XLORA", "SHADOW"])
def test_adapters_that_mix_tokens_or_draw_numbers_are_refused(kind):
    config = LoraConfig(task_type="CAUSAL_LM")
    config.peft_type = PeftType(kind)
    with pytest.raises(NotImplementedError, match=f"act on each token, got {kind}, w"):
        require_token_adapter(config)


NOISY = {
    "dropout of ranks": LoHaConfig(r=4, target_modules=["q_proj"], rank_dropout=0.5),
    "dropout of layers": LoKrConfig(r=4, target_modules=["q_proj"], module_dropout=0.5),
    "dropout of blocks": BOFTConfig(boft_block_size=4, target_modules=["q_proj"], boft_dropout=0.5),
}


@pytest.mark.parametrize("kind", NOISY)
def test_the_dropout_of_every_kind_of_adapter_is_known(kind, tokenizer):
    """PEFT keeps it in dicts and in layers of its own: a reference scored twice differed by nats."""
    torch.manual_seed(3)
    policy = get_peft_model(build_tiny_llama(tokenizer), copy.deepcopy(NOISY[kind]))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    install_scoring(policy.get_base_model())
    policy.train()

    def several():
        with torch.no_grad():
            return [score_batch(policy, BATCH)["logps"] for _ in range(8)]

    first, *others = several()
    assert not all(torch.equal(first, other) for other in others)
    with noise_off(policy):
        first, *others = several()
    assert all(torch.equal(first, other) for other in others)
    first, *others = several()
    assert not all(torch.equal(first, other) for other in others)
    disable_dropout(policy)
    first, *others = several()
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_any_adapter_name_trains(tokenizer, make_args, name):
    model = build_tiny_llama(tokenizer)
    policy = get_peft_model(model, LoraConfig(target_modules=ALL, task_type="CAUSAL_LM"), adapter_name=name)
    trainer = trainer_of(tokenizer, make_args(max_steps=2, learning_rate=1e-2), policy)
    trainer.train()
    assert trainer.reference.kind == "base"
    assert trained_adapters(policy) == [name]


def test_a_continued_adapter_is_compared_with_itself(tokenizer, make_args, capsys):
    policy = trained(tokenizer, task_type="CAUSAL_LM")
    before = logps(policy)
    trainer = trainer_of(tokenizer, make_args(max_steps=2, learning_rate=1e-2), policy)
    trainer.train()
    assert torch.equal(trainer.reference(policy, BATCH)["logps"], before)
    printed = capsys.readouterr().err
    assert "reference: the policy as it was at the start" in printed
    assert "largest step-0 margin: 0 nats (exactly 0)" in printed


def test_a_new_adapter_on_a_frozen_one_is_compared_with_base_and_frozen_one(tokenizer, make_args, tmp_path):
    policy = trained(tokenizer, task_type="CAUSAL_LM")
    below = {n: p.detach().clone() for n, p in policy.named_parameters() if "lora_" in n}
    before = logps(policy)
    args = make_args(max_steps=2, learning_rate=1e-2, output_dir=str(tmp_path / "stacked"))
    lora = LoraConfig(r=2, target_modules=ALL, task_type="CAUSAL_LM")
    trainer = trainer_of(tokenizer, args, policy, peft_config=lora)
    assert (trained_adapters(policy), frozen_adapters(policy)) == (["dpo"], ["default"])
    trainer.train()
    assert trainer.reference.kind == "adapter"
    assert trainer.state.log_history[0]["rewards/margins"] == 0
    assert torch.equal(trainer.reference(policy, BATCH)["logps"], before)
    assert not torch.equal(logps(policy), before)
    assert all(torch.equal(dict(policy.named_parameters())[name], value) for name, value in below.items())
    trainer.save_model()
    assert (tmp_path / "stacked" / "dpo" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "stacked" / "adapter_model.safetensors").exists()


def test_a_stack_resumes_with_its_frozen_part_frozen(tokenizer, make_args):
    def run(**options):
        policy = trained(tokenizer, task_type="CAUSAL_LM")
        lora = LoraConfig(r=2, target_modules=ALL, task_type="CAUSAL_LM")
        args = make_args(learning_rate=1e-2, save_strategy="steps", save_steps=2, **options)
        return trainer_of(tokenizer, args, policy, peft_config=lora)

    straight = run(max_steps=4)
    straight.train()
    resumed = run(max_steps=4)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    assert torch.equal(logps(resumed.model), logps(straight.model))
    assert trained_adapters(resumed.model) == ["dpo"]


def test_resuming_from_another_start_is_refused(tokenizer, make_args):
    args = make_args(max_steps=2, save_strategy="steps", save_steps=2)
    trainer_of(tokenizer, args, trained(tokenizer, task_type="CAUSAL_LM")).train()
    other = trained(tokenizer, task_type="CAUSAL_LM")
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "lora_B" in n).mul_(2)
    with pytest.raises(ValueError, match=r"the reference was .* and is "):
        trainer_of(tokenizer, args, other).train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")


def test_an_adapter_named_by_its_path_is_the_reference(tokenizer, make_args, tmp_path):
    sft = trained(tokenizer, task_type="CAUSAL_LM")
    sft.save_pretrained(tmp_path / "sft")
    expected = logps(sft)
    policy = policy_of(tokenizer)
    args = make_args(max_steps=2, learning_rate=1e-2, reference=str(tmp_path / "sft"))
    trainer = trainer_of(tokenizer, args, policy)
    before = state_of(policy)[0]
    assert torch.equal(trainer.reference(policy, BATCH)["logps"], expected)
    trainer.train()
    assert torch.equal(trainer.reference(policy, BATCH)["logps"], expected)
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == before
    trainer.save_model()
    assert not list((tmp_path / "run").rglob("reference"))


def test_an_adapter_as_reference_has_no_bits_of_its_own(tokenizer, make_args, tmp_path):
    trained(tokenizer, task_type="CAUSAL_LM").save_pretrained(tmp_path / "sft")
    args = make_args(reference=str(tmp_path / "sft"), reference_in_4bit=False)
    with pytest.raises(ValueError, match=r"`reference_in_4bit` must be True for the adapter .*sft, which lies on the"):
        trainer_of(tokenizer, args, policy_of(tokenizer))


@pytest.mark.parametrize("cached", [False, True])
def test_a_reference_model_is_scored_with_in_the_bits_it_was_given_in(base_folder, tokenizer, make_args, cached):
    """TRL's `ref_model` in 16 bit was recorded as one in 4 bit, and then said to have changed."""
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    args = make_args(max_steps=1, precompute_ref_log_probs=cached)
    trainer = trainer_of(tokenizer, args, load_policy(base_folder), ref_model=model)
    trainer.train()
    trainer.save_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scorer = load_scorer(args.output_dir)
    assert not getattr(scorer.reference.model, "is_loaded_in_4bit", False)


@pytest.mark.parametrize("in_4bit", [True, False])
def test_a_model_named_by_its_path_is_the_reference(tokenizer, make_args, base_folder, in_4bit):
    args = make_args(max_steps=1, learning_rate=1e-2, reference=base_folder, reference_in_4bit=in_4bit)
    trainer = trainer_of(tokenizer, args, policy_of(tokenizer))
    before = trainer.reference(trainer.model, BATCH)["logps"]
    trainer.train()
    assert trainer.reference.kind == "model"
    assert getattr(trainer.reference.model, "is_loaded_in_4bit", False) is in_4bit
    assert torch.equal(trainer.reference(trainer.model, BATCH)["logps"], before)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_reference_model_may_be_given_as_in_trl(tokenizer, make_args, wrapped):
    other = trained(tokenizer) if wrapped else build_tiny_llama(tokenizer)
    twin = copy.deepcopy(other)
    install_scoring(twin.get_base_model() if wrapped else twin)
    trainer = trainer_of(tokenizer, make_args(max_steps=1), policy_of(tokenizer), ref_model=other)
    trainer.train()
    assert torch.equal(trainer.reference(trainer.model, BATCH)["logps"], logps(twin))
    assert not any(p.requires_grad for p in other.parameters())


def test_two_references_are_refused(tokenizer, make_args):
    with pytest.raises(ValueError, match="`ref_model` must be None with reference='base'"):
        trainer_of(tokenizer, make_args(reference="base"), policy_of(tokenizer), ref_model=build_tiny_llama(tokenizer))


def test_losses_without_a_reference_score_none(tokenizer, make_args):
    trainer = trainer_of(tokenizer, make_args(loss_type="simpo", max_steps=1), policy_of(tokenizer))
    assert trainer.reference.kind == "none"
    trainer.train()


def test_a_policy_that_does_not_start_at_its_reference_is_stopped(tokenizer, make_args):
    policy = policy_of(tokenizer)
    trainer = trainer_of(tokenizer, make_args(), policy)
    with torch.no_grad():
        next(p for n, p in policy.named_parameters() if "lora_B" in n).normal_()
    with pytest.raises(RuntimeError, match="Step-0 margins must be exactly 0"):
        trainer.train()


# ---- given log-probabilities -----------------------------------------------------------------------------------------


def test_given_log_probabilities_are_used(tokenizer, make_args):
    rows = [row | {"ref_logps": [-3.0 - i, -5.0]} for i, row in enumerate(CHAT_ROWS[:4])]
    trl_rows = [row | {"ref_chosen_logps": -3.0 - i, "ref_rejected_logps": -5.0} for i, row in enumerate(CHAT_ROWS[:4])]
    found = []
    for some in (rows, trl_rows):
        args = make_args(max_steps=1, per_device_train_batch_size=4, learning_rate=0.0)
        trainer = trainer_of(tokenizer, args, policy_of(tokenizer), some)
        trainer.train()
        assert trainer.given
        found.append(trainer.state.log_history[0]["rewards/chosen"])
    pi = trainer.state.log_history[0]["logps/chosen"]
    assert found == [pytest.approx(0.1 * (pi + 4.5), rel=1e-6)] * 2


def test_given_log_probabilities_beside_a_named_reference_are_refused(tokenizer, make_args):
    rows = [row | {"ref_logps": [-3.0, -5.0]} for row in CHAT_ROWS[:4]]
    with pytest.raises(ValueError, match="`reference` must be 'auto' with a column `ref_logps`"):
        trainer_of(tokenizer, make_args(reference="base"), policy_of(tokenizer), rows)


def test_given_log_probabilities_of_rows_that_are_cut_are_not_used(tokenizer, make_args):
    rows = [row | {"ref_logps": [-3.0, -5.0]} for row in CHAT_ROWS]
    trainer = trainer_of(tokenizer, make_args(max_length=20), policy_of(tokenizer), rows)
    assert any("cut to the token limits" in reason for reason in trainer.data_reports["train"].dropped)


def test_given_log_probabilities_that_some_rows_lack_are_refused(tokenizer, make_args):
    rows = [row | {"ref_logps": [-3.0, -5.0] if i else None} for i, row in enumerate(CHAT_ROWS)]
    with pytest.raises(ValueError, match="must be given in every row or in none"):
        trainer_of(tokenizer, make_args(), policy_of(tokenizer), rows)


# ---- a reference that follows the policy -----------------------------------------------------------------------------


class TwoModels:
    """TR-DPO with whole weights: W_ref <- alpha W + (1 - alpha) W_ref, over the merged weights of the policy."""

    def __init__(self, policy, alpha, start):
        self.policy, self.alpha = policy, alpha
        self.model = copy.deepcopy(policy).merge_and_unload() if start == "initial" else self._base()
        install_scoring(self.model)

    def _base(self):
        merged = copy.deepcopy(self.policy)
        with torch.no_grad():
            for name, p in merged.named_parameters():
                if "lora_B" in name:
                    p.zero_()
        return merged.merge_and_unload()

    def update(self):
        merged = dict(copy.deepcopy(self.policy).merge_and_unload().named_parameters())
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.mul_(1 - self.alpha).add_(merged[name], alpha=self.alpha)


@pytest.mark.parametrize("start", ["base", "initial"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_moving_reference_is_that_of_two_models_with_whole_weights(tokenizer, start, rslora):
    """Four updates in fp64: the average of B A, which the average of B and of A is not."""
    policy = trained(tokenizer, use_rslora=rslora, r=3).double()
    reference = make_reference(start, policy, average=(0.6, 128))
    truth = TwoModels(policy, 0.6, start)
    assert torch.allclose(reference(policy, BATCH)["logps"], logps(truth.model), rtol=0, atol=1e-9)
    for step in range(4):
        torch.manual_seed(step)
        with torch.no_grad():
            for p in policy.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p), alpha=0.1)
        assert reference.update() == 0
        truth.update()
        assert torch.allclose(reference(policy, BATCH)["logps"], logps(truth.model), rtol=0, atol=1e-9)


def test_averaging_factors_instead_of_products_would_show():
    torch.manual_seed(0)
    (a, b), (c, d) = [(torch.randn(2, 5).double(), torch.randn(4, 2).double()) for _ in range(2)]
    x, y = averaged((c, d), (a, b), 0.6)
    right = 0.6 * b @ a + 0.4 * d @ c
    assert torch.allclose(y @ x, right, rtol=1e-12)
    assert (right - (0.6 * b + 0.4 * d) @ (0.6 * a + 0.4 * c)).norm() > 0.05 * right.norm()


def test_recompression_is_the_best_of_its_rank_and_says_its_error():
    torch.manual_seed(0)
    a, b = torch.randn(6, 9).double(), torch.randn(7, 6).double()
    (x, y), error = recompressed((a, b), 4)
    assert (x.shape, y.shape) == ((4, 9), (7, 4))
    u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
    best = (u[:, :4] * s[:4]) @ v[:4]
    assert torch.allclose(y @ x, best, atol=1e-12)
    assert error == pytest.approx(((b @ a - best).norm() / (b @ a).norm()).item())
    assert recompressed((a, b), 6)[1] == 0


def test_sync_moves_the_reference_every_few_steps_and_logs_its_error(tokenizer, make_args):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    policy = policy_of(tokenizer)
    trainer = trainer_of(tokenizer, make_args(max_steps=4, learning_rate=1e-2, **options), policy)
    start = trainer.reference(policy.train(), BATCH)["logps"]
    trainer.train()
    assert torch.equal(start, logps(build_installed(tokenizer)))
    moved = trainer.reference(policy, BATCH)["logps"]
    assert torch.allclose(moved, logps(policy), rtol=0, atol=1e-5)
    assert trainer.state.log_history[3]["reference/rank_error"] == 0


def build_installed(tokenizer):
    model = build_tiny_llama(tokenizer)
    install_scoring(model)
    return model.train()


def test_a_moving_reference_resumes_where_it_was_and_is_never_exported(tokenizer, make_args):
    def run():
        args = make_args(
            max_steps=6, learning_rate=1e-2, sync_ref_model=True, ref_model_sync_steps=2, save_strategy="steps",
            save_steps=3,
        )  # fmt: skip
        return trainer_of(tokenizer, args, policy_of(tokenizer))

    straight = run()
    straight.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert torch.equal(
        resumed.reference(resumed.model, BATCH)["logps"], straight.reference(straight.model, BATCH)["logps"]
    )
    assert torch.equal(logps(resumed.model), logps(straight.model))
    resumed.save_model(f"{resumed.args.output_dir}/final")
    from pathlib import Path

    assert Path(resumed.args.output_dir, "checkpoint-3", "reference", "average.safetensors").is_file()
    assert not Path(resumed.args.output_dir, "final", "reference").exists()


@pytest.mark.parametrize(
    "lora",
    [LoraConfig(target_modules=["q_proj"], use_dora=True), LoraConfig(target_modules=["embed_tokens"])],
    ids=["dora", "embedding"],
)
def test_a_moving_reference_of_more_than_products_is_refused(tokenizer, lora):
    with pytest.raises(
        NotImplementedError, match=r"must have a plain LoRA on linear layers, got another: .* Leave the option out"
    ):
        make_reference("auto", policy_of(tokenizer, lora), average=(0.5, 8))


def test_a_moving_reference_of_two_trained_adapters_is_refused(tokenizer):
    policy = policy_of(tokenizer)
    policy.add_adapter("more", LoraConfig(target_modules=["q_proj"]))
    policy.base_model.set_adapter(["default", "more"])
    with pytest.raises(NotImplementedError, match=r"must have one trained adapter, got \['default', 'more'\]. Freeze"):
        make_reference("auto", policy, average=(0.5, 8))


# ---- identities ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_of_the_base_knows_nothing_of_the_adapter(tokenizer):
    found = set()
    for seed, rank in ((1, 2), (2, 8)):
        torch.manual_seed(seed)
        policy = policy_of(tokenizer, LoraConfig(r=rank, target_modules=["q_proj"] if rank == 2 else ALL))
        found.add(fingerprint(make_reference("base", policy)))
    assert len(found) == 1
    with torch.no_grad():
        policy.get_base_model().model.norm.weight[0] += 1e-3
    assert fingerprint(make_reference("base", policy)) not in found


def test_one_adapter_has_one_fingerprint_whatever_it_is_called(tokenizer, tmp_path):
    policy = trained(tokenizer, task_type="CAUSAL_LM")
    policy.save_pretrained(tmp_path)
    initial = reference_hash(make_reference("initial", policy))
    named = reference_hash(make_reference(str(tmp_path), policy_of(tokenizer)))
    again = PeftModel.from_pretrained(
        build_tiny_llama(tokenizer), str(tmp_path), adapter_name="other", is_trainable=True
    )
    assert initial == named == reference_hash(make_reference("initial", again))
    assert reference_hash(make_reference("base", policy)) is None


def test_a_moving_reference_that_no_loss_looks_at_is_refused(tokenizer, make_args):
    with pytest.raises(ValueError, match="`sync_ref_model` must be False for losses without a reference"):
        trainer_of(tokenizer, make_args(loss_type="simpo", sync_ref_model=True), policy_of(tokenizer))


def test_a_cache_in_front_of_a_reference_does_not_hide_which_it_is(tokenizer, make_args, tmp_path):
    policy = trained(tokenizer, task_type="CAUSAL_LM")
    live = reference_hash(make_reference("initial", policy))
    args = make_args(max_steps=1, precompute_ref_log_probs=True, reference_cache=str(tmp_path / "c.sqlite"))
    trainer = trainer_of(tokenizer, args, policy)
    trainer.train()
    assert reference_hash(trainer.reference) == live


def test_a_trained_policy_that_is_evaluated_against_itself_is_warned_about(tokenizer, make_args):
    policy = trained(tokenizer, task_type="CAUSAL_LM")
    rows = Dataset.from_list(CHAT_ROWS[:4])
    trainer = QLoRADPOTrainer(policy, args=make_args(), eval_dataset=rows, processing_class=tokenizer)
    with pytest.warns(UserWarning, match="compared with itself"):
        assert trainer.evaluate()["eval_rewards/margins"] == 0


@pytest.mark.parametrize(("asked", "hint"), [("bse", "Did you mean base?"), ("me/no-such-model", "Check the path, or")])
def test_a_reference_that_cannot_be_found_is_named_with_the_option(base_folder, asked, hint):
    listed = r"`reference` must be one of \['auto', 'base', 'initial', 'none'\], or the path or id of"
    with pytest.raises(FileNotFoundError, match=f"{listed} .*, got {asked} .* {re.escape(hint)}"):
        make_reference(asked, load_policy(base_folder, quantize=False))
