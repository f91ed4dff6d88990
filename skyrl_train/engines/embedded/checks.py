"""What is refused before it costs anything: requests that cannot be served."""

from __future__ import annotations

from skyrl_train.engines.base import Request
from skyrl_train.errors import EngineError


def check_request(
    request: Request,
    *,
    vocabulary: int,
    max_length: int,
    can_decode: bool,
    engine: str = "embedded engine",
    takes_extra: bool = False,
) -> None:
    """Refuses a request that this engine cannot serve.

    Raises:
        EngineError: naming the request, the parameter, its value and the way out.
    """
    p, prompt = request.params, request.prompt_ids
    problems = {
        "the prompt is empty; give it at least one token": not prompt,
        f"prompt of {len(prompt)} tokens + max_new_tokens={p.max_new_tokens} exceeds the {max_length} tokens the model "
        "was made for; lower generator.max_input_length or max_generate_length": len(prompt) + p.max_new_tokens
        > max_length,
        f"max_new_tokens={p.max_new_tokens} must be at least 1": p.max_new_tokens < 1,
        f"min_new_tokens={p.min_new_tokens} must lie in 0 .. max_new_tokens={p.max_new_tokens}": not 0
        <= p.min_new_tokens
        <= p.max_new_tokens,
        f"temperature={p.temperature} must be 0 (greedy) or greater": not 0 <= p.temperature < float("inf"),
        f"top_p={p.top_p} must lie in (0, 1]; 1 is off": not 0 < p.top_p <= 1,
        f"top_k={p.top_k} must be at least 1, or -1 for off": p.top_k < 1 and p.top_k not in (-1, 0),
        f"min_p={p.min_p} must lie in [0, 1]; 0 is off": not 0 <= p.min_p <= 1,
        f"repetition_penalty={p.repetition_penalty} must be above 0; 1 is off": not 0
        < p.repetition_penalty
        < float("inf"),
        f"n={p.n} must be at least 1": p.n < 1,
        f"stop={p.stop!r} holds an empty string; remove it": "" in p.stop,
        f"stop={p.stop!r} needs a tokenizer to match text; make the engine with one": bool(p.stop) and not can_decode,
        f"extra={dict(p.extra)!r} is for another backend; remove it": bool(p.extra) and not takes_extra,
    }
    for text, wrong in problems.items():
        if wrong:
            raise EngineError(f"{engine}, request {request.id!r}: {text}.")
    named = {"prompt": prompt, "stop_token_ids": p.stop_token_ids, "logit_bias": p.logit_bias or ()}
    for name, ids in named.items():
        if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
            outside = min(ids) if min(ids) < 0 else max(ids)
            raise EngineError(
                f"{engine}, request {request.id!r}: {name} holds the id {outside}, and the model's vocabulary "
                f"is 0 .. {vocabulary - 1}. Use the tokenizer that belongs to this model."
            )
