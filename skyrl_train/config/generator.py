"""The section ``generator``: how prompts become trajectories, and by which engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skyrl_train.config.fields import follow, key, section

SERVERS = ("sglang", "vllm")
SGLANG, VLLM = ("sglang",), ("vllm",)
LOCAL = ("generator.run_engines_locally", True)
HTTP = ("generator.enable_http_endpoint", True)


@dataclass(slots=True, kw_only=True)
class SamplingConfig:
    """How the policy samples. ``n_samples_per_prompt`` says how often."""

    max_generate_length: int = key(1024, "Tokens of one completion at most.", minimum=1, unit="tokens")
    min_new_tokens: int = key(0, "Tokens before a completion may stop.", minimum=0, unit="tokens")
    temperature: float = key(1.0, "Sampling temperature; 0 is greedy.", minimum=0)
    top_p: float = key(1.0, "Sample from the likeliest tokens that hold this probability.", above=0, maximum=1)
    top_k: int = key(-1, "Sample from the k likeliest tokens; -1: all.", minimum=-1)
    min_p: float = key(0.0, "Leave out tokens below this share of the likeliest one.", minimum=0, maximum=1)
    repetition_penalty: float = key(1.0, "Above 1, tokens seen before are less likely.", above=0)
    frequency_penalty: float = key(
        0.0, "Taken off a token's logit for each time it was sampled.", minimum=-2, maximum=2
    )
    presence_penalty: float = key(0.0, "Taken off the logit of each token that was sampled.", minimum=-2, maximum=2)
    logit_bias: dict[int, float] | None = key(None, "Added to the logits, by token id.")
    stop: str | list[str] | None = key(None, "Strings that end a completion; matched on the text, and kept in it.")
    stop_token_ids: list[int] | None = key(None, "Token ids that end a completion, beside the end-of-sequence token.")
    ignore_eos: bool = key(False, "Go on after the end-of-sequence token.")
    seed: int | None = key(None, "Seed of the sampling; null: trainer.seed.", minimum=0)
    logprobs: int | None = key(
        0, "The log-prob of every sampled token is always returned; further ones are not.",
        capability="the log-probs of further candidates", off=(None, 0, 1), minimum=0, instead="Set 0.",
    )  # fmt: skip
    n: int | None = key(
        None, "Samples of one prompt.", capability="sampling_params.n", off=(None, 1), minimum=1,
        reason="the samples of a prompt are counted by one key",
        instead="Use generator.n_samples_per_prompt, or generator.eval_n_samples_per_prompt.",
    )  # fmt: skip
    best_of: int | None = key(
        None, "Sample several, keep the likeliest.", capability="best_of", off=(None, 1), minimum=1,
        reason="a completion chosen by its own probability is not a sample of the policy", instead="Remove the key.",
    )  # fmt: skip
    skip_special_tokens: bool = key(
        True, "The env reads text without special tokens.", capability="special tokens in the env's text",
        instead="Remove the key: ids and log-probs keep every token in any case.",
    )  # fmt: skip
    spaces_between_special_tokens: bool = key(
        True,
        "Spacing of special tokens in text.",
        capability="special tokens in the env's text",
        instead="Remove the key.",
    )
    no_stop_trim: bool | None = key(
        None, "A matched stop string stays in the completion.", capability="cutting stop strings off", off=(None, True),
        reason="ids and log-probs are kept exactly as sampled, the stop string included", instead="Remove the key.",
        was=False, why="tokens are kept as they were sampled",
    )  # fmt: skip
    lora_name: str | None = key(
        None, "Adapter to sample with, one that the engines have loaded.", backends=SGLANG,
        switch=("generator.enable_lora", True),
    )  # fmt: skip
    stop_regex: str | list[str] | None = key(
        None,
        "Patterns that end a completion.",
        backends=SGLANG,
        instead="Use sampling_params.stop with the plain strings.",
    )
    json_schema: str | None = key(None, "Schema that the text must follow.", backends=SGLANG)
    regex: str | None = key(None, "Pattern that the text must follow.", backends=SGLANG)
    ebnf: str | None = key(None, "Grammar that the text must follow.", backends=SGLANG)
    custom_logit_processor: str | None = key(None, "SGLang's serialised logit processor.", backends=SGLANG)
    custom_params: dict[str, Any] | None = key(None, "Parameters of the logit processor.", backends=SGLANG)


@dataclass(slots=True, kw_only=True)
class EvalSamplingConfig(SamplingConfig):
    """How evaluations sample: greedy unless set otherwise."""

    max_generate_length: int = follow(
        "generator.sampling_params.max_generate_length", "Tokens of one completion at most.", minimum=1, unit="tokens"
    )
    temperature: float = key(0.0, "Sampling temperature; 0 is greedy.", minimum=0)


@dataclass(slots=True, kw_only=True)
class ChatTemplateConfig:
    """A chat template in place of the tokenizer's own."""

    source: str = key("name", "What name_or_path is.", choices=("name", "file"))
    name_or_path: str | None = key(None, "A template's name, or a Jinja file; null: the tokenizer's own.", path=True)


@dataclass(slots=True, kw_only=True)
class GeneratorConfig:
    """Engines, sampling and turns."""

    backend: str = key(
        "auto", "The inference engine; auto: sglang where there is a GPU and SGLang is installed, else embedded.",
        choices=("auto", "embedded", *SERVERS), capability="the {value} engine", off=("auto", "embedded", "sglang"),
        instead="Use generator.backend=sglang.", was="vllm", why="embedded runs on every machine",
    )  # fmt: skip
    model_name: str = follow(
        "trainer.policy.model.path", "Model that the engines start from.", path=True, backends=SERVERS,
        instead="Set trainer.policy.model.path.",
    )  # fmt: skip
    model_dtype: str = key(
        "auto", "Number format of the engines; auto: the learner's.",
        choices=("auto", "bfloat16", "float16", "float32"),
        backends=SERVERS, instead="Use trainer.bf16.", was="bfloat16",
        why="the learner's format keeps the log-probs together", switch=LOCAL
    )  # fmt: skip
    deterministic: bool = key(
        True,
        "The embedded engine waits for every running env before its next decoding step, so timing decides nothing.",
    )
    request_timeout: float = key(3600.0, "Time for one completion.", above=0, unit="seconds")
    sampling_params: SamplingConfig = section(SamplingConfig)
    eval_sampling_params: EvalSamplingConfig = section(EvalSamplingConfig)
    n_samples_per_prompt: int = key(5, "Trajectories of one prompt: the size of a group.", minimum=1)
    eval_n_samples_per_prompt: int = key(1, "Trajectories of one prompt in an evaluation.", minimum=1)
    max_turns: int = key(1, "Turns of one trajectory at most.", minimum=1)
    max_input_length: int = follow(
        "trainer.max_prompt_length",
        "Conversation tokens beyond which no further turn is sampled.",
        minimum=1,
        unit="tokens",
    )
    use_conversation_multi_turn: bool = key(
        True, "Each turn is a chat message; false: all turns continue one assistant message."
    )
    append_eos_token_after_stop_str_in_multi_turn: bool = key(
        True, "End a turn that a stop string ended with the end-of-sequence token."
    )
    chat_template: ChatTemplateConfig = section(ChatTemplateConfig)
    chat_template_kwargs: dict[str, Any] = key({}, "Passed to the chat template, e.g. enable_thinking.")
    zero_reward_on_non_stop: bool = key(
        False, "A trajectory whose last completion or input ran into a length limit gets reward 0."
    )
    apply_overlong_filtering: bool = key(
        False, "A trajectory whose last completion or input ran into a length limit is left out of the loss."
    )
    step_wise_trajectories: bool = key(False, "Train on each turn by itself.", capability="step-wise trajectories")
    batched: bool = key(
        False, "Send all prompts in one call.", capability="batched generation",
        reason="each trajectory is its own task, and the engine batches whatever is in flight",
        instead="Remove the key.",
    )  # fmt: skip
    async_engine: bool = key(
        True, "Requests run concurrently.", capability="a blocking engine",
        reason="every engine here is asynchronous", instead="Remove the key.",
    )  # fmt: skip

    num_inference_engines: int = key(1, "Engines.", minimum=1, backends=SERVERS, switch=LOCAL)
    inference_engine_tensor_parallel_size: int = key(
        1,
        "GPUs that split each layer of an engine.",
        minimum=1,
        backends=SERVERS,
        was=4,
        why="one GPU is what everyone has",
        switch=LOCAL,
    )
    inference_engine_pipeline_parallel_size: int = key(
        1, "GPUs that split the layers of an engine.", minimum=1, backends=SERVERS, switch=LOCAL
    )
    inference_engine_expert_parallel_size: int = key(
        1, "GPUs that split the experts of an engine.", minimum=1, backends=SERVERS, switch=LOCAL
    )
    inference_engine_data_parallel_size: int = key(
        1, "Copies of the model in an engine.", minimum=1, backends=SERVERS, switch=LOCAL
    )
    max_num_seqs: int = key(1024, "Sequences that an engine decodes at the same time.", minimum=1)
    gpu_memory_utilization: float = key(
        0.8, "Share of a GPU's memory that an engine takes.", above=0, maximum=1, backends=SERVERS, switch=LOCAL
    )
    max_num_batched_tokens: int = key(
        8192, "Tokens of one engine step at most.", minimum=1, unit="tokens", backends=SERVERS, switch=LOCAL
    )
    enable_prefix_caching: bool = key(True, "Keep the KV cache of shared prefixes.", backends=SERVERS, switch=LOCAL)
    enable_chunked_prefill: bool = key(True, "Split long prompts over engine steps.", backends=SERVERS, switch=LOCAL)
    enforce_eager: bool = key(
        False,
        "No CUDA graphs.",
        backends=SERVERS,
        was=True,
        why="without CUDA graphs decoding is about half as fast",
        switch=LOCAL,
    )
    vllm_v1_disable_multiproc: bool = key(True, "Run vLLM's core in the engine's own process.", backends=VLLM)
    fully_sharded_loras: bool = key(False, "Shard adapters over the engine's GPUs.", backends=VLLM)
    engine_python: str | None = key(
        None, "Python of the environment that has the engine; null: the one that runs this.", path=True,
        backends=SERVERS, switch=LOCAL,
    )  # fmt: skip
    engine_init_kwargs: dict[str, Any] = key(
        {}, "Passed to the engine as its own options.", backends=SERVERS, switch=LOCAL
    )
    enable_lora: bool = key(
        False, "Engines serve adapters. With trainer.policy.model.lora.rank above 0 each weight sync brings the "
        "policy's adapter alone; without, the weights with the adapter's work in them.", backends=SERVERS,
        instead="Remove the key: the embedded engine samples with the policy's adapter.",
    )  # fmt: skip
    rope_scaling: dict[str, Any] | None = follow(
        "trainer.rope_scaling", "Rotary scaling of the engines.", backends=SERVERS, instead="Set trainer.rope_scaling."
    )
    rope_theta: float | None = follow(
        "trainer.rope_theta",
        "Rotary base of the engines.",
        above=0,
        backends=SERVERS,
        instead="Set trainer.rope_theta.",
    )

    run_engines_locally: bool = key(True, "Start the engines; false: attach to remote ones.", backends=SERVERS)
    remote_inference_engine_urls: list[str] = key(
        [], "Addresses of engines that run already.", backends=SERVERS, switch=("generator.run_engines_locally", False),
        was=["127.0.0.1:8001"], why="an address nobody wrote down should not be called",
    )  # fmt: skip
    weight_sync_timeout: float = key(120.0, "Deadline of each wait of a weight sync.", above=0, unit="seconds")
    weight_sync_backend: str = key(
        "auto", "How weights reach the engines; auto: the fastest way to each. nccl takes CUDA IPC where engine and "
        "learner share a GPU.", choices=("auto", "nccl", "gloo", "ipc", "disk"), backends=SERVERS,
        instead="Remove the key: the embedded engine samples from the learner's own parameters.",
        was="nccl", why="the embedded engine needs no transport",
    )  # fmt: skip
    weight_transfer_threshold_cuda_ipc_GB: float = key(
        1.0,
        "Size of one bucket of a weight sync; two are in memory at a time, three where workers share the model.",
        above=0,
        unit="GB",
        backends=SERVERS,
    )
    weight_sync_path: str | None = key(
        None, "Folder for a weight sync by disk, which learner and engines can reach; null: in the run folder.",
        path=True, backends=SERVERS,
    )  # fmt: skip
    weight_sync_pause_mode: str = key(
        "abort", "What happens to requests that run when weights come: abort and carry on with what was sampled, "
        "freeze in_place, or retract into the engine's queue.", choices=("abort", "in_place", "retract"),
        backends=SERVERS,
    )  # fmt: skip
    weight_proof: str = key(
        "both", "Proof after each weight sync: digests of the engines' memory, log-probs of a fixed probe, or both.",
        choices=("digest", "probe", "both", "off"), backends=SERVERS,
    )  # fmt: skip
    weight_proof_failure: str = key(
        "quarantine", "An engine whose proof fails twice: go on without it, or stop the run.",
        choices=("quarantine", "stop"), backends=SERVERS,
    )  # fmt: skip
    weight_probe_tolerance: float | None = key(
        None, "Largest mean difference of a probe's log-probs; null: 0.001 in float32, 0.1 otherwise.", above=0,
        unit="nats", backends=SERVERS,
    )  # fmt: skip
    weight_probe_graphs: bool = key(
        True, "On a GPU, record the learner's half of the probe as CUDA graphs: it is launched in a few milliseconds, "
        "and a layer's memory in the compute format stays taken.", backends=SERVERS,
    )  # fmt: skip
    engine_start_timeout: float = key(
        1800.0, "Time until an engine must serve, or answer.", above=0, unit="seconds", backends=SERVERS
    )
    engine_restarts: int = key(
        3, "How often an engine that failed is brought back: started, or attached, and proven.", minimum=0,
        backends=SERVERS,
    )  # fmt: skip
    engine_health_interval: float = key(
        10.0, "Time between two questions whether an engine still computes; 0: none.", minimum=0, unit="seconds",
        backends=SERVERS,
    )  # fmt: skip
    engine_health_timeout: float = key(
        30.0, "Time that an engine has to answer that.", above=0, unit="seconds", backends=SERVERS
    )
    override_existing_update_group: str = key(
        "auto", "Replace a weight-sync group that an engine still holds.", choices=("auto", "enable", "disable"),
        backends=SERVERS,
    )  # fmt: skip

    enable_http_endpoint: bool = key(False, "Serve the engines over HTTP.", capability="the HTTP endpoint")
    http_endpoint_host: str = key("127.0.0.1", "Its address.", capability="the HTTP endpoint")
    http_endpoint_port: int = key(8000, "Its port.", minimum=1, maximum=65535, capability="the HTTP endpoint")
    external_proxy_url: str | None = key(
        None, "A proxy before the engines.", capability="engines behind a proxy",
        instead="Use generator.run_engines_locally=false with generator.remote_inference_engine_urls.",
    )  # fmt: skip
    external_server_urls: list[str] | None = key(
        None, "Servers behind the proxy.", capability="engines behind a proxy",
        instead="Use generator.run_engines_locally=false with generator.remote_inference_engine_urls.",
    )  # fmt: skip
    served_model_name: str | None = key(None, "The model's name in HTTP requests.", capability="the HTTP endpoint")
    enable_ray_prometheus_stats: bool = key(
        False, "Engine metrics through Ray.", capability="engine metrics through Ray",
        instead="Read metrics.jsonl, or trainer.logger.",
    )  # fmt: skip
