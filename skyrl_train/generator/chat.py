"""Conversations as token ids, such that no sampled token is ever tokenized again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skyrl_train.errors import ConfigError, ModelError
from skyrl_train.types import Message

_MARK = "\u2063assistant-text\u2063"  # stands for a completion while we look at what the template puts after one

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
NAMED_TEMPLATES = {
    "chatml": CHATML,
    # What the policy thought stays in the conversation as it was sampled, so both keep every token; they differ in
    # whether the next turn starts with thinking already closed.
    "qwen3_with_thinking": CHATML,
    "qwen3_without_thinking": CHATML.replace(
        "assistant\\n' -}}{%- endif", "assistant\\n<think>\\n\\n</think>\\n\\n' -}}{%- endif"
    ),
}


def resolve_template(source: str, name_or_path: str | None) -> str | None:
    """The chat template that ``generator.chat_template`` asks for, or None for the tokenizer's own.

    Raises:
        ConfigError: an unknown name, or a file that cannot be read.
    """
    if name_or_path is None:
        return None
    key = "generator.chat_template.name_or_path"
    if source == "name":
        if name_or_path not in NAMED_TEMPLATES:
            known = ", ".join(NAMED_TEMPLATES)
            raise ConfigError(
                key,
                name_or_path,
                f"no template of that name; there are {known}.",
                "Set one of these, or generator.chat_template.source=file and a path to a Jinja file.",
            )
        return NAMED_TEMPLATES[name_or_path]
    try:
        return Path(name_or_path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(key, name_or_path, f"the template file cannot be read ({error}).") from error


class ChatFormat:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer.
        template: a Jinja chat template; None takes the tokenizer's own.
        template_kwargs: passed to the template (``enable_thinking=False`` and the like).

    Raises:
        ModelError: there is no chat template, or it does not render a conversation.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, template_kwargs: dict[str, Any] | None = None):
        self.tokenizer = tokenizer
        self._template = template
        self._kwargs = template_kwargs or {}
        marked = tokenizer.added_tokens_decoder.items()
        self.special_ids = frozenset(tokenizer.all_special_ids) | {i for i, token in marked if token.special}
        self._opening: list[Message] = [{"role": "user", "content": "x"}]
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                f"the tokenizer of '{tokenizer.name_or_path}' has no chat template. "
                "Set generator.chat_template.source=name and generator.chat_template.name_or_path=chatml, or a file."
            )
        self._choose_opening()  # fails now rather than in the first long rollout

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation so far, ending where the assistant is to write."""
        return self._encode(self._render(messages))

    def observation_ids(self, messages: Sequence[Message], *, last_id: int, append_eos: bool) -> list[int]:
        """What stands between a completion's last sampled token and the next turn's first.

        Args:
            messages: the env's reply.
            last_id: the completion's last token. If it is the one with which the template closes an assistant message,
                be that EOS or another, it is not repeated.
            append_eos: when the completion ended otherwise (a stop string), close it with the template's EOS first.
        """
        ids = self._encode(self._observation_tail(messages))
        place = next((i for i, token in enumerate(ids) if token in self.special_ids), None)
        if place is None or self.tokenizer.decode(ids[:place]).strip():
            return ids
        closed = ids[place] == last_id or (ids[place] == self.tokenizer.eos_token_id and not append_eos)
        return ids[place + 1 :] if closed else ids

    def plain_ids(self, messages: Sequence[Message]) -> list[int]:
        """The reply's text alone, for conversations kept inside one assistant message."""
        return self._encode("".join(m["content"] for m in messages))

    def text(self, ids: Sequence[int]) -> str:
        """The text of sampled tokens, for the env and for people."""
        # Of a list, transformers asks every element whether it is a number.
        return self.tokenizer.decode(np.asarray(ids, dtype=np.int64), skip_special_tokens=True)

    def _choose_opening(self) -> None:
        """Finds an opening that the template takes: some refuse a system message, some insist on one."""
        reply: list[Message] = [{"role": "user", "content": "x"}]
        try:
            self._observation_tail(reply)
        except ModelError as first:
            self._opening = [{"role": "system", "content": "x"}, *self._opening]
            try:
                self._observation_tail(reply)
            except ModelError:
                raise first from None

    def _observation_tail(self, messages: Sequence[Message]) -> str:
        probe: list[Message] = [*self._opening, {"role": "assistant", "content": _MARK}, *messages]
        rendered = self._render(probe)
        if rendered.count(_MARK) != 1:
            raise ModelError(
                "the chat template does not render an assistant message's text exactly once, so the tokens after a "
                "turn cannot be told. Set generator.chat_template to a plain template (chatml)."
            )
        return rendered.split(_MARK)[1]

    def _render(self, messages: Sequence[Message]) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self._template, add_generation_prompt=True, tokenize=False, **self._kwargs
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            roles = [m.get("role") for m in messages]
            raise ModelError(f"the chat template refused a conversation with the roles {roles}: {error}") from error

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
