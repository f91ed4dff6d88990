"""Where the time of a colocated GRPO step goes: one GPU, stock SGLang, random weights.

    python benchmarks/grpo_gpu.py --sizes 0.6B --prompts 256 --answer 1024 --out grpo.json

The command line's own run: ``--prompts`` prompts of 8 samples, full answers (the end token is ignored), an update with
the engine's memory given back, a weight sync with both proofs. The first step, which compiles, is left out. ``share``
is the part of a step in which tokens are sampled, scored or learned from; ``rest`` names the others, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_models

WORK = ("time/generate", "time/old_logprobs", "time/update")
SAMPLES = 8
TOKENS = 32768
"""Of a micro-batch: fewer leave the GPU waiting for kernels to be launched."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["0.6B"], choices=list(gpu_models.SHAPES))
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--answer", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--engine-python")
    parser.add_argument("--deadline", type=float, default=500.0, help="seconds for each size")
    parser.add_argument("--work", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("more", nargs="*", help="further overrides, as of the command line")
    options = parser.parse_args()
    results = []
    for size in options.sizes:
        results.append(measure(size, options))
        print(json.dumps(results[-1], indent=1), flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n")


def measure(size: str, options: argparse.Namespace) -> dict[str, Any]:
    on_gpu = Path("/dev/nvidiactl").exists()
    folder = gpu_models.make(size, options.work / f"model-{size}", device="cuda" if on_gpu else "cpu")
    data = write_prompts(options.work / "prompts.jsonl", options.prompts * options.steps)
    run = (options.work / f"grpo-{size}").absolute()
    server = {"disable_prefill_cuda_graph": "true"} if on_gpu else {"max_total_tokens": "8192"}
    command = [
        sys.executable, "-m", "skyrl_train.entrypoints.main_base", f"hydra.run.dir={run}",
        f"trainer.policy.model.path={folder.absolute()}", f"data.train_data=[{data.absolute()}]", "data.val_data=[]",
        "generator.backend=sglang", f"generator.n_samples_per_prompt={SAMPLES}", "generator.max_num_seqs=1024",
        f"generator.sampling_params.max_generate_length={options.answer}", "trainer.max_prompt_length=256",
        "generator.sampling_params.ignore_eos=true", "environment.env_class=grpo_gpu:SumOfLetters",
        f"trainer.train_batch_size={options.prompts}", f"trainer.policy_mini_batch_size={max(options.prompts // 4, 1)}",
        f"trainer.max_steps={options.steps}", "trainer.algorithm.use_kl_loss=false", "trainer.ckpt_interval=-1",
        f"trainer.max_tokens_per_microbatch={TOKENS}",
        "trainer.hf_save_interval=-1", "trainer.eval_interval=-1", "trainer.eval_before_train=false",
        f"trainer.ckpt_path={run}/checkpoints", f"trainer.export_path={run}/exports", "trainer.logger=[]",
        f"generator.engine_python={options.engine_python or 'null'}", "trainer.placement.runtime=local",
        *(f"+generator.engine_init_kwargs.{name}={value}" for name, value in server.items()), *options.more,
    ]  # fmt: skip
    result: dict[str, Any] = {"size": size, "prompts": options.prompts, "samples": SAMPLES, "answer": options.answer}
    here = str(Path(__file__).parent)  # of the reward
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=options.deadline, check=False, env=environment
        )
        said = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        said = f"not done within {options.deadline:g} s: {error.stdout}"
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not lines:
        return result | {"error": said[-3000:]}
    return result | {"steps": len(lines)} | summary(lines[1:] or lines, size)


def summary(lines: list[dict[str, Any]], size: str) -> dict[str, Any]:
    """Medians over steps."""
    names = sorted({n for line in lines for n in line if n.startswith(("time/", "weight_sync/", "tokens_per_s/"))})
    found = {n: round(statistics.median(line.get(n, 0.0) for line in lines), 4) for n in names}
    whole = found["time/step"]
    work = sum(found.get(name, 0.0) for name in WORK)
    rest = {n: v for n, v in found.items() if n.startswith("time/") and n not in (*WORK, "time/step")}
    rest["unnamed"] = round(whole - work - sum(rest.values()), 4)
    last = {n: lines[-1][n] for n in ("mismatch/mean", "policy/ratio_gap_first", "policy/grad_norm") if n in lines[-1]}
    alone = work - found.get("time/old_logprobs", 0.0)
    return {
        "step_s": whole, "share": round(work / whole, 4), "share_without_scoring": round(alone / whole, 4),
        "rest": rest, "metrics": found, "last": last,
    }  # fmt: skip


def write_prompts(file: Path, count: int) -> Path:
    import random

    chance = random.Random(0)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as out:
        for number in range(count):
            text = "".join(chance.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(100))
            row = {"prompt": [{"role": "user", "content": text}], "env_class": "grpo_gpu:SumOfLetters"}
            out.write(json.dumps(row | {"extra_info": {"index": number}}) + "\n")
    return file


def __getattr__(name: str) -> Any:
    if name != "SumOfLetters":
        raise AttributeError(name)
    from skyrl_train.envs.base import Env, StepResult

    class SumOfLetters(Env):
        """A reward that differs between answers of random letters, so that no group is dead."""

        def step(self, response: str) -> StepResult:
            return StepResult(reward=float(sum(map(ord, response)) % 97) / 97, terminated=True)

    globals()["SumOfLetters"] = SumOfLetters
    return SumOfLetters


if __name__ == "__main__":
    main()
