#!/usr/bin/env bash
# Everything that only a CUDA device can show, with its figures as JSON under scripts/results/gpu_*.json.
#   scripts/gpu_check.sh PREFERENCES.jsonl TOKENIZER [STAGE ...]
# TOKENIZER is a folder or id whose ids the vocabularies hold. No weights are needed: random ones in 4 bit are made in
# the shape of real models, in $WORK_DIR (default: a temporary folder; 8 GB of disk, 45 GB for `large`).
# Stages, all of them by default, in this order; one that fails does not keep the next from running:
#   tests    the tests marked `gpu`
#   demo     the demo
#   memory   what each option saves, and the plan against measured peaks: 1B and 8B, three lengths
#   capped   the recipe of the 8B model with the memory of a card of 8 GB
#   bench    this library against TRL, and Unsloth where it is installed, on the 8B shape ($BENCH: more options)
#   scaling  how time grows with tokens, and with the completions of a prompt
#   large    the recipes of 32B with 24 GB and of 70B with 48 GB
# Needs the extras `test` and `bench`. $PYTHON is the interpreter.
set -uo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,15s/^# \{0,1\}//p' "$0"
  exit 2
fi
data=$(realpath -e "$1") || exit 2
tokenizer=$2
[ -d "$tokenizer" ] && tokenizer=$(realpath "$tokenizer")
shift 2
python=$(command -v "${PYTHON:-python3}") && python=$(realpath -s "$python") || exit 2
work=${WORK_DIR:-$(mktemp -d)}
[ -n "${WORK_DIR:-}" ] || trap 'rm -rf "$work"' EXIT
mkdir -p "$work" && work=$(realpath "$work") || exit 2
cd "$(dirname "$0")/.." || exit 2
results=scripts/results
mkdir -p "$results"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TORCHINDUCTOR_COMPILE_THREADS=2

"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit 2

# shape NAME: the folder of a model of that shape, made if it is not there
shape() {
  [ -f "$work/$1/config.json" ] ||
    "$python" scripts/make_shape.py --config "$1" --tokenizer "$tokenizer" --output_dir "$work/$1" >&2 || return 1
  echo "$work/$1"
}

# capped RECIPE SHAPE CARD: three steps of a recipe in the memory of a card
capped() {
  local model
  model=$(shape "$2") || return 1
  "$python" scripts/capped_run.py --gpu "$3" --output "$results/gpu_capped_$2.json" -- \
    train --config "examples/recipes/$1.yaml" --model_name_or_path "$model" --dataset_name "$data" \
    --dataset_test_split 'train[:4]' --max_steps 3 --gradient_accumulation_steps 2 --logging_steps 1 \
    --eval_strategy no --save_strategy no --report_to none --output_dir "$work/run-$2"
}

stage_tests() { "$python" -m pytest tests/test_gpu.py -m gpu -n 4 --dist load --durations 10; }

stage_demo() {
  "$python" -m qlora_dpo demo --output_dir "$work/demo" && cp "$work/demo/metrics.json" "$results/gpu_demo.json"
}

stage_memory() {
  local name model status=0
  for name in llama-3.2-1b llama-3.1-8b; do
    model=$(shape "$name") && "$python" scripts/memory_ladder.py --model "$model" --tokens 1024 2048 4096 --pairs 1 \
      --output "$results/gpu_memory_$name.json" || status=1
  done
  return $status
}

stage_capped() { capped 8gb-llama-3.1-8b llama-3.1-8b 8GB; }

stage_bench() {
  local model unsloth=
  model=$(shape llama-3.1-8b) || return 1
  "$python" -c 'import importlib.util as u; raise SystemExit(u.find_spec("unsloth") is None)' && unsloth=--unsloth
  # shellcheck disable=SC2086  # options are words
  "$python" scripts/bench_vs_trl.py --data "$data" --model "$model" --max_length 2048 $unsloth ${BENCH:-} \
    --output "$results/gpu_bench.json"
}

stage_scaling() {
  local model
  model=$(shape llama-3.1-8b) || return 1
  "$python" scripts/scaling.py --model "$model" --dtype bfloat16 --output "$results/gpu_scaling.json"
}

stage_large() {
  local status=0
  capped 24gb-qwen2.5-32b qwen2.5-32b 24GB || status=1
  rm -rf "$work/qwen2.5-32b"
  capped 48gb-llama-3.1-70b llama-3.1-70b 48GB || status=1
  rm -rf "$work/llama-3.1-70b"
  return $status
}

stages=${*:-tests demo memory capped bench scaling large}
for stage in $stages; do
  declare -F "stage_$stage" > /dev/null || { echo "there is no stage $stage"; exit 2; }
done
failed=()
for stage in $stages; do
  echo "== $stage"
  start=$SECONDS
  "stage_$stage" || failed+=("$stage")
  echo "== $stage: $((SECONDS - start)) s"
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all stages passed; figures in $results/gpu_*.json"
