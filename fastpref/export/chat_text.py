"""Ollama's template for a chat template whose conversations are turns that follow each other.

Ollama does not run Jinja, and a model without its own template gets the user's text and nothing else. A template in
its language (Go's) is therefore derived from what the chat template writes: the text around each role's turn, taken
from one conversation and compared on others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER, _ANSWER, _NEXT = "Syst3m words.", "Us3r words.", "Answ3r words.", "N3xt words."
Message = dict[str, str]


@dataclass(frozen=True)
class Turns:
    """The text around each turn, and before and after a conversation."""

    system: tuple[str, str] | None  # None if the template has no system turn
    user: tuple[str, str]
    assistant: tuple[str, str]
    without_system: str  # at the beginning of a conversation without a system turn

    def written(self, messages: Sequence[Message]) -> str:
        """Return what Ollama writes for a conversation that ends with the user."""
        text = "" if messages[0]["role"] == "system" else self.without_system
        for message in messages:
            before, after = getattr(self, message["role"])
            text += before + message["content"] + after
        return text + self.assistant[0]

    def template(self) -> str:
        """Return the template in Go's language. Ollama itself writes BOS before it."""
        parts = []
        for role in ("system", "user", "assistant"):
            around = getattr(self, role)
            if around is not None:
                parts.append(f'{{{{ if eq .Role "{role}" }}}}{around[0]}{{{{ .Content }}}}{around[1]}{{{{ end }}}}')
        start = "{{ if not .System }}" + self.without_system + "{{ end }}" if self.without_system else ""
        return f"{start}{{{{ range .Messages }}}}{''.join(parts)}{{{{ end }}}}{self.assistant[0]}"


def turns_of(tokenizer: PreTrainedTokenizerBase, keywords: Mapping[str, Any], ends: Sequence[str]) -> Turns | None:
    """Return the turns of a tokenizer's chat template, or None if its conversations are not such turns.

    `ends`: the tokens that end answers. Where turns can be divided in several ways, one of them ends a turn.
    """

    def render(messages: Sequence[Message]) -> str:
        text: Any = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **keywords
        )
        bos = tokenizer.bos_token
        adds = bool(bos) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        return text.removeprefix(str(bos)) if adds else text

    try:
        turns = _found(render, ends)
        if any(mark in part for part in _parts(turns) for mark in ("{{", "}}", '"""')):
            return None
        return turns if all(render(talk) == turns.written(talk) for talk in _talks(turns)) else None
    except Exception:  # a chat template may raise anything for a conversation that it does not know
        return None


def _found(render: Callable[[Sequence[Message]], str], ends: Sequence[str]) -> Turns:
    """Read the turns from the rendering of three conversations."""
    user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    beginning, _, to_answer = render([user]).partition(_USER)
    talk = render([user, answer, {"role": "user", "content": _NEXT}])
    to_user = talk.partition(_ANSWER)[2].partition(_NEXT)[0]
    end = _after_end(to_user, ends)
    opening = to_user[end:] if beginning.endswith(to_user[end:]) else _common_end(beginning, to_user)
    closing = to_user.removesuffix(opening)
    closed = _common_start(closing, to_answer)
    start = beginning.removesuffix(opening)
    return Turns(_system(render, opening), (opening, closed), (to_answer[len(closed) :], closing), start)


def _system(render: Callable[[Sequence[Message]], str], opening: str) -> tuple[str, str] | None:
    """Return the text around a system turn, or None if the template refuses it or writes it into the user's."""
    try:
        text = render([{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}])
    except Exception:  # a chat template refuses what it does not know as it likes
        return None
    before, found, after = text.partition(_SYSTEM)
    between = after.partition(_USER)[0]
    return (before, between.removesuffix(opening)) if found and between.endswith(opening) else None


def _after_end(text: str, ends: Sequence[str]) -> int:
    """Return where a text goes on after the token that ends a turn, and the line ends that follow it, or 0."""
    places = [text.index(end) + len(end) for end in ends if end in text]
    at = min(places, default=0)
    return at + len(text[at:]) - len(text[at:].lstrip("\n")) if places else 0


def _talks(turns: Turns) -> list[list[Message]]:
    """Return conversations on which what was found is compared."""

    def message(role: str, content: str) -> Message:
        return {"role": role, "content": content}

    talk = [message("user", "a b"), message("assistant", "c, d"), message("user", "e"), message("assistant", "f\n\ng")]
    talks = [[message("user", "x")], [*talk, message("user", "h?")], [*talk[:2], message("user", "i")]]
    if turns.system is not None:
        talks += [[message("system", "Be k1nd."), *talk] for talk in talks]
    return talks


def _parts(turns: Turns) -> list[str]:
    return [*(turns.system or ()), *turns.user, *turns.assistant, turns.without_system]


def _common_end(left: str, right: str) -> str:
    return _common_start(left[::-1], right[::-1])[::-1]


def _common_start(left: str, right: str) -> str:
    size = next((at for at, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))
    return left[:size]
