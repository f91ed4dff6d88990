"""Every YAML block, override and environment variable of the FAQ, read from the FAQ itself, comes out typed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from config.conftest import GOOD
from skyrl_train.config.door import load_config
from skyrl_train.config.environ import read_environment
from skyrl_train.config.load import from_mapping
from skyrl_train.config.preflight import preflight
from skyrl_train.config.schema import tree, value_of


def blocks(faq: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", faq, flags=re.DOTALL)


def flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict) and prefix + name not in tree():
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def same(got: Any, written: Any) -> bool:
    return got == written and isinstance(got, bool) == isinstance(written, bool)


def test_every_yaml_block_loads_as_a_config_file(faq: str, tmp_path: Path) -> None:
    loaded = 0
    for number, text in enumerate(blocks(faq, "yaml")):
        (tmp_path / f"block{number}.yaml").write_text(text)
        config = load_config([], tmp_path, f"block{number}")
        for name, value in flat(yaml.safe_load(text) or {}):
            got = value_of(config, name)
            assert same(got, value), f"block {number}: {name} is {got!r}, written {value!r}"
            hint = tree()[name].type
            assert not isinstance(hint, type) or isinstance(got, hint), f"{name} is not a {hint}"
            loaded += 1
    assert loaded >= 34


def test_commented_out_keys_are_keys_too(faq: str) -> None:
    named = re.findall(r"^# (\w+): (\S+)", "\n".join(blocks(faq, "yaml")), flags=re.MULTILINE)
    assert ("enforce_eager", "true") in named
    for name, value in named:
        config = from_mapping({"generator": {name: yaml.safe_load(value)}})
        assert value_of(config, f"generator.{name}") is True


def overrides(faq: str) -> list[str]:
    shell = "\n".join(blocks(faq, "bash"))
    inline = re.findall(r"`((?:generator|trainer)\.[\w.]+=\w+)`", faq)
    short = {k.rpartition(".")[2]: k for k in reversed(tree())}
    bare = [f"{short[name]}={value}" for name, value in re.findall(r"`(\w+)=(\w+)`", faq)]
    return re.findall(r"(?<=\s)(\+{0,2}\w+\.[\w.]+=\S+)", shell) + inline + bare


def test_every_override_comes_out_typed(faq: str) -> None:
    found = overrides(faq)
    assert len(found) >= 6, found
    for text in found:
        name, _, value = text.lstrip("+").partition("=")
        parent, _, last = name.rpartition(".")
        for plus in ("", "+", "++"):
            config = load_config([plus + name + "=" + value])
            got = value_of(config, parent)[last] if name not in tree() else value_of(config, name)
            assert same(got, yaml.safe_load(value)), text


def test_every_environment_variable_is_read(faq: str) -> None:
    lines = re.findall(r"^(export|unset) (\w+)(?:=(\S+))?", "\n".join(blocks(faq, "bash")), flags=re.MULTILINE)
    assert {name for _, name, _ in lines} == {
        "SGLANG_LOG_LEVEL", "SKYRL_LOG_LEVEL", "NCCL_DEBUG", "NCCL_TIMEOUT", "RAY_RUNTIME_ENV_HOOK",
    }  # fmt: skip
    got = read_environment({name: value for word, name, value in lines if word == "export"})
    assert got.skyrl_log_level == "debug"
    assert got.sglang_log_level == "debug"
    assert got.nccl_debug == "INFO"
    assert got.nccl_timeout == 1800.0
    assert got.ray_runtime_env_hook is None


def test_the_limitation_on_conversation_turns_is_gone() -> None:
    for value in ("true", "false"):
        config = load_config([*GOOD, f"generator.use_conversation_multi_turn={value}"])
        preflight(config)
        assert config.generator.use_conversation_multi_turn is (value == "true")
