"""Finds a function by its name or by its import path. One table per family, one signature per family.

A user's own function is named in the config as ``package.module:function``. It has the family's parameters, by name and
in order; further ones need defaults. No torch is imported here before a function is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from skyrl_train.errors import ConfigError

_HERE = "skyrl_train.algorithms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Functions that can stand in for each other."""

    key: str
    """The config key that chooses one."""
    signature: str
    """As a message shows it."""
    parameters: tuple[str, ...]
    functions: dict[str, str]
    """Name in the config -> ``module:function``."""
    optional: tuple[str, ...] = ()
    """What a function gets by name if it has a parameter of that name."""


def _in(module: str, **functions: str) -> dict[str, str]:
    return {name: f"{_HERE}.{module}:{function}" for name, function in functions.items()}


FAMILIES = {
    "advantage_estimator": Family(
        key="trainer.algorithm.advantage_estimator",
        signature="(rewards, mask, group, config, values=None) -> (advantages [B, T], returns [B, T])",
        parameters=("rewards", "mask", "group", "config", "values"),
        optional=("baseline",),
        functions={
            **_in("advantages", grpo="grpo", dr_grpo="dr_grpo", rloo="rloo", maxrl="maxrl", opo="opo", remax="remax"),
            **_in("returns", gae="gae", **{"reinforce++": "reinforce_plus_plus",
                                           "reinforce++_baseline": "reinforce_plus_plus_baseline"}),
        },
    ),
    "policy_loss": Family(
        key="trainer.algorithm.policy_loss_type",
        signature="(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None) -> PolicyLoss",
        parameters=("logprobs", "old_logprobs", "advantages", "mask", "config", "rollout_logprobs"),
        optional=("chosen",),
        functions={
            **_in("losses", regular="regular", dual_clip="dual_clip"),
            **_in("losses_bounded", gspo="gspo", sapo="sapo", dppo="dppo", decoupled="decoupled"),
            **_in("losses_weighted", cispo="cispo", rollout_is="rollout_is", reinforce="reinforce",
                  importance_sampling="importance_sampling", cross_entropy="cross_entropy"),
            **_in("losses_covariance", clip_cov="clip_cov", kl_cov="kl_cov"),
        },
    ),
    "value_loss": Family(
        key="trainer.algorithm.value_loss_type",
        signature="(values, old_values, returns, mask, config) -> ValueLoss",
        parameters=("values", "old_values", "returns", "mask", "config"),
        functions=_in("values", clipped="clipped"),
    ),
    "kl_estimator": Family(
        key="trainer.algorithm.kl_estimator_type",
        signature="(logprobs, ref_logprobs, mask) -> kl [B, T]",
        parameters=("logprobs", "ref_logprobs", "mask"),
        functions=_in("kl", k1="k1", k2="k2", k3="k3", abs="absolute", **{
            "k1+": "k1_straight", "k2+": "k2", "k3+": "k3_straight", "abs+": "absolute_straight",
        }),
    ),
    "loss_reduction": Family(
        key="trainer.algorithm.loss_reduction",
        signature="(mask, group, config) -> weights [B, T]",
        parameters=("mask", "group", "config"),
        optional=("micro_batch_size",),
        functions=_in("reductions", **{name: name for name in (
            "token_mean", "token_mean_legacy", "sequence_mean", "seq_mean_token_sum_norm", "prompt_mean",
        )}),
    ),
    "off_policy_correction": Family(
        key="trainer.algorithm.off_policy_correction.function",
        signature="(old_logprobs, rollout_logprobs, mask, config) -> Correction",
        parameters=("old_logprobs", "rollout_logprobs", "mask", "config"),
        functions=_in("off_policy", standard="standard"),
    ),
    "reward_shaping": Family(
        key="trainer.algorithm.reward_shaping",
        signature="(rewards, mask, group, config) -> rewards [B, T]",
        parameters=("rewards", "mask", "group", "config"),
        functions=_in("shaping", standard="standard"),
    ),
}  # fmt: skip


def resolve(family: str, name: str) -> Callable[..., Any]:
    """The function that ``name`` names.

    Args:
        family: a key of ``FAMILIES``.
        name: a name of the family's table, or ``package.module:function``. A user's function comes back wrapped: what
            it returns is checked at every call, so that a wrong shape is named where it arises.

    Raises:
        ConfigError: the name is not known, the module or function is not there, or its parameters are others.
    """
    known = FAMILIES[family]
    if name in known.functions:
        return _load(known, name, known.functions[name])
    if ":" not in name:
        raise ConfigError(known.key, name, f"there is no such {family.replace('_', ' ')}.", _nearest(known, name))
    function = _load(known, name, name)
    _check_parameters(known, name, function)
    from skyrl_train.algorithms.contracts import checked  # imports torch

    return checked(family, known.key, name, function)


def accepts(function: Callable[..., Any], parameter: str) -> bool:
    """Whether a function has a parameter of that name."""
    return parameter in inspect.signature(function).parameters


def only_accepted(function: Callable[..., Any], **extras: Any) -> dict[str, Any]:
    """Those of ``extras`` that the function has a parameter for: what is optional in its family."""
    return {name: value for name, value in extras.items() if accepts(function, name)}


def _nearest(family: Family, name: str) -> str:
    near = difflib.get_close_matches(name, family.functions, n=1)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    return f"{guess}Known: {', '.join(family.functions)}; or your own as package.module:function."


def _load(family: Family, name: str, path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise ConfigError(family.key, name, "this is no import path.", "Write package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            family.key, name, f"{module_name} cannot be imported: {error}.",
            "It is looked for in the current folder and on PYTHONPATH, on every machine of the run.",
        ) from error  # fmt: skip
    function = getattr(module, attribute, None)
    if function is None:
        public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        near = difflib.get_close_matches(attribute, public, n=1)
        remedy = f"Did you mean {module_name}:{near[0]}?" if near else f"It has {', '.join(public[:8]) or 'nothing'}."
        raise ConfigError(family.key, name, f"{module_name} has no {attribute!r}.", remedy)
    if not callable(function):
        raise ConfigError(family.key, name, f"{attribute} is a {type(function).__name__}, not a function.", "")
    return function


def _check_parameters(family: Family, name: str, function: Callable[..., Any]) -> None:
    """Names are compared, not only counted: a mask and a config that changed places would otherwise pass."""
    expected = f"The signature is {family.signature}."
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ConfigError(family.key, name, "its signature cannot be read.", expected) from error
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    has = tuple(p.name for p in positional[: len(family.parameters)])
    if has != family.parameters:
        raise ConfigError(family.key, name, f"its parameters are ({', '.join(p.name for p in parameters)}).", expected)
    keyword_only = [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    extra = [p.name for p in positional[len(has) :] + keyword_only if p.default is p.empty]
    if extra:
        raise ConfigError(family.key, name, f"nothing is passed for {', '.join(extra)}.", f"Give a default. {expected}")
