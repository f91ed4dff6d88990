"""Rules between the keys of ``trainer.algorithm`` and others: what cannot work, and what is probably not meant."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_train.config.backend import resolve_backend
from skyrl_train.config.schema import Config, tree
from skyrl_train.errors import ConfigError, NotSupportedError

ANCHORED = ("rollout_is", "dppo", "decoupled")
"""Policy losses whose ratio is relative to the engine's log-probs: they are the correction."""
SCORED = ("top_p", "top_k", "min_p", "repetition_penalty", "logit_bias")
"""Sampling parameters that change the distribution and that the learner follows."""
NEUTRAL = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "min_new_tokens": 0}
"""Those that it does not follow, with the value that leaves the distribution alone."""
CONSTRAINED = ("json_schema", "regex", "ebnf", "custom_logit_processor")
"""What servers mask logits by, each token in its own way."""
LONELY = {
    "grpo": "the advantage is the reward itself",
    "dr_grpo": "the advantage is the reward itself",
    "maxrl": "the advantage is the reward itself",
    "opo": "the advantage is the reward itself",
    "reinforce++_baseline": "it is reinforce++ of the whole response",
    "rloo": "every advantage is 0, and nothing is learned",
}


def broken(config: Config) -> Iterator[ConfigError]:
    """Every combination that cannot work."""
    yield from _critic(config)
    yield from _kl_and_sampling(config)
    yield from _changed_distribution(config)
    yield from _correction(config)
    yield from _overlong(config)
    for role in ("policy", "critic"):
        betas = getattr(config.trainer, role).optimizer_config.adam_betas
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            yield ConfigError(
                f"trainer.{role}.optimizer_config.adam_betas", betas, "needs two numbers from 0 to below 1.",
                "The default is [0.9, 0.999].",
            )  # fmt: skip
    clip = config.trainer.algorithm.reward_clip
    if clip is not None and (len(clip) != 2 or not clip[0] < clip[1]):
        yield ConfigError(
            "trainer.algorithm.reward_clip", clip, "needs the lowest and the highest reward.", "Write [-1.0, 1.0]."
        )


def _critic(config: Config) -> Iterator[ConfigError]:
    trainer = config.trainer
    if trainer.critic.model.path is None:
        if trainer.algorithm.advantage_estimator == "gae":
            yield ConfigError(
                "trainer.algorithm.advantage_estimator", "gae",
                "needs a critic, and trainer.critic.model.path is null.",
                "Set trainer.critic.model.path, for instance to the policy's own folder.",
            )  # fmt: skip
        return
    step, update = trainer.train_batch_size, trainer.critic_mini_batch_size
    if step % update:
        yield ConfigError(
            "trainer.critic_mini_batch_size", update, f"does not divide trainer.train_batch_size={step} prompts.",
            f"Set it to trainer.policy_mini_batch_size={trainer.policy_mini_batch_size}.",
        )  # fmt: skip


def _kl_and_sampling(config: Config) -> Iterator[ConfigError]:
    algorithm = config.trainer.algorithm
    if algorithm.use_kl_in_reward and algorithm.use_kl_loss:
        yield ConfigError(
            "trainer.algorithm.use_kl_in_reward", True,
            "the KL penalty would count twice, in the reward and in the loss (trainer.algorithm.use_kl_loss=true).",
            "Set one of the two to false.",
        )  # fmt: skip
    sampling, samples = config.generator.sampling_params, config.generator.n_samples_per_prompt
    if sampling.temperature == 0 and samples > 1:
        yield ConfigError(
            "generator.sampling_params.temperature", sampling.temperature,
            f"greedy sampling makes the {samples} samples of a prompt equal, so there is nothing to learn from.",
            "Set a temperature above 0, such as 1.0.",
        )  # fmt: skip


def changes_distribution(config: Config) -> bool:
    """Whether training samples from another distribution than ``softmax(logits / temperature)``."""
    params, defaults = config.generator.sampling_params, tree()
    followed = SCORED if resolve_backend(config) == "embedded" else (n for n in SCORED if n != "repetition_penalty")
    return params.temperature > 0 and any(
        getattr(params, name) not in (defaults[f"generator.sampling_params.{name}"].default, {}) for name in followed
    )


def _changed_distribution(config: Config) -> Iterator[ConfigError]:
    params, section = config.generator.sampling_params, "generator.sampling_params"
    backend = resolve_backend(config)
    for name in CONSTRAINED if backend != "embedded" else ():
        if getattr(params, name):
            yield NotSupportedError(
                f"{section}.{name}", getattr(params, name),
                "leaves the policy only some of its tokens, others at each place, and the learner does not know which: "
                "no importance ratio would be right.",
                f"Remove the key, and let the env score the form; generator.eval_sampling_params.{name} is free.",
            )  # fmt: skip
    for name, neutral in NEUTRAL.items():
        if getattr(params, name) != neutral:
            yield NotSupportedError(
                f"{section}.{name}", getattr(params, name),
                "changes what the engine samples from in a way that the learner does not follow, so no importance "
                "ratio would be right.",
                f"Remove the key; the learner follows {', '.join(SCORED)}.",
            )  # fmt: skip
    if changes_distribution(config) and config.trainer.algorithm.old_logprobs == "engine":
        yield ConfigError(
            "trainer.algorithm.old_logprobs", "engine",
            "engines report the log-probs before top-p, top-k, min-p and penalties, and this run samples with some of "
            "them.",
            "Set it to auto: the learner scores under the distribution that was sampled from.",
        )  # fmt: skip


def _correction(config: Config) -> Iterator[ConfigError]:
    algorithm = config.trainer.algorithm
    if algorithm.use_tis and algorithm.tis_imp_ratio_cap <= 0:
        yield ConfigError(
            "trainer.algorithm.tis_imp_ratio_cap", algorithm.tis_imp_ratio_cap, "use_tis=true needs a cap above 0.",
            "Set it to 2.0; or use trainer.algorithm.off_policy_correction.tis_ratio_type=token.",
        )  # fmt: skip
    if not algorithm.off_policy_correction.active:
        return
    key = "trainer.algorithm.policy_loss_type"
    loss, off = algorithm.policy_loss_type, "Remove the keys of trainer.algorithm.off_policy_correction."
    anchored = loss in ANCHORED or (loss == "cispo" and algorithm.cispo.cispo_anchor == "rollout")
    if anchored:
        yield ConfigError(
            key, loss, "its ratio already is relative to the engine's log-probs: off_policy_correction would correct "
            "the same gap twice.", off,
        )  # fmt: skip
    if loss == "cross_entropy":
        yield ConfigError(key, loss, "imitates every token alike: there is no policy to correct for.", off)
    if algorithm.old_logprobs == "engine":
        yield ConfigError(
            "trainer.algorithm.old_logprobs", "engine",
            "with the engine's log-probs as the old ones there is no gap that off_policy_correction could correct.",
            "Set it to auto or learner.",
        )  # fmt: skip


def _overlong(config: Config) -> Iterator[ConfigError]:
    algorithm = config.trainer.algorithm
    if algorithm.overlong_penalty is None:
        return
    longest, buffer = algorithm.overlong_max_len, algorithm.overlong_buffer_len
    if longest is None:
        yield ConfigError(
            "trainer.algorithm.overlong_max_len", None,
            f"the overlong penalty needs the maximum, which does not follow from max_generate_length with "
            f"generator.max_turns={config.generator.max_turns}.",
            "Set it to the most tokens that the policy may write in a trajectory.",
        )  # fmt: skip
    elif buffer > longest and algorithm.overlong_penalty != "hard":
        yield ConfigError(
            "trainer.algorithm.overlong_buffer_len", buffer,
            f"is longer than the longest response, {longest} tokens (trainer.algorithm.overlong_max_len).",
            f"Set it to {max(1, longest // 4)}, or another part of the maximum.",
        )  # fmt: skip


def doubtful(config: Config) -> Iterator[str]:
    """Combinations that work and are probably not meant."""
    algorithm, generator = config.trainer.algorithm, config.generator
    yield from _kl_without_effect(config)
    if generator.sampling_params.temperature == 0:
        yield "generator.sampling_params.temperature=0: greedy samples show the policy no alternative."
    penalty, backend = generator.sampling_params.repetition_penalty, resolve_backend(config)
    if penalty != 1.0 and backend != "embedded":
        yield (
            f"generator.sampling_params.repetition_penalty={penalty:g}: which tokens count as repeated is the "
            f"{backend} server's own affair, so the learner scores without it, and trains on samples of a distribution "
            "that is not quite its own. generator.backend=embedded follows it exactly."
        )
    estimator, alone = algorithm.advantage_estimator, generator.n_samples_per_prompt == 1
    if alone and estimator in LONELY:
        yield (
            f"generator.n_samples_per_prompt=1 with advantage_estimator={estimator}: a group of one has no baseline; "
            f"{LONELY[estimator]}."
        )
    if alone and algorithm.dynamic_sampling.type:
        yield (
            f"trainer.algorithm.dynamic_sampling.type={algorithm.dynamic_sampling.type} has no effect: with "
            "generator.n_samples_per_prompt=1 no group has equal rewards."
        )
    if config.trainer.critic.model.path and estimator != "gae" and ":" not in estimator:
        yield (
            f"trainer.critic.model.path={config.trainer.critic.model.path}: a critic is trained, and "
            f"advantage_estimator={estimator} does not look at its values."
        )
    if algorithm.policy_loss_type in ("gspo", "sapo") and algorithm.loss_reduction != "sequence_mean":
        yield (
            f"trainer.algorithm.policy_loss_type={algorithm.policy_loss_type} is defined with "
            f"loss_reduction=sequence_mean; this run has {algorithm.loss_reduction}."
        )


def _kl_without_effect(config: Config) -> Iterator[str]:
    algorithm, models = config.trainer.algorithm, config.trainer
    on = algorithm.use_kl_loss or algorithm.use_kl_in_reward
    if on and algorithm.kl_loss_coef == 0:
        yield "trainer.algorithm.kl_loss_coef=0 leaves the KL penalty without effect."
    off = "has no effect: trainer.algorithm.use_kl_loss and use_kl_in_reward are both false."
    if not on and algorithm.kl_loss_coef != tree()["trainer.algorithm.kl_loss_coef"].default:
        yield f"trainer.algorithm.kl_loss_coef={algorithm.kl_loss_coef:g} {off}"
    if not on and models.ref.model.path != models.policy.model.path:
        yield f"trainer.ref.model.path={models.ref.model.path} {off}"
