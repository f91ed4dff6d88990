"""The contract test that users run on their own functions: ours keep the contract, and each way to break it is seen."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from skyrl_train.algorithms.advantages import grpo
from skyrl_train.algorithms.losses import PolicyLoss, regular
from skyrl_train.algorithms.properties import broken, check
from skyrl_train.algorithms.table import FAMILIES
from skyrl_train.entrypoints.cli import main

from .helpers import BUILT_IN, busy_config

HERE = f"{__package__}.test_properties"
MINE = f"{__package__}.helpers"
STOPPED = {"gspo", "cispo", "rollout_is", "k1+", "k3+", "abs+"}
"""Functions that hold a part of their gradient still."""


@pytest.mark.parametrize(("family", "name"), BUILT_IN, ids=[f"{f}-{n}" for f, n in BUILT_IN])
def test_ours_keep_it(family, name):
    found = check(family, name, busy_config(gamma=1.0))  # a discount gives equal rewards unequal returns
    assert len(found) > 5 and [f for f in found if f.verdict == "broken"] == []
    notes = {f.property for f in found if f.verdict == "note"}
    assert notes == ({"the gradient is that of the value"} if name in STOPPED else set())


@pytest.mark.parametrize(
    ("family", "name"),
    [("advantage_estimator", "my_estimator"), ("kl_estimator", "my_kl"), ("loss_reduction", "my_weights"),
     ("off_policy_correction", "my_correction"), ("reward_shaping", "my_rewards")],
)  # fmt: skip
def test_simple_functions_of_users_own_keep_it(family, name):
    seen = [text for text in broken(family, f"{MINE}:{name}") if "the metric mine" not in text]
    assert seen == []


@pytest.mark.parametrize(("family", "name"), [("policy_loss", "my_loss"), ("value_loss", "my_value_loss")])
def test_a_metric_over_padding_is_seen(family, name):
    """The metrics of these are means over all positions."""
    assert [text.split(":")[0] for text in broken(family, f"{MINE}:{name}")] == [
        "more padding changes nothing", "rows may be cut into micro-batches"
    ]  # fmt: skip


def _like(loss: PolicyLoss, per_token: torch.Tensor) -> PolicyLoss:
    return replace(loss, per_token=per_token)


# Two ways to break it that a user's own function does not have: what it gets is clean, and its own.


def leaks(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    return PolicyLoss(per_token=-advantages.detach() * logprobs * mask)


def spoils(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    advantages[mask] *= 2
    return regular(logprobs, old_logprobs, advantages, mask, config)


@pytest.mark.parametrize(
    ("name", "property", "detail"),
    [
        ("leaks", "nan and inf outside the mask", "with nan there, the result is another one.*torch.where"),
        ("spoils", "its arguments stay", "advantages changed in place"),
    ],
)
def test_what_the_wrapper_mends(monkeypatch, name, property, detail):
    assert broken("policy_loss", f"{HERE}:{name}") == []
    monkeypatch.setitem(FAMILIES["policy_loss"].functions, name, f"{HERE}:{name}")  # as one of ours: not wrapped
    (text,) = [text for text in broken("policy_loss", name) if text.startswith(property)]
    assert re.search(detail, text), text


# Each of these breaks the property that its test names.


def ordered(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    made = regular(logprobs, old_logprobs, advantages, mask, config)
    return _like(made, made.per_token * torch.arange(1, len(mask) + 1)[:, None])


def padded(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    made = regular(logprobs, old_logprobs, advantages, mask, config)
    return _like(made, made.per_token / mask.shape[1])


def together(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    made = regular(logprobs, old_logprobs, advantages, mask, config)
    return _like(made, made.per_token / mask.sum().clamp(min=1))


def normalises(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    return regular(
        logprobs, old_logprobs, advantages / (advantages[mask] - advantages[mask].mean()).norm(), mask, config
    )


def counts(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    made = regular(logprobs, old_logprobs, advantages, mask, config)
    return replace(made, metrics={"tokens": mask.sum().float()})


def frozen(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    return regular(logprobs.detach(), old_logprobs, advantages, mask, config)


def raises(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    if not mask.any():
        raise RuntimeError("nothing to do")
    return regular(logprobs, old_logprobs, advantages, mask, config)


@pytest.mark.parametrize(
    ("name", "property", "detail"),
    [
        ("ordered", "the order of rows", "the result is another one"),
        ("padded", "more padding", "the result is another one"),
        ("together", "rows may be cut", "chosen before"),
        ("counts", "rows may be cut", "the metric tokens is .*ends in _max or _min"),
        ("normalises", "a batch of one token", "of 1 x 1 tokens, all in the mask, it makes what is not finite"),
        ("frozen", "a gradient flows to logprobs", "logprobs gets none, so nothing would be learned"),
        ("raises", "a batch of one token", "RuntimeError: nothing to do"),
    ],
)
def test_each_way_to_break_it_is_seen(name, property, detail):
    found = {f.property: f.detail for f in check("policy_loss", f"{HERE}:{name}") if f.verdict == "broken"}
    (match,) = [text for title, text in found.items() if title.startswith(property)]
    assert re.search(detail, match), match


def always_raises(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    raise KeyError("no such thing")


def test_a_wrong_signature_is_all_that_is_said():
    (only,) = check("policy_loss", f"{MINE}:skyrl_style_loss")
    assert only.verdict == "broken" and "its parameters are" in only.detail
    (text,) = broken("advantage_estimator", f"{MINE}:per_sequence")
    assert "has shape [6], expected [6, 5]" in text
    (text,) = broken("policy_loss", f"{HERE}:always_raises")
    assert text == "signature and result: it raises KeyError: 'no such thing'"


def raw(rewards, mask, group, config, values=None):
    made, _ = grpo(rewards, mask, group, config)
    total = torch.where(mask, rewards, 0.0).sum(1, keepdim=True)
    return torch.where(mask, total, 0.0) + 0 * made, torch.where(mask, total, 0.0)


def runs_back(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    return PolicyLoss(per_token=torch.where(mask, -advantages * (logprobs - old_logprobs).exp(), 0.0))


def twice_negative(mask, group, config):
    return -2 * mask.float()


@pytest.mark.parametrize(
    ("family", "name", "detail"),
    [
        ("advantage_estimator", "raw", "the largest advantage is 0.1"),
        ("policy_loss", "runs_back", "advantages, old_logprobs too; a run gives it without gradient"),
        ("loss_reduction", "twice_negative", "some are: a token of negative weight"),
    ],
)
def test_what_may_be_meant_is_a_note(family, name, detail):
    notes = [f for f in check(family, f"{HERE}:{name}") if f.verdict == "note"]
    assert len(notes) == 1 and detail in notes[0].detail and broken(family, f"{HERE}:{name}") == []


def test_the_command(capsys):
    assert main(["check", "policy_loss", "regular", "trainer.algorithm.eps_clip_low=0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all(line.startswith("holds ") for line in lines)
    assert main(["check", "policy_loss", f"{HERE}:padded"]) == 1
    assert "broken  more padding changes nothing: the result is another one" in capsys.readouterr().out
    assert main(["check", "policy_loss", "regular", "trainer.algorithm.eps_clip=0.1"]) == 2
    assert "eps_clip" in capsys.readouterr().err


def test_the_command_finds_a_function_in_the_current_folder(tmp_path):
    (tmp_path / "of_my_own.py").write_text(
        "from skyrl_train.algorithms.losses import PolicyLoss\n\n\n"
        "def mine(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):\n"
        "    return PolicyLoss(per_token=-advantages.detach() * logprobs)\n"
    )
    script = Path(sys.executable).with_name("skyrl")
    done = subprocess.run([script, "check", "policy_loss", "of_my_own:mine"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("holds ") == 10, done.stdout + done.stderr
