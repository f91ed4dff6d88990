"""Chat templates of several kinds: what stands before the first completion and between two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skyrl_train.errors import ConfigError, ModelError
from skyrl_train.generator.chat import CHATML, NAMED_TEMPLATES, ChatFormat, resolve_template
from skyrl_train.models.tokenizers import make_tokenizer

from .games import user

EOS = "<|im_end|>"
TAIL = "\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n"
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML
STRIPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content %}{{ m.content.split('</think>')[-1] | trim }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPACED = (  # as Llama 2 and Mistral: a space between the text and EOS
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def observed(chat: ChatFormat, last: str, *, append_eos: bool = True) -> str:
    """What follows a completion that ended with ``last``, as text with its special tokens."""
    last_id = ids(chat.tokenizer, last)[-1]
    return chat.tokenizer.decode(chat.observation_ids([user("no")], last_id=last_id, append_eos=append_eos))


def test_chatml(tokenizer: Any) -> None:
    chat = ChatFormat(tokenizer)
    assert chat.prompt_ids([user("hi")]) == ids(tokenizer, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert observed(chat, EOS) == TAIL
    assert observed(chat, "x") == EOS + TAIL
    assert observed(chat, "x", append_eos=False) == TAIL
    assert observed(chat, EOS, append_eos=False) == TAIL
    assert chat.text(ids(tokenizer, "ab" + EOS)) == "ab"
    assert chat.plain_ids([user("ab"), user("c")]) == ids(tokenizer, "abc")


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, NEEDS_SYSTEM, CHATML, NAMED_TEMPLATES["qwen3_with_thinking"]])
def test_templates_that_refuse_or_need_a_system_message(tokenizer: Any, template: str) -> None:
    assert observed(ChatFormat(tokenizer, template), EOS) == TAIL


def test_a_real_conversation_is_held_to_the_templates_own_rule(tokenizer: Any) -> None:
    chat = ChatFormat(tokenizer, NEEDS_SYSTEM)
    assert chat.prompt_ids([{"role": "system", "content": "s"}, user("u")])
    with pytest.raises(ModelError, match=r"roles \['user'\].*system first"):
        chat.prompt_ids([user("u")])


def test_a_template_that_strips_thinking_from_history_strips_nothing_that_was_sampled(rig: Any, prompt: Any) -> None:
    from .games import Book, Replies

    game = rig(
        lambda r: ["<think>why</think>7", "8"][r.order[-1]], Book(Replies, ["no"]), template=STRIPS_THINKING,
        n_samples_per_prompt=1, max_turns=2,
    )  # fmt: skip
    (made,) = game.run(prompt())
    assert made.response_ids == game.ids("<think>why</think>7" + EOS + TAIL + "8" + EOS)
    rendered = game.tokenizer.apply_chat_template(made.messages, chat_template=STRIPS_THINKING, tokenize=False)
    assert "why" not in rendered  # so tokenizing the conversation again would have lost it


def test_template_kwargs_reach_every_generation_prompt(tokenizer: Any) -> None:
    chat = ChatFormat(tokenizer, STRIPS_THINKING, {"enable_thinking": False})
    closed = "<think>\n\n</think>\n\n"
    assert tokenizer.decode(chat.prompt_ids([user("u")])).endswith("assistant\n" + closed)
    assert observed(chat, EOS) == TAIL + closed


@pytest.fixture(scope="module")
def llama() -> Any:
    made = make_tokenizer("char")
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    made.add_special_tokens({"eos_token": "<|eot_id|>", "additional_special_tokens": names})
    return made


def test_llama_3(llama: Any) -> None:
    chat = ChatFormat(llama, LLAMA3)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    tail = header.format("user") + "no<|eot_id|>" + header.format("assistant")
    assert llama.decode(chat.prompt_ids([user("hi")])).count("<|begin_of_text|>") == 1
    assert observed(chat, "<|eot_id|>") == tail
    assert observed(chat, "x") == "<|eot_id|>" + tail
    assert observed(chat, "x", append_eos=False) == tail


def test_a_space_before_eos_is_not_repeated_with_it(tokenizer: Any) -> None:
    chat = ChatFormat(tokenizer, SPACED)
    assert observed(chat, EOS) == "[INST] no [/INST]"
    assert observed(chat, "x") == f" {EOS}[INST] no [/INST]"
    assert observed(chat, "x", append_eos=False) == "[INST] no [/INST]"


def test_a_template_without_eos(tokenizer: Any) -> None:
    chat = ChatFormat(tokenizer, PLAIN)
    for last in (EOS, "x"):
        assert observed(chat, last) == "\nuser: no\nassistant: "


def test_an_eos_that_closes_the_users_message_is_not_taken_for_the_assistants(tokenizer: Any) -> None:
    only_user = PLAIN.replace("{{ m.content }}\n", "{{ m.content }}{{ '<|im_end|>' if m.role == 'user' else '' }}\n")
    assert observed(ChatFormat(tokenizer, only_user), EOS) == f"\nuser: no{EOS}\nassistant: "


def test_a_closing_token_that_is_not_the_tokenizers_eos_is_not_repeated() -> None:
    """Base models: the tokenizer's EOS is <|endoftext|>, the template closes with <|im_end|>, and that is sampled."""
    base = make_tokenizer("char")
    base.eos_token = "<|endoftext|>"
    chat = ChatFormat(base, CHATML)
    assert observed(chat, EOS) == TAIL
    assert observed(chat, "x") == EOS + TAIL


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ undefined_function() }}", "undefined"),
        ("{% for m in messages %}{{ m['text'].strip() }}{% endfor %}", "text"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "str"),
        ("{{ messages[99]['content'] }}", "99|no element"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "exactly once"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "exactly once"),
        ("hello", "exactly once"),
        ("", "no chat template|exactly once"),
    ],
)
def test_a_broken_template_is_found_at_once(tokenizer: Any, template: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        ChatFormat(tokenizer, template)


def test_a_tokenizer_without_a_template_says_what_to_set() -> None:
    bare = make_tokenizer("char")
    bare.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template.*generator\.chat_template"):
        ChatFormat(bare)
    assert observed(ChatFormat(bare, CHATML), EOS) == TAIL


class TestResolve:
    """``generator.chat_template``."""

    def test_none_is_the_tokenizers_own(self) -> None:
        assert resolve_template("name", None) is None and resolve_template("file", None) is None

    def test_names(self, tokenizer: Any) -> None:
        for name, template in NAMED_TEMPLATES.items():
            assert resolve_template("name", name) == template
            chat = ChatFormat(tokenizer, template)
            assert tokenizer.decode(chat.prompt_ids([user("u")])).startswith("<|im_start|>user\nu<|im_end|>\n")
        without = ChatFormat(tokenizer, NAMED_TEMPLATES["qwen3_without_thinking"])
        assert observed(without, EOS).endswith("assistant\n<think>\n\n</think>\n\n")

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "mine.jinja").write_text(PLAIN)
        assert resolve_template("file", str(tmp_path / "mine.jinja")) == PLAIN

    def test_an_unknown_name_lists_the_known(self) -> None:
        with pytest.raises(ConfigError, match=r"qwen4.*there are chatml.*source=file") as raised:
            resolve_template("name", "qwen4")
        assert raised.value.key == "generator.chat_template.name_or_path"

    def test_a_file_that_is_absent_a_folder_or_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
        for path in (tmp_path / "absent", tmp_path, tmp_path / "binary"):
            with pytest.raises(ConfigError, match="cannot be read"):
                resolve_template("file", str(path))
