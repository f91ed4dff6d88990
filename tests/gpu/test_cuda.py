"""The learner and the embedded engine on a GPU: the same promises as on the CPU."""

import asyncio
import copy
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from skyrl_train.batch import collate
from skyrl_train.engines.base import Request, SamplingParams
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.engines.sglang.payloads import Counter, directed_payloads, give_up
from skyrl_train.models.attention import NAME
from skyrl_train.models.scoring import score
from skyrl_train.types import Prompt, Trajectory
from skyrl_train.weight_sync.digests import digest, tiles, told
from skyrl_train.weight_sync.directions import question
from skyrl_train.weight_sync.layout import Rank
from skyrl_train.weight_sync.outline import SendPlan
from skyrl_train.weight_sync.own_memory import lent
from skyrl_train.weight_sync.sender import WeightSender

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
VOCABULARY = 512


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        initializer_range=0.1,
        eos_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=NAME).cuda().eval()


def sample(model, dtype: torch.dtype | None, temperature: float = 0.8):
    """24 completions of 12 prompts of unequal length, as a batch on the GPU."""

    async def run() -> list[Trajectory]:
        engine = EmbeddedEngine(model, max_num_seqs=16, autocast_dtype=dtype)
        draw = torch.Generator().manual_seed(1)
        prompts = [torch.randint(1, VOCABULARY, (5 + 3 * i,), generator=draw).tolist() for i in range(12)]
        params = [SamplingParams(max_new_tokens=20 + i, temperature=temperature, seed=i) for i in range(24)]
        requests = [Request(id=f"r{i}", prompt_ids=prompts[i // 2], params=p, order=(i,)) for i, p in enumerate(params)]
        answers = await asyncio.gather(*(engine.generate(request) for request in requests))
        await engine.close()
        trajectories = []
        for i, (completion,) in enumerate(answers):
            prompt = Prompt(uid=str(i // 2), messages=(), env_class="none")
            trajectory = Trajectory(prompt=prompt, sample=i % 2, prompt_ids=prompts[i // 2])
            trajectory.append_sampled(completion.token_ids, completion.logprobs, completion.stop_reason, 0)
            trajectories.append(trajectory)
        return trajectories

    return collate(asyncio.run(run()), pad_token_id=0).to(torch.device("cuda"))


@pytest.mark.parametrize("packed", [True, False])
def test_the_engines_logprobs_are_the_learners(model, packed):
    batch = sample(model, None)
    with torch.no_grad():
        learner, _ = score(model, batch, temperature=0.8, packed=packed, with_entropy=False)
    gap = (learner - batch.rollout_logprobs)[batch.loss_mask].abs()
    assert gap.max() < 1e-3, gap.max()
    assert gap.numel() > 300


def test_under_bfloat16_they_agree_on_average(model):
    batch = sample(model, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        learner, _ = score(model, batch, temperature=0.8, packed=True, with_entropy=False)
    gap = (learner - batch.rollout_logprobs)[batch.loss_mask].abs()
    assert gap.mean() < 0.05, gap.mean()


def test_packed_gradients_are_the_padded_ones(model):
    batch = sample(model, None)
    gradients = []
    for packed in (True, False):
        copied = copy.deepcopy(model)
        logprobs, entropy = score(copied, batch, temperature=0.8, packed=packed, with_entropy=True)
        (logprobs.sum() + entropy.sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in copied.parameters()]))
    largest = gradients[1].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() < 1e-3 * largest


def test_changed_weights_are_used_at_once(model):
    changed = copy.deepcopy(model)
    before = sample(changed, None, temperature=0.0)
    with torch.no_grad():
        changed.lm_head.weight.copy_(changed.lm_head.weight.roll(1, 0))
    after = sample(changed, None, temperature=0.0)
    assert not torch.equal(before.response_ids, after.response_ids)


def test_memory_that_no_engine_read_is_taken_back(model):
    """An engine that dies in the middle of a sync leaves a bucket that it had been told of."""
    sender, plan = WeightSender(model, torch.device("cuda")), SendPlan(dtype="float32", limit=1 << 30, device="cuda")

    def held() -> int:
        torch.cuda.ipc_collect()
        return torch.cuda.memory_allocated()

    before = held()
    sender.begin(plan)
    sender.pack(0)
    sender.share(0, "e", [Rank()], 1, directed=False)
    sender.end()
    assert held() >= before + sum(p.nbytes for p in model.parameters()), "torch waits for the reader"
    sender.begin(plan)
    sender.end()
    assert held() == before


def test_another_process_reads_the_learners_own_memory():
    """As an engine does: by a handle of a few long runs, and nothing of them is held when it has ended."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    memory = torch.arange(1 << 20, dtype=torch.float32, device="cuda")
    for turn in range(3):
        memory.add_(turn)
        counters: list[Counter] = []
        (payload,), copies = directed_payloads([[b"what is where"]], [lent(memory)], counters)
        done = subprocess.run(
            [sys.executable, "-c", READER], input=payload, capture_output=True, text=True, timeout=120, check=True
        )
        assert float(done.stdout) == memory.double().sum().item()
        del copies
        assert give_up(counters) == 0, "it has read"
    storage = memory.untyped_storage()
    storage.resize_(0)
    del memory, storage
    torch.cuda.ipc_collect()
    assert torch.cuda.memory_allocated() == before


def test_digests_of_what_is_converted_as_it_is_read():
    draw = torch.Generator(device="cuda").manual_seed(0)
    tensors = [torch.randn(shape, generator=draw, device="cuda") for shape in [(7000,), (33, 1000), (4096, 4096), (2,)]]
    tensors.append(torch.tensor([1.00390625, 1.01171875, -0.0, 3e38, 1e-40, 1.5], device="cuda"))  # ties, and no ties
    converted = [tensor.bfloat16() for tensor in tensors]
    assert torch.equal(tiles(tensors, torch.bfloat16), tiles(converted))
    assert torch.equal(tiles(converted).cpu(), tiles([tensor.cpu() for tensor in converted]))


def test_the_loader_inside_sglang_tells_the_digests_of_what_the_model_holds(monkeypatch):
    from skyrl_train.engines.sglang.inside import skyrl_loader  # pyright: ignore[reportAttributeAccessIssue]
    from skyrl_train.engines.sglang.options import INSIDE

    monkeypatch.syspath_prepend(str(INSIDE))
    model = torch.nn.Sequential(torch.nn.Linear(64, 333), torch.nn.LayerNorm(333), torch.nn.Linear(333, 7))
    model = model.to("cuda", torch.bfloat16)
    names = [name for name, _ in model.named_parameters()][::-1]
    out = torch.zeros(len(names), dtype=torch.int64, device="cuda")
    held = dict(model.named_parameters())
    for turn in range(2):
        held[names[0]].data[0] += turn
        skyrl_loader.load(model, [(question(names), out)])
        assert told(out.cpu(), "tiles") == [digest(held[name].cpu(), "tiles") for name in names]


READER = """
import base64, pickle, sys, torch
from torch.multiprocessing import reductions

class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name == "rebuild_cuda_tensor":  # as SGLang's, which knows a GPU by its UUID
            return lambda *args: reductions.rebuild_cuda_tensor(*args[:6], 0, *args[7:])
        return super().find_class(module, name)

import io
((message, flat),) = Unpickler(io.BytesIO(base64.b64decode(sys.stdin.read()))).load()
assert message == b"what is where"
print(flat.view(torch.float32).double().sum().item())
del flat
"""
