"""FSDP2: processes that hold parts of the model each train as one process does; other ways to share are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from accelerate.utils import DistributedType
from peft import PeftModel, import_utils
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_dpo import QLoRADPOConfig
from qlora_dpo.arguments import require_shardable
from qlora_dpo.reference import BaseReference, InitialReference

from sharded_run import run, save_base

KNOWS_PARTS = getattr(import_utils, "is_transformers_dtensor_tp", False)
shares = pytest.mark.skipif(not KNOWS_PARTS, reason="transformers and PEFT cannot load an adapter into parts yet")

CASES = [
    {"name": "pairs", "eval_strategy": "steps", "eval_steps": 1, "sample_generations": 1, "sample_max_new_tokens": 2},
    {"name": "coupled", "loss_type": "aot"},
    {"name": "cached", "precompute_ref_log_probs": True, "reference": "initial"},
    {"name": "long", "max_steps": 4, "save_strategy": "steps", "save_steps": 2},
    {"name": "long", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "resume_from": "checkpoint-2"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    save_base(folder / "base")
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    """What two processes saw of the cases, started once."""
    (folder / "cases.json").write_text(json.dumps(CASES))
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29687",
         str(here / "sharded_run.py"), str(folder), str(folder / "cases.json")],
        capture_output=True, text=True, timeout=400, check=False,
        env=os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "seen.pt", weights_only=True)


@shares
@pytest.mark.parametrize("number", range(3), ids=lambda number: CASES[number]["name"])
def test_a_shared_model_trains_as_a_whole_one(seen, folder, number):
    found = seen[number]
    expected = run(folder, world=1, **(CASES[number] | {"name": f"alone-{number}"}))
    assert found["shared"]
    assert not expected["shared"]
    assert len(found["gradients"]) == len(found["log"]) == 2
    for mine, other in zip(found["gradients"], expected["gradients"], strict=True):
        assert (mine - other).norm() < 1e-5 * other.norm()
        assert other.norm() > 1e-3
    for kind, keys in (
        ("log", ("loss", "grad_norm", "rewards/margins", "num_tokens")),
        ("evaluations", ("eval_loss",)),
    ):
        for line, other in zip(found[kind], expected[kind], strict=True):
            assert [line[key] for key in keys] == pytest.approx([other[key] for key in keys], rel=1e-5, abs=1e-6)
    assert len(found["evaluations"]) == (2 if number == 0 else 0)


@shares
def test_a_shared_run_goes_on_as_if_it_had_not_stopped(seen):
    whole, resumed = seen[3], seen[4]
    assert len(whole["log"]) == 4
    assert len(resumed["gradients"]) == 2
    for mine, other in zip(resumed["gradients"], whole["gradients"][2:], strict=True):
        assert torch.equal(mine, other)
    assert [line["loss"] for line in resumed["log"]] == [line["loss"] for line in whole["log"]]


@shares
def test_the_adapter_of_a_shared_run_is_a_whole_plain_one(seen, folder):
    saved = folder / "long" / "checkpoint-4"
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), saved)
    shapes = {key: value.shape for key, value in policy.state_dict().items() if "lora_" in key}
    stored = load_file(saved / "adapter_model.safetensors")
    assert {key.replace(".weight", ".default.weight"): value.shape for key, value in stored.items()} == shapes


def accelerator(kind=DistributedType.FSDP, version=2):
    return SimpleNamespace(distributed_type=kind, is_fsdp2=version == 2)


def arguments(tmp_path, **options):
    return QLoRADPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, **options)


def kind_of(reference):
    return object.__new__(reference)


@shares
@pytest.mark.parametrize(
    ("of", "reference", "options", "message"),
    [
        ({"kind": DistributedType.DEEPSPEED}, BaseReference, {}, "`deepspeed` must be left out"),
        ({"version": 1}, BaseReference, {}, "FSDP must be version 2"),
        ({}, InitialReference, {}, "`reference` must be base, none, an adapter or a model with FSDP"),
        ({}, BaseReference, {"max_tokens_per_forward": 64}, "`max_tokens_per_forward` must be left out with FSDP"),
        ({"kind": DistributedType.NO}, BaseReference, {"fsdp": True}, "`fsdp` must be left out where no processes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_not_give_the_numbers_of_one_process_is_refused(tmp_path, of, reference, options, message):
    with pytest.raises((NotImplementedError, ValueError), match=message):
        require_shardable(accelerator(**of), arguments(tmp_path, **options), kind_of(reference))


@shares
def test_what_gives_them_is_not(tmp_path):
    cached = arguments(tmp_path, precompute_ref_log_probs=True)
    assert require_shardable(accelerator(), arguments(tmp_path), kind_of(BaseReference))
    assert require_shardable(accelerator(), cached, kind_of(InitialReference))
    assert not require_shardable(accelerator(DistributedType.MULTI_GPU), arguments(tmp_path), kind_of(InitialReference))


@pytest.mark.skipif(KNOWS_PARTS, reason="these versions can")
def test_versions_that_cannot_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"FSDP must have versions .*, got transformers .* Upgrade them"):
        require_shardable(accelerator(), arguments(tmp_path), kind_of(BaseReference))
