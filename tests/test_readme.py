"""What README and examples say is true: every block is run or parsed."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from qlora_dpo import QLoRADPOConfig
from qlora_dpo.__main__ import main
from qlora_dpo.cli import (
    DataArguments,
    EvaluationArguments,
    MergeArguments,
    ModelArguments,
    PlanArguments,
    PushArguments,
    parse,
)
from qlora_dpo.footprint import MemoryOptions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
TRAIN = (DataArguments, ModelArguments, QLoRADPOConfig)
QUICK = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "eval_strategy": "no"}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_of_the_readme_runs(base_folder, rows_file, tmp_path, monkeypatch):
    (source,) = blocks("python")
    assert len(source.strip().splitlines()) <= 22
    changes = {
        '"Qwen/Qwen2.5-7B-Instruct"': repr(base_folder),
        '"trl-lib/ultrafeedback_binarized"': f'"json", data_files={{"train": {rows_file!r}, "test": {rows_file!r}}}',
        "range(500)": "range(4)",
        "eval_steps=200": "eval_steps=200, max_steps=2, report_to=[]",
        '"qwen-dpo"': repr(str(tmp_path / "run")),
    }
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "run" / "qlora_dpo.json").is_file()


def test_command_lines_of_the_readme_are_understood():
    lines = [line for block in blocks("bash") for line in block.strip().splitlines() if line.startswith("qlora-dpo ")]
    classes = {
        "train": TRAIN,
        "evaluate": (EvaluationArguments, QLoRADPOConfig),
        "push": (PushArguments,),
        "merge": (MergeArguments,),
        "plan": (PlanArguments, MemoryOptions),
    }
    assert {line.split()[1] for line in lines} == set(classes)
    for line in lines:
        _, command, *words = shlex.split(line)
        assert parse(classes[command], words, command)


def test_the_plan_of_the_readme_is_the_one_that_is_printed(capsys):
    (command,) = [line for line in "".join(blocks("bash")).splitlines() if line.startswith("qlora-dpo plan")]
    assert main(shlex.split(command)[1:]) == 0
    assert blocks("text") == [capsys.readouterr().out]


RECIPES = sorted(str(path) for folder in ("", "recipes") for path in (ROOT / "examples" / folder).glob("*.yaml"))


@pytest.mark.parametrize("name", ["README", *RECIPES], ids=lambda name: Path(name).stem)
def test_recipes_train(name, base_folder, rows_file, tmp_path):
    text = blocks("yaml")[0] if name == "README" else Path(name).read_text()
    options = yaml.safe_load(text)
    local = {
        "model_name_or_path": base_folder,
        "dataset_name": rows_file,
        "dataset_test_split": "train[:2]",
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(options | local | QUICK))
    assert main(["train", "--config", str(path)]) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_ci_takes_the_test_command_from_the_readme():
    found = re.search(r"<!-- test command -->\n```bash\n(.*)\n```", README)
    assert found is not None
    assert "pytest" in found[1]
    assert "scripts/constraints.txt" in found[1]
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()


def test_every_module_is_in_the_table_of_modules():
    for path in (ROOT / "qlora_dpo").glob("*.py"):
        if not path.stem.startswith("__"):
            assert f"`{path.stem}`" in CONTRIBUTING, path.stem
