"""Tokens per second of the embedded engine and of transformers ``generate``, same model, same prompts, same lengths.

    OMP_NUM_THREADS=1 python benchmarks/embedded_engine.py [--repeats 5] [--batches 1 16 64 256] [--device cpu]

Answers have lognormal lengths (median 32, at most 128), as sampling has: ``generate`` runs its batch until the longest
is done, and only the tokens asked for count, on both sides. Sides alternate. Batch 1 is one request after the other.
The rate is per CPU second of the process on the CPU (other jobs on the machine then disturb less), per second on a GPU.
Writes ``benchmarks/results/embedded_engine-<date>.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
import transformers
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from skyrl_train.engines.base import Request, SamplingParams
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.models.attention import NAME

RESULTS = Path(__file__).parent / "results"
VOCABULARY, PROMPT = 113, 16


def make_model(implementation: str, device: str) -> PreTrainedModel:
    """The quickstart's model: 0.41 M parameters, random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attn_implementation=implementation,
    )
    return Qwen3ForCausalLM(config).to(device).eval()


def make_work(batch: int) -> tuple[list[list[int]], list[int]]:
    """Prompts and the lengths of their answers. Batch 1 gets eight, to be asked one after the other."""
    chance = random.Random(batch)
    count = max(batch, 8)
    prompts = [[chance.randrange(VOCABULARY) for _ in range(PROMPT)] for _ in range(count)]
    return prompts, [min(128, max(1, round(chance.lognormvariate(3.4657, 0.6)))) for _ in range(count)]


def run_generate(model: PreTrainedModel, batch: int, prompts: list[list[int]], lengths: list[int]) -> None:
    """transformers ``generate``, sampling at temperature 1."""
    for start in range(0, len(prompts), batch):
        ids = torch.tensor(prompts[start : start + batch], device=model.device)
        longest = max(lengths[start : start + batch])
        with torch.no_grad():
            model.generate(  # pyright: ignore
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=longest,
                min_new_tokens=longest,
                pad_token_id=0,
            )


async def run_engine(engine: EmbeddedEngine, batch: int, prompts: list[list[int]], lengths: list[int]) -> None:
    """The same through the engine, as a generator would call it."""
    requests = [
        Request(id=str(i), prompt_ids=p, params=SamplingParams(max_new_tokens=n, seed=i, ignore_eos=True))
        for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    for start in range(0, len(requests), batch):
        answers = await asyncio.gather(*(engine.generate(r) for r in requests[start : start + batch]))
        assert [len(a[0].token_ids) for a in answers] == lengths[start : start + batch]
    await engine.commit_weights(engine.core.weight_version + 1)


def seconds(clock: Callable[[], float], call: Callable[[], object]) -> float:
    """How long ``call`` takes on ``clock``."""
    start = clock()
    call()
    return clock() - start


def compare(batch: int, repeats: int, device: str) -> dict[str, float]:
    """Median rates of both sides and their ratio, over alternating runs."""
    prompts, lengths = make_work(batch)
    engine = EmbeddedEngine(make_model(NAME, device), deterministic=False)
    model = make_model("sdpa", device)
    model.generation_config.eos_token_id = None
    clock = time.process_time if device == "cpu" else time.perf_counter
    sides: dict[str, list[float]] = {"generate": [], "engine": []}
    for repeat in range(repeats + 1):  # the first warms both up
        theirs = seconds(clock, lambda: run_generate(model, batch, prompts, lengths))
        ours = seconds(clock, lambda: asyncio.run(run_engine(engine, batch, prompts, lengths)))
        if repeat:
            sides["generate"].append(sum(lengths) / theirs)
            sides["engine"].append(sum(lengths) / ours)
    ratios = [ours / theirs for ours, theirs in zip(sides["engine"], sides["generate"], strict=True)]
    return {
        "batch": batch,
        "tokens": sum(lengths),
        "generate_tokens_per_second": round(statistics.median(sides["generate"])),
        "engine_tokens_per_second": round(statistics.median(sides["engine"])),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_least": round(min(ratios), 2),
        "ratio_most": round(max(ratios), 2),
    }


def hardware(device: str) -> dict[str, object]:
    """What it ran on."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    """Runs, prints and writes the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    rows = []
    print(f"{'batch':>6} {'generate tok/s':>15} {'engine tok/s':>13} {'ratio':>6}  (least .. most)")
    for batch in args.batches:
        row = compare(batch, args.repeats, args.device)
        rows.append(row)
        print(
            f"{batch:>6} {row['generate_tokens_per_second']:>15,} {row['engine_tokens_per_second']:>13,} "
            f"{row['ratio']:>6}  ({row['ratio_least']} .. {row['ratio_most']})"
        )
    if not args.no_save:
        now = datetime.now(UTC)
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"embedded_engine-{now:%Y-%m-%d}{'' if args.device == 'cpu' else '-' + args.device}.json"
        report = {"date": now.isoformat(timespec="seconds"), "hardware": hardware(args.device), "rows": rows}
        path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
