"""What cannot be served is refused, by key, value, reason and remedy; what is doubtful gets a warning."""

from __future__ import annotations

from typing import Any

import pytest

from config.conftest import GOOD
from skyrl_train.config.backend import resolve_backend
from skyrl_train.config.door import load_config
from skyrl_train.config.fields import Key
from skyrl_train.config.load import from_mapping, to_plain
from skyrl_train.config.preflight import preflight
from skyrl_train.config.problems import ConfigErrors
from skyrl_train.config.schema import Leaf, tree, type_text, value_of
from skyrl_train.errors import ConfigError, NotSupportedError

# overrides | the key that the error names | words of its reason or remedy
BAD: list[tuple[str, str, str]] = [
    # unknown keys
    ("trainer.polcy.model.path=x", "trainer.polcy.model.path", "trainer.policy.model.path"),
    ("+trainer.train_batchsize=8", "trainer.train_batchsize", "trainer.train_batch_size"),
    ("++generator.max_turn=3", "generator.max_turn", "generator.max_turns"),
    ("generator.sampling_params.max_tokens=8", "generator.sampling_params.max_tokens", "max_generate_length"),
    ("enviroment.env_class=gsm8k", "enviroment.env_class", "environment.env_class"),
    ("environment.skyrl_gym.max_env_worker=3", "environment.skyrl_gym.max_env_worker", "max_env_workers"),
    ("data.train=x", "data.train", "data.train_data"),
    ("trainer.placement.policy_num_gpus=2", "trainer.placement.policy_num_gpus", "policy_num_gpus_per_node"),
    ("learning_rate=1e-4", "learning_rate", "trainer.policy.optimizer_config.lr"),
    ("trainer.algorithm.kl_coef=0.1", "trainer.algorithm.kl_coef", "trainer.algorithm.kl_loss_coef"),
    # wrong types
    ("trainer.epochs=abc", "trainer.epochs", "expects an integer, not text"),
    ("trainer.epochs=1.5", "trainer.epochs", "not a number with a fraction"),
    ("trainer.epochs=true", "trainer.epochs", "not true/false"),
    ("trainer.epochs=null", "trainer.epochs", "not null"),
    ("trainer.eval_before_train=yes", "trainer.eval_before_train", "Write true or false."),
    ("trainer.policy.optimizer_config.lr=fast", "trainer.policy.optimizer_config.lr", "expects a number, not text"),
    ("trainer.policy.optimizer_config.lr=inf", "trainer.policy.optimizer_config.lr", "not finite"),
    ("trainer.policy.optimizer_config.lr=nan", "trainer.policy.optimizer_config.lr", "not finite"),
    ("trainer.policy=model", "trainer.policy", "is a section of keys"),
    ("trainer.seed={a:1}", "trainer.seed", "not a mapping"),
    ("trainer.seed=[1]", "trainer.seed", "not a list"),
    ("generator.weight_sync_timeout=2m", "generator.weight_sync_timeout", "in seconds"),
    ("generator.request_timeout=30s", "generator.request_timeout", "in seconds"),
    ("generator.engine_init_kwargs=flashinfer", "generator.engine_init_kwargs", "expects a mapping"),
    ("data.train_data={a:1}", "data.train_data", "list of strings"),
    ("generator.sampling_params.stop_token_ids=[a]", "generator.sampling_params.stop_token_ids", "list of integers"),
    ("generator.sampling_params.logit_bias={a:1}", "generator.sampling_params.logit_bias", "mapping"),
    # choices and limits
    ("trainer.strategy=fsdp3", "trainer.strategy", "fsdp2"),
    ("trainer.logger=wandbb", "trainer.logger", "Did you mean wandb?"),
    ("trainer.logger=[console,mlflow]", "trainer.logger", "tensorboard"),
    ("trainer.resume_mode=newest", "trainer.resume_mode", "none, latest or from_path"),
    ("trainer.device=gpu", "trainer.device", "auto, cpu or cuda"),
    ("generator.backend=sglng", "generator.backend", "Did you mean sglang?"),
    ("generator.weight_sync_backend=ncll", "generator.weight_sync_backend", "Did you mean nccl?"),
    ("trainer.algorithm.kl_estimator_type=k4", "trainer.algorithm.kl_estimator_type", "k1, k2, k3, abs, k1+"),
    ("trainer.algorithm.loss_reduction=mean", "trainer.algorithm.loss_reduction", "token_mean"),
    ("trainer.algorithm.policy_loss_type='my.losses:'", "trainer.algorithm.policy_loss_type", "package.module:name"),
    ("trainer.policy.optimizer_config.scheduler=cosin", "trainer.policy.optimizer_config.scheduler", "cosine"),
    ("trainer.train_batch_size=0", "trainer.train_batch_size", "at least 1 prompts"),
    ("trainer.policy_mini_batch_size=-4", "trainer.policy_mini_batch_size", "at least 1"),
    ("generator.n_samples_per_prompt=0", "generator.n_samples_per_prompt", "at least 1"),
    ("generator.max_turns=0", "generator.max_turns", "at least 1"),
    ("trainer.policy.optimizer_config.lr=0", "trainer.policy.optimizer_config.lr", "above 0"),
    ("trainer.policy.optimizer_config.lr=-1e-6", "trainer.policy.optimizer_config.lr", "above 0"),
    ("trainer.policy.optimizer_config.max_grad_norm=0", "trainer.policy.optimizer_config.max_grad_norm", "above 0"),
    ("trainer.algorithm.eps_clip_low=1.0", "trainer.algorithm.eps_clip_low", "below 1"),
    ("trainer.algorithm.eps_clip_high=-0.1", "trainer.algorithm.eps_clip_high", "at least 0"),
    ("trainer.algorithm.kl_loss_coef=-1", "trainer.algorithm.kl_loss_coef", "at least 0"),
    ("generator.sampling_params.temperature=-1", "generator.sampling_params.temperature", "at least 0"),
    ("generator.sampling_params.top_p=0", "generator.sampling_params.top_p", "above 0"),
    ("generator.sampling_params.top_p=1.5", "generator.sampling_params.top_p", "at most 1"),
    ("generator.gpu_memory_utilization=80", "generator.gpu_memory_utilization", "at most 1"),
    ("trainer.ckpt_interval=-2", "trainer.ckpt_interval", "at least -1"),
    ("environment.timeout=0", "environment.timeout", "above 0 seconds"),
    ("trainer.seed=-1", "trainer.seed", "at least 0"),
    # combinations
    (
        "trainer.train_batch_size=100 trainer.policy_mini_batch_size=64",
        "trainer.train_batch_size",
        "policy_mini_batch_size=50",
    ),
    ("trainer.train_batch_size=64", "trainer.train_batch_size", "trainer.policy_mini_batch_size=64"),
    (
        "trainer.micro_train_batch_size_per_gpu=3",
        "trainer.micro_train_batch_size_per_gpu",
        "1280 sequences of one update",
    ),
    ("trainer.algorithm.advantage_estimator=gae", "trainer.algorithm.advantage_estimator", "needs a critic"),
    (
        "trainer.critic.model.path=org/critic trainer.critic_mini_batch_size=100",
        "trainer.critic_mini_batch_size",
        "trainer.policy_mini_batch_size=256",
    ),
    (
        "generator.sampling_params.top_p=0.9 trainer.algorithm.old_logprobs=engine",
        "trainer.algorithm.old_logprobs",
        "before top-p",
    ),
    ("trainer.algorithm.use_tis=true", "trainer.algorithm.tis_imp_ratio_cap", "a cap above 0"),
    (
        "trainer.algorithm.off_policy_correction.tis_ratio_type=token trainer.algorithm.old_logprobs=engine",
        "trainer.algorithm.old_logprobs",
        "no gap",
    ),
    *[
        (
            f"trainer.algorithm.off_policy_correction.tis_ratio_type=token trainer.algorithm.policy_loss_type={loss}",
            "trainer.algorithm.policy_loss_type",
            words,
        )
        for loss, words in {
            "rollout_is": "twice",
            "dppo": "twice",
            "decoupled": "twice",
            "cross_entropy": "imitates",
            "cispo trainer.algorithm.cispo.cispo_anchor=rollout": "twice",
        }.items()
    ],
    (
        "trainer.algorithm.overlong_penalty=soft trainer.algorithm.overlong_buffer_len=2000",
        "trainer.algorithm.overlong_buffer_len",
        "Set it to 256",
    ),
    (
        "trainer.algorithm.overlong_penalty=soft generator.max_turns=3",
        "trainer.algorithm.overlong_max_len",
        "generator.max_turns=3",
    ),
    ("trainer.algorithm.reward_clip=[1,-1]", "trainer.algorithm.reward_clip", "lowest and the highest"),
    ("trainer.algorithm.reward_clip=[1]", "trainer.algorithm.reward_clip", "lowest and the highest"),
    ("trainer.algorithm.use_kl_in_reward=true", "trainer.algorithm.use_kl_in_reward", "count twice"),
    ("generator.sampling_params.temperature=0", "generator.sampling_params.temperature", "nothing to learn from"),
    ("data.val_data=[]", "data.val_data", "trainer.eval_interval=-1"),
    ("data.train_data=[]", "data.train_data", "nothing to train on"),
    ("trainer.resume_mode=from_path", "trainer.resume_path", "trainer.resume_mode=latest"),
    ("trainer.max_ckpts_to_keep=0", "trainer.max_ckpts_to_keep", "trainer.ckpt_interval=-1"),
    ("generator.max_input_length=100", "generator.max_input_length", "trainer.max_prompt_length=512"),
    (
        "generator.eval_sampling_params.min_new_tokens=2000",
        "generator.eval_sampling_params.min_new_tokens",
        "max_generate_length=1024",
    ),
    ("generator.sampling_params.stop=''", "generator.sampling_params.stop", "empty string"),
    ("generator.sampling_params.stop_token_ids=[-1]", "generator.sampling_params.stop_token_ids", "start at 0"),
    ("generator.chat_template.source=file", "generator.chat_template.name_or_path", "Jinja"),
    ("trainer.policy.optimizer_config.adam_betas=[0.9]", "trainer.policy.optimizer_config.adam_betas", "two numbers"),
    ("trainer.policy.optimizer_config.adam_betas=[0.9,1.0]", "trainer.policy.optimizer_config.adam_betas", "below 1"),
    ("trainer.policy.model.path=", "trainer.policy.model.path", "skyrl warmup"),
    ("trainer.policy.model.path=null", "trainer.policy.model.path", "expects a string, not null"),
    ("trainer.ckpt_path='s3://bucket/x'", "trainer.ckpt_path", "Install s3fs"),
    ("trainer.export_path='nowhere://x'", "trainer.export_path", "Protocol not known"),
    ("trainer.policy.model.path='s3://bucket/x'", "trainer.policy.model.path", "cloud address"),
    ("trainer.run_name='${trainer.nme}'", "trainer.run_name", "cannot be resolved"),
    ("trainer.run_name=???", "trainer.run_name", "has no value yet"),
    # what this version does not have
    ("generator.backend=vllm", "generator.backend", "the vllm engine"),
    ("trainer.strategy=megatron", "trainer.strategy", "trainer.strategy=fsdp2"),
    ("trainer.placement.colocate_all=false", "trainer.placement.colocate_all", "sglang or vllm only"),
    ("trainer.weight_sync_interval=2", "trainer.weight_sync_interval", "sglang or vllm only"),
    (
        "trainer.policy.sequence_parallel_size=2",
        "trainer.policy.sequence_parallel_size",
        "does not divide the 1 worker",
    ),
    ("trainer.ref.fsdp_config.fsdp_size=3", "trainer.ref.fsdp_config.fsdp_size", "does not divide the 1 worker"),
    (
        "trainer.max_tokens_per_microbatch=99 trainer.micro_train_batch_size_per_gpu=1",
        "trainer.micro_train_batch_size_per_gpu",
        "counts tokens instead",
    ),
    ("trainer.policy.model.lora.dropout=0.1", "trainer.policy.model.lora.dropout", "importance ratios compare"),
    (
        "trainer.policy.model.lora.rank=3 trainer.policy.model.lora.init_method=orthogonal",
        "trainer.policy.model.lora.rank",
        "Set 4",
    ),
    ("trainer.policy.model.lora.init_method=pissa", "trainer.policy.model.lora.init_method", "gaussian or orthogonal"),
    ("trainer.policy.model.lora.lora_sync_path=/x", "trainer.policy.model.lora.lora_sync_path", "sglang or vllm only"),
    ("generator.enable_lora=true", "generator.enable_lora", "embedded engine samples with the policy's adapter"),
    ("trainer.critic.model.lora.rank=8", "trainer.critic.model.lora.rank", "LoRA of the critic"),
    ("generator.sampling_params.min_new_tokens=3", "generator.sampling_params.min_new_tokens", "does not follow"),
    (
        "generator.sampling_params.presence_penalty=0.1",
        "generator.sampling_params.presence_penalty",
        "top_p, top_k, min_p, repetition_penalty",
    ),
    (
        "generator.backend=sglang generator.sampling_params.regex='[0-9]+'",
        "generator.sampling_params.regex",
        "no importance ratio would be right",
    ),
    (
        "generator.backend=sglang generator.sampling_params.custom_logit_processor=x",
        "generator.sampling_params.custom_logit_processor",
        "generator.eval_sampling_params.custom_logit_processor is free",
    ),
    ("generator.enable_lora=true", "generator.enable_lora", "Or set generator.backend=sglang (to install it: uv sync"),
    (
        "generator.backend=sglang generator.enable_lora=true trainer.policy.model.lora.rank=128 "
        "+generator.engine_init_kwargs.max_lora_rank=64",
        "trainer.policy.model.lora.rank",
        "Set max_lora_rank=128",
    ),
    (
        "generator.backend=sglang +generator.engine_init_kwargs.tp_size=2",
        "generator.engine_init_kwargs.tp_size",
        "Set generator.inference_engine_tensor_parallel_size=2 instead",
    ),
    ("trainer.fully_async.max_staleness_steps=1", "trainer.fully_async.max_staleness_steps", "fully asynchronous"),
    ("trainer.flash_attn=true", "trainer.flash_attn", "flash kernel"),
    ("trainer.log_path=/tmp/x", "trainer.log_path", "hydra.run.dir"),
    ("generator.step_wise_trajectories=true", "generator.step_wise_trajectories", "step-wise"),
    ("generator.batched=true", "generator.batched", "Remove the key"),
    ("generator.async_engine=false", "generator.async_engine", "asynchronous"),
    ("generator.enable_http_endpoint=true", "generator.enable_http_endpoint", "HTTP endpoint"),
    ("generator.sampling_params.n=4", "generator.sampling_params.n", "generator.n_samples_per_prompt"),
    ("generator.sampling_params.best_of=4", "generator.sampling_params.best_of", "not a sample of the policy"),
    ("generator.sampling_params.logprobs=5", "generator.sampling_params.logprobs", "Set 0"),
    ("generator.sampling_params.no_stop_trim=false", "generator.sampling_params.no_stop_trim", "exactly as sampled"),
    ("generator.sampling_params.lora_name=a", "generator.sampling_params.lora_name", "sglang only"),
    (
        "generator.backend=sglang generator.sampling_params.lora_name=a",
        "generator.sampling_params.lora_name",
        "enable_lora=false",
    ),
    # keys that mean nothing to this engine
    ("generator.gpu_memory_utilization=0.6", "generator.gpu_memory_utilization", "uses the embedded engine"),
    (
        "+generator.engine_init_kwargs.attention_backend=flashinfer",
        "generator.engine_init_kwargs",
        "sglang or vllm only",
    ),
    ("generator.vllm_v1_disable_multiproc=false", "generator.vllm_v1_disable_multiproc", "vllm only"),
    ("generator.weight_sync_backend=nccl", "generator.weight_sync_backend", "learner's own parameters"),
    ("generator.sampling_params.stop_regex=a+", "generator.sampling_params.stop_regex", "sampling_params.stop"),
    ("generator.eval_sampling_params.json_schema='{}'", "generator.eval_sampling_params.json_schema", "sglang only"),
    ("generator.num_inference_engines=2", "generator.num_inference_engines", "sglang or vllm only"),
    ("generator.model_name=org/other", "generator.model_name", "trainer.policy.model.path"),
    ("generator.rope_theta=10000", "generator.rope_theta", "trainer.rope_theta"),
]


@pytest.mark.parametrize(("given", "key", "words"), BAD, ids=[bad[0] for bad in BAD])
def test_a_bad_config_is_one_clear_error(given: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preflight(load_config([*GOOD, *given.split()]))
    error = caught.value
    assert not hasattr(error, "errors"), str(error)
    assert error.key == key
    assert str(error).startswith(key)
    assert words in str(error)
    assert str(error).endswith((".", "?")), "the message is a sentence"


def test_a_good_config_passes_without_warning() -> None:
    assert preflight(load_config(GOOD)) == []
    assert resolve_backend(load_config(GOOD)) == "embedded"


def refused_value(leaf: Leaf) -> Any:
    """A value of the key's type that is not among those it takes without the capability."""
    key: Key = leaf.key
    if key.choices:
        return next(choice for choice in key.choices if choice not in (key.off or (leaf.default,)))
    wanted = type_text(leaf.type).removesuffix(" or null")
    if wanted == "true/false":
        return True not in key.off if key.off else not leaf.default
    if wanted == "integer":
        return max(key.off or (leaf.default or 0,), key=lambda v: v or 0) + 1
    if wanted == "number":
        low, high = key.minimum or 0.0, key.maximum if key.maximum is not None else key.below
        return (leaf.default or 0) + 0.125 if high is None else (low + high) / 2 + 0.0625
    return {
        "string": "x",
        "mapping": {"x": 1},
        "list of strings": ["x"],
        "list of integers": [1],
        "list of numbers": [0.5, 0.6],
    }.get(wanted, "x")


GATED = [leaf for leaf in tree().values() if leaf.key.capability or any(s.capability for s in leaf.sections)]


def test_every_key_of_a_missing_capability_is_refused() -> None:
    values = {leaf.name: refused_value(leaf) for leaf in GATED}
    config = from_mapping({"trainer": {"policy": {"model": {"path": "org/model"}}}})
    for name, value in values.items():
        parent, _, last = name.rpartition(".")
        setattr(value_of(config, parent), last, value)
    assert len(GATED) > 50
    assert to_plain(from_mapping(to_plain(config))) == to_plain(config), "the values are well-formed"
    with pytest.raises(ConfigErrors) as caught:
        preflight(config)
    refused = {error.key: error for error in caught.value.errors if isinstance(error, NotSupportedError)}
    assert [name for name in values if name not in refused] == []
    for name, value in values.items():
        assert str(refused[name]).startswith(f"{name}={value!r}: ")
        assert refused[name].remedy


def test_what_is_missing_has_its_own_type() -> None:
    with pytest.raises(NotSupportedError):
        preflight(load_config([*GOOD, "generator.backend=vllm"]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("trainer.algorithm.entropy_loss_coef=1",
         "entropy_loss_coef=1.0 has no effect while trainer.algorithm.use_entropy_loss=false"),
        ("trainer.algorithm.use_kl_loss=false trainer.algorithm.kl_loss_coef=0.1", "kl_loss_coef=0.1 has no effect"),
        ("trainer.algorithm.kl_loss_coef=0", "trainer.algorithm.kl_loss_coef=0 leaves the KL penalty without effect"),
        ("trainer.algorithm.use_kl_loss=false trainer.ref.model.path=org/other", "path=org/other has no"),
        ("generator.n_samples_per_prompt=1", "group of one has no baseline; the advantage is the reward itself"),
        ("generator.n_samples_per_prompt=1 trainer.algorithm.advantage_estimator=rloo", "nothing is learned"),
        ("generator.n_samples_per_prompt=1 trainer.algorithm.dynamic_sampling.type=filter", "no group has equal"),
        ("trainer.critic.model.path=org/critic", "does not look at its values"),
        ("trainer.algorithm.policy_loss_type=gspo", "gspo is defined with loss_reduction=sequence_mean"),
        ("trainer.algorithm.policy_loss_type=sapo trainer.algorithm.eps_clip_high=0.3", "eps_clip_high=0.3 has no"),
        ("trainer.algorithm.gamma=0.9", "gamma=0.9 has no effect while trainer.algorithm.advantage_estimator=grpo"),
        ("trainer.algorithm.sapo.tau_pos=2", "tau_pos=2.0 has no effect while trainer.algorithm.policy_loss_type"),
        ("generator.n_samples_per_prompt=1 generator.sampling_params.temperature=0", "greedy"),
        ("generator.eval_n_samples_per_prompt=4", "pass@k is pass@1"),
        ("trainer.resume_path=/x", "trainer.resume_path=/x has no effect while trainer.resume_mode=latest"),
        ("trainer.algorithm.max_seq_len=99", "max_seq_len=99 has no effect"),
        ("data.train_data=[mine.parquet]", "left at its default"),
        ("trainer.critic.optimizer_config.lr=1e-3", "optimizer_config.lr=0.001 has no effect: there is no critic"),
        ("trainer.policy.fsdp_config.cpu_offload=true", "cpu_offload=True has no effect: with one worker"),
        (
            "generator.run_engines_locally=false generator.remote_inference_engine_urls=[h:1] "
            "generator.enforce_eager=true",
            "enforce_eager=true has no effect while generator.run_engines_locally=false",
        ),
        (
            "generator.backend=sglang generator.sampling_params.repetition_penalty=1.1",
            "repetition_penalty=1.1: which tokens count as repeated is the sglang server's own affair",
        ),
        ("trainer.policy.model.lora.rank=8", "an adapter needs a larger rate"),
        ("trainer.policy.model.lora.alpha=8", "alpha=8.0 has no effect while trainer.policy.model.lora.rank=0"),
        ("trainer.policy.model.lora.target_modules=[q_proj]", "target_modules=['q_proj'] has no effect"),
    ],
)  # fmt: skip
def test_what_is_doubtful_is_said(given: str, words: str) -> None:
    assert words in "\n".join(preflight(load_config([*GOOD, *given.split()])))


@pytest.mark.parametrize(
    "given",
    [
        "trainer.algorithm.policy_loss_type='my.losses:mine'",
        "trainer.algorithm.advantage_estimator='my.advantages:mine'",
        "trainer.algorithm.loss_reduction='my.reductions:mine'",
        "trainer.algorithm.kl_estimator_type='my.kl:mine'",
        "trainer.algorithm.value_loss_type='my.values:mine'",
        "trainer.algorithm.reward_shaping='my.rewards:mine'",
        "trainer.algorithm.off_policy_correction.function='my.corrections:mine'",
        "trainer.algorithm.policy_loss_type='my.losses:mine' trainer.algorithm.eps_clip_high=0.3",
        "trainer.algorithm.advantage_estimator='my.advantages:mine' trainer.algorithm.gamma=0.9",
        "trainer.algorithm.advantage_estimator=gae trainer.critic.model.path=org/critic trainer.algorithm.gamma=0.9",
        "trainer.algorithm.policy_loss_type=gspo trainer.algorithm.loss_reduction=sequence_mean",
        "trainer.algorithm.dynamic_sampling.type=filter",
        "trainer.algorithm.kl_ctrl.type=adaptive trainer.algorithm.kl_ctrl.kl_target=0.2",
        "generator.sampling_params.top_p=0.9 generator.sampling_params.repetition_penalty=1.1",
        "trainer.algorithm.use_tis=true trainer.algorithm.tis_imp_ratio_cap=2.0",
        "trainer.algorithm.overlong_penalty=soft",
        "trainer.algorithm.use_kl_loss=false trainer.algorithm.use_kl_in_reward=true",
        "trainer.algorithm.kl_loss_coef=0.1",
        "trainer.placement.runtime=ray",
        "trainer.rope_theta=500000",
        "trainer.policy.model_config_kwargs.attention_dropout=0.1",
        "trainer.ref.model.path=org/other",
        "trainer.policy.model.lora.rank=8 trainer.policy.optimizer_config.lr=1e-5",
        "trainer.policy.model.lora.rank=8 trainer.policy.model.lora.exclude_modules=[o_proj] "
        "trainer.policy.model.lora.init_method=gaussian trainer.policy.optimizer_config.lr=1e-4",
        "trainer.algorithm.zero_variance_filter=true",
        "generator.max_num_seqs=16",
        "generator.eval_sampling_params.top_p=0.5",
        "generator.backend=sglang generator.eval_sampling_params.regex=x generator.sampling_params.top_p=0.9",
        "trainer.resume_mode=from_path trainer.resume_path=/x",
        "data.val_data=[] trainer.eval_interval=-1 trainer.eval_before_train=false",
        "generator.sampling_params.no_stop_trim=true",
        "environment.env_class='my.envs:Mine' environment.skyrl_gym.mine.level=3",
        "generator.backend=sglang generator.sampling_params.stop_regex=a+ generator.num_inference_engines=2",
        "generator.backend=sglang trainer.placement.colocate_all=false generator.weight_sync_backend=nccl",
        "generator.backend=sglang generator.use_conversation_multi_turn=false trainer.weight_sync_interval=4",
        "generator.run_engines_locally=false generator.remote_inference_engine_urls=[10.0.0.1:8000]",
    ],
)
def test_what_is_served_passes(given: str) -> None:
    assert preflight(load_config([*GOOD, *given.split()])) == []


def test_generating_alone_needs_no_training() -> None:
    given = ["data.train_data=[]", "trainer.train_batch_size=3", "generator.sampling_params.temperature=0"]
    assert preflight(load_config([*GOOD, *given]), "generate") == []
    with pytest.raises(ConfigError, match="nothing to generate from"):
        preflight(load_config([*GOOD, "data.val_data=[]"]), "generate")
