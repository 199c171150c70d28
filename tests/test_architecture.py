"""Imports point down, and the checks that hold the house together can fail."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_dpo

PACKAGE = Path(qlora_dpo.__file__).parent

LAYERS = [
    {"bare", "errors", "logits", "offload", "recompute", "terminal", "typed"},
    {"four_bit_head"},
    {
        "preferences",
        "prompts",
        "scores",
        "origins",
        "losses",
        "logps",
        "metrics",
        "cache",
        "paths",
        "averaging",
        "adapters",
        "lora",
    },
    {"lean", "measures", "progress", "rewardbench", "world", "data_report", "files"},
    {"charts", "preference_report"},
    {
        "objective",
        "layouts",
        "segments",
        "blockwise",
        "kernels",
        "attention",
        "data",
        "sampling",
        "budget",
        "migration",
        "remembered",
    },
    {"config"},
    {"weights"},
    {"model", "forward"},
    {"reference", "shapes", "footprint", "shards"},
    {"memory", "record", "fold", "resuming", "checkpoints", "arguments", "proof", "precomputed", "step", "callbacks"},
    {"evaluation", "generations", "training", "room"},
    {"report"},
    {"cardtext"},
    {"card"},
    {"hub"},
    {"saving"},
    {"trainer"},
    {"demo", "judge", "score", "compare", "merge"},
    {"parsing", "options"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(source):
    """Names of the package's modules that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "qlora_dpo":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qlora_dpo."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("qlora_dpo.")}
    return found


def upward(sources):
    """Imports that point to a higher layer."""
    graph = {name: imported(source) & set(LEVEL) for name, source in sources.items()}
    return [(a, b) for a, targets in graph.items() for b in targets if LEVEL[b] > LEVEL[a]]


def cycle(sources):
    """Modules that import each other, in however many steps; None if there are none."""
    try:
        graphlib.TopologicalSorter({name: imported(source) for name, source in sources.items()}).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def sources():
    return {path.stem: path.read_text() for path in PACKAGE.glob("*.py")}


def test_every_module_has_one_layer():
    assert sorted(sources()) == sorted(name for names in LAYERS for name in names)


def test_imports_point_down():
    assert upward(sources()) == []
    assert cycle(sources()) is None


@pytest.mark.parametrize(
    "line",
    ["from qlora_dpo.trainer import QLoRADPOTrainer", "from qlora_dpo import trainer", "import qlora_dpo.trainer"],
)
def test_an_upward_import_would_be_found(line):
    assert upward(sources() | {"losses": line}) == [("losses", "trainer")]


def test_a_cycle_within_a_layer_would_be_found():
    lines = {"preferences": "scores", "scores": "losses", "losses": "preferences"}
    found = cycle(sources() | {name: f"from qlora_dpo.{other} import x" for name, other in lines.items()})
    assert set(found) == {"preferences", "scores", "losses"}


def test_modules_are_small():
    assert {name: n for name, text in sources().items() if (n := text.count("\n")) > 500} == {}


def test_evaluate_modules_are_never_imported():
    assert not any("evaluate_metrics" in str(imported(text)) for text in sources().values())


def test_importing_the_package_needs_no_extra():
    blocked = "import sys; sys.modules['trl'] = None; sys.modules['resvg_py'] = None; "
    everything = "from qlora_dpo import *; import qlora_dpo.cli"
    assert subprocess.run([sys.executable, "-c", blocked + everything], check=False).returncode == 0


def test_public_names_are_imported_when_they_are_asked_for():
    """Before that, nothing that takes seconds."""
    homes = [name for names in qlora_dpo._HOMES.values() for name in names]
    assert sorted(homes) == sorted(qlora_dpo.__all__)
    assert all(getattr(qlora_dpo, name) is not None for name in homes)
    assert set(homes) < set(dir(qlora_dpo))
    assert qlora_dpo.losses.dpo_loss is qlora_dpo.dpo_loss
    with pytest.raises(AttributeError, match="has no attribute 'DPOTrainer'"):
        qlora_dpo.DPOTrainer  # noqa: B018
    code = "import sys, qlora_dpo.__main__; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
