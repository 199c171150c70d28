#!/usr/bin/env bash
# Everything that only a CUDA device can show, with its figures as JSON under scripts/results/:
# the gpu tests, the demo, this library against TRL on the shape of an 8B model, and how time grows with tokens.
#   scripts/gpu_check.sh PREFERENCES.jsonl CONFIG TOKENIZER [PYTHON]
# CONFIG and TOKENIZER are folders or ids, such as those of an 8B Llama; its weights are not needed: random ones in 4 bit
# are made in its shape. Needs the extras `test` and `bench`.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0"
  exit 2
fi
data=$(realpath "$1") config=$2 tokenizer=$3
cd "$(dirname "$0")/.."
python=${4:-python3}
results=scripts/results
shape=$(mktemp -d)
trap 'rm -rf "$shape" "$results/demo"' EXIT
mkdir -p "$results"

"$python" -m pytest -m gpu
"$python" -m qlora_dpo demo --output_dir "$results/demo"
"$python" scripts/make_shape.py --config "$config" --tokenizer "$tokenizer" --output_dir "$shape"
"$python" scripts/bench_vs_trl.py --data "$data" --model "$shape" --max_length 2048 --output "$results/gpu_bench.json"
"$python" scripts/scaling.py --model "$shape" --dtype bfloat16 --output "$results/gpu_scaling.json"
"$python" -m qlora_dpo plan --model "$config" --json > "$results/gpu_plan.json"
"$python" - "$results" <<'PY'
import importlib.metadata as md
import json
import pathlib
import sys

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
