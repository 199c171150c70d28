"""Options: defaults, and no option that lies."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qlora_dpo import QLoRADPOConfig
from qlora_dpo.config import _NOT_BUILT, best_precision


def make(tmp_path, **options):
    return QLoRADPOConfig(output_dir=str(tmp_path), report_to=[], **options)


def test_defaults_are_those_of_trl(tmp_path):
    trl = pytest.importorskip("trl")
    theirs = trl.DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=not torch.accelerator.is_available())
    ours = make(tmp_path)
    different = {"logging_nan_inf_filter", "pad_to_multiple_of", "router_aux_loss_coef", "loss_type"}
    shared = (set(theirs.__dataclass_fields__) & set(ours.__dataclass_fields__)) - different
    assert {"beta", "max_length", "learning_rate", "gradient_checkpointing", "logging_steps", "bf16"} <= shared
    for name in shared - {"output_dir", "logging_dir", "run_name", "accelerator_config"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.loss_type == theirs.loss_type == ["sigmoid"]


def test_device_and_precision_are_set_where_there_is_no_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = make(tmp_path)
    assert args.use_cpu
    assert args.bf16
    assert not make(tmp_path, bf16=False).bf16


@pytest.mark.parametrize(("major", "expected"), [(7, "fp16"), (8, "bf16"), (9, "bf16")])
def test_a_gpu_that_only_emulates_bf16_computes_in_fp16(tmp_path, monkeypatch, major, expected):
    """As one of capability 7.5 does, on which a tensor of bf16 can be made."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr("torch.cuda._check_bf16_tensor_supported", lambda device: True)
    assert best_precision() == expected
    assert make(tmp_path, use_cpu=True).arithmetic == "bf16"  # the CPU's


def test_loss_type_may_be_a_name(tmp_path):
    assert make(tmp_path, loss_type="hinge").loss_type == ["hinge"]
    assert make(tmp_path, loss_type="hinge").objective.losses == ("hinge",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "`beta` must be above 0 and finite"),
        ({"label_smoothing": 0.5}, r"must be in \[0, 0.5\)"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "does not use it"),
        ({"loss_type": "dpo"}, "`loss_type` must be one of .*, got 'dpo'. Use 'sigmoid'"),
        ({"batch_layout": "flat"}, "`batch_layout` must be one of .*, got 'flat'. Use 'auto'"),
        ({"fp16": True, "use_cpu": True}, "`fp16` must be False on a CPU, got True. Use bf16"),
        (
            {"sync_ref_model": True, "reference": "./sft"},
            "`reference` must be .*with `sync_ref_model`, got './sft'. Use 'auto'",
        ),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "whose reference moves"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 0.0}, r"must be in \(0, 1\]"),
        ({"ref_model_mixup_alpha": 0.5}, "without sync_ref_model=True"),
        ({"ref_model_sync_steps": 8}, "without sync_ref_model=True"),
        ({"sync_ref_model": True, "ref_model_sync_steps": 0}, "`ref_model_sync_steps` must be 1 or more"),
        ({"max_tokens_per_forward": 0}, "`max_tokens_per_forward` must be 1 or more"),
        ({"precompute_ref_batch_size": 4}, "without precompute_ref_log_probs=True"),
        ({"reference_cache": "x"}, "without precompute_ref_log_probs=True"),
        ({"pair_strategy": "some"}, "`pair_strategy` must be one of"),
        ({"padding_free": True, "batch_layout": "padded"}, "`padding_free` must be False"),
        ({"max_length": 0}, "`max_length` must be 1 or more"),
        ({"logps_chunk_size": 0}, "`logps_chunk_size` must be 1 or more"),
        ({"keep_layers": -1}, "`keep_layers` must be a number of layers, 0 or more, or 'auto', got -1"),
        ({"keep_layers": "some"}, "`keep_layers` must be a number of layers, 0 or more, or 'auto', got 'some'"),
        ({"sample_generations": -1}, "`sample_generations` must be 0 or more, got -1"),
        ({"sample_max_new_tokens": 3}, "`sample_max_new_tokens` must be 128 without sample_generations above 0"),
        ({"sample_generations_every": 2}, "`sample_generations_every` must be 1 without sample_generations above 0"),
        ({"sample_generations": 1, "sample_max_new_tokens": 0}, "`sample_max_new_tokens` must be 1 or more, got 0"),
        ({"reference_in_4bit": False}, "`reference_in_4bit` must be True without the path or id of a model"),
        ({"dataset_num_proc": 0}, "`dataset_num_proc` must be 1 or more, or None, got 0"),
        ({"max_tokens_per_forward": "many"}, "`max_tokens_per_forward` must be a number, None or 'auto', got 'many'"),
        ({"keep_layers": 2, "gradient_checkpointing": False}, "`keep_layers` must be 0 without `gradient_checkpoint"),
        ({"use_liger_kernel": True, "use_cpu": True}, "`use_liger_kernel` must be False on a CPU"),
        (
            {"accelerator_config": {"use_seedable_sampler": False}},
            "`accelerator_config.use_seedable_sampler` must be True",
        ),
        ({"activation_offloading": True, "use_cpu": True}, "`activation_offloading` must be False without a CUDA"),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_length": 1024.5}, "`max_length` must be a whole number or None, got 1024.5"),
        ({"max_length": True}, "`max_length` must be a whole number or None, got True"),
        ({"max_length": "long"}, "`max_length` must be a whole number or None, got 'long'"),
        ({"beta": True}, "`beta` must be a number, got True"),
        ({"sample_generations": 1, "sample_max_new_tokens": None}, "`sample_max_new_tokens` must be a whole number"),
        ({"sync_ref_model": True, "ref_model_sync_steps": None}, "`ref_model_sync_steps` must be a whole number"),
        ({"keep_layers": 2.0}, "`keep_layers` must be a whole number or text or None, got 2.0"),
        ({"keep_layers": True}, "`keep_layers` must be a whole number or text or None, got True"),
        ({"use_weighting": "no"}, "`use_weighting` must be true or false, got 'no'"),
        ({"reference": None}, "`reference` must be text, got None"),
        ({"loss_type": 1}, "`loss_type` must be a name or a list of them, got 1. Use 'sigmoid'"),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path, options, said):
    with pytest.raises(TypeError, match=said):
        make(tmp_path, **options)


def test_numbers_may_be_text_as_yaml_leaves_them(tmp_path):
    options = {
        "beta": "5e-1",
        "max_length": "512",
        "keep_layers": "2",
        "max_tokens_per_forward": "none",
        "ld_alpha": "1",
    }
    args = make(tmp_path, **options)
    assert [getattr(args, name) for name in options] == [0.5, 512, 2, None, 1.0]
    assert make(tmp_path, max_length=np.int64(4)).max_length == 4


ASKED = {
    "truncation_mode": "keep_end", "pad_to_multiple_of": 8, "pad_token": "<pad>",
    "train_sampling_strategy": "group_by_length", "label_smoothing_factor": 0.1,
    "batch_eval_metrics": True, "bf16_full_eval": True, "fp16_full_eval": True, "neftune_noise_alpha": 5.0,
    "include_for_metrics": ["inputs"], "prediction_loss_only": True,
    "logging_nan_inf_filter": True,
}  # fmt: skip


def test_every_option_that_is_not_built_is_tested():
    assert set(ASKED) == set(_NOT_BUILT)


@pytest.mark.parametrize("name", sorted(ASKED))
def test_what_is_not_built_is_refused_and_never_ignored(tmp_path, name):
    with pytest.raises(NotImplementedError, match=f"`{name}` must be .* for now, got .*\\. Leave it out"):
        make(tmp_path, **{name: ASKED[name]})


def test_liger_is_for_layers_and_not_for_the_head(tmp_path, monkeypatch):
    monkeypatch.setattr(QLoRADPOConfig, "_set_device_and_precision", lambda self: None)  # as if there were a GPU
    with pytest.raises(ValueError, match=r"must be False without the package liger-kernel, got True. Install it"):
        make(tmp_path, use_liger_kernel=True)
    monkeypatch.setattr("qlora_dpo.config.is_liger_kernel_available", lambda: True)
    args = make(tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert args.rounding == "no+liger"
    assert args.liger_kernel_config == {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    for name in ("cross_entropy", "fused_linear_cross_entropy"):
        with pytest.raises(
            ValueError, match=f"`liger_kernel_config` must not ask for {name}, another loss, got True. Leave"
        ):
            make(tmp_path, use_liger_kernel=True, liger_kernel_config={name: True})


def test_no_token_is_shown_or_given_to_a_tracker(tmp_path):
    """A dataclass of a dataclass has a `repr` of its own, which showed `hub_token`."""
    args = make(tmp_path, hub_token="hf_secret", model_init_kwargs={"token": "hf_other", "revision": "v1"})
    for text in (repr(args), str(args), args.to_json_string(), str(args.to_sanitized_dict())):
        assert "hf_secret" not in text
        assert "hf_other" not in text
        assert "v1" in text
    assert args.hub_token == "hf_secret"
    assert args.model_init_kwargs["token"] == "hf_other"


def test_a_config_comes_back_from_its_dict(tmp_path):
    config = QLoRADPOConfig(output_dir=str(tmp_path), beta=0.3, keep_layers=2)
    found = config.to_dict()
    again = QLoRADPOConfig(**{f.name: found[f.name] for f in dataclasses.fields(config) if f.init and f.name in found})
    assert again.to_dict() == found


def test_a_path_may_be_a_path_and_a_truth_value_numpys(tmp_path):
    args = make(tmp_path, precompute_ref_log_probs=np.True_, reference_cache=tmp_path / "cache")
    assert args.reference_cache == str(tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be 1 or more, got 0"),
        ({"per_device_eval_batch_size": 0}, "`per_device_eval_batch_size` must be 1 or more, got 0"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be 1 or more, got 0"),
        ({"max_steps": 0}, "`max_steps` must be 1 or more, or -1 for `num_train_epochs`, got 0"),
        ({"max_grad_norm": None}, "`max_grad_norm` must be a number, got None. Use 0 to clip nothing"),
    ],
)
def test_a_training_of_nothing_is_refused(tmp_path, options, message):
    """`max_steps=0` made one step, and the others failed after the start with what they were divided by."""
    with pytest.raises(ValueError, match=message):
        QLoRADPOConfig(output_dir=str(tmp_path), **options)


def test_numbers_of_numpy_become_plain_ones(tmp_path):
    """They were taken, and the first checkpoint could not be written."""
    options = {
        "learning_rate": np.float32(0.5),
        "beta": np.float32(0.25),
        "max_steps": np.int64(3),
        "seed": np.int64(7),
    }
    args = make(tmp_path, **options, per_device_train_batch_size=np.int64(2), loss_weights=np.float64(2.0))
    assert [type(getattr(args, name)) for name in options] == [float, float, int, int]
    assert (args.learning_rate, args.per_device_train_batch_size, args.loss_weights) == (0.5, 2, [2.0])
    json.dumps(args.to_dict())


def test_numbers_of_numpy_in_lists_and_dicts_become_plain_ones(tmp_path):
    options = {"lr_scheduler_kwargs": {"min_lr": np.float32(0.5)}, "model_init_kwargs": {"max_memory": [np.int64(1)]}}
    args = make(tmp_path, **options, loss_weights=[np.float32(2.0)])
    found = args.lr_scheduler_kwargs, args.model_init_kwargs, args.loss_weights
    assert found == ({"min_lr": 0.5}, {"max_memory": [1]}, [2.0])
    json.dumps(args.to_dict())
