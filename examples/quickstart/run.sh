#!/usr/bin/env bash
# From nothing to a model that learned by reinforcement: a task, a tiny model, 150 steps. About two minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=outputs/quickstart

echo "== 1. the task: additions, 10 % of the pairs held out =="
skyrl data addition --out "$out/data"

echo "== 2. a tiny model, warmed up on worked answers until it is right about two times in five (20 s) =="
skyrl warmup --data "$out/data" --out "$out/model" --seed "${SEED:-1}"

echo "== 3. reinforcement learning: 150 steps of 32 prompts x 8 samples (90 s) =="
skyrl train +experiment=quickstart trainer.seed="${SEED:-1}" hydra.run.dir="$out/run" "$@"

echo "== 4. what happened =="
python -m skyrl_train.tracking.report "$out/run"
