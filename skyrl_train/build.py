"""Config to objects: every "which one?" is answered here, once."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_train.algorithms.kl_control import KLController
from skyrl_train.algorithms.table import accepts, resolve
from skyrl_train.checkpoints import Checkpoints, Intervals, Stateful
from skyrl_train.config.algorithm_rules import changes_distribution
from skyrl_train.config.backend import resolve_background
from skyrl_train.data.dataset import PromptDataset, load_prompts
from skyrl_train.data.sampler import PromptSampler
from skyrl_train.doors import Doors
from skyrl_train.engines.base import Engine
from skyrl_train.envs.base import Env
from skyrl_train.envs.registry import check_env, check_settings, make_env
from skyrl_train.envs.runner import EnvRunner
from skyrl_train.errors import ConfigError
from skyrl_train.evaluator import Evaluator
from skyrl_train.generator.chat import ChatFormat, resolve_template
from skyrl_train.generator.generator import Generator
from skyrl_train.generator.rollout import Rollout
from skyrl_train.invariants import Invariants
from skyrl_train.learner.policy import Critic, Policy, Scorer
from skyrl_train.learner.residents import Residents
from skyrl_train.prompts import PromptSource
from skyrl_train.rounds import Rounds
from skyrl_train.runtime.collector import settled
from skyrl_train.runtime.site import Site, open_site
from skyrl_train.sampling import start_sampling
from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.tracking.tracker import Tracker
from skyrl_train.types import Prompt
from skyrl_train.weight_sync.base import WeightSync

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config
    from skyrl_train.trainer import Trainer

log = logging.getLogger("skyrl.build")

PROBES = 4
"""Prompts that engines are asked about after each weight sync."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What training and generating have in common: a policy, an engine that samples from it, and who watches."""

    tokenizer: Any
    policy: Policy
    engine: Engine
    generator: Generator
    weight_sync: WeightSync
    evaluator: Evaluator
    tracker: Tracker
    folder: RunFolder
    dtype: str
    """The learner's number format."""
    on_gpu: bool
    """The learner is on GPUs."""
    residents: Residents | None
    """The models that make room for engines on their GPUs."""


def train(config: Config, run_folder: Path) -> None:
    """Trains to the end of the run."""
    asyncio.run(_train(config, run_folder))


def generate(config: Config, run_folder: Path) -> None:
    """Generates for ``data.val_data`` with the eval sampling parameters, scores, and writes the trajectories."""
    asyncio.run(_generate(config, run_folder))


async def _train(config: Config, run_folder: Path) -> None:
    async with AsyncExitStack() as stack:
        trainer = await build_trainer(config, run_folder, stack)
        stack.enter_context(settled())
        await trainer.train()


async def _generate(config: Config, run_folder: Path) -> None:
    async with AsyncExitStack() as stack:
        folder = RunFolder(run_folder)
        tokenizer, chat = _chat(config)
        prompts = _load("data.val_data", config.data.val_data, config, chat)
        check_settings({p.env_class for p in prompts}, config.environment)
        site = await _open_site(config, ["policy"], stack)
        nothing = PromptDataset([])
        run = await _sampling(config, site, folder, tokenizer, chat, nothing, prompts, total_steps=0, stack=stack)
        await Doors(run.weight_sync, run.tracker, version=0).enter_generation()
        stack.enter_context(settled())
        with run.tracker.step(0) as log_metrics:
            log_metrics(await run.evaluator.run(0))


async def build_trainer(config: Config, run_folder: Path, stack: AsyncExitStack) -> Trainer:
    """Builds every object of a run; what needs ending is ended when ``stack`` is left.

    Raises:
        SkyRLError: whatever cannot be built, in the order cheap to dear: tokenizer, data, models, engines.
    """
    from skyrl_train.trainer import Trainer

    folder = RunFolder(run_folder)
    tokenizer, chat = _chat(config)
    data = _load("data.train_data", config.data.train_data, config, chat)
    evaluating = config.trainer.eval_interval > 0
    held_out = _load("data.val_data", config.data.val_data if evaluating else [], config, chat)
    check_settings({p.env_class for p in (*data, *held_out)}, config.environment)
    prompts = _prompt_source(config, data)
    total = prompts.total_steps
    roles = _roles(config)
    site = await _open_site(config, roles, stack)
    run = await _sampling(config, site, folder, tokenizer, chat, data, held_out, total_steps=total, stack=stack)
    reference = await _reference(config, site, run.policy, folder.path, stack)
    critic = await _critic(config, site, total, folder.path, stack) if "critic" in roles else None
    for role, model in (("ref", reference), ("critic", critic)):
        if run.residents and model and role in roles and site.plan.with_engines(role):
            run.residents.add(model)
    kl_controller = KLController(config.trainer.algorithm)
    checkpoints = _checkpoints(config, run.policy, critic, prompts, {"kl_controller": kl_controller}, run.on_gpu)
    stack.push_async_callback(checkpoints.close)
    await checkpoints.restore(config.trainer.resume_mode, config.trainer.resume_path)
    run.tracker.resume_after(prompts.step)
    return Trainer(
        config=config,
        prompts=prompts,
        rounds=Rounds(run.generator, prompts, config),
        policy=run.policy,
        reference=reference,
        critic=critic,
        kl_controller=kl_controller,
        doors=Doors(run.weight_sync, run.tracker, prompts.step, config.trainer.weight_sync_interval),
        evaluator=run.evaluator,
        checkpoints=checkpoints,
        invariants=Invariants(config.trainer.invariants),
        tracker=run.tracker,
        folder=folder,
        pad_token_id=tokenizer.pad_token_id,
        engine_logprobs_are_old=_engine_logprobs_are_old(config, run.engine, run.dtype),
        changed_distribution=changes_distribution(config),
        reference_is_start=config.trainer.ref.model.path == config.trainer.policy.model.path,
    )


def _roles(config: Config) -> list[str]:
    """The models that training has, each of which needs a place."""
    from skyrl_train.learner.worker import policy_holds_reference

    reference = _compares(config) and not policy_holds_reference(config)
    return ["policy", *(["ref"] if reference else []), *(["critic"] if config.trainer.critic.model.path else [])]


def _compares(config: Config) -> bool:
    """Whether the policy is held against a reference, which may be a model of its own."""
    algorithm = config.trainer.algorithm
    return algorithm.use_kl_loss or algorithm.use_kl_in_reward


async def _open_site(config: Config, roles: list[str], stack: AsyncExitStack) -> Site:
    site = await open_site(config, roles)
    stack.push_async_callback(site.close)
    return site


async def _sampling(
    config: Config,
    site: Site,
    folder: RunFolder,
    tokenizer: Any,
    chat: ChatFormat,
    prompts: PromptDataset,
    held_out: PromptDataset,
    *,
    total_steps: int,
    stack: AsyncExitStack,
) -> Sampling:
    examples = [chat.prompt_ids(prompt.messages) for prompt in islice(chain(prompts, held_out), PROBES)]
    updates = total_steps * _updates_per_step(config)
    started = await start_sampling(config, site, updates, folder.path, examples, stack)
    facts = started.facts
    _check_vocabulary(len(tokenizer), facts["vocabulary"], config)
    generator = _generator(config, started.engine, chat)
    tracker = stack.enter_context(Tracker.open(config, folder, total_steps))
    return Sampling(
        tokenizer=tokenizer,
        policy=started.policy,
        engine=started.engine,
        generator=generator,
        weight_sync=started.weight_sync,
        evaluator=_evaluator(config, generator, held_out, total_steps, tracker, folder),
        tracker=tracker,
        folder=folder,
        dtype=facts["dtype"],
        on_gpu=facts["device"].startswith("cuda"),
        residents=started.residents,
    )


def _chat(config: Config) -> tuple[Any, ChatFormat]:
    from skyrl_train.models.loading import load_tokenizer

    tokenizer = load_tokenizer(config.trainer.policy.model.path)
    choice = config.generator.chat_template
    template = resolve_template(choice.source, choice.name_or_path)
    return tokenizer, ChatFormat(tokenizer, template, dict(config.generator.chat_template_kwargs))


def _load(key: str, sources: list[str], config: Config, chat: ChatFormat) -> PromptDataset:
    """Loads a data set, leaves out prompts that are too long, and makes each of its envs once."""
    if not sources:
        return PromptDataset([])
    limit = config.trainer.max_prompt_length
    dataset = load_prompts(sources, env_class_default=config.environment.env_class)
    dropped = dataset.drop_longer_than(lambda messages: len(chat.prompt_ids(messages)), limit)
    counts = ", ".join(f"{n:,} of {source}" for source, n in dataset.per_source().items())
    log.info("%s: %s; %d dropped: longer than trainer.max_prompt_length=%d", key, counts, dropped, limit)
    first = {prompt.env_class: prompt for prompt in dataset}
    for prompt in first.values():
        check_env(prompt, config.environment)
    return dataset


def _prompt_source(config: Config, data: PromptDataset) -> PromptSource:
    trainer = config.trainer
    sampler = PromptSampler(
        len(data),
        trainer.train_batch_size,
        seed=trainer.seed,
        shuffle=config.data.shuffle,
        epochs=trainer.epochs,
        fingerprint=data.fingerprint(),
    )
    return PromptSource(data, sampler, trainer.max_steps)


def _updates_per_step(config: Config) -> int:
    trainer = config.trainer
    return trainer.update_epochs_per_batch * (trainer.train_batch_size // trainer.policy_mini_batch_size)


async def _reference(config: Config, site: Site, policy: Policy, folder: Path, stack: AsyncExitStack) -> Scorer | None:
    from skyrl_train.learner.worker import ScoringWorker, policy_holds_reference

    if not _compares(config):
        return None
    if policy_holds_reference(config):
        return Scorer(policy.workers, "base_logprobs", parts=policy.parts)
    workers = await site.workers("ref", ScoringWorker, config, "ref", folder=folder)
    stack.push_async_callback(workers.close)
    return Scorer(workers, parts=config.trainer.ref.sequence_parallel_size)


async def _critic(config: Config, site: Site, steps: int, folder: Path, stack: AsyncExitStack) -> Critic:
    from skyrl_train.learner.critic_worker import CriticWorker

    trainer = config.trainer
    updates = steps * trainer.update_epochs_per_batch * (trainer.train_batch_size // trainer.critic_mini_batch_size)
    workers = await site.workers("critic", CriticWorker, config, updates, folder=folder)
    stack.push_async_callback(workers.close)
    return Critic(workers, parts=config.trainer.critic.sequence_parallel_size)


def _check_vocabulary(tokenizer_size: int, model_size: int, config: Config) -> None:
    if tokenizer_size > model_size:
        raise ConfigError(
            "trainer.policy.model.path",
            config.trainer.policy.model.path,
            f"the tokenizer has {tokenizer_size} tokens and the model embeds {model_size}.",
            "They are not of one model: put the right tokenizer files into the folder.",
        )


def _engine_logprobs_are_old(config: Config, engine: Engine, dtype: str) -> bool:
    """``auto``: only those of an engine that runs the learner's own parameters in float32 equal the learner's.

    And not where the engine draws from a changed distribution, or where the gap between the two is to be corrected.
    """
    algorithm = config.trainer.algorithm
    if algorithm.old_logprobs == "auto":
        apart = changes_distribution(config) or algorithm.off_policy_correction.active
        return engine.capabilities.shares_parameters and dtype == "float32" and not apart
    return algorithm.old_logprobs == "engine"


def _generator(config: Config, engine: Engine, chat: ChatFormat) -> Generator:
    environment = config.environment
    runner = EnvRunner(max_workers=environment.skyrl_gym.max_env_workers, timeout=environment.timeout)
    turns = config.generator.max_turns

    def make(prompt: Prompt) -> Env:
        return make_env(prompt, environment, max_turns=turns)

    estimator = resolve("advantage_estimator", config.trainer.algorithm.advantage_estimator)
    return Generator(
        Rollout(engine, chat, runner, make, config.generator),
        config.generator,
        config.trainer.seed,
        greedy_baseline=accepts(estimator, "baseline"),
    )


def _evaluator(
    config: Config,
    generator: Generator,
    prompts: PromptDataset,
    total_steps: int,
    tracker: Tracker,
    folder: RunFolder,
) -> Evaluator:
    trainer = config.trainer
    return Evaluator(
        generator,
        prompts,
        interval=trainer.eval_interval,
        batch_size=trainer.eval_batch_size,
        total_steps=total_steps,
        tracker=tracker,
        folder=folder if trainer.dump_eval_results else None,
    )


def _checkpoints(
    config: Config, policy: Policy, critic: Critic | None, prompts: PromptSource, memory: dict[str, Stateful],
    on_gpu: bool,
) -> Checkpoints:  # fmt: skip
    trainer = config.trainer
    return Checkpoints(
        folder=trainer.ckpt_path,
        exports=trainer.export_path,
        keep=trainer.max_ckpts_to_keep,
        intervals=Intervals(
            checkpoint=trainer.ckpt_interval, export=trainer.hf_save_interval, total_steps=prompts.total_steps
        ),
        identity={
            "model": trainer.policy.model.path,
            "seed": trainer.seed,
            "train_batch_size": trainer.train_batch_size,
            "critic": trainer.critic.model.path,
        },
        policy=policy,
        sampler=prompts.sampler,
        critic=critic,
        memory=memory,
        background=resolve_background(config, on_gpu),
        timeout=trainer.ckpt_timeout,
    )
