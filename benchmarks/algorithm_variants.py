"""The variants of ``learning_curves.py --algorithms``: what each changes in the quickstart's config.

A variant is promised to gain at least 80 % of what GRPO gains from the same start, unless ``exempt`` says why not.
Every variant runs with the first of the seeds given, those of ``MAIN`` with all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

A = "trainer.algorithm"
SEQUENCES = f"{A}.loss_reduction=sequence_mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One algorithm, as overrides of ``+experiment=quickstart``. ``{model}`` is the folder of the warm model."""

    overrides: tuple[str, ...] = ()
    exempt: str = ""
    """Why it need not gain what GRPO does; empty: it must."""


def _estimator(name: str, *more: str) -> Variant:
    return Variant(overrides=(f"{A}.advantage_estimator={name}", *more))


def _loss(name: str, *more: str, exempt: str = "") -> Variant:
    return Variant(overrides=(f"{A}.policy_loss_type={name}", *more), exempt=exempt)


def _set(*keys: str, exempt: str = "") -> Variant:
    return Variant(overrides=keys, exempt=exempt)


CRITIC = (
    "trainer.critic.model.path={model}", "trainer.critic_mini_batch_size=16",
    "trainer.critic.optimizer_config.lr=5e-4", "trainer.critic.optimizer_config.weight_decay=0.0",
)  # fmt: skip

VARIANTS: dict[str, Variant] = {
    "grpo": Variant(),
    # advantage estimators
    "grpo, no std": _set(f"{A}.grpo_norm_by_std=false"),
    "grpo, batch std": _set(f"{A}.grpo_std_over=batch"),
    "dr_grpo": _estimator("dr_grpo", f"{A}.loss_reduction=seq_mean_token_sum_norm"),
    "rloo": _estimator("rloo"),
    "reinforce++": _estimator("reinforce++"),
    "reinforce++_baseline": _estimator("reinforce++_baseline"),
    "gae (PPO with a critic)": _estimator("gae", *CRITIC),
    "remax": Variant(
        overrides=(f"{A}.advantage_estimator=remax",),
        exempt="a greedy trajectory does better than samples do, so most advantages are negative; the next is centred",
    ),
    "remax, batch normalised": _estimator("remax", f"{A}.advantage_batch_normalize=true"),
    "opo": _estimator("opo"),
    "maxrl": _estimator("maxrl"),
    "batch normalised": _set(f"{A}.advantage_batch_normalize=true"),
    # policy losses
    "dual_clip": _loss("dual_clip"),
    "gspo": _loss("gspo", SEQUENCES, f"{A}.eps_clip_low=0.003", f"{A}.eps_clip_high=0.004"),  # means of a sequence
    "sapo": _loss("sapo", SEQUENCES),
    "cispo": _loss("cispo"),
    "clip_cov": _loss("clip_cov"),
    "kl_cov": _loss("kl_cov"),
    "dppo": _loss("dppo"),
    "importance_sampling": _loss("importance_sampling"),
    "rollout_is": _loss("rollout_is"),
    "decoupled": _loss("decoupled"),
    "reinforce": _loss(
        "reinforce",
        exempt="nothing corrects the second update of a step for the first; importance_sampling is the same with that",
    ),
    "reinforce, one update": _loss("reinforce", "trainer.policy_mini_batch_size=32"),
    "cross_entropy": _loss(
        "cross_entropy",
        exempt="it imitates every sample, right or wrong, so nothing tells it what to gain",
    ),
    # what a run adds to those; the first of each kind come first
    "dynamic sampling, filter": _set(f"{A}.dynamic_sampling.type=filter"),
    "k3 in the loss": _set(f"{A}.use_kl_loss=true"),
    "k1 in the reward, adaptive": _set(
        f"{A}.use_kl_in_reward=true", f"{A}.kl_estimator_type=k1", f"{A}.kl_ctrl.type=adaptive"
    ),
    "sequence_mean": _set(SEQUENCES),
    "prompt_mean": _set(f"{A}.loss_reduction=prompt_mean"),
    "token TIS": _set(f"{A}.off_policy_correction.tis_ratio_type=token"),
    "top_p=0.95": _set("generator.sampling_params.top_p=0.95"),
    "top_k=5, repetition": _set(
        "generator.sampling_params.top_k=5", "generator.sampling_params.repetition_penalty=1.02"
    ),
    "dynamic sampling, replace": _set(f"{A}.dynamic_sampling.type=replace"),
    "token_mean_legacy": _set(f"{A}.loss_reduction=token_mean_legacy"),
    "overlong, soft": _set(f"{A}.overlong_penalty=soft", f"{A}.overlong_buffer_len=8"),
    "entropy bonus": _set(f"{A}.use_entropy_loss=true", f"{A}.entropy_loss_coef=0.001"),
    "zero_variance_filter": _set(f"{A}.zero_variance_filter=true"),
    "k1+ in the loss": _set(f"{A}.use_kl_loss=true", f"{A}.kl_estimator_type=k1+"),
    "k2 in the loss": _set(f"{A}.use_kl_loss=true", f"{A}.kl_estimator_type=k2"),
}  # fmt: skip

MAIN = (
    "grpo", "dr_grpo", "rloo", "reinforce++_baseline", "gae (PPO with a critic)", "gspo", "cispo",
    "dynamic sampling, filter",
)  # fmt: skip
"""What people train with."""
