"""What a script for TRL's trainer does beside its constructor: it works, or it is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlavaConfig,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from qlora_dpo import LOSSES, QLoRADPOTrainer
from qlora_dpo.record import read_record

from test_trainer import RANKED, KeepGradients, first_step, policy_of, trainer_of, weights
from tiny_chat import CHAT_ROWS, build_tiny_llama


def built(kind, tokenizer, args):
    rows = Dataset.from_list(CHAT_ROWS)
    return kind(model=policy_of(tokenizer), args=args, train_dataset=rows, processing_class=tokenizer)


# ---- attributes ------------------------------------------------------------------------------------------------------


class Anneal(TrainerCallback):
    """Another beta at every step."""

    def __init__(self):
        self.trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.beta = 0.1 + state.global_step


def annealed(tokenizer, args, **options):
    callback = Anneal()
    trainer = trainer_of(tokenizer, args, callbacks=[callback], **options)
    callback.trainer = trainer
    return trainer


def logged(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if key in line]


def test_beta_can_be_set_in_the_middle_of_a_run(tokenizer, make_args):
    """Gradient, logged loss and logged rewards, of one step with another beta than that of the configuration."""
    options = {"max_steps": 1, "reference": "base", "learning_rate": 1e-3, "max_grad_norm": 0.0}
    found = []
    for beta, set_to in ((0.5, None), (0.1, 0.5)):
        keep, policy = KeepGradients(), policy_of(tokenizer, random_b=True)
        args = make_args(**options, beta=beta)
        trainer = trainer_of(tokenizer, args, policy=policy, callbacks=[keep], eval_rows=RANKED)
        if set_to is not None:
            trainer.beta = set_to
        assert trainer.beta == 0.5
        found.append((trainer.evaluate(), trainer.train() and keep.gradients[0], trainer.state.log_history[0]))
    (evaluation, gradient, line), (other_evaluation, other_gradient, other_line) = found
    assert torch.equal(gradient, other_gradient)
    for key in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert line[key] == other_line[key] != 0
        assert evaluation[f"eval_{key}"] == other_evaluation[f"eval_{key}"] != 0


def test_a_callback_may_anneal_beta_and_the_run_goes_on_as_it_would_have(tokenizer, make_args, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = annealed(tokenizer, make_args(output_dir=str(tmp_path / "a"), **options))
    whole.train()
    constant = trainer_of(tokenizer, make_args(max_steps=4, learning_rate=1e-3))
    constant.train()
    assert logged(whole)[0] == logged(constant)[0]
    assert all(one != other for one, other in zip(logged(whole)[1:], logged(constant)[1:], strict=True))
    resumed = annealed(tokenizer, make_args(output_dir=str(tmp_path / "b"), **options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(resumed))
    record = read_record(str(tmp_path / "a" / "checkpoint-4"))
    assert (record.beta, record.loss["beta"]) == (3.1, 0.1)


def test_beta_is_that_of_the_checkpoint_that_is_gone_on_from(tokenizer, make_args, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    annealed(tokenizer, make_args(max_steps=2, **options)).train()
    resumed = trainer_of(tokenizer, make_args(max_steps=3, **options))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.beta == 1.1


def test_beta_is_that_of_the_best_checkpoint_once_it_is_loaded(tokenizer, make_args):
    """Nothing is learnt, so the two evaluations differ by beta alone."""
    args = make_args(
        max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.0,
        load_best_model_at_end=True, metric_for_best_model="eval_rewards/margins", reference="base",
        greater_is_better=True,
    )  # fmt: skip
    policy = policy_of(tokenizer, random_b=True)
    trainer = annealed(tokenizer, args, policy=policy, eval_rows=CHAT_ROWS)
    trainer.train()
    margins = logged(trainer, "eval_rewards/margins")
    best = int(np.argmax(margins))
    assert margins[0] != margins[1]
    assert trainer.state.best_global_step == best + 1
    assert trainer.beta == [0.1, 1.1][best]
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(margins[best], rel=1e-6)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_beta_must_be_in_its_range(tokenizer, make_args, value):
    trainer = trainer_of(tokenizer, make_args())
    with pytest.raises(ValueError, match="`beta` must be above 0 and finite"):
        trainer.beta = value
    assert trainer.beta == 0.1


def test_options_can_be_read_by_the_names_of_trl(tokenizer, make_args):
    args = make_args(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], label_smoothing=0.1, ld_alpha=0.4)
    trainer = trainer_of(tokenizer, args)
    assert trainer.loss_types == trainer.loss_type == ["sigmoid", "sft"]
    assert trainer.loss_weights == [1.0, 0.5]
    assert (trainer.label_smoothing, trainer.ld_alpha) == (0.1, 0.4)
    assert (trainer.f_divergence_type, trainer.f_alpha_divergence_coef) == ("reverse_kl", 0.5)
    assert not any((trainer.use_weighting, trainer.precompute_ref_logps, trainer.padding_free))
    assert (trainer.router_aux_loss_coef, trainer.aux_loss_enabled) == (0.0, False)
    assert trainer.ref_model is None


def test_the_model_that_is_the_reference_can_be_read(tokenizer, make_args):
    reference = build_tiny_llama(tokenizer)
    assert trainer_of(tokenizer, make_args(), ref_model=reference).ref_model is reference


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("loss_types", ["ipo"], "loss_type"),
        ("loss_type", "ipo", "loss_type"),
        ("loss_weights", [3.0], "loss_weights"),
        ("label_smoothing", 0.3, "label_smoothing"),
        ("ld_alpha", 0.2, "ld_alpha"),
        ("f_divergence_type", "js_divergence", "f_divergence_type"),
        ("f_alpha_divergence_coef", 0.3, "f_alpha_divergence_coef"),
        ("use_weighting", True, "use_weighting"),
        ("precompute_ref_logps", True, "precompute_ref_log_probs"),
        ("padding_free", True, "padding_free"),
        ("router_aux_loss_coef", 0.1, "router_aux_loss_coef"),
        ("aux_loss_enabled", True, "router_aux_loss_coef"),
    ],
)
def test_options_cannot_be_set_on_the_trainer(tokenizer, make_args, name, value, option):
    trainer = trainer_of(tokenizer, make_args())
    with pytest.raises(AttributeError, match=f"`{name}` must not be set on the trainer.*Set `{option}` in QLoRADPOC"):
        setattr(trainer, name, value)


def test_what_cannot_be_replaced_on_a_trainer_says_so(tokenizer, make_args):
    trainer = trainer_of(tokenizer, make_args())
    with pytest.raises(AttributeError, match="`ref_model` must not be set on the trainer, got LlamaForC"):
        trainer.ref_model = build_tiny_llama(tokenizer)
    with pytest.raises(NotImplementedError, match=r"`compute_loss` must not be replaced.*Add a loss of your own"):
        trainer.compute_loss = lambda model, inputs: 0.0
    trainer.own = 1
    assert trainer.own == 1


# ---- subclasses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("compute_loss", "Add a loss of your own to `qlora_dpo.LOSSES`"),
        ("_compute_loss", "Add a loss of your own to `qlora_dpo.LOSSES`"),
        ("dpo_loss", "Add a loss of your own to `qlora_dpo.LOSSES`"),
        ("get_batch_loss_metrics", "Add a loss of your own to `qlora_dpo.LOSSES`"),
        ("concatenated_forward", "Add a loss of your own to `qlora_dpo.LOSSES`"),
        ("_prepare_dataset", "Map the data set before you pass it"),
        ("tokenize_row", "Map the data set before you pass it"),
        ("compute_ref_log_probs", "Set `reference`, pass `ref_model`"),
        ("store_metrics", "Override `log`"),
        ("prediction_step", "Pass `compute_metrics`"),
        ("generate_from_model_and_ref", "Set `sample_generations`"),
        ("beta", "Set `beta` there"),
        ("loss_types", "Set `loss_type` there"),
    ],
)
def test_an_override_that_would_have_no_effect_is_refused(tokenizer, make_args, name, way_out):
    mine = type("Mine", (QLoRADPOTrainer,), {name: lambda self, *args, **kwargs: None})
    said = rf"`{name}` must not be overridden, got Mine\.{name}: .*{way_out}"
    with pytest.raises(NotImplementedError, match=said):
        built(mine, tokenizer, make_args())


def test_an_override_of_a_mixin_is_refused_too(tokenizer, make_args):
    class Mixin:
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    class Mine(Mixin, QLoRADPOTrainer):
        pass

    with pytest.raises(NotImplementedError, match="`compute_loss` must not be overridden, got Mine"):
        built(Mine, tokenizer, make_args())


def test_a_method_put_into_the_class_is_refused_too(tokenizer, make_args, monkeypatch):
    monkeypatch.setattr(QLoRADPOTrainer, "_prepare_dataset", lambda self, *args: None, raising=False)
    with pytest.raises(NotImplementedError, match="`_prepare_dataset` must not be overridden"):
        built(QLoRADPOTrainer, tokenizer, make_args())


def test_overrides_that_are_called_work(tokenizer, make_args):
    called = set()

    class Mine(QLoRADPOTrainer):
        def __init__(self, *args, extra, **kwargs):
            self.before = extra
            super().__init__(*args, **kwargs)
            self.extra = extra

        def _get_train_sampler(self, *args):
            called.add("_get_train_sampler")
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def create_optimizer(self, *args):
            called.add("create_optimizer")
            self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.1)
            return self.optimizer

        def training_step(self, *args, **kwargs):
            called.add("training_step")
            return super().training_step(*args, **kwargs)

        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            return output._replace(metrics=output.metrics | {"eval_mine": 2.0})

        def log(self, logs, start_time=None):
            super().log(logs | {"mine": 1.0}, start_time)

    trainer = Mine(
        model=policy_of(tokenizer),
        args=make_args(max_steps=1),
        train_dataset=Dataset.from_list(CHAT_ROWS),
        eval_dataset=Dataset.from_list(RANKED),
        processing_class=tokenizer,
        extra=1,
    )
    trainer.train()
    assert called == {"_get_train_sampler", "create_optimizer", "training_step"}
    assert trainer.state.log_history[0]["mine"] == 1.0
    assert trainer.evaluate()["eval_mine"] == 2.0
    assert trainer.extra == trainer.before == 1


# ---- the hooks that errors name --------------------------------------------------------------------------------------


def tripled(scores, *, beta):
    """Three times the loss of DPO."""
    return -3 * F.logsigmoid(beta * scores.logratio_differences)


@pytest.mark.parametrize("micro", [1, 4])
def test_a_loss_of_ones_own_is_scaled_once_logged_and_evaluated(tokenizer, make_args, monkeypatch, micro):
    monkeypatch.setitem(LOSSES, "tripled", tripled)
    options = {"reference": "base", "per_device_train_batch_size": micro, "gradient_accumulation_steps": 4 // micro}
    plain, line = first_step(tokenizer, make_args, CHAT_ROWS[:4], **options)
    mine, own_line = first_step(tokenizer, make_args, CHAT_ROWS[:4], loss_type="tripled", **options)
    assert (mine - 3 * plain).norm() < 1e-6 * mine.norm()
    assert own_line["loss"] == pytest.approx(3 * line["loss"], rel=1e-6)
    evaluations = []
    for loss in ("sigmoid", "tripled"):
        args, policy = make_args(reference="base", loss_type=loss), policy_of(tokenizer, random_b=True)
        trainer = trainer_of(tokenizer, args, rows=None, eval_rows=CHAT_ROWS, policy=policy)
        evaluations.append(trainer.evaluate()["eval_loss"])
    assert evaluations[1] == pytest.approx(3 * evaluations[0], rel=1e-6)


@pytest.mark.filterwarnings("error:The card of")
def test_an_adapter_of_a_loss_of_ones_own_is_saved_with_its_card(tokenizer, make_args, monkeypatch):
    monkeypatch.setitem(LOSSES, "tripled", tripled)
    args = make_args(max_steps=1, loss_type="tripled")
    trainer = trainer_of(tokenizer, args)
    trainer.train()
    trainer.save_model()
    assert read_record(args.output_dir).loss["loss_type"] == ["tripled"]
    assert "tripled" in Path(args.output_dir, "README.md").read_text()


class Penalty(TrainerCallback):
    """The gradient of 0.05 |w|^2, once a step, as the error on `compute_loss` says."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad += 0.1 * parameter.detach()


@pytest.mark.parametrize("micro", [1, 4])
def test_a_term_of_the_weights_is_added_once_whatever_the_accumulation(tokenizer, make_args, micro):
    """Plain SGD with rate 1: a step takes off the gradient."""
    options = {
        "max_steps": 1, "reference": "base", "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": 4 // micro,
    }  # fmt: skip
    after = []
    for callbacks in ([], [Penalty()]):
        policy = policy_of(tokenizer, random_b=True)
        before = torch.cat([p.detach().flatten() for p in policy.parameters() if p.requires_grad])
        trainer = trainer_of(tokenizer, make_args(**options), CHAT_ROWS[:4], policy=policy, callbacks=callbacks)
        trainer.train()
        after.append(weights(trainer))
    assert torch.allclose(after[1], after[0] - 0.1 * before, atol=1e-6)


def test_what_compute_metrics_gets_is_said_once(tokenizer, make_args, capsys):
    options = {"rows": None, "eval_rows": RANKED, "policy": policy_of(tokenizer, random_b=True)}
    trainer = trainer_of(tokenizer, make_args(reference="base"), compute_metrics=lambda p: {"n": len(p[1])}, **options)
    trainer.evaluate()
    trainer.evaluate()
    assert capsys.readouterr().err.count("compute_metrics gets rewards of pairs") == 1
    trainer_of(tokenizer, make_args(reference="base"), **options).evaluate()
    assert "compute_metrics" not in capsys.readouterr().err


# ---- callbacks -------------------------------------------------------------------------------------------------------


def of_trl(name):
    return type(name, (TrainerCallback,), {"__module__": "trl.trainer.callbacks"})


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("LogCompletionsCallback", "sample_generations"),
        ("WeaveCallback", "sample_generations"),
        ("WinRateCallback", "sample_generations"),
        ("SyncRefModelCallback", "sync_ref_model"),
    ],
)
def test_callbacks_of_trl_that_cannot_work_are_refused(tokenizer, make_args, name, way_out):
    kind = of_trl(name)
    match = f"`callbacks` must be without TRL's {name}.*Set `{way_out}`"
    for one in (kind, kind(), type("Mine", (kind,), {})()):
        with pytest.raises(NotImplementedError, match=match):
            trainer_of(tokenizer, make_args(), callbacks=[one])
    trainer = trainer_of(tokenizer, make_args())
    with pytest.raises(NotImplementedError, match=match):
        trainer.add_callback(kind())


def test_other_callbacks_of_that_name_or_of_trl_are_taken(tokenizer, make_args):
    own = type("LogCompletionsCallback", (TrainerCallback,), {})
    trainer = trainer_of(tokenizer, make_args(), callbacks=[of_trl("RichProgressCallback")])
    trainer.add_callback(own)
    assert {"RichProgressCallback", "LogCompletionsCallback"} <= {
        type(callback).__name__ for callback in trainer.callback_handler.callbacks
    }


# ---- the card --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tokenizer, make_args):
    trainer = trainer_of(tokenizer, make_args(max_steps=1))
    trainer.train()
    trainer.save_model()
    return trainer


def card_of(trainer):
    return ModelCard(Path(trainer.args.output_dir, "README.md").read_text())


def test_a_card_takes_the_arguments_of_trl_in_their_order(trained):
    trained.create_model_card("my-model", "trl-lib/ultrafeedback_binarized", ["a", "b"])
    card = card_of(trained)
    assert "\n# my-model\n" in card.text
    assert card.data.datasets == ["trl-lib/ultrafeedback_binarized"]
    assert {"a", "b"} <= set(card.data.tags)
    assert (card.data.language, card.data.license) == (None, None)
    assert "- train: trl-lib/ultrafeedback_binarized, " in card.text


def test_the_name_of_the_data_stays_in_the_record(trained):
    trained.create_model_card(dataset_name="trl-lib/x")
    assert read_record(trained.args.output_dir).datasets["train"]["id"] == "trl-lib/x"
    trained.save_model()
    assert card_of(trained).data.datasets == ["trl-lib/x"]
    trained.create_model_card()
    assert card_of(trained).data.datasets == ["trl-lib/x"]


def test_a_push_names_the_data_too(trained, monkeypatch):
    pushed = []
    monkeypatch.setattr("qlora_dpo.saving.make_repository", lambda name, **options: name)
    monkeypatch.setattr("qlora_dpo.saving.upload", lambda folder, *options: pushed.append(folder))
    trained.push_to_hub(dataset_name="trl-lib/x")
    assert pushed == [trained.args.output_dir]
    assert card_of(trained).data.datasets == ["trl-lib/x"]
    assert json.loads(Path(pushed[0], "qlora_dpo.json").read_text())["datasets"]["train"]["id"] == "trl-lib/x"


def test_data_that_there_is_not_cannot_be_named(tokenizer, make_args):
    trainer = trainer_of(tokenizer, make_args(reference="base"), rows=None, eval_rows=CHAT_ROWS)
    with pytest.raises(ValueError, match="`dataset_name` must be None for a trainer without training data, got x"):
        trainer.create_model_card(dataset_name="x")


# ---- what is loaded --------------------------------------------------------------------------------------------------


def loaded(base_folder, args, **options):
    rows = Dataset.from_list(CHAT_ROWS[:4])
    return QLoRADPOTrainer(model=base_folder, args=args, train_dataset=rows, **options)


def test_the_quantisation_may_stand_in_model_init_kwargs(base_folder, make_args):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    kwargs = {"quantization_config": quantization, "dtype": "float32"}
    trainer = loaded(base_folder, make_args(max_steps=1, model_init_kwargs=kwargs))
    trainer.train()
    assert trainer.model.get_base_model().config.quantization_config.bnb_4bit_quant_type == "fp4"
    trainer.save_model()
    assert read_record(trainer.args.output_dir).quantization["bnb_4bit_quant_type"] == "fp4"


def test_none_as_quantisation_in_model_init_kwargs_loads_the_model_as_it_is(base_folder, make_args, capsys):
    trainer = loaded(base_folder, make_args(model_init_kwargs={"quantization_config": None, "dtype": "float32"}))
    assert not getattr(trainer.model.get_base_model(), "is_loaded_in_4bit", False)
    assert "in torch.float32" in capsys.readouterr().err


def test_none_as_quantisation_holds_for_the_base_of_an_adapter_too(base_folder, make_args, tmp_path):
    first = loaded(base_folder, make_args(max_steps=1, output_dir=str(tmp_path / "first")))
    first.train()
    first.save_model()
    args = make_args(model_init_kwargs={"quantization_config": None})
    with pytest.warns(UserWarning, match="must be on its base as it was trained"):
        trainer = loaded(str(tmp_path / "first"), args)
    assert not getattr(trainer.model.get_base_model(), "is_loaded_in_4bit", False)


def test_the_quantisation_must_be_given_once(base_folder, make_args):
    args = make_args(model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_4bit=True)})
    with pytest.raises(ValueError, match="`quantization_config` must be given once"):
        loaded(base_folder, args, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


@pytest.mark.parametrize("as_object", [False, True])
def test_an_adapter_as_a_dict_is_refused(base_folder, tokenizer, make_args, as_object):
    model = build_tiny_llama(tokenizer) if as_object else base_folder
    with pytest.raises(TypeError, match="`peft_config` must be a config of PEFT, got dict"):
        QLoRADPOTrainer(
            model=model,
            args=make_args(),
            train_dataset=Dataset.from_list(CHAT_ROWS),
            processing_class=tokenizer,
            peft_config={"r": 4},
        )


def test_a_vision_language_model_by_name_is_refused_in_a_sentence(tokenizer, make_args, tmp_path):
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlavaConfig(vision_config=vision, text_config=build_tiny_llama(tokenizer).config).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="`model` must name a decoder-only language model, got ") as error:
        loaded(str(tmp_path), make_args(), processing_class=tokenizer)
    assert "LlavaConfig" in str(error.value)
    assert len(str(error.value)) < 600


def test_an_encoder_decoder_is_refused(tokenizer, make_args):
    config = T5Config(vocab_size=40, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(NotImplementedError, match="`model` must be a decoder-only language model, got t5"):
        QLoRADPOTrainer(
            model=T5ForConditionalGeneration(config),
            args=make_args(),
            train_dataset=Dataset.from_list(CHAT_ROWS),
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules=["q", "v"]),
        )


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("stream", [False, True])
def test_data_with_images_is_refused(tokenizer, make_args, column, stream):
    rows = [{**row, column: "a.png"} for row in CHAT_ROWS]
    data = IterableDataset.from_generator(lambda: iter(rows)) if stream else Dataset.from_list(rows)
    with pytest.raises(NotImplementedError, match=f"The train data set must be of text, got a column `{column}`"):
        QLoRADPOTrainer(
            model=policy_of(tokenizer), args=make_args(max_steps=1), train_dataset=data, processing_class=tokenizer
        )
    trainer = trainer_of(tokenizer, make_args())
    with pytest.raises(NotImplementedError, match="The eval data set must be of text"):
        trainer.evaluate(Dataset.from_list(rows))
