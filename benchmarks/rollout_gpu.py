"""Tokens a second through our generator, beside SGLang's own benchmark client on the same server, and its own engine.

    python benchmarks/rollout_gpu.py --sizes 0.6B --in-flight 256 1024 --out rollout.json

The same requests: prompts of 128 tokens, completions of 512 (the end token ignored), log-probs on, all in flight at
once. The sides take turns on one server; ours goes through envs, trajectories, pool and client, as in training. The
engine in process (``--offline``) needs the GPU for itself and a start of its own, afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import gpu_models

PROMPT, ANSWER = 128, 512


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["0.6B"], choices=list(gpu_models.SHAPES))
    parser.add_argument("--in-flight", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--answer", type=int, default=ANSWER)
    parser.add_argument("--attention", default=None)
    parser.add_argument("--utilization", type=float, default=0.8)
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--without-streams", action="store_true", help="also where answers come in one piece")
    parser.add_argument("--engine-python", default=None)
    parser.add_argument("--work", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for size in options.sizes:
        results.append(await measure(size, options))
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


async def measure(size: str, options: argparse.Namespace) -> dict[str, Any]:
    from skyrl_train import build
    from skyrl_train.config.door import load_config
    from skyrl_train.doors import Doors
    from skyrl_train.runtime.collector import settled
    from skyrl_train.runtime.site import open_site
    from skyrl_train.sampling import start_sampling
    from skyrl_train.tracking.run_folder import RunFolder
    from skyrl_train.tracking.tracker import Tracker

    on_gpu = Path("/dev/nvidiactl").exists()
    folder = gpu_models.make(size, options.work / f"model-{size}", device="cuda" if on_gpu else "cpu")
    most = max(options.in_flight)
    graphs = ",".join(map(str, graph_sizes(options)))
    arguments = (
        ["disable_prefill_cuda_graph=true", f"cuda_graph_bs=[{graphs}]"] if on_gpu else ["max_total_tokens=65536"]
    )
    arguments += [f"attention_backend={options.attention}"] if options.attention else []
    config = load_config(
        [
            f"trainer.policy.model.path={folder}", "generator.backend=sglang", f"generator.max_num_seqs={most}",
            f"generator.gpu_memory_utilization={options.utilization}", 
            f"generator.sampling_params.max_generate_length={options.answer}", "trainer.max_prompt_length=1024",
            "generator.sampling_params.ignore_eos=true", "generator.n_samples_per_prompt=1", "data.val_data=[]",
            "environment.env_class=rollout_gpu:Nothing", "trainer.placement.runtime=local",
            f"generator.engine_python={options.engine_python or 'null'}",
            *(f"+generator.engine_init_kwargs.{argument}" for argument in arguments),
        ]
    )  # fmt: skip
    result: dict[str, Any] = {"size": size, "prompt": PROMPT, "answer": options.answer}
    async with AsyncExitStack() as stack:
        run = RunFolder(options.work / f"rollout-{size}")
        _, chat = build._chat(config)
        started = await start_sampling(config, await open_site(config), 10, run.path, [list(range(100, 140))], stack)
        tracker = stack.enter_context(Tracker.open(config, run, 1))
        await Doors(started.weight_sync, tracker, 0).enter_generation()
        generator = build._generator(config, started.engine, chat)
        stack.enter_context(settled())
        engine: Any = next(iter(started.engine.engines().values()))  # pyright: ignore[reportAttributeAccessIssue]
        for count in options.in_flight:
            prompts = make_prompts(chat, count)
            ours, streamed, theirs = [], [], []
            for _ in range(options.repeats):
                engine.stream = True
                streamed.append(await rollout(generator, prompts, options.answer))
                if options.without_streams:
                    engine.stream = False
                    ours.append(await rollout(generator, prompts, options.answer))
                theirs.append(await client(engine, folder, count, options))
            engine.stream = True
            ratio = round(max(streamed) / max(theirs), 3)
            found = {"ours": max(streamed), "sglang_client": max(theirs), "ratio_to_client": ratio}
            found |= {"ours_without_streams": max(ours)} if ours else {}
            found["runs"] = {"ours": streamed, "ours_without_streams": ours, "sglang_client": theirs}
            result[f"{count} in flight"] = found
            print(size, count, found, flush=True)
            if options.out:  # a run that is cut short keeps what it has
                options.out.with_suffix(".part.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.offline:
        result["offline"] = {str(n): offline(folder, n, options) for n in options.in_flight}
        for count in options.in_flight:
            ratio = result[f"{count} in flight"]["ours"] / max(result["offline"][str(count)], 1e-9)
            result[f"{count} in flight"]["ratio_to_engine"] = round(ratio, 3)
        print(size, result, flush=True)
    return result


def graph_sizes(options: argparse.Namespace) -> list[int]:
    """Batch sizes whose graphs are captured: few, so that a server starts in time. All requests are of one length."""
    return sorted({1, 16, 64, 128, *options.in_flight})


def make_prompts(chat: Any, count: int) -> list[Any]:
    """Prompts of PROMPT tokens that share no prefix beyond the template's."""
    from skyrl_train.types import Prompt

    base = len(chat.prompt_ids([{"role": "user", "content": ""}]))
    return [
        Prompt(uid=f"p/{i}", messages=({"role": "user", "content": text},), env_class="rollout_gpu:Nothing")
        for i, text in enumerate(make_texts(count, PROMPT - base))
    ]


def make_texts(count: int, length: int = PROMPT) -> list[str]:
    """Of random letters, each a token."""
    import random

    chance = random.Random(count)
    return ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=length)) for _ in range(count)]


async def rollout(generator: Any, prompts: list[Any], answer: int) -> float:
    """Tokens a second of one step's trajectories."""
    begun = time.monotonic()
    trajectories = await generator.generate(prompts, step=1)
    seconds = time.monotonic() - begun
    tokens = sum(t.sampled for t in trajectories)
    assert tokens == len(prompts) * answer, f"{tokens} tokens"
    return round(tokens / seconds, 1)


async def client(engine: Any, folder: Path, count: int, options: argparse.Namespace) -> float:
    """The same by ``sglang.bench_serving``, which is told the same lengths."""
    target = options.work / "client.jsonl"
    target.unlink(missing_ok=True)
    command = [
        options.engine_python or sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang",
        "--base-url", engine.url,
        "--dataset-name", "random-ids", "--tokenize-prompt", "--random-input-len", str(PROMPT), "--random-output-len",
        str(options.answer), "--random-range-ratio", "1", "--num-prompts", str(count), "--max-concurrency", str(count),
        "--return-logprob", "--disable-stream", "--disable-tqdm", "--model", str(folder), "--tokenizer", str(folder),
        "--warmup-requests", "0", "--temperature", "1", "--output-file", str(target),
    ]  # fmt: skip
    key = engine.client._headers["Authorization"].removeprefix("Bearer ")
    environment = os.environ | {"OPENAI_API_KEY": key, "PYTHONSAFEPATH": "1"}
    await engine.flush()
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said, _ = await asyncio.wait_for(process.communicate(), 300)
    if not target.exists():
        raise SystemExit(said.decode()[-3000:])
    line = json.loads(target.read_text().splitlines()[-1])
    await engine.flush()
    return round(line["total_output_tokens"] / line["duration"], 1)


def offline(folder: Path, count: int, options: argparse.Namespace) -> float:
    """The same by ``sglang.benchmark.offline_throughput``, the engine in its own process."""
    target, texts = options.work / "offline.jsonl", options.work / "conversations.json"
    texts.write_text(json.dumps([{"conversations": [{"value": text}, {"value": "-"}]} for text in make_texts(count)]))
    target.unlink(missing_ok=True)
    command = [
        options.engine_python or sys.executable, "-m", "sglang.benchmark.offline_throughput",
        "--model-path", str(folder), "--dataset-name", "random", "--dataset-path", str(texts),
        "--extra-request-body", '{"temperature": 1}',
        "--random-input-len", str(PROMPT), "--random-output-len", str(options.answer),
        "--random-range-ratio", "1", "--num-prompts", str(count), "--return-logprob", "--result-filename", str(target),
        "--disable-prefill-cuda-graph", "--max-running-requests", str(count), "--skip-warmup", "--mem-fraction-static",
        str(options.utilization), "--dtype", "bfloat16", "--cuda-graph-bs", *map(str, graph_sizes(options)),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True, timeout=400
    )
    if not target.exists():
        print((done.stdout + done.stderr)[-2000:], flush=True)
        return 0.0
    line = json.loads(target.read_text().splitlines()[-1])
    return round(line["total_output_tokens"] / line["total_latency"], 1)


def __getattr__(name: str) -> Any:
    if name != "Nothing":
        raise AttributeError(name)
    from skyrl_train.envs.base import Env, StepResult

    class Nothing(Env):
        def step(self, response: str) -> StepResult:
            return StepResult(reward=0.0, terminated=True)

    globals()["Nothing"] = Nothing
    return Nothing


if __name__ == "__main__":
    sys.modules["rollout_gpu"] = sys.modules["__main__"]
    asyncio.run(main())
