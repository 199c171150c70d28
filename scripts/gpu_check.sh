#!/usr/bin/env bash
# Everything that only a CUDA device can show: the gpu tests, and the demo with its figures as JSON.
#   scripts/gpu_check.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
results=scripts/results
mkdir -p "$results"
"$python" -m pytest -m gpu
"$python" -m qlora_dpo demo --output_dir "$results/demo"
"$python" - "$results" <<'PY'
import json, sys, pathlib, importlib.metadata as md
import torch
folder = pathlib.Path(sys.argv[1])
demo = json.loads((folder / "demo" / "metrics.json").read_text())
names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
record = {
    "gpu": torch.cuda.get_device_name(0),
    "versions": {name: md.version(name) for name in names},
    "accuracy": {when: demo[when]["eval_rewards/accuracies"] for when in ("before", "control", "after")},
    "seconds": demo["seconds"],
}
(folder / "gpu_check.json").write_text(json.dumps(record, indent=2) + "\n")
print(json.dumps(record, indent=2))
PY
rm -r "$results/demo"
