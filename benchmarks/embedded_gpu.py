"""The embedded engine and the learner's packed forward on one GPU, with a 0.6B Qwen3 of random weights.

    python benchmarks/embedded_gpu.py --out FILE

Prints and writes: tokens/s of the engine against transformers' ``generate`` on the same module, and the packed against
the padded learner pass. The embedded engine exists for laptops and as an oracle; on a GPU SGLang is the engine to use,
and these figures say by how much.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from datetime import date
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers import __version__ as transformers_version

from skyrl_train.batch import collate
from skyrl_train.engines.base import Request, SamplingParams
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.models.attention import NAME
from skyrl_train.models.scoring import score
from skyrl_train.types import Prompt, Trajectory

PROMPT, ANSWER = 128, 256


def qwen3_06b() -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=3072, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=torch.bfloat16).eval()


async def run_engine(model: torch.nn.Module, prompts: list[list[int]]) -> tuple[float, list[Trajectory]]:
    engine = EmbeddedEngine(model, max_num_seqs=len(prompts))
    params = SamplingParams(max_new_tokens=ANSWER, ignore_eos=True)
    requests = [Request(id=str(i), prompt_ids=p, params=params, order=(i,)) for i, p in enumerate(prompts)]
    started = time.perf_counter()
    answers = await asyncio.gather(*(engine.generate(r) for r in requests))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    await engine.close()
    trajectories = []
    for i, (c,) in enumerate(answers):
        t = Trajectory(prompt=Prompt(uid=str(i), messages=(), env_class=""), sample=0, prompt_ids=prompts[i])
        t.append_sampled(c.token_ids, c.logprobs, c.stop_reason, 0)
        trajectories.append(t)
    return seconds, trajectories


def timed(function) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    out = Path(parser.parse_args().out)
    model = qwen3_06b()
    rows: list[dict[str, float]] = []
    trajectories: list[Trajectory] = []
    for size in (1, 16, 64):
        prompts = torch.randint(1, 150000, (size, PROMPT)).tolist()
        asyncio.run(run_engine(model, prompts[:1]))  # warms up
        ours, trajectories = asyncio.run(run_engine(model, prompts))
        ids = torch.tensor(prompts, device="cuda")
        arguments = {"min_new_tokens": ANSWER, "max_new_tokens": ANSWER, "do_sample": True, "pad_token_id": 0}
        theirs = timed(lambda ids=ids, a=arguments: model.generate(ids, attention_mask=torch.ones_like(ids), **a))
        rate = size * ANSWER
        speeds = {"engine_tok_s": rate / ours, "generate_tok_s": rate / theirs}
        rows.append({"batch": size, **speeds, "ratio": theirs / ours})
        print(rows[-1], flush=True)
    batch = collate(trajectories, 0).select(range(16)).to(torch.device("cuda"))
    seconds = {}
    for packed in (True, False, True, False):

        def step(packed: bool = packed) -> None:
            logprobs, _ = score(model, batch, temperature=1.0, packed=packed, with_entropy=False)
            logprobs.sum().backward()
            model.zero_grad()

        step()
        seconds["packed" if packed else "padded"] = timed(step)
    logprobs, _ = score(model, batch, temperature=1.0, packed=True, with_entropy=False)
    gap = (logprobs - batch.rollout_logprobs)[batch.loss_mask].abs().mean().item()
    result = {
        "date": str(date.today()), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "transformers": transformers_version, "model": "Qwen3 0.6B, random bf16 weights",
        "prompt_tokens": PROMPT, "new_tokens": ANSWER, "engine": rows,
        "forward_backward_16_rows_s": seconds, "mean_logprob_gap_bf16": gap,
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result["forward_backward_16_rows_s"]), "gap", gap)


if __name__ == "__main__":
    main()
