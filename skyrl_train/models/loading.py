"""Models and tokenizers from Hugging Face folders, with errors that say what is wrong with a folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch

from skyrl_train.errors import ModelError
from skyrl_train.models.attention import NAME
from skyrl_train.models.folders import (
    check_model_folder,
    check_tokenizer_folder,
    locate,
    one_line,
    save_pretrained,
    why_not,
)
from skyrl_train.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["checkpoint_dtype", "load_model", "load_tokenizer", "save_pretrained", "supports_packing"]

log = logging.getLogger("skyrl.models")

BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that depend on the length of what is computed together."""
PACKING_TOLERANCE = 1e-3
"""Largest difference of log-probs, in float32, between the packed and the padded forward of a model that packs."""


def load_model(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    attn: str = NAME,
    config_kwargs: dict[str, Any] | None = None,
    rope_scaling: dict[str, Any] | None = None,
    rope_theta: float | None = None,
) -> PreTrainedModel:
    """Loads a causal language model, in eval mode, with every dropout off: with it no ratio would ever be 1.

    Args:
        path: a folder, or a name on the Hugging Face hub.
        dtype: of the parameters.
        attn: the attention implementation; a model that cannot use it takes transformers' choice.
        config_kwargs: fields of the model's config to override.
        rope_scaling: fields of its rotary embedding to override (``rope_type``, ``factor``, ...).
        rope_theta: the base of its rotary embedding.

    Raises:
        ModelError: names the folder and what is missing or broken in it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, options = locate(path)
    if not options:
        check_model_folder(source)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
            _override(config, path, config_kwargs or {})
            _override_rope(config, path, dict(rope_scaling or {}), rope_theta)
            _without_dropout(config)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                attn_implementation=_implementation(config, path, attn),
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported, and refused below in words
                output_loading_info=True,
                **options,
            )
    except ModelError:
        raise
    except Exception as error:  # transformers raises nearly every kind for a bad folder
        raise ModelError(f"the model '{path}' cannot be loaded: {why_not(path, error, options)}") from error
    model, report = loaded
    _check_report(path, report)
    return model.to(device)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer; one without a pad token pads with its end-of-sequence token.

    Raises:
        ModelError: there is none, it does not load, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    source, options = locate(path)
    if not options:
        check_tokenizer_folder(source)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # as above
        raise ModelError(f"the tokenizer of '{path}' cannot be loaded: {why_not(path, error, options)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of '{path}' has no eos_token: a completion could never end. Name it in "
            "tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def checkpoint_dtype(path: str) -> str:
    """The number format of a model's files by its config, such as "bfloat16"; "float32" if that does not say.

    Raises:
        ModelError: there is no config.
    """
    return str(_config_of(path).get_text_config().dtype or "float32").removeprefix("torch.")


def _config_of(path: str) -> Any:
    from transformers import AutoConfig

    source, options = locate(path)
    try:
        with quiet():
            return AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # as above
        raise ModelError(f"the model '{path}' cannot be read: {why_not(path, error, options)}") from error


def supports_packing(model: PreTrainedModel) -> bool:
    """Whether a packed forward of this model gives the log-probs of a padded one. Tried on a few random tokens.

    Also notes on the model whether its logits are its output layer's as they are (``scoring.PROJECTS``).
    """
    from skyrl_train.models.probe import packed_gap, projected_gap
    from skyrl_train.models.scoring import PROJECTS

    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") in BY_LENGTH:
        kind = rope["rope_type"]
        log.warning("%s runs padded: its rotary embedding (%s) goes by the longest row", type(model).__name__, kind)
        return False
    try:
        gap = packed_gap(model)
    except Exception as error:  # whatever a model that knows no plan does with one
        log.warning("%s runs padded: %s: %s", type(model).__name__, type(error).__name__, one_line(error))
        return False
    if not gap <= PACKING_TOLERANCE:  # nan too
        log.warning("%s runs padded: packed log-probs differ by %.2g nats", type(model).__name__, gap)
        return False
    gap = projected_gap(model)
    if not gap <= PACKING_TOLERANCE:
        log.warning("%s changes its logits: they are held in one piece", type(model).__name__)
        setattr(model, PROJECTS, False)
    return True


def _check_report(path: str, report: dict[str, Any]) -> None:
    """Refuses weights that do not fill the model: what they leave out would start as random numbers."""
    if mismatched := sorted(report["mismatched_keys"]):
        name, saved, wanted = mismatched[0]
        raise ModelError(
            f"{len(mismatched)} tensors in '{path}' do not have the shape that the config describes ({name}: "
            f"{tuple(saved)} in the file, {tuple(wanted)} in the config). The config is of another model, or "
            "model_config_kwargs changed a size."
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the weights in '{path}' lack {len(missing)} tensors that the config describes ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}). The folder is partial, or the config is of another model."
        )
    if extra := sorted(report["unexpected_keys"]):
        log.warning("%s: %d tensors that the config does not describe are left out (%s)", path, len(extra), extra[0])


def _override(config: Any, path: str, kwargs: dict[str, Any]) -> None:
    text = config.get_text_config()
    for name, value in kwargs.items():
        if not hasattr(text, name):
            near = get_close_matches(name, text.to_dict(), n=1)
            raise ModelError(
                f"model_config_kwargs.{name}={value!r}: the config of '{path}' ({config.model_type}) has no such "
                f"field.{f' Did you mean {near[0]}?' if near else ''}"
            )
        setattr(text, name, value)
    if kwargs and hasattr(text, "validate"):
        text.validate()  # fields that must agree, such as num_hidden_layers and layer_types


def changed_rope(path: str, scaling: Mapping[str, Any] | None, theta: float | None) -> dict[str, Any]:
    """The rotary embedding's parameters of a model's config with these changes.

    Raises:
        ModelError: there is no config, or no one rotary embedding in it.
    """
    config = _config_of(path)
    _override_rope(config, path, dict(scaling or {}), theta)
    return dict(config.get_text_config().rope_parameters)


def _override_rope(config: Any, path: str, scaling: dict[str, Any], theta: float | None) -> None:
    if "type" in scaling:  # its name in older configs
        scaling["rope_type"] = scaling.pop("type")
    if scaling.get("rope_type") == "dynamic":
        raise ModelError(
            "trainer.rope_scaling.rope_type=dynamic: each batch would be computed by its longest sequence, and by "
            "those before it. Set a type that goes by the token alone: linear, yarn or llama3."
        )
    changes = scaling | ({} if theta is None else {"rope_theta": theta})
    if not changes:
        return
    text = config.get_text_config()
    present = getattr(text, "rope_parameters", None)
    if not present or "rope_type" not in present:
        what = "a rotary embedding for each kind of layer" if present else "no rotary embedding"
        raise ModelError(
            f"trainer.rope_scaling, trainer.rope_theta: '{path}' ({config.model_type}) has {what}. "
            "Set its fields through model_config_kwargs."
        )
    text.rope_parameters = dict(present) | changes


def _without_dropout(config: Any) -> None:
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(text, name, 0.0)


def _implementation(config: Any, path: str, wanted: str) -> str | None:
    """The attention asked for, if the architecture can take it (ours is SDPA where nothing is packed)."""
    from transformers import AutoModelForCausalLM

    known: Any = AutoModelForCausalLM._model_mapping
    architecture = known.get(type(config), None)
    if architecture is None or getattr(config, "is_decoder", True) is False:
        raise ModelError(
            f"'{path}' is of type '{config.model_type}': no causal language model that transformers knows."
        )
    return wanted if architecture._supports_sdpa else None
