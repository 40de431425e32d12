"""From a row of a file to a prompt and its completions.

A format is a function from a row to a `Paired` or an `Unpaired`. Prompts and completions are either text or lists of
chat messages; `tokenize.py` renders the latter with the tokenizer's chat template.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Content = str | list[Message]  # text, or chat messages
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Paired:
    prompt: Content
    chosen: Content
    rejected: Content


@dataclass(frozen=True)
class Unpaired:
    prompt: Content
    completion: Content
    label: bool


@dataclass(frozen=True)
class Format:
    name: str
    """What was recognised, in words."""
    read: Callable[[Row], Paired | Unpaired]
    """Raises ValueError for a row that is not of the format."""


def detect(row: Row) -> Format | None:
    """The format that a first row's columns and types speak for, or None."""
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if chosen is not None and rejected is not None:
        if _is_turns(row.get("conversations")):
            return Format("ShareGPT conversations with chosen and rejected", _paired_from("conversations"))
        if _is_turns(row.get("messages")):
            return Format("messages with chosen and rejected", _paired_from("messages"))
        if _is_turns(prompt):
            return Format("a prompt of messages with chosen and rejected", _paired_from("prompt"))
        if _is_conversation(chosen) and _is_conversation(rejected):
            return Format("chosen and rejected conversations that share their prompt", _paired_implicit)
        if isinstance(prompt, str):
            return Format("text prompt, chosen and rejected", _paired_from("prompt"))
        return None
    if "label" in row:
        if "completion" in row and prompt is not None:
            return Format("prompt, completion and label", _unpaired_from("prompt"))
        for column in ("messages", "conversations"):
            if _is_turns(row.get(column)):
                return Format(f"{column} and label", _unpaired_last_turn(column))
    return None


def unpair(pair: Paired) -> tuple[Unpaired, Unpaired]:
    """A pair as a desirable and an undesirable response."""
    return Unpaired(pair.prompt, pair.chosen, True), Unpaired(pair.prompt, pair.rejected, False)


def _paired_from(column: str) -> Callable[[Row], Paired]:
    def read(row: Row) -> Paired:
        prompt, chosen, rejected = _prompt_and_responses(row, column, "chosen", "rejected")
        return Paired(prompt, chosen, rejected)

    return read


def _paired_implicit(row: Row) -> Paired:
    """The prompt is what both conversations begin with; each keeps at least its last turn as the response."""
    chosen, rejected = _turns(row["chosen"], "chosen"), _turns(row["rejected"], "rejected")
    shared = 0
    for ours, theirs in zip(chosen[:-1], rejected[:-1]):
        if ours != theirs:
            break
        shared += 1
    if not shared:
        raise ValueError("chosen and rejected do not begin with the same turn, so there is no prompt")
    return Paired(chosen[:shared], chosen[shared:], rejected[shared:])


def _unpaired_from(column: str) -> Callable[[Row], Unpaired]:
    def read(row: Row) -> Unpaired:
        prompt, completion = _prompt_and_responses(row, column, "completion")
        return Unpaired(prompt, completion, read_label(row["label"]))

    return read


def _unpaired_last_turn(column: str) -> Callable[[Row], Unpaired]:
    def read(row: Row) -> Unpaired:
        turns = _turns(row[column], column)
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise ValueError(f"{column} must end with an assistant turn that answers something before it")
        return Unpaired(turns[:-1], turns[-1:], read_label(row["label"]))

    return read


def read_label(value: Any) -> bool:
    """true/false as a boolean, 0/1, or the words in any case."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise ValueError(f"label must be true or false, 0 or 1, got {value!r}")


def _prompt_and_responses(row: Row, column: str, *responses: str) -> list[Content]:
    """All text, or all messages: a text prompt before any response of messages is a user's turn."""
    prompt = _content(row, column)
    if isinstance(prompt, str) and not all(isinstance(row[name], str | None) for name in responses):
        prompt = [{"role": "user", "content": prompt}]
    return [prompt, *(_response(row, name, prompt) for name in responses)]


def _content(row: Row, column: str) -> Content:
    value = row[column]
    if isinstance(value, str):
        return value
    turns = _turns(value, column)
    if not turns:
        raise ValueError(f"{column} is empty")
    return turns


def _response(row: Row, column: str, prompt: Content) -> Content:
    """A response after its prompt: text, a message or messages; text after messages is an assistant's turn."""
    value = row[column]
    if isinstance(value, str):
        return value if isinstance(prompt, str) else [{"role": "assistant", "content": value}]
    if value is None:
        raise ValueError(f"{column} is missing")
    return _turns([value] if isinstance(value, Mapping) else value, column)


# ShareGPT's names for roles.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


def _turns(value: Any, column: str) -> list[Message]:
    """Chat messages from `role`/`content` or ShareGPT's `from`/`value`. Other keys pass through to the template."""
    if not isinstance(value, list):
        raise ValueError(f"{column} must be text or a list of messages, got {type(value).__name__}")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping) or not _is_turn(turn):
            raise ValueError(f"{column} holds {turn!r:.80}, a message has role and content (or from and value)")
        message = {k: v for k, v in _without_none(turn).items() if k not in ("from", "value")}
        role = turn.get("role") or turn.get("from")
        message["role"] = _role(turn)
        if message["role"] not in _KNOWN_ROLES:
            known = ", ".join((*_KNOWN_ROLES, *_ROLES))
            raise ValueError(f"{column} has a turn of role {role!r}; known roles are {known}")
        if "content" not in message and "tool_calls" not in message:
            if not isinstance(turn.get("value"), str):
                raise ValueError(f"{column} has a turn of role {role!r} without content")
            message["content"] = turn["value"]
        turns.append(message)
    return turns


def _without_none(value: Any) -> Any:
    """A table fills keys that only some messages or tool calls have with None; a template must not see those."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _role(turn: Mapping[str, Any]) -> str:
    role = str(turn.get("role") or turn.get("from"))
    return _ROLES.get(role, role)


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value.get("role") or value.get("from"))


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_turn(turn) for turn in value)


def _is_conversation(value: Any) -> bool:
    """A list of messages that carries its own prompt: more than an answer."""
    return _is_turns(value) and len(value) > 1 and _role(value[0]) != "assistant"
