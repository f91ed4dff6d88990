"""What tests of several folders share."""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.forkserver
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from ray_cluster import ray_address, ray_cluster  # noqa: F401 - fixtures
from sglang_cpu.servers import sglang_model, sglang_python, sglang_server, sglang_servers  # noqa: F401 - fixtures

from skyrl_train.config.generator import GeneratorConfig
from skyrl_train.engines.base import Request
from skyrl_train.engines.scripted import ScriptedEngine
from skyrl_train.envs.base import Env, StepResult
from skyrl_train.envs.runner import EnvRunner
from skyrl_train.generator.chat import ChatFormat
from skyrl_train.generator.generator import Generator, Purpose
from skyrl_train.generator.rollout import Rollout
from skyrl_train.types import Outcome, Prompt, Trajectory

PRELOADED = ["skyrl_train.trainer", "skyrl_train.roles", "transformers.models.qwen3.modeling_qwen3"]


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    """Processes forked from a server that has torch loaded: a command, or a rank, then starts in no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    yield context
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def ranks(server: Any) -> Callable[..., list[Any]]:
    """``ranks(function, *args)`` runs a function of a test module in two processes of one gloo group."""
    from rank_processes import run

    return partial(run, server)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A character tokenizer with a ChatML template; its EOS is ``<|im_end|>``."""
    from skyrl_train.models.tokenizers import make_tokenizer

    return make_tokenizer("char")


@pytest.fixture(scope="session")
def prompt() -> Callable[..., Prompt]:
    """Makes prompts: ``prompt("a/0", text="2+2", env_class="sum")``."""

    def make(uid: str = "a/0", text: str = "go", **fields: Any) -> Prompt:
        fields = {"env_class": "test"} | fields
        return Prompt(uid=uid, messages=({"role": "user", "content": text},), **fields)

    return make


@pytest.fixture(scope="session")
def trajectory(prompt: Callable[..., Prompt]) -> Callable[..., Trajectory]:
    """Makes one-turn trajectories: ``trajectory("a/0", sample=1, ids=[5, 6], reward=1.0)``."""

    def make(
        uid: str = "a/0",
        sample: int = 0,
        ids: list[int] | None = None,
        reward: float = 0.0,
        outcome: Outcome = Outcome.FINISHED,
        prompt_ids: list[int] | None = None,
        **fields: Any,
    ) -> Trajectory:
        made = Trajectory(prompt=prompt(uid, **fields), sample=sample, prompt_ids=prompt_ids or [1, 2])
        ids = [3] if ids is None else ids
        made.append_sampled(ids, [-0.5] * len(ids), "stop", 0)
        made.reward_turn(reward)
        made.outcome = outcome
        return made

    return make


class Answer(Env):
    """A one-turn env: reward 1 for the text ``good``."""

    def step(self, response: str) -> StepResult:
        return StepResult(reward=float(response == "good"), terminated=True, metadata={"length": len(response)})


class Rig:
    """A generator of real parts around a scripted engine.

    Args:
        script: text that the policy "writes" to a request; its tokens end with EOS. Or token ids, taken as they are.
        make_env: the env of each prompt.
        delay: of each answer, in seconds.
        timeout: of each env call, in seconds.
        config: keys of ``generator``, dotted ones for its sections.
    """

    def __init__(
        self,
        tokenizer: Any,
        script: Callable[[Request], str | list[int]] = lambda _: "good",
        make_env: Callable[[Prompt], Env] | None = None,
        *,
        delay: Callable[[Request], float] = lambda _: 0.0,
        timeout: float = 20.0,
        template: str | None = None,
        seed: int = 42,
        **config: Any,
    ) -> None:
        def ids(request: Request) -> list[int]:
            answer = script(request)
            return answer if isinstance(answer, list) else [*self.ids(answer), tokenizer.eos_token_id]

        self.tokenizer = tokenizer
        self.config = GeneratorConfig(max_input_length=4096)  # these two follow other sections
        self.config.eval_sampling_params.max_generate_length = 64
        for key, value in config.items():
            section, _, name = key.rpartition("__")
            setattr(getattr(self.config, section) if section else self.config, name, value)
        self.engine = ScriptedEngine(ids, delay)
        self.chat = ChatFormat(tokenizer, template)
        self.runner = EnvRunner(max_workers=64, timeout=timeout)
        make = make_env or (lambda prompt: Answer(prompt, {}))
        self.rollout = Rollout(self.engine, self.chat, self.runner, make, self.config)
        self.generator = Generator(self.rollout, self.config, seed)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def run(self, *prompts: Prompt, step: int = 1, purpose: Purpose = "train") -> list[Trajectory]:
        """One step's trajectories. Whatever happens, no session stays open."""
        try:
            return asyncio.run(self.generator.generate(prompts, step, purpose))
        finally:
            assert self.engine.open == set()


@pytest.fixture(scope="session")
def rig(tokenizer: Any) -> Callable[..., Rig]:
    """Makes rigs: ``rig(script, make_env, max_turns=3)``."""
    return partial(Rig, tokenizer)
