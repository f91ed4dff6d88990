"""The right key for a wrong one."""

from __future__ import annotations

import difflib

from skyrl_train.config.fields import one_of
from skyrl_train.config.schema import tree

# What the same thing is called elsewhere (TRL, verl, vLLM, SGLang, transformers), by the last part of the key.
ELSEWHERE = {
    "learning_rate": "trainer.policy.optimizer_config.lr",
    "grad_clip": "trainer.policy.optimizer_config.max_grad_norm",
    "warmup_steps": "trainer.policy.optimizer_config.num_warmup_steps",
    "lr_scheduler": "trainer.policy.optimizer_config.scheduler",
    "lr_scheduler_type": "trainer.policy.optimizer_config.scheduler",
    "model_path": "trainer.policy.model.path",
    "model_name_or_path": "trainer.policy.model.path",
    "num_generations": "generator.n_samples_per_prompt",
    "group_size": "generator.n_samples_per_prompt",
    "rollout_n": "generator.n_samples_per_prompt",
    "max_tokens": "generator.sampling_params.max_generate_length",
    "max_new_tokens": "generator.sampling_params.max_generate_length",
    "max_completion_length": "generator.sampling_params.max_generate_length",
    "max_response_length": "generator.sampling_params.max_generate_length",
    "tensor_parallel_size": "generator.inference_engine_tensor_parallel_size",
    "tensor_model_parallel_size": "generator.inference_engine_tensor_parallel_size",
    "tp_size": "generator.inference_engine_tensor_parallel_size",
    "pipeline_parallel_size": "generator.inference_engine_pipeline_parallel_size",
    "mem_fraction_static": "generator.gpu_memory_utilization",
    "beta": "trainer.algorithm.kl_loss_coef",
    "kl_coef": "trainer.algorithm.kl_loss_coef",
    "entropy_coeff": "trainer.algorithm.entropy_loss_coef",
    "adv_estimator": "trainer.algorithm.advantage_estimator",
    "clip_ratio_low": "trainer.algorithm.eps_clip_low",
    "clip_ratio_high": "trainer.algorithm.eps_clip_high",
    "epsilon": "trainer.algorithm.eps_clip_low",
    "epsilon_high": "trainer.algorithm.eps_clip_high",
    "ppo_epochs": "trainer.update_epochs_per_batch",
    "num_iterations": "trainer.update_epochs_per_batch",
    "ppo_mini_batch_size": "trainer.policy_mini_batch_size",
    "ppo_micro_batch_size_per_gpu": "trainer.micro_train_batch_size_per_gpu",
    "per_device_train_batch_size": "trainer.micro_train_batch_size_per_gpu",
    "total_epochs": "trainer.epochs",
    "num_train_epochs": "trainer.epochs",
    "total_training_steps": "trainer.max_steps",
    "save_freq": "trainer.ckpt_interval",
    "save_steps": "trainer.ckpt_interval",
    "test_freq": "trainer.eval_interval",
    "eval_steps": "trainer.eval_interval",
    "output_dir": "trainer.ckpt_path",
    "ckpt_dir": "trainer.ckpt_path",
    "report_to": "trainer.logger",
    "experiment_name": "trainer.run_name",
    "train_files": "data.train_data",
    "val_files": "data.val_data",
    "n_gpus_per_node": "trainer.placement.policy_num_gpus_per_node",
    "nnodes": "trainer.placement.policy_num_nodes",
}


def nearest_keys(name: str, most: int = 3) -> list[str]:
    """The keys that ``name`` probably means, likeliest first."""
    keys, last = list(tree()), name.rpartition(".")[2]
    same_last = sorted((k for k in keys if k.rpartition(".")[2] == last), key=lambda k: -_alike(name, k))
    if same_last:
        return same_last[:most]
    elsewhere = [ELSEWHERE[last]] if last in ELSEWHERE else []
    spelled = difflib.get_close_matches(name, keys, n=most, cutoff=0.8)
    lasts = difflib.get_close_matches(last, {k.rpartition(".")[2] for k in keys}, n=2, cutoff=0.75)
    near_last = [k for k in keys if k.rpartition(".")[2] in lasts or (len(last) > 3 and last in k.rpartition(".")[2])]
    near_last.sort(key=lambda k: -_alike(name, k))
    return list(dict.fromkeys([*elsewhere, *spelled[:1], *near_last[:1], *spelled[1:], *near_last[1:]]))[:most]


def did_you_mean(name: str) -> str:
    """A remedy for an unknown key."""
    keys = nearest_keys(name)
    return f"Did you mean {one_of(keys)}?" if keys else "`skyrl config` lists every key."


def _alike(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
