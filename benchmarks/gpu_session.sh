#!/usr/bin/env bash
# GPU tests and benchmarks in one call; results go to $OUT (default: benchmarks/results/gpu).
#
#   benchmarks/gpu_session.sh [stage ...]      tests quickstart embedded learner launches sync rollout grpo learning attention two
#
# All of them, in this order, if none is named; "two" needs two GPUs. Stages on different GPUs may run side by side, by
# CUDA_VISIBLE_DEVICES. The environment needs torch with CUDA, SGLang, transformers, hydra-core, ray, peft and pytest;
# nothing is fetched. A stage that fails, or takes more than LIMIT seconds (600), leaves the others alone. $OUT/progress
# says what has begun and ended, and $OUT/STAGE.log what each said.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-benchmarks/results/gpu}
WORK=${WORK:-${TMPDIR:-/tmp}/skyrl-gpu}
mkdir -p "$OUT" "$WORK"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

tests() { python3 -m pytest -q -m gpu tests/gpu -p no:cacheprovider -W ignore::SyntaxWarning 2>&1 | tail -15 | tee "$OUT/tests.txt"; }

task() {
  [ -d outputs/quickstart/model ] || {
    python3 -m skyrl_train.entrypoints.cli data addition --out outputs/quickstart/data &&
      python3 -m skyrl_train.entrypoints.cli warmup --data outputs/quickstart/data --out outputs/quickstart/model
  } | tail -2
}

train() { # NAME OVERRIDE ...: the quickstart's run, from the command line
  task
  python3 -m skyrl_train.entrypoints.main_base +experiment=quickstart "hydra.run.dir=$WORK/$1" "${@:2}" 2>&1 |
    tail -25 | tee "$OUT/$1.txt"
  python3 -m skyrl_train.tracking.report "$WORK/$1" | tee -a "$OUT/$1.txt"
  cp "$WORK/$1/metrics.jsonl" "$OUT/$1.jsonl"
}

quickstart() { train quickstart_embedded trainer.device=cuda generator.backend=embedded; }

learning() { # the engine on the learner's GPU: asleep in every update, woken, synced and proven in every step
  train quickstart_sglang trainer.device=cuda generator.backend=sglang trainer.placement.colocate_all=true \
    generator.gpu_memory_utilization=0.2 trainer.max_steps=75 trainer.logger=[] trainer.hf_save_interval=-1 \
    +generator.engine_init_kwargs.disable_prefill_cuda_graph=true "+generator.engine_init_kwargs.cuda_graph_bs=[256]"
}

embedded() { python3 benchmarks/embedded_gpu.py --out "$OUT/embedded_gpu.json"; }

learner() { # the scenarios that need one GPU
  python3 benchmarks/learner_gpu.py --out "$OUT/learner_gpu.json" --work "$WORK/learner" --only \
    ${LEARNER:-update-0.6B-16k update-0.6B-65k update-4B-lora-16k ragged offload-4B attention}
}

launches() { python3 benchmarks/launches_gpu.py --sizes 0.6B 4B --work "$WORK/learner" --out "$OUT/launches.json"; }

sync() {
  python3 benchmarks/weight_sync_gpu.py --sizes ${SYNC:-0.6B 4B 8B} --utilization 0.3 --cycles ${CYCLES:-50} --buckets-gb 1 4 \
    --work "$WORK/sync" --out "$OUT/weight_sync.json"
  python3 benchmarks/weight_sync_gpu.py --sizes 0.6B --layouts lora --proofs off both --work "$WORK/sync" \
    --out "$OUT/adapter_sync.json"
}

rollout() {
  python3 benchmarks/rollout_gpu.py --sizes 0.6B --in-flight 256 1024 --offline --work "$WORK/rollout" --out "$OUT/rollout.json"
  python3 benchmarks/rollout_gpu.py --sizes 4B --in-flight 256 --work "$WORK/rollout" --out "$OUT/rollout_4B.json"
}

attention() { # each kernel serves, and its log-probs pass the probe against the learner's
  for kernel in fa3 flashinfer triton; do
    timeout 300 python3 benchmarks/rollout_gpu.py --sizes 0.6B --in-flight 256 --repeats 1 --attention "$kernel" \
      --work "$WORK/attention-$kernel" --out "$OUT/attention_$kernel.json" 2>&1 | tail -3
  done
}

grpo() { # few graphs, so that the server starts in time
  python3 benchmarks/grpo_gpu.py --sizes ${GRPO:-0.6B} --work "$WORK/grpo" --out "$OUT/grpo.json" --deadline "${LIMIT:-600}" \
    "+generator.engine_init_kwargs.cuda_graph_bs=[64,256,512,1024]"
}

two() {
  python3 benchmarks/nccl_broadcast.py --out "$OUT/nccl_broadcast.json"
  python3 benchmarks/weight_sync_gpu.py --sizes 4B --layouts apart --proofs off both --work "$WORK/two" \
    --out "$OUT/weight_sync_nccl.json"
  python3 benchmarks/weight_sync_gpu.py --sizes 0.6B --layouts remote tp2 pair --proofs off both --repeats 3 \
    --work "$WORK/two" --out "$OUT/weight_sync_two_gpus.json"
  learner_two
}

learner_two() {
  python3 benchmarks/learner_gpu.py --out "$OUT/learner_two_gpus.json" --work "$WORK/learner" --only scaling
}

if [ "${1:-}" = --stage ]; then
  "$2"
  exit
fi
machine="$OUT/machine.txt"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$machine"
python3 -c "import torch, transformers, sglang; print('torch', torch.__version__, 'transformers', transformers.__version__, 'sglang', sglang.__version__)" | tee -a "$machine"
[ $# -gt 0 ] || set -- tests quickstart embedded learner launches sync rollout grpo learning attention two
for stage in "$@"; do
  echo "$stage begins ($SECONDS s)" | tee -a "$OUT/progress"
  timeout -k 10 "${LIMIT:-600}" bash benchmarks/gpu_session.sh --stage "$stage" 2>&1 | tee "$OUT/$stage.log"
  echo "$stage ended: ${PIPESTATUS[0]} ($SECONDS s)" | tee -a "$OUT/progress"
done
