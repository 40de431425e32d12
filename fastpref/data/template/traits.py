"""Find the form of messages that a chat template accepts, by rendering, and convert messages to it.

The form concerns content in parts and the arguments of tool calls."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fastpref.data.rows.content import Message, Writing
from fastpref.data.rows.messages import KNOWN_ROLES, SYSTEM_ROLES
from fastpref.data.rows.parts import joined

_WORDS, _MORE = "qzfirst", "qzsecond"  # no template has these
_PARTS = [{"type": "text", "text": _WORDS}, {"type": "text", "text": _MORE}]
_ASKED = {"role": "user", "content": "-"}
_NO_TOKENS = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token"), "")


@dataclass(frozen=True)
class Traits:
    """The forms of messages that a chat template accepts."""

    iterates: frozenset[str]
    """Roles whose content the template writes part by part."""
    needs_parts: frozenset[str]
    """Roles whose content the template writes only if it is in parts."""
    arguments_as_text: bool
    """Whether a call's arguments must be JSON text, because the template fails, or writes Python, for a mapping."""
    no_words: Mapping[str, Any]
    """The content (empty text, None or no key) with which the template writes a turn that only has a call."""


def for_template(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, writing: Writing) -> list[Message]:
    """Return messages in the form that a row's template accepts: text or parts, arguments as a mapping or JSON text.

    A template that writes parts gets them; for other templates, the parts of a message are joined.
    """
    template = template_of(tokenizer, writing)
    if template is None:
        return list(messages)
    traits = traits_of(template)
    return [_as_taken(message, traits) for message in messages]


def template_of(tokenizer: PreTrainedTokenizerBase, writing: Writing) -> str | None:
    """Return the Jinja that writes a row, or None if there is none."""
    own: Any = writing.chat_template or tokenizer.chat_template or writing.without_template
    if not isinstance(own, dict):
        return own
    return (own.get("tool_use") if writing.tools else None) or own.get("default") or next(iter(own.values()), None)


@lru_cache(maxsize=64)
def traits_of(template: str) -> Traits:
    """Find the traits of a chat template by rendering. A form that it refuses to write is not accepted."""
    iterates, needs_parts = set[str](), set[str]()
    for role in KNOWN_ROLES:
        if _writes_any(template, _chats(role, _PARTS), (_WORDS, _MORE), ("'text'", '"text"')):
            iterates.add(role)
            if not _writes_any(template, _chats(role, _WORDS), (_WORDS,), ()):
                needs_parts.add(role)
    return Traits(frozenset(iterates), frozenset(needs_parts), *_calls(template))


def _chats(role: str, content: Any) -> list[list[Message]]:
    """Return chats with a turn of this role and content, whose other turns are text or parts."""
    return [_chat({"role": role, "content": content}, words) for words in ("-", [{"type": "text", "text": "-"}])]


def _chat(turn: Message, words: Any) -> list[Message]:
    asked = {"role": "user", "content": words}
    if turn["role"] in SYSTEM_ROLES:
        return [turn, asked]
    if turn["role"] == "tool":
        return [asked, _calling({}, {"content": words}), {**turn, "name": "f", "tool_call_id": "abcdefghi"}]
    return [asked, turn] if turn["role"] == "assistant" else [turn]


_NO_WORDS: tuple[dict[str, Any], ...] = ({"content": ""}, {"content": None}, {})


def _calling(arguments: Any, no_words: Mapping[str, Any]) -> Message:
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", **no_words, "tool_calls": [call]}


def _calls(template: str) -> tuple[bool, Mapping[str, Any]]:
    """Return whether a template needs a call's arguments as text, and the content that a turn with a call needs."""
    arguments = {_WORDS: _MORE}
    text = json.dumps(arguments)
    forms = ((False, arguments, (_WORDS, _MORE)), (True, text, (text,)))
    for as_text, given, wanted in forms:
        for no_words in _NO_WORDS:
            chat = [_ASKED, _calling(given, no_words)]
            if _writes(template, chat, wanted, (f"{{'{_WORDS}'", "None")):
                return as_text, no_words
    return False, _NO_WORDS[0]


def _writes_any(template: str, chats: list[list[Message]], wanted: Sequence[str], unwanted: Sequence[str]) -> bool:
    return any(_writes(template, chat, wanted, unwanted) for chat in chats)


def _writes(template: str, chat: list[Message], wanted: Sequence[str], unwanted: Sequence[str]) -> bool:
    """Return whether a template writes a chat with all wanted words and no unwanted ones."""
    try:
        written, _ = render_jinja_template([chat], chat_template=template, **_NO_TOKENS)
    except Exception:  # Jinja's errors, and whatever a template's Python raises
        return False
    return all(word in written[0] for word in wanted) and not any(word in written[0] for word in unwanted)


def _as_taken(message: Message, traits: Traits) -> Message:
    changed: dict[str, Any] = {}
    role, content = message["role"], message.get("content")
    if isinstance(content, list) and role not in traits.iterates:
        changed["content"] = joined(content)
    elif isinstance(content, str) and role in traits.needs_parts:
        changed["content"] = [{"type": "text", "text": content}]
    if message.get("tool_calls"):
        if traits.arguments_as_text:
            changed["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
        if not content:
            message = {name: value for name, value in message.items() if name != "content"}
            changed |= traits.no_words
    return {**message, **changed} if changed else message


def _with_text(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return call
    return {
        **call,
        "function": {**function, "arguments": json.dumps(function.get("arguments", {}), ensure_ascii=False)},
    }
