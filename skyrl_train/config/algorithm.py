"""The section ``trainer.algorithm``: how rewards become a gradient."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_train.config.algorithm_sections import (
    ALGORITHM,
    LOSS,
    CispoConfig,
    ClipCovConfig,
    DppoConfig,
    DynamicSamplingConfig,
    KLControlConfig,
    KLCovConfig,
    OffPolicyCorrectionConfig,
    SapoConfig,
)
from skyrl_train.config.fields import key, section

ESTIMATOR = f"{ALGORITHM}.advantage_estimator"
ESTIMATORS = (
    "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "gae", "remax", "opo", "maxrl",
)  # fmt: skip
LOSSES = (
    "regular", "dual_clip", "gspo", "sapo", "cispo", "clip_cov", "kl_cov", "dppo", "importance_sampling", "rollout_is",
    "decoupled", "reinforce", "cross_entropy",
)  # fmt: skip
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+")
REDUCTIONS = ("token_mean", "token_mean_legacy", "sequence_mean", "seq_mean_token_sum_norm", "prompt_mean")
CLIPPED = ("regular", "dual_clip", "gspo", "clip_cov", "rollout_is", "decoupled")
OVERLONG = (f"{ALGORITHM}.overlong_penalty", ("soft", "hard", "zero"))


@dataclass(slots=True, kw_only=True)
class AlgorithmConfig:
    """Advantages, loss and penalties."""

    advantage_estimator: str = key("grpo", "How rewards become advantages.", choices=ESTIMATORS, import_path=True)
    kl_ctrl: KLControlConfig = section(KLControlConfig)
    kl_estimator_type: str = key(
        "k3", "How the KL to the reference is estimated; with + it has the gradient of k2.", choices=KL_ESTIMATORS,
        import_path=True,
    )  # fmt: skip
    use_kl_in_reward: bool = key(False, "Take the KL penalty off the reward of every token.")
    use_kl_loss: bool = key(True, "Add the KL penalty to the loss.")
    kl_loss_coef: float = key(0.001, "Strength of the KL penalty, in the loss or in the reward.", minimum=0)
    use_entropy_loss: bool = key(False, "Reward entropy in the loss.")
    entropy_loss_coef: float = key(
        0.01, "Strength of the entropy bonus.", minimum=0, switch=(f"{ALGORITHM}.use_entropy_loss", True)
    )
    advantage_batch_normalize: bool = key(False, "Normalise the advantages over the whole batch.")
    leave_one_out_baseline: bool = key(
        False, "The baseline of a trajectory is the mean of the others of its group.",
        switch=(ESTIMATOR, ("grpo", "dr_grpo", "reinforce++_baseline", "opo")),
    )  # fmt: skip
    observation_tokens: str = key(
        "count",
        "Whether the env's tokens take part in returns, lengths and the whitening of advantages, or are skipped as if "
        "they were not there.",
        choices=("count", "skip"),
    )
    value_head_prefix: str = key("value_head", "Name of the critic's head in its checkpoint.")
    value_loss_type: str = key("clipped", "The critic's loss.", choices=("clipped",), import_path=True)
    value_clip: float | None = key(0.2, "How far a value may move from the old one; null: no bound.", above=0)
    policy_loss_type: str = key("regular", "The policy loss.", choices=LOSSES, import_path=True)
    loss_reduction: str = key(
        "token_mean", "How the losses of tokens become one number.", choices=REDUCTIONS, import_path=True
    )
    max_seq_len: int | None = key(
        None, "Divisor of the reduction seq_mean_token_sum_norm; null: max_input_length + max_generate_length.",
        minimum=1,
        unit="tokens", switch=(f"{ALGORITHM}.loss_reduction", "seq_mean_token_sum_norm"),
    )  # fmt: skip
    grpo_norm_by_std: bool = key(
        True, "Divide GRPO's advantages by the standard deviation of their group.", switch=(ESTIMATOR, "grpo")
    )
    grpo_std_over: str = key(
        "group", "Over what that deviation is taken.", choices=("group", "batch"), switch=(ESTIMATOR, "grpo")
    )
    zero_variance_filter: bool = key(False, "Leave groups whose rewards are all equal out of the loss.")
    zero_variance_filter_tol: float = key(
        1e-6, "Rewards of a group within this of each other count as equal.", minimum=0
    )
    reward_shaping: str = key(
        "standard", "What is done to rewards first; standard is what the overlong and reward keys describe.",
        choices=("standard",), import_path=True,
    )  # fmt: skip
    reward_level: str = key(
        "turn", "Where rewards sit: on the last token of their turn, or summed up on the trajectory's last token.",
        choices=("turn", "trajectory"),
    )  # fmt: skip
    reward_scale: float = key(1.0, "Rewards are multiplied by this.")
    reward_clip: list[float] | None = key(None, "Lowest and highest reward of a token, after scaling.")
    overlong_penalty: str | None = key(
        None,
        "Penalty for length: soft rises over the buffer to the whole factor (DAPO), hard is the whole factor from the "
        "maximum on, zero is soft and sets the reward beyond the maximum to 0.",
        choices=("soft", "hard", "zero"),
    )
    overlong_buffer_len: int = key(
        512, "Tokens before the maximum over which the penalty rises.", minimum=1, unit="tokens", switch=OVERLONG
    )
    overlong_buffer_penalty_factor: float = key(1.0, "The whole penalty.", minimum=0, switch=OVERLONG)
    overlong_max_len: int | None = key(
        None, "The maximum, in tokens that the policy wrote; null: max_generate_length, for one turn.", minimum=1,
        unit="tokens", switch=OVERLONG,
    )  # fmt: skip
    old_logprobs: str = key(
        "auto",
        "Where the old log-probs of the ratio come from; auto: the engine, where it is the learner in float32 and "
        "nothing is to be corrected.",
        choices=("auto", "learner", "engine"),
    )
    lambd: float = key(1.0, "GAE's lambda.", minimum=0, maximum=1, switch=(ESTIMATOR, "gae"))
    gamma: float = key(
        1.0, "Discount of later rewards, for each token.", minimum=0, maximum=1,
        switch=(ESTIMATOR, ("gae", "reinforce++")),
    )  # fmt: skip
    eps_clip_low: float = key(0.2, "The ratio is clipped at 1 - this.", minimum=0, below=1, switch=(LOSS, CLIPPED))
    eps_clip_high: float = key(0.2, "The ratio is clipped at 1 + this.", minimum=0, switch=(LOSS, CLIPPED))
    clip_ratio_c: float = key(3.0, "Second clip of dual_clip.", above=1, switch=(LOSS, "dual_clip"))
    tis_imp_ratio_cap: float = key(
        -1.0, "Older name of off_policy_correction.token_tis_ratio_clip_high.",
        switch=(f"{ALGORITHM}.use_tis", True),
    )  # fmt: skip
    use_tis: bool = key(False, "Older name of off_policy_correction.tis_ratio_type=token.")
    off_policy_correction: OffPolicyCorrectionConfig = section(OffPolicyCorrectionConfig)
    sapo: SapoConfig = section(SapoConfig)
    dynamic_sampling: DynamicSamplingConfig = section(DynamicSamplingConfig)
    clip_cov: ClipCovConfig = section(ClipCovConfig)
    kl_cov: KLCovConfig = section(KLCovConfig)
    cispo: CispoConfig = section(CispoConfig)
    dppo: DppoConfig = section(DppoConfig)
