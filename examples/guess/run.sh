#!/usr/bin/env bash
# Several turns: guess a hidden number, told "higher" or "lower" after each guess. About three minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=outputs/guess

echo "== 1. the game: a number from 1 to 15, five guesses =="
skyrl data guess --out "$out/data" --high 15 --max-turns 5

echo "== 2. a tiny model, warmed up on a player who minds the answers half of the time =="
skyrl warmup --data "$out/data" --out "$out/model" --steps 200 --until-accuracy 1 --seed "${SEED:-0}"

echo "== 3. reinforcement learning: 100 steps of 32 numbers x 8 games =="
skyrl train +experiment=guess trainer.seed="${SEED:-0}" hydra.run.dir="$out/run" "$@"

echo "== 4. what happened =="
python -m skyrl_train.tracking.report "$out/run"
