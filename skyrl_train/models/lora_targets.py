"""Which layers of a model get an adapter: the config's names against the model's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from skyrl_train.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from skyrl_train.config.models import CriticLoraConfig, LoraConfig

ALL_LINEAR = "all-linear"


def find_targets(model: PreTrainedModel, lora: LoraConfig | CriticLoraConfig, key: str) -> list[str]:
    """Full names of the layers that get an adapter, in the model's order.

    ``target_modules`` and ``exclude_modules`` are lists of names or ends of names (``q_proj``), or one regular
    expression for the full name. ``all-linear`` is every linear layer but the output embedding.

    Raises:
        ConfigError: a name that no layer has, a layer that is not linear, or nothing left.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in modules.items() if _is_linear(module)]
    head = model.get_output_embeddings()
    wanted, excluded = lora.target_modules, lora.exclude_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        found = [name for name in linear if modules[name] is not head]
    else:
        found = _named(list(modules), wanted, f"{key}.target_modules", linear)
        _require_adaptable(model, modules, found, wanted, f"{key}.target_modules")
    if excluded:
        out = set(_named(list(modules), excluded, f"{key}.exclude_modules", linear))
        found = [name for name in found if name not in out]
    if not found:
        raise ConfigError(
            f"{key}.exclude_modules", excluded, f"leaves no layer of target_modules={wanted!r} to adapt.",
            "Exclude fewer.",
        )  # fmt: skip
    return found


def as_short_names(targets: list[str], model: nn.Module) -> list[str]:
    """The targets as last parts of their names (``q_proj``) where these mean the same layers; else in full.

    Engines know layers by these parts.
    """
    short = sorted({_last(name) for name in targets})
    meant = [name for name, _ in model.named_modules() if _last(name) in short]
    return short if set(meant) == set(targets) else targets


def _named(names: list[str], wanted: str | list[str], key: str, linear: list[str]) -> list[str]:
    """The names that are meant. Every entry must mean at least one, or a typing error would go by unseen."""
    entries = [wanted] if isinstance(wanted, str) else wanted
    met = [set(_matching(names, entry, key, regex=isinstance(wanted, str))) for entry in entries]
    for entry, found in zip(entries, met, strict=True):
        if not found:
            known = ", ".join(sorted({_last(name) for name in linear}))
            raise ConfigError(key, wanted, f"the model has no module {entry!r}.", f"Its linear layers are {known}.")
    return [name for name in names if any(name in found for found in met)]


def _matching(names: list[str], entry: str, key: str, *, regex: bool) -> Iterator[str]:
    if not regex:
        yield from (name for name in names if name == entry or name.endswith(f".{entry}"))
        return
    try:
        pattern = re.compile(entry)
    except re.error as error:
        raise ConfigError(
            key, entry, f"is no regular expression ({error}).", f"Write a list of names, or {ALL_LINEAR}."
        ) from error
    yield from (name for name in names if pattern.fullmatch(name))


def _require_adaptable(
    model: PreTrainedModel, modules: dict[str, Any], found: list[str], wanted: str | list[str], key: str
) -> None:
    tied = {name.removesuffix(".weight") for name in getattr(model, "all_tied_weights_keys", None) or {}}
    for name in found:
        if not _is_linear(modules[name]):
            kind = type(modules[name]).__name__
            raise ConfigError(
                key, wanted, f"{name} is of the type {kind}, and adapters are for linear layers.", "Remove it."
            )
        if name in tied:
            raise ConfigError(
                key, wanted, f"{name} shares its weight with the input embedding, which an adapter would change too.",
                "Remove it.",
            )  # fmt: skip


def _is_linear(module: Any) -> bool:
    """Conv1D is the linear layer of GPT-2, its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
