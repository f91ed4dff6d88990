#!/usr/bin/env bash
# bash examples/run.sh NAME [KEY=VALUE ...]     one example, on a CPU, in two to five minutes
#
# NAME is a folder beside this file with NAME.yaml in it, which holds what it changes in the quickstart. The task and the
# warm model are the quickstart's, and are made first if they are not there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${1:?one of: $(basename -s .yaml examples/*/*.yaml | tr "\n" " ")}
shift
start=outputs/quickstart run=${RUN_FOLDER:-outputs/examples/$name/run}
PATH="$PWD/.venv/bin:$PATH"  # what make install made, if it is there

[ -e "$start/data/train.parquet" ] || skyrl data addition --out "$start/data"
[ -e "$start/model/warmup.json" ] || skyrl warmup --data "$start/data" --out "$start/model"
skyrl train --config-dir "examples/$name" --config-name "$name" hydra.run.dir="$run" "$@"
python -m skyrl_train.tracking.report "$run"
