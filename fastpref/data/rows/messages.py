"""Convert chat messages of any data set to one form: `role`, `content`, and other keys that a template reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastpref.data.rows.columns import column
from fastpref.data.rows.content import Content, Message, Row, RowError, shown
from fastpref.data.rows.parts import joined, read_parts
from fastpref.data.rows.tool_calls import read_calls

SYSTEM_ROLES = ("system", "developer")
KNOWN_ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "observation": "tool", "function_call": "assistant",
    "tool_call": "assistant", "tool_response": "tool",  # ms-swift's
    "function": "tool",  # OpenAI's role before tools were introduced
}  # fmt: skip
_CALLING_ROLES = ("function_call", "tool_call")  # the content of such a message is a call as JSON
_WRONG_TYPE = "with a value of another type"
_SILENT = (*SYSTEM_ROLES, "assistant")  # the roles whose turns ask nothing
_UNTRAINED = ("weight", "train", "loss")
"""Keys of a message that mark it as not trained: OpenAI's, Axolotl's, ms-swift's."""
OPENING = "the conversation opens with the assistant's turn, which answers nothing and is not scored"
TRAILING = "turns after the assistant's last trained one are left out, as nothing in them is scored"


@dataclass(frozen=True)
class Reader:
    """Reads messages with the keys and roles of a data set."""

    properties: Mapping[str, str] = field(default_factory=dict)  # property of a message → its key in the data
    roles: Mapping[str, str] = field(default_factory=dict)  # further roles in the data → role for the template

    @cached_property
    def known_roles(self) -> dict[str, str]:
        """Return every role that may be in the data, with the template's name for it."""
        targets = dict.fromkeys((*KNOWN_ROLES, *self.roles.values()))
        return {role: role for role in targets} | SHAREGPT_ROLES | dict(self.roles)

    def turns(self, value: Any, name: str) -> list[Message]:
        """Read a list of messages. Keys besides role and content are kept. Raises RowError naming the column `name`."""
        if not isinstance(value, list):
            raise RowError(f"{name} must be text or a list of messages, got {shown(value)}", _WRONG_TYPE)
        return [self._turn(turn, name) for turn in value]

    def completion(self, value: Any, name: str) -> list[Message]:
        """Read the assistant's text, a message, or messages that end with the assistant's. Raises RowError."""
        if isinstance(value, str):
            return says(value)
        turns = self.turns([value] if isinstance(value, Mapping) else value, name)
        if turns and turns[-1]["role"] != "assistant":
            raise RowError(
                f"{name} ends with a turn of role {turns[-1]['role']!r}; a completion ends with the assistant's",
                "whose completion is not the assistant's",
            )
        return turns

    def conversation(self, row: Row, name: str, *, all_of_it: bool = False) -> tuple[list[Message], list[Message]]:
        """Split a conversation before its last turn, which must be the assistant's. Raises RowError.

        With `all_of_it`, split it before all assistant turns at its end.
        """
        turns = self.completion(column(row, name), name)
        at = len(turns) - 1
        while all_of_it and at > 0 and turns[at - 1]["role"] == "assistant":
            at -= 1
        if at < 1:
            raise RowError(
                f"{name} must end with an assistant turn that answers something before it", "without a prompt"
            )
        return turns[:at], turns[at:]

    def answered(self, row: Row, name: str) -> tuple[list[Message], list[Message], tuple[str, ...]]:
        """Split a conversation before the assistant's first turn that answers something. Also returns remarks.

        The second part ends with the assistant's last trained turn; what follows cannot be scored. Raises RowError.
        """
        turns = self.turns(column(row, name), name)
        last = max((at for at, turn in enumerate(turns) if is_trained(turn)), default=-1)
        asked = next((at for at, turn in enumerate(turns) if turn["role"] not in _SILENT), len(turns))
        first = next((at for at in range(asked, last + 1) if turns[at]["role"] == "assistant"), None)
        if first is None:
            raise RowError(
                f"{name} has no trained turn of the assistant that answers something before it", "without a prompt"
            )
        remarks = (OPENING,) * any(turn["role"] == "assistant" for turn in turns[:first])
        remarks += (TRAILING,) * (last + 1 < len(turns))
        return turns[:first], turns[first : last + 1], remarks

    def _turn(self, turn: Any, name: str) -> Message:
        role_key, content_key = self.properties.get("role", "role"), self.properties.get("content", "content")
        given = _role(turn, role_key)
        if not given:
            raise RowError(
                f"{name} holds {shown(turn)}, a message has {role_key} and {content_key} (or from and value)",
                "with a message that is none",
            )
        role = self.known_roles.get(given) if isinstance(given, str) else None
        if role is None:
            raise RowError(
                f"{name} has a turn of role {given!r}; known roles are {', '.join(self.known_roles)}; name others by "
                "the option roles of chat_template formats",
                "with an unknown role",
            )
        sources = {role_key, content_key, "from", "value", *self.properties.values()}
        cleaned = {key: value for key, value in turn.items() if value is not None}
        message = {k: v for k, v in cleaned.items() if k not in sources} | {"role": role}
        for target, source in self.properties.items():
            if target not in ("role", "content") and source in cleaned:
                message[target] = cleaned[source]
        content = cleaned.get(content_key, cleaned.get("value"))
        calls: list[Any] = []
        for key in ("tool_calls", "function_call"):
            if key in message:
                calls += read_calls(message.pop(key), name)
        if given in _CALLING_ROLES and role == "assistant" and content is not None:
            calls += read_calls(
                joined(read_parts(content, name, given)) if isinstance(content, list) else content, name
            )
            content = None
        if calls:
            message["tool_calls"] = calls
        if content is not None:
            if not isinstance(content, str | list):
                raise RowError(
                    f"{name} has a turn of role {given!r} whose {content_key} is {shown(content)}, not text",
                    _WRONG_TYPE,
                )
            message["content"] = read_parts(content, name, given) if isinstance(content, list) else content
        elif not calls:
            raise RowError(f"{name} has a turn of role {given!r} without content", "with a message without content")
        return message


STANDARD = Reader()


def with_system(row: Row, turns: list[Message]) -> list[Message]:
    """Put a `system` column before the turns, unless it is empty or they have a system turn."""
    words = row.get("system")
    if not words:
        return turns
    if not isinstance(words, str):
        raise RowError(f"system must be text, got {shown(words)}", _WRONG_TYPE)
    if turns and turns[0]["role"] in SYSTEM_ROLES:
        if joined(turns[0].get("content")).strip() == words.strip():
            column(row, "system")  # mark the column as read, because the turn repeats it
        return turns
    return [{"role": "system", "content": row["system"]}, *turns]


def words(message: Message, name: str) -> str:
    """Return a message's text, for formats without a chat template. Raises RowError if there is more than text."""
    content = message.get("content")
    if message.get("tool_calls") or not isinstance(content, str | list):
        raise RowError(
            f"{name} has a turn of role {message['role']!r} that is more than text; a chat_template format writes it",
            "with a turn that is more than text",
        )
    return joined(content)


def untrained(message: Message) -> list[str]:
    """Return the keys that mark a message as not trained: a weight of 0, or train or loss = false."""
    return [key for key in _UNTRAINED if _is_off(message.get(key))]


def is_trained(message: Message) -> bool:
    """Return whether a message is the assistant's, and not marked as not trained."""
    return message["role"] == "assistant" and not untrained(message)


def _is_off(weight: object) -> bool:
    return weight is False or (isinstance(weight, int | float) and weight == 0)


def is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_role, value))


def as_content(value: Any, name: str, reader: Reader = STANDARD) -> Content:
    """Return text unchanged, or a list of at least one message. Raises RowError."""
    if isinstance(value, str):
        return value
    turns = reader.turns(value, name)
    if not turns:
        raise RowError(f"{name} is empty", "with an empty prompt")
    return turns


def says(words: str) -> list[Message]:
    return [{"role": "assistant", "content": words}]


def as_turns(prompt: Content) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _role(turn: Any, key: str = "role") -> Any:
    """Return the role of a message as it is in the data, or None if the value is no message."""
    return turn.get(key) or turn.get("from") if isinstance(turn, Mapping) else None
