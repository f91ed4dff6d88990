"""What real servers hold of each model family, split in each way, is what the sender says that they hold."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engines.contract import SIZES
from sglang_cpu.servers import SMALL

from skyrl_train.engines.sglang.launch import SGLangServer
from skyrl_train.engines.sglang.options import cpu_arguments, cpu_variables, inside_variables
from skyrl_train.errors import WeightSyncError
from skyrl_train.models.folders import save_pretrained
from skyrl_train.models.tiny import make_model
from skyrl_train.models.tokenizers import make_tokenizer
from weight_sync.helpers import FAR, HERE, Syncing, one_unit_off, syncing

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1,
           "mlp_only_layers": []}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Any, str]] = {
    # model, server, the way there, proof
    "qwen2, tensor parallel": ({"model_type": "qwen2", "tie_word_embeddings": True}, {"tp_size": 2}, HERE, "both"),
    "qwen3_moe, tensor parallel": ({"model_type": "qwen3_moe", **EXPERTS}, {"tp_size": 2}, FAR, "both"),
    "qwen3, pipeline parallel": ({"model_type": "qwen3"}, {"pp_size": 2}, HERE, "both"),
}
SLOW: dict[str, tuple[dict[str, Any], dict[str, Any], Any, str]] = {
    "llama, tied": ({"model_type": "llama", "tie_word_embeddings": True}, {}, HERE, "both"),
    "llama, tensor parallel": ({"model_type": "llama"}, {"tp_size": 2}, HERE, "both"),
    "qwen3, tensor parallel, broadcast": ({"model_type": "qwen3"}, {"tp_size": 2}, FAR, "both"),
    "qwen3, pipeline parallel, disk": ({"model_type": "qwen3"}, {"pp_size": 2}, FAR, "both"),
    "qwen3, two whole copies": ({"model_type": "qwen3"}, {"dp_size": 2}, FAR, "both"),
    # SGLang cannot compute with dealt-out experts on a CPU, but it holds them
    "qwen3_moe, expert parallel": (
        {"model_type": "qwen3_moe", **EXPERTS},
        {"tp_size": 2, "ep_size": 2},
        HERE,
        "digest",
    ),
}


def make(folder: Path, changes: dict[str, Any]) -> None:
    sizes = {k: v for k, v in (SIZES | changes).items() if k != "head_dim" or changes["model_type"] == "qwen3"}
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(sizes | {"vocab_size": 150, "num_hidden_layers": 2}))
    tokenizer = make_tokenizer()
    torch.manual_seed(2)
    save_pretrained(make_model(file, tokenizer, 1024).eval(), tokenizer, folder)


async def one_rank_off(here: Syncing) -> None:
    """Of one tensor, the last number lies on the last rank alone."""
    here.sync.shipment._digests.taken.clear()  # SGLang's checker is asked: our loader tells before this change
    wrong = r"1 of \d+ tensors .* model.layers.1.self_attn.qkv_proj.weight on rank 1"
    spoiled = one_unit_off(here.sync, here.policy, "model.layers.1.self_attn.q_proj.weight", -1)
    with spoiled, pytest.raises(WeightSyncError, match=wrong):
        await here.sync.sync(3)
    assert "e" in here.pool.quarantined()


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_what_ranks_hold(case: str, sglang_python: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes, split, around, proof = (CASES | SLOW)[case]
    make(tmp_path / "model", changes)
    arguments = cpu_arguments() | SMALL | {"model_path": str(tmp_path / "model")} | split
    variables = cpu_variables(tensor_parallel=split.get("tp_size", 1)) | inside_variables()

    async def launch() -> Any:
        server = SGLangServer(
            arguments, log=tmp_path / "engine.log", python=sglang_python, env=variables, start_timeout=240
        )
        return await server.attach(control_timeout=120.0)

    async def main() -> None:
        servers = {"e": launch}
        async with syncing(tmp_path / "model", servers, around=around, proof=proof, timeout=120.0) as here:
            for version in (1, 2):
                here.change_policy()
                await here.sync.sync(version)
            if proof == "both":
                assert await here.answers_as_the_policy(here.engines["e"])
            assert here.sync.shipment._digests.told == set() or "pipeline stages" in caplog.text
            if "tp_size" in split and "ep_size" not in split:
                await one_rank_off(here)
        assert "own loader" not in (tmp_path / "engine.log").read_text(), "what was told to our loader fitted"

    asyncio.run(main())
