"""Finding functions by name and by import path; what a user's own may return."""

import subprocess
import sys

import pytest
import torch

from skyrl_train.algorithms.losses import PolicyLoss
from skyrl_train.algorithms.table import FAMILIES, accepts, only_accepted, resolve
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.config.schema import tree
from skyrl_train.errors import ConfigError

from .helpers import BUILT_IN, tensor_of

MINE = f"{__package__}.helpers"
X = torch.full((2, 3), -1.0)
MASK = torch.tensor([[True, True, True], [True, False, False]])
CONFIG = AlgorithmConfig()
GROUP = torch.tensor([0, 0])
ARGUMENTS = {
    "advantage_estimator": (X, MASK, GROUP, CONFIG, X),
    "policy_loss": (X, X, X, MASK, CONFIG, X),
    "value_loss": (X, X, X, MASK, CONFIG),
    "kl_estimator": (X, X, MASK),
    "loss_reduction": (MASK, GROUP, AlgorithmConfig(max_seq_len=8)),
    "off_policy_correction": (X, X, MASK, CONFIG),
    "reward_shaping": (X, MASK, GROUP, CONFIG),
}
OPTIONAL = {"baseline": torch.zeros(2), "micro_batch_size": 1}


@pytest.mark.parametrize(("family", "name"), BUILT_IN)
def test_every_name_resolves_and_honours_its_familys_contract(family, name):
    function = resolve(family, name)
    function(*ARGUMENTS[family], **only_accepted(function, **OPTIONAL))
    # by its import path it goes through the same checks as a user's own
    checked = resolve(family, FAMILIES[family].functions[name])
    checked(*ARGUMENTS[family], **only_accepted(checked, **OPTIONAL))


@pytest.mark.parametrize(("family", "name"), BUILT_IN)
def test_the_keys_default_is_in_the_table(family, name):
    key = FAMILIES[family].key
    assert tree()[key].default in FAMILIES[family].functions
    assert set(tree()[key].key.choices) == set(FAMILIES[family].functions) and tree()[key].key.import_path


@pytest.mark.parametrize(
    ("family", "function"),
    [
        ("advantage_estimator", "my_estimator"),
        ("policy_loss", "my_loss"),
        ("value_loss", "my_value_loss"),
        ("kl_estimator", "my_kl"),
        ("loss_reduction", "my_weights"),
        ("off_policy_correction", "my_correction"),
        ("reward_shaping", "my_rewards"),
    ],
)
def test_a_users_own(family, function):
    tensor = tensor_of(resolve(family, f"{MINE}:{function}")(*ARGUMENTS[family]))
    assert tensor.shape == MASK.shape and (tensor[~MASK] == 0).all()


def test_a_users_loss_keeps_its_gradient_and_loses_its_metrics():
    x = X.clone().requires_grad_()
    result = resolve("policy_loss", f"{MINE}:my_loss")(x, X, X, mask=MASK, config=CONFIG)
    assert isinstance(result, PolicyLoss) and not result.metrics["mine"].requires_grad
    result.per_token.sum().backward()
    assert x.grad is not None and x.grad.tolist() == MASK.float().tolist()


@pytest.mark.parametrize(
    ("family", "name", "text"),
    [
        ("advantage_estimator", "grop", r"trainer\.algorithm\.advantage_estimator='grop'.*Did you mean 'grpo'"),
        ("policy_loss", "regula", "policy_loss_type='regula': there is no such policy loss. Did you mean 'regular'"),
        ("kl_estimator", "k4", r"kl_estimator_type='k4'.*Known: k1, k2, k3, abs, k1\+, k2\+, k3\+, abs\+; or"),
        ("loss_reduction", "zzz", "there is no such loss reduction. Known: token_mean"),
        ("policy_loss", "json.dumps", "or your own as package.module:function"),
        ("policy_loss", ":f", "no import path"),
        ("policy_loss", "json:", "no import path"),
        ("policy_loss", ".losses:mine", "no import path"),
        ("policy_loss", "no_such_package.losses:mine", "cannot be imported.*PYTHONPATH"),
        ("policy_loss", f"{MINE}:my_los", f"no 'my_los'. Did you mean {MINE}:my_loss"),
        ("policy_loss", f"{MINE}:not_a_function", "is a int, not a function"),
        ("policy_loss", f"{MINE}:skyrl_style_loss", r"parameters are \(log_probs.*The signature is \(logprobs"),
        ("policy_loss", f"{MINE}:my_kl", r"parameters are \(logprobs, ref_logprobs, mask\)"),
        ("loss_reduction", f"{MINE}:wants_more", "nothing is passed for temperature. Give a default"),
    ],
)
def test_what_cannot_be_found(family, name, text):
    with pytest.raises(ConfigError, match=text):
        resolve(family, name)


@pytest.mark.parametrize(
    ("family", "function", "text"),
    [
        ("policy_loss", "reduces_itself", "returned a Tensor.*Return PolicyLoss"),
        ("policy_loss", "reduced_field", r"per_token has shape \[\], expected \[2, 3\].*loss_reduction"),
        ("policy_loss", "metric_number", "metric 'mine' is not a 0-d tensor"),
        ("advantage_estimator", "one_tensor", r"returned a Tensor.*Return \(advantages, returns\)"),
        ("advantage_estimator", "per_sequence", r"advantages has shape \[2\], expected \[2, 3\]"),
        ("loss_reduction", "bool_weights", "the result is torch.bool on cpu, expected floating point"),
        ("off_policy_correction", "bare_weights", r"returned a Tensor.*Return Correction\(weights"),
    ],
)
def test_what_returns_something_else(family, function, text):
    with pytest.raises(ConfigError, match=rf"{FAMILIES[family].key}='{MINE}:{function}': .*{text}"):
        resolve(family, f"{MINE}:{function}")(*ARGUMENTS[family])


def test_optional_parameters_are_found_by_name():
    remax, mine = resolve("advantage_estimator", "remax"), resolve("advantage_estimator", f"{MINE}:my_estimator")
    assert accepts(remax, "baseline") and not accepts(mine, "baseline")
    assert only_accepted(remax, baseline=1, chosen=2) == {"baseline": 1} and only_accepted(mine, baseline=1) == {}


def test_the_table_loads_without_torch():
    code = "import sys, skyrl_train.algorithms.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
