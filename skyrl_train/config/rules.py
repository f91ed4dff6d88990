"""Rules between keys: combinations that cannot work (``broken``), and those that are probably not meant."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from skyrl_train.config import algorithm_rules, lora_rules, worker_rules
from skyrl_train.config.generator import SamplingConfig
from skyrl_train.config.schema import Config, tree
from skyrl_train.errors import ConfigError, NotSupportedError

_ADDRESS = re.compile(r"(https?://)?([\w.-]+|\[[0-9A-Fa-f:]+\]):\d{1,5}(/[\w./-]*)?|https?://[\w.-]+(/[\w./-]*)?")
_CLOUD = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def broken(config: Config, purpose: str) -> Iterator[ConfigError]:
    """Every combination of values that cannot work."""
    if purpose == "train":
        yield from _batch_sizes(config)
        yield from algorithm_rules.broken(config)
        yield from _checkpoints(config)
        yield from lora_rules.broken(config)
        yield from worker_rules.broken(config)
    yield from _model_and_data(config, purpose)
    yield from _lengths(config)
    yield from _sampling("generator.sampling_params", config.generator.sampling_params)
    yield from _sampling("generator.eval_sampling_params", config.generator.eval_sampling_params)
    yield from _engines(config)
    yield from _paths(config)


def _batch_sizes(config: Config) -> Iterator[ConfigError]:
    trainer, samples = config.trainer, config.generator.n_samples_per_prompt
    step, update, micro = (
        trainer.train_batch_size,
        trainer.policy_mini_batch_size,
        trainer.micro_train_batch_size_per_gpu,
    )
    if step % update:
        yield ConfigError(
            "trainer.train_batch_size", step,
            f"does not divide into updates of trainer.policy_mini_batch_size={update} prompts.",
            f"Set trainer.policy_mini_batch_size={_nearest_divisor(step, update)}, or a train_batch_size that is a "
            f"multiple of {update}.",
        )  # fmt: skip
    if micro is not None and (update * samples) % micro:
        yield ConfigError(
            "trainer.micro_train_batch_size_per_gpu", micro,
            f"does not divide the {update * samples} sequences of one update (trainer.policy_mini_batch_size={update} "
            f"prompts x generator.n_samples_per_prompt={samples}).",
            f"Set it to {_nearest_divisor(update * samples, micro)}, or to null.",
        )  # fmt: skip


def _nearest_divisor(number: int, near: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - near), d))


def _checkpoints(config: Config) -> Iterator[ConfigError]:
    trainer = config.trainer
    if trainer.resume_mode == "from_path" and not trainer.resume_path:
        yield ConfigError(
            "trainer.resume_path", trainer.resume_path, "trainer.resume_mode=from_path needs the checkpoint's folder.",
            "Set trainer.resume_path, or trainer.resume_mode=latest.",
        )  # fmt: skip
    if trainer.max_ckpts_to_keep == 0:
        yield ConfigError(
            "trainer.max_ckpts_to_keep", 0, "would remove each checkpoint as soon as it is written.",
            "Set -1 to keep all, or trainer.ckpt_interval=-1 to write none.",
        )  # fmt: skip


def _model_and_data(config: Config, purpose: str) -> Iterator[ConfigError]:
    trainer, data = config.trainer, config.data
    if not trainer.policy.model.path:
        yield ConfigError(
            "trainer.policy.model.path", trainer.policy.model.path, "no model is given.",
            "Set it to the folder of a Hugging Face causal language model or to its name on the hub; "
            "`skyrl warmup --out DIR` makes a small one on any machine.",
        )  # fmt: skip
    if purpose == "train" and not data.train_data:
        yield ConfigError(
            "data.train_data", data.train_data, "there is nothing to train on.", "`skyrl data` makes data."
        )
    if data.val_data:
        return
    if purpose == "generate":
        yield ConfigError("data.val_data", [], "there is nothing to generate from.", "`skyrl data` makes data.")
    elif trainer.eval_interval > 0 or trainer.eval_before_train:
        yield ConfigError(
            "data.val_data", [],
            f"evaluation is on (trainer.eval_interval={trainer.eval_interval}, "
            f"trainer.eval_before_train={str(trainer.eval_before_train).lower()}) and has no data.",
            "Set data.val_data, or trainer.eval_interval=-1 and trainer.eval_before_train=false.",
        )  # fmt: skip


def _lengths(config: Config) -> Iterator[ConfigError]:
    generator, longest_prompt = config.generator, config.trainer.max_prompt_length
    if generator.max_input_length < longest_prompt:
        yield ConfigError(
            "generator.max_input_length", generator.max_input_length,
            f"is below trainer.max_prompt_length={longest_prompt}: a prompt could be too long for its own first turn.",
            f"Set it to {longest_prompt} or more.",
        )  # fmt: skip
    template = generator.chat_template
    if template.source == "file" and not template.name_or_path:
        yield ConfigError(
            "generator.chat_template.name_or_path", template.name_or_path,
            "generator.chat_template.source=file needs a Jinja file.", "Set its path, or remove source.",
        )  # fmt: skip


def _sampling(section: str, params: SamplingConfig) -> Iterator[ConfigError]:
    if params.min_new_tokens > params.max_generate_length:
        yield ConfigError(
            f"{section}.min_new_tokens", params.min_new_tokens,
            f"is above max_generate_length={params.max_generate_length}.", "Lower it.",
        )  # fmt: skip
    stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
    if "" in stops:
        yield ConfigError(
            f"{section}.stop", params.stop, "an empty string ends every completion at once.", "Remove it."
        )
    for name, ids in (("stop_token_ids", params.stop_token_ids or []), ("logit_bias", params.logit_bias or {})):
        if any(token < 0 for token in ids):
            yield ConfigError(f"{section}.{name}", getattr(params, name), "token ids start at 0.", "Correct the ids.")


PLANNED = {
    name: f"inference_engine_{kind}_parallel_size"
    for kind, names in {
        "tensor": ("tp_size", "tensor_parallel_size", "tp"),
        "pipeline": ("pp_size", "pipeline_parallel_size", "pp"),
        "expert": ("ep_size", "expert_parallel_size", "ep"),
    }.items()
    for name in names
}
"""SGLang's arguments that decide how many GPUs a server takes, and our keys for them."""


def _engines(config: Config) -> Iterator[ConfigError]:
    generator = config.generator
    if not generator.run_engines_locally and not generator.remote_inference_engine_urls:
        yield ConfigError(
            "generator.remote_inference_engine_urls", [],
            "generator.run_engines_locally=false needs the addresses of the engines.",
            'List them, such as ["http://10.0.0.1:8000"].',
        )  # fmt: skip
    for name, key in PLANNED.items():
        wanted = generator.engine_init_kwargs.get(name)
        if generator.run_engines_locally and wanted is not None and wanted != getattr(generator, key):
            yield ConfigError(
                f"generator.engine_init_kwargs.{name}", wanted,
                f"GPUs are planned by generator.{key}={getattr(generator, key)}, and this would go past the plan.",
                f"Set generator.{key}={wanted} instead.",
            )  # fmt: skip
    for url in generator.remote_inference_engine_urls:
        if not _ADDRESS.fullmatch(url):
            yield ConfigError(
                "generator.remote_inference_engine_urls", url, "is not an address.", "Write http://HOST:PORT."
            )


def _paths(config: Config) -> Iterator[ConfigError]:
    trainer, data = config.trainer, config.data
    paths = {"trainer.policy.model.path": trainer.policy.model.path}
    paths |= {"data.train_data": next((p for p in data.train_data if _CLOUD.match(p)), None)}
    paths |= {"data.val_data": next((p for p in data.val_data if _CLOUD.match(p)), None)}
    for name, path in paths.items():
        if path is not None and _CLOUD.match(path):
            yield NotSupportedError(
                name, path, "is a cloud address; this version reads folders.", "Mount it, or copy it."
            )
    places = {"trainer.ckpt_path": trainer.ckpt_path, "trainer.export_path": trainer.export_path}
    for name, path in places.items():
        if not path:
            yield ConfigError(name, path, "is empty.", "Set a folder, or remove the key to take the default.")
    for name, path in (places | {"trainer.resume_path": trainer.resume_path}).items():
        if path and _CLOUD.match(path):
            yield from _reachable(name, path)


def _reachable(name: str, address: str) -> Iterator[ConfigError]:
    """Whether fsspec has what speaks the address's protocol; nothing is asked of the network."""
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(address.partition("://")[0])
    except (ValueError, ImportError) as error:
        why = str(error).rstrip(".")
        yield ConfigError(name, address, f"fsspec cannot reach it: {why}.", "Install that package, or give a folder.")


def doubtful(config: Config, purpose: str) -> Iterator[str]:
    """Combinations that work and are probably not meant."""
    generator = config.generator
    evaluation = generator.eval_sampling_params
    if generator.eval_n_samples_per_prompt > 1 and evaluation.temperature == 0:
        yield (
            f"generator.eval_n_samples_per_prompt={generator.eval_n_samples_per_prompt} with "
            "generator.eval_sampling_params.temperature=0: all samples of a prompt are equal, so pass@k is pass@1."
        )
    if purpose != "train":
        return
    yield from algorithm_rules.doubtful(config)
    yield from lora_rules.doubtful(config)
    yield from worker_rules.doubtful(config)
    trains_on_default, evaluates_on_default = (
        getattr(config.data, name) == [os.path.expanduser(path) for path in tree()[f"data.{name}"].default]
        for name in ("train_data", "val_data")
    )
    if evaluates_on_default and not trains_on_default:
        yield f"data.val_data is left at its default {config.data.val_data}, while data.train_data is yours."
