"""The tree holds every public key, and says which defaults it changed."""

from __future__ import annotations

import copy
import re
from typing import Any

from config.conftest import ROOT
from skyrl_train.config.fields import UNCHANGED
from skyrl_train.config.load import defaults, from_mapping, to_plain, to_yaml
from skyrl_train.config.schema import Config, tree, value_of


def public_defaults(public: dict[str, Any]) -> dict[str, Any]:
    """Key to default; where the two packages differ, the first one's."""
    differ = {name: value["fork"] for name, value in public["differ"].items()}
    return {**public["keys"], **differ, **public["later"], **public["sampling"]}


def test_every_public_key_is_in_the_tree(public_keys: dict[str, Any]) -> None:
    wanted = [*public_defaults(public_keys), *public_keys["faq_only"]]
    wanted += [name.replace("sampling_params", "eval_sampling_params") for name in public_keys["sampling"]]
    assert [name for name in wanted if name not in tree()] == []
    assert len(wanted) > 250


def test_every_changed_default_says_what_it_was_and_why(public_keys: dict[str, Any]) -> None:
    interpolations = public_keys["interpolations"]
    for name, public in public_defaults(public_keys).items():
        leaf = tree()[name]
        plain = leaf.default == public or (name in interpolations and interpolations[name] == leaf.default)
        if plain:
            assert leaf.key.was is UNCHANGED, f"{name} claims a change and has none"
        else:
            assert leaf.key.was == public, f"{name}: public default {public!r}, ours {leaf.default!r}, not declared"
            assert leaf.key.why


def test_every_key_has_help_that_ends_a_sentence() -> None:
    for leaf in tree().values():
        assert leaf.key.help.endswith("."), leaf.name
        assert leaf.key.help[0].isupper(), leaf.name


def test_what_keys_refer_to_exists() -> None:
    for leaf in tree().values():
        if leaf.key.switch:
            assert leaf.key.switch[0] in tree(), leaf.name
        if leaf.key.follows:
            assert leaf.key.follows in tree(), leaf.name
        assert (leaf.key.was is UNCHANGED) == (not leaf.key.why), leaf.name


def test_defaults_that_follow_another_key() -> None:
    config = from_mapping({
        "trainer": {"policy": {"model": {"path": "org/a"}}, "max_prompt_length": 77, "rope_theta": 5e5},
        "generator": {"sampling_params": {"max_generate_length": 33}},
    })  # fmt: skip
    assert config.trainer.ref.model.path == config.generator.model_name == "org/a"
    assert config.generator.max_input_length == 77
    assert config.generator.eval_sampling_params.max_generate_length == 33
    assert config.generator.rope_theta == 5e5


def test_configs_do_not_share_lists() -> None:
    a, b = Config(), Config()
    a.trainer.policy.optimizer_config.adam_betas.append(3.0)
    assert b.trainer.policy.optimizer_config.adam_betas == [0.9, 0.999]


def test_plain_form_loads_back_equal() -> None:
    config = from_mapping(
        {"environment": {"skyrl_gym": {"mine": {"a": [1, {"b": None}]}}}, "trainer": {"logger": ["wandb"]}}
    )
    plain = to_plain(config)
    assert plain["environment"]["skyrl_gym"]["mine"] == {"a": [1, {"b": None}]}
    assert "others" not in plain["environment"]["skyrl_gym"]
    assert from_mapping(copy.deepcopy(plain)) == config
    assert to_yaml(config).startswith("trainer:\n")


def test_defaults_name_every_key() -> None:
    names: set[str] = set()

    def walk(node: dict[str, Any], prefix: str) -> None:
        for name, value in node.items():
            if isinstance(value, dict) and prefix + name not in tree():
                walk(value, f"{prefix}{name}.")
            else:
                names.add(prefix + name)

    walk(defaults(), "")
    assert names == set(tree())
    config = from_mapping({})
    assert all(hasattr(value_of(config, name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names)


def test_every_key_that_is_accepted_is_read_somewhere() -> None:
    """Nothing is accepted and ignored. A section that goes to an env is read by the env, an older name by derive, and
    what each role has of its own as ``f"{role}_num_nodes"``."""
    files = [p for p in (ROOT / "skyrl_train").rglob("*.py") if p.parent.name != "config" or p.name == "derive.py"]
    source = "\n".join(path.read_text() for path in files)

    def of_a_role(name: str) -> bool:
        forms = (re.sub(rf"(^|_){role}(_|$)", r"\1{role}\2", name) for role in ("policy", "critic", "ref"))
        return any(form != name and form in source for form in forms)

    unread = [
        leaf.name
        for leaf in tree().values()
        if not (leaf.key.capability or leaf.key.backends or any(s.capability for s in leaf.sections))
        and len(leaf.key.choices) != 1
        and not re.match(r"environment\.skyrl_gym\.\w+\.", leaf.name)
        and not re.search(rf"\.{leaf.name.rpartition('.')[2]}\b", source)
        and not of_a_role(leaf.name.rpartition(".")[2])
    ]
    assert unread == []
