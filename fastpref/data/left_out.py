"""Find words of a row's messages that the chat template leaves out of its text."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastpref.data.rows.columns import REASONING
from fastpref.data.rows.content import Message
from fastpref.data.template.render import common

_SWITCHES = re.compile(r"/(?:no_?)?think\b|/system_override\b")  # switches that a template reads and may remove

_OF_DATA = re.compile(r"think|tool|^/")


@dataclass(frozen=True)
class Piece:
    """Words of one message that its rendered text must contain."""

    what: str
    words: str

    def __str__(self) -> str:
        words = " ".join(self.words.split())
        return f"{self.what}, {words if len(words) <= 60 else words[:57].rstrip() + '...'}"


def left_out(pieces: Sequence[Piece], text: str, before: str = "") -> list[Piece]:
    """Return the pieces whose words are missing in `text` after the prefix that it shares with `before`.

    Words that occur several times in the pieces must occur as often in the text. White space, JSON escapes and thinking
    switches are not compared, because templates trim, encode and remove them.
    """
    shared = common(before, text)
    counts = Counter(piece.words.strip() for piece in pieces)
    if all(not words or text.count(words, shared) >= many for words, many in counts.items()):
        return []  # the usual case, in which nothing needs to be normalised
    rest = plain(text[shared:])
    missing, whole, start = [], "", ""
    same: dict[str, list[Piece]] = {}
    for piece in pieces:
        same.setdefault(plain(piece.words), []).append(piece)
    for words, alike in same.items():
        forms = list(_forms(alike[0].words))
        times = max(map(rest.count, forms)) if words else len(alike)
        if times < len(alike) and shared:  # its first letters may be part of the shared prefix
            whole, start = whole or plain(text), start or plain(text[:shared])
            times = max(times, *(whole.count(form) - start.count(form) for form in forms))
        if times < len(alike):
            missing.append(alike[times])
    return missing


def plain(text: str) -> str:
    """Return text without white space, and without the switches that templates read."""
    return "".join(_SWITCHES.sub("", text).split())


def prompt_pieces(prompt: Sequence[Message], tools: Sequence[Any] | None) -> list[Piece]:
    """Return the words that a prompt's text must contain. Templates may leave out the reasoning of earlier turns."""
    pieces = [Piece("the tool", name) for name in tool_names(tools)]
    for message in prompt:
        pieces += _pieces(message, f"a turn of role {message['role']}", reasoning=False)
    return pieces


def completion_pieces(completion: Sequence[Message], name: str) -> list[Piece]:
    """Return the words that a completion's text must contain."""
    pieces = []
    for message in completion:
        role = "" if message["role"] == "assistant" else f"a turn of role {message['role']} in "
        pieces += _pieces(message, f"{role}{name}", reasoning=True)
    return pieces


def says_something(message: Message, ends: Sequence[str] = ()) -> bool:
    """Return whether an assistant message has a tool call, reasoning, or words other than the tokens `ends`."""
    words = "".join(piece.words for piece in _pieces(message, "", reasoning=True))
    for end in ends:
        words = words.replace(end, "")
    return bool(words.strip()) or bool(message.get("tool_calls"))


class SpecialWords:
    """Finds special tokens in the words of messages, which tokenising would turn into control tokens.

    Tokens of tool calls and reasoning are ignored, because data sets use them to write calls and thoughts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        names = {str(token) for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        names = {name for name in names if name.strip() and not _OF_DATA.search(name)}
        self._firsts = {name[0] for name in names}
        self._any = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None

    def find(self, piece: Piece) -> str | None:
        """Return the first special token in a piece and where it stands, or None."""
        if self._any is None or not any(first in piece.words for first in self._firsts):
            return None
        match = self._any.search(piece.words)
        return f"{match.group()} in {piece.what}" if match else None


def tool_names(tools: Sequence[Any] | None) -> list[str]:
    given = [tool.get("function", tool) if isinstance(tool, Mapping) else {} for tool in tools or ()]
    return [tool["name"] for tool in given if isinstance(tool, Mapping) and isinstance(tool.get("name"), str)]


def _pieces(message: Message, where: str, *, reasoning: bool) -> Iterator[Piece]:
    assistant = message["role"] == "assistant"
    for content in _texts(message.get("content")):
        thought, tag, answer = content.rpartition("</think>") if assistant else ("", "", content)
        if tag and reasoning:
            yield Piece(f"the reasoning of {where}", thought.rpartition("<think>")[2])
        yield Piece(where, answer)
    if not assistant:
        return
    for key in REASONING if reasoning else ():
        if isinstance(words := message.get(key), str):
            yield Piece(f"the reasoning of {where}", words)
    for call in message.get("tool_calls") or ():
        called = call.get("function", call) if isinstance(call, Mapping) else {}
        if isinstance(called, Mapping) and isinstance(called.get("name"), str):
            yield Piece(f"a tool call of {where}", called["name"])
            for words in _leaves(called.get("arguments")):
                yield Piece(f"an argument of a tool call of {where}", words)


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            words = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(words, str):
                yield words


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts in a call's arguments, given as a mapping or as JSON."""
    if isinstance(value, str):
        try:
            inner = json.loads(value)
        except ValueError:
            inner = None
        if isinstance(inner, Mapping):
            yield from _leaves(inner)
        else:
            yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _forms(words: str) -> Iterator[str]:
    """Yield words as they are, as Python writes them in single quotes, as JSON, and as JSON within JSON."""
    words = words.strip()
    yield plain(words)
    yield plain(words.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r"))
    for ascii_only in (False, True):
        once = json.dumps(words, ensure_ascii=ascii_only)[1:-1]
        yield plain(once)
        yield plain(json.dumps(once, ensure_ascii=ascii_only)[1:-1])
