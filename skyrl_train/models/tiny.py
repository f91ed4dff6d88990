"""Models with random weights, small enough to be made and trained anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_train.errors import ConfigError
from skyrl_train.models.folders import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT = Path(__file__).with_name("tiny.yaml")
KEY = "--model-config"


def make_model(config_file: str | Path | None, tokenizer: PreTrainedTokenizerBase, longest: int) -> PreTrainedModel:
    """A causal language model with random weights (torch's global random state), as a YAML file describes it.

    Args:
        config_file: fields of a transformers config, ``model_type`` among them; None takes ``tiny.yaml``.
        tokenizer: gives the size of the vocabulary and the special tokens.
        longest: tokens of the longest sequence that it is to take.

    Raises:
        ConfigError: the file does not describe such a model.
    """
    import yaml
    from transformers import AutoConfig, AutoModelForCausalLM

    from skyrl_train.models.attention import NAME
    from skyrl_train.models.quiet import quiet

    path = Path(config_file).expanduser() if config_file else DEFAULT
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(KEY, str(path), f"cannot be read: {error}.") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ConfigError(KEY, str(path), "names no model_type.", "See skyrl_train/models/tiny.yaml.")
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    kind = fields.pop("model_type")
    try:
        with quiet():
            config = AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **special, **fields})
            if reason := _unfit(config, fields, len(tokenizer), longest):
                raise ConfigError(KEY, str(path), reason)
            return AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    except ConfigError:
        raise
    except Exception as error:  # transformers and torch raise nearly every kind for sizes that do not fit
        raise ConfigError(KEY, str(path), f"no model can be made of it: {one_line(error)}.") from error


def _unfit(config: Any, fields: dict[str, Any], vocabulary: int, longest: int) -> str | None:
    """Why this config cannot be used; None if it can."""
    if unknown := sorted(set(fields) - set(type(config)().to_dict())):
        return f"a config of type '{config.model_type}' has no field {', '.join(unknown)}."
    if getattr(config, "is_decoder", True) is False:
        return f"'{config.model_type}' is no causal language model."
    if config.vocab_size < vocabulary:
        return f"vocab_size {config.vocab_size} is less than the tokenizer's {vocabulary}."
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        return f"the longest sequence has {longest} tokens, the model takes {limit}."
    return None
