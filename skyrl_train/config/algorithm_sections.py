"""The sections of ``trainer.algorithm``: what one loss, estimator or correction reads alone."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_train.config.fields import key

ALGORITHM = "trainer.algorithm"
LOSS = f"{ALGORITHM}.policy_loss_type"
DYNAMIC = f"{ALGORITHM}.dynamic_sampling.type"
CORRECTION = f"{ALGORITHM}.off_policy_correction"
SEQUENCE_MASK = f"{CORRECTION}.sequence_mask_metric"
ADAPTIVE = (f"{ALGORITHM}.kl_ctrl.type", "adaptive")


@dataclass(slots=True, kw_only=True)
class KLControlConfig:
    """How the strength of the KL penalty moves, in the reward and in the loss; it starts at ``kl_loss_coef``."""

    type: str = key("fixed", "How the coefficient moves.", choices=("fixed", "adaptive"))
    kl_target: float = key(
        0.1, "KL that the adaptive controller aims at.", above=0, unit="nats a token", switch=ADAPTIVE
    )
    horizon: float = key(
        10000, "Sequences over which the adaptive controller reacts.", above=0, unit="sequences", switch=ADAPTIVE
    )


@dataclass(slots=True, kw_only=True)
class SapoConfig:
    """The SAPO policy loss."""

    tau_pos: float = key(1.0, "Gate temperature where the advantage is positive.", above=0, switch=(LOSS, "sapo"))
    tau_neg: float = key(1.05, "Gate temperature where it is not.", above=0, switch=(LOSS, "sapo"))


@dataclass(slots=True, kw_only=True)
class DynamicSamplingConfig:
    """Sampling more prompts where groups teach nothing."""

    type: str | None = key(
        None,
        "What happens to groups of equal rewards: filter samples further prompts in their place (DAPO), replace puts "
        "copies of the other groups there (POLARIS).",
        choices=("filter", "replace"),
    )
    max_sample_batches: int = key(
        30, "Rounds of sampling in one step at most; then it learns from the groups it has. -1: no bound.", minimum=-1,
        switch=(DYNAMIC, ("filter", "replace")),
    )  # fmt: skip
    min_replace_ratio: float = key(
        0.3, "Share of good groups up to which a round is thrown away and another one sampled.", minimum=0, maximum=1,
        switch=(DYNAMIC, "replace"),
    )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class ClipCovConfig:
    """The Clip-Cov policy loss."""

    clip_ratio: float = key(0.0002, "Share of tokens left out.", minimum=0, maximum=1, switch=(LOSS, "clip_cov"))
    clip_cov_lb: float = key(1.0, "Only tokens of a higher covariance are.", switch=(LOSS, "clip_cov"))
    clip_cov_ub: float = key(5.0, "Only tokens of a lower covariance are.", switch=(LOSS, "clip_cov"))


@dataclass(slots=True, kw_only=True)
class KLCovConfig:
    """The KL-Cov policy loss."""

    kl_cov_frac: float = key(
        0.2, "Share of tokens that get a KL penalty.", minimum=0, maximum=1, switch=(LOSS, "kl_cov")
    )
    ppo_kl_coef: float = key(1.0, "Strength of that penalty.", minimum=0, switch=(LOSS, "kl_cov"))


@dataclass(slots=True, kw_only=True)
class CispoConfig:
    """The CISPO policy loss."""

    cispo_eps_clip_low: float = key(
        1.0, "The importance weight is at least 1 - this.", minimum=0, switch=(LOSS, "cispo"),
        was=0, why="CISPO has no lower bound; 0 would lift every weight below 1 to 1",
    )  # fmt: skip
    cispo_eps_clip_high: float = key(
        4.0, "The importance weight is at most 1 + this.", minimum=0, switch=(LOSS, "cispo"),
        was=5, why="the bound of the ScaleRL recipe is 5, which is 1 + 4",
    )  # fmt: skip
    cispo_anchor: str = key(
        "old", "Whose log-probs the weight is relative to: those at the start of the step, or the engine's.",
        choices=("old", "rollout"), switch=(LOSS, "cispo"),
    )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class DppoConfig:
    """The DPPO policy loss."""

    dppo_type: str = key(
        "binary_tv", "Divergence that bounds a token.", choices=("binary_tv", "binary_kl"), switch=(LOSS, "dppo")
    )
    delta_low: float = key(
        0.2, "Largest divergence where the advantage is negative (0.05 suits binary_kl).", minimum=0,
        switch=(LOSS, "dppo"),
    )  # fmt: skip
    delta_high: float = key(
        0.2, "Largest divergence where the advantage is positive (0.05 suits binary_kl).", minimum=0,
        switch=(LOSS, "dppo"),
    )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class OffPolicyCorrectionConfig:
    """Importance sampling and masks for the gap between the engine that sampled and the learner.

    The ratio of a token is ``exp(old_logprobs - rollout_logprobs)``.
    """

    function: str = key(
        "standard", "The correction; standard is what the keys below describe.",
        choices=("standard",), import_path=True,
    )  # fmt: skip
    tis_ratio_type: str | None = key(
        None, "Multiply losses by the capped ratio, of each token or of the whole sequence.",
        choices=("token", "sequence"),
    )  # fmt: skip
    token_tis_ratio_clip_high: float = key(
        2.0, "Cap of the token ratio.", above=0, switch=(f"{CORRECTION}.tis_ratio_type", "token")
    )
    sequence_tis_ratio_clip_high: float = key(
        5.0, "Cap of the sequence ratio.", above=0, switch=(f"{CORRECTION}.tis_ratio_type", "sequence")
    )
    sequence_mask_metric: str | None = key(
        None, "Leave out sequences by the product, or by the geometric mean, of their ratios.",
        choices=("product", "geometric"),
    )  # fmt: skip
    geo_mask_high: float = key(
        1.01,
        "Highest geometric mean that is kept.",
        above=0,
        switch=(SEQUENCE_MASK, "geometric"),
    )
    geo_mask_low: float = key(
        0.99, "Lowest geometric mean that is kept.", minimum=0,
        switch=(SEQUENCE_MASK, "geometric"),
    )  # fmt: skip
    product_mask_high: float = key(2.0, "Highest product that is kept.", above=0, switch=(SEQUENCE_MASK, "product"))
    product_mask_low: float = key(0.5, "Lowest product that is kept.", minimum=0, switch=(SEQUENCE_MASK, "product"))
    outlier_token_is_threshold_low: float | None = key(
        None, "Leave out sequences of which a token's ratio is below this, such as 1e-4.", minimum=0
    )
    outlier_token_is_threshold_high: float | None = key(
        None, "Leave out sequences of which a token's ratio is above this, such as 100.", above=0
    )
    token_mask_is_threshold_low: float | None = key(None, "Leave out tokens of a ratio below this.", minimum=0)
    token_mask_is_threshold_high: float | None = key(None, "Leave out tokens of a ratio above this.", above=0)

    @property
    def active(self) -> bool:
        """Whether anything is corrected."""
        bounds = (self.outlier_token_is_threshold_low, self.outlier_token_is_threshold_high,
                  self.token_mask_is_threshold_low, self.token_mask_is_threshold_high)  # fmt: skip
        chosen = (self.tis_ratio_type, self.sequence_mask_metric, *bounds)
        return self.function != "standard" or any(value is not None for value in chosen)
