from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from envs.conftest import ROOT, a_config, a_prompt
from skyrl_train.config.door import load_config
from skyrl_train.config.environment import EnvironmentConfig
from skyrl_train.envs import lookup
from skyrl_train.envs.base import Env, StepResult
from skyrl_train.envs.guess import GuessEnv
from skyrl_train.envs.registry import ENVS, check_env, check_settings, make_env, register, settings_name
from skyrl_train.errors import ConfigError, EnvError, EnvTimeoutError, MissingPackageError, SkyRLError

HERE = "envs.test_registry"


class Mine(Env):
    closed = 0

    def __init__(self, prompt: Any, settings: dict[str, Any]) -> None:
        super().__init__(prompt, settings)
        if settings.get("fail"):
            raise {"raise": ValueError("no such file"), "exit": SystemExit(1)}[settings["fail"]]
        time.sleep(settings.get("sleep", 0))

    def step(self, response: str) -> StepResult:
        return StepResult(terminated=True)

    def close(self) -> None:
        type(self).closed += 1
        raise RuntimeError("close before init")


class NoStep(Env):
    pass


class Careless(Env):
    def __init__(self, prompt: Any, settings: Any) -> None:
        pass

    def step(self, response: str) -> StepResult:
        return StepResult(terminated=True)


class NotAnEnv:
    pass


VALUE = 3


def a_function(prompt: Any, settings: dict[str, Any]) -> Any:
    return settings.get("give", Mine(prompt, settings))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of the test's own."""
    monkeypatch.setattr(lookup, "_registered", {})


def test_ours_by_name() -> None:
    env = make_env(a_prompt("guess", {"secret": 5, "low": 1, "high": 7}), EnvironmentConfig())
    assert isinstance(env, GuessEnv)


def test_a_users_by_import_path() -> None:
    env = make_env(a_prompt(f"{HERE}:Mine"), a_config(f"{HERE}:Mine", {"level": 3}))
    assert isinstance(env, Mine) and env.settings == {"level": 3} and env.prompt.uid == "source/7"
    assert isinstance(make_env(a_prompt(f"{HERE}:a_function"), EnvironmentConfig()), Mine)
    careless = make_env(a_prompt(f"{HERE}:Careless"), EnvironmentConfig())
    assert careless.prompt.uid == "source/7"


@pytest.mark.parametrize("entry", [f"{HERE}:Mine", Mine, a_function])
def test_a_users_by_registered_id(entry: Any) -> None:
    register("mine", entry)
    assert isinstance(make_env(a_prompt("mine"), a_config("mine", {"level": 3})), Mine)


@pytest.mark.parametrize(
    ("id", "entry", "message"),
    [
        ("gsm8k", Mine, "env of ours"),
        ("a:b", Mine, "colon"),
        ("", Mine, "colon"),
        ("x", "mine", "package.module:Class"),
    ],
)
def test_an_id_that_cannot_be_registered(id: str, entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register(id, entry)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8", "Did you mean 'gsm8k'"),
        ("worlde", "Did you mean 'wordle'"),
        ("text-2-sql", "Did you mean 'text2sql'"),
        ("zzz", "There are addition, countdown"),
        ("zzz", "package.module:Class"),
        ("gsm8k:strict", "module gsm8k cannot be imported: ModuleNotFoundError.*current folder"),
        (f"{HERE}:Mien", "Did you mean envs.test_registry:Mine"),
        (f"{HERE}:", "has no ''"),
        (":Mine", "cannot be imported"),
        (f"{HERE}:NotAnEnv", "NotAnEnv is not a subclass"),
        (f"{HERE}:NoStep", "NoStep does not define step"),
        (f"{HERE}:VALUE", "neither a class nor a function"),
        ("envs.broken_module:Env", "cannot be imported: ZeroDivisionError"),
        ("envs.exiting_module:Env", "cannot be imported: SystemExit"),
    ],
)
def test_a_wrong_name_is_a_config_error(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"env_class='.*'.*{message}"):
        make_env(a_prompt(name), EnvironmentConfig())


def test_a_function_that_returns_no_env() -> None:
    config = a_config(f"{HERE}:a_function", {"give": None})
    with pytest.raises(ConfigError, match="returned None, which is not an Env"):
        make_env(a_prompt(f"{HERE}:a_function"), config)


@pytest.mark.parametrize(("fail", "message"), [("raise", "ValueError: no such file"), ("exit", "SystemExit: 1")])
def test_a_constructor_that_raises(fail: str, message: str) -> None:
    config = a_config(f"{HERE}:Mine", {"fail": fail})
    with pytest.raises(EnvError, match=rf"env {HERE}:Mine of prompt source/7: making it raised {message}") as caught:
        make_env(a_prompt(f"{HERE}:Mine"), config)
    assert caught.value.__cause__ is not None
    with pytest.raises(EnvError, match="making it raised"):
        check_env(a_prompt(f"{HERE}:Mine"), config)


def test_checking_makes_and_closes_once() -> None:
    before = Mine.closed
    check_env(a_prompt(f"{HERE}:Mine"), EnvironmentConfig())  # its close raises, as init was not called
    assert Mine.closed == before + 1


def test_checking_has_the_deadline() -> None:
    with pytest.raises(EnvTimeoutError, match=r"making it took over environment\.timeout=0\.05 s"):
        check_env(a_prompt(f"{HERE}:Mine"), a_config(f"{HERE}:Mine", {"sleep": 1}, timeout=0.05))


@pytest.mark.parametrize(
    ("env_class", "section"),
    [
        ("gsm8k", "gsm8k"),
        ("my.envs:Mine", "mine"),
        ("reasoning_gym:chess", "reasoning_gym"),
        ("skyrl_gym:aime", "aime"),
    ],
)
def test_the_section_of_an_env(env_class: str, section: str) -> None:
    assert settings_name(env_class) == section


def test_settings_come_from_the_command_line() -> None:
    config = load_config(["environment.skyrl_gym.gsm8k.method=flexible", "trainer.policy.model.path=x"]).environment
    env: Any = make_env(a_prompt("gsm8k", "18"), config)
    assert env.method == "flexible"


def test_a_section_that_no_env_reads_is_refused() -> None:
    check_settings(["my.envs:Mine"], a_config("my.envs:Mine", {"level": 3}))
    check_settings(["gsm8k"], a_config("countdown", {"format_score": 0.1}))
    with pytest.raises(ConfigError, match=r"environment\.skyrl_gym\.gsm8: .*|environment\.skyrl_gym\.gsm8=.*'gsm8k'"):
        check_settings(["gsm8k"], a_config("gsm8", {"method": "strict"}))


@pytest.mark.parametrize("env_class", ["math", "reasoning_gym:chain_sum", "skyrl_gym:aime"])
def test_a_package_that_is_not_installed(env_class: str) -> None:
    script = f"""
import sys
sys.modules.update(math_verify=None, reasoning_gym=None, skyrl_gym=None)
from skyrl_train.config.environment import EnvironmentConfig
from skyrl_train.envs.registry import make_env
from envs.conftest import a_prompt
try:
    make_env(a_prompt({env_class!r}), EnvironmentConfig())
except Exception as error:
    print(type(error).__name__, error)
"""
    done = _python(script)
    assert done.startswith("MissingPackageError") and 'pip install "skyrl-train[envs]"' in done, done


def test_no_env_imports_torch() -> None:
    modules = sorted(entry.partition(":")[0] for entry in ENVS.values())
    script = f"""
import importlib, sys
for name in {[*modules, "skyrl_train.envs.registry", "skyrl_train.envs.runner", "skyrl_train.envs.skyrl_gym"]}:
    importlib.import_module(name)
print([n for n in ("torch", "transformers", "sympy", "reasoning_gym", "skyrl_gym", "omegaconf") if n in sys.modules])
"""
    assert _python(script) == "[]\n"


def test_the_errors_are_of_our_tree() -> None:
    assert issubclass(EnvError, SkyRLError) and issubclass(MissingPackageError, SkyRLError)


def _python(script: str) -> str:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
