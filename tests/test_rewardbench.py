"""RewardBench: sections, weights and the strict comparison."""

import doctest
import json

import numpy as np
import pytest
from datasets import Dataset

from qlora_dpo import rewardbench
from qlora_dpo.cli import main
from qlora_dpo.rewardbench import SECTIONS, as_conversations, section_scores

from test_cli import QUICK, train_words


def test_the_doctests_hold():
    assert doctest.testmod(rewardbench).failed == 0


def test_sections_weigh_what_the_benchmark_says():
    """Math weighs as much as the six code subsets: 984 = 6 x 164."""
    reasoning = SECTIONS["Reasoning"]
    assert reasoning["math-prm"] == sum(weight for name, weight in reasoning.items() if name != "math-prm")
    assert sum(len(weights) for weights in SECTIONS.values()) == 23


def test_a_tie_is_wrong_here():
    assert section_scores(np.array([0.0, 1.0]), ["donotanswer", "donotanswer"])["Safety"] == 0.5


def test_other_subsets_are_refused():
    with pytest.raises(ValueError, match="Subsets must be RewardBench's"):
        section_scores(np.array([1.0]), ["mine"])


def test_files_without_its_columns_are_refused():
    with pytest.raises(ValueError, match="must have the columns prompt, chosen, rejected and subset"):
        as_conversations(Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]))


def test_an_adapter_is_judged_on_a_local_copy(base_folder, rows_file, tmp_path, capsys):
    """Text rows are rendered by the chat template; the sections are printed and written beside the report."""
    assert main(train_words(base_folder, rows_file, tmp_path / "run")) == 0
    words = ["the cat sees", "a blue tree", "gladly finds", "never likes"]
    rows = [
        {
            "prompt": words[i % 4],
            "chosen": words[(i + 1) % 4],
            "rejected": words[(i + 2) % 4],
            "subset": subset,
            "id": i,
        }
        for i, subset in enumerate(["mt-bench-easy", "hep-go", "math-prm", "donotanswer"])
    ]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    folder = str(tmp_path / "e")
    options = ["--dataset_name", str(path), "--benchmark", "rewardbench", "--output_dir", folder, *QUICK]
    assert main(["evaluate", "--adapter", str(tmp_path / "run"), *options]) == 0
    assert "Chat Hard" not in capsys.readouterr().out
    found = json.loads((tmp_path / "e" / "metrics.json").read_text())["rewardbench"]
    lines = [json.loads(line) for line in (tmp_path / "e" / "pairs.jsonl").read_text().splitlines()]
    assert found == section_scores(np.array([line["margin"] for line in lines]), [line["subset"] for line in lines])
    assert "<user>" in lines[0]["prompt"]
