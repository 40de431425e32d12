"""The formats whose rows become chats, written by a chat template: chat_template.*, and what `auto` recognises."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ConfigDict

from fastpref.data.chat_templates import load_chat_template
from fastpref.data.content import Content, Format, Paired, Row, RowError, Unpaired, Writing, column, label, shown
from fastpref.data.messages import (
    STANDARD,
    Reader,
    as_content,
    is_conversation,
    is_turns,
    read_tools,
    with_system,
)


@dataclass(frozen=True)
class ChatOptions:
    """The options of every chat_template.* format."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    field_messages: str = "messages"
    field_chosen: str = "chosen"
    field_rejected: str = "rejected"
    field_prompt: str = "prompt"
    field_completion: str = "completion"
    field_label: str = "label"
    message_property_mappings: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    chat_template: str | None = None
    tools: Sequence[Any] | str | None = None

    def loaded(self) -> "ChatOptions":
        """With the chat template's text in place of its name or file."""
        return replace(self, chat_template=load_chat_template(self.chat_template, "format.chat_template"))

    def reader(self) -> Reader:
        roles = {source: target for target, sources in self.roles.items() for source in sources}
        return Reader(self.message_property_mappings, roles | {target: target for target in self.roles})

    def writing(self, row: Row) -> Writing:
        if isinstance(self.tools, str):
            return Writing(self.chat_template, read_tools(row, name=self.tools))
        return Writing(self.chat_template, read_tools(row, self.tools))


Read = Callable[[Row], Any]


def default(options: ChatOptions) -> Read:
    """A prompt in `messages`, with `chosen` and `rejected` after it."""
    reader = options.reader()

    def read(row: Row) -> Paired:
        return Paired(
            _asked(row, options.field_messages, reader),
            reader.response(column(row, options.field_chosen), options.field_chosen),
            reader.response(column(row, options.field_rejected), options.field_rejected),
            options.writing(row),
        )

    return read


def last_turns(options: ChatOptions) -> Read:
    """`chosen` but its last turn is the prompt; the last turns are the responses."""
    reader = options.reader()

    def read(row: Row) -> Paired:
        prompt, chosen = reader.conversation(row, options.field_chosen)
        rejected = reader.response(column(row, options.field_rejected), options.field_rejected)
        return Paired(with_system(row, prompt), chosen, rejected[-1:], options.writing(row))

    return read


def default_unpaired(options: ChatOptions) -> Read:
    """`messages` and a `completion`, or messages whose last turn is the completion, or a `prompt` and a completion."""
    reader = options.reader()

    def read(row: Row) -> Unpaired:
        messages, completion = options.field_messages, options.field_completion
        good = label(row, options.field_label)
        if row.get(completion) is None and row.get(messages) is not None:
            prompt, last = reader.conversation(row, messages)
            return Unpaired(with_system(row, prompt), last, good, options.writing(row))
        asked = messages if row.get(messages) is not None else options.field_prompt
        response = reader.response(column(row, completion), completion)
        return Unpaired(_asked(row, asked, reader), response, good, options.writing(row))

    return read


PAIRED: dict[str, Callable[[ChatOptions], Read]] = {
    "default": default,
    "argilla_chat": last_turns,
    "argilla": last_turns,
}
UNPAIRED: dict[str, Callable[[ChatOptions], Read]] = {"default": default_unpaired}
COLUMNS: dict[str, tuple[str, ...]] = {  # fields
    "default": ("messages", "chosen", "rejected"),
    "argilla_chat": ("chosen", "rejected"),
    "argilla": ("chosen", "rejected"),
}


def _asked(row: Row, name: str, reader: Reader) -> list[Any]:
    """Messages, or text as one user's turn."""
    value = column(row, name)
    turns = as_content(value, name, reader)
    return with_system(row, [{"role": "user", "content": turns}] if isinstance(turns, str) else turns)


# --- auto ----------------------------------------------------------------------------------------------------------


def detect(row: Row) -> Format | None:
    """The format that a row's columns and types speak for, or None."""
    form = _recognised(row)
    extra = [name for name in ("system", "tools") if row.get(name) is not None]
    return replace(form, name=f"{form.name}, with {' and '.join(extra)}") if form and extra else form


def _recognised(row: Row) -> Format | None:
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    chat = any(row.get(name) is not None for name in ("system", "tools"))  # which text alone cannot say
    if chosen is not None and rejected is not None:
        if is_turns(row.get("conversations")):
            return Format("ShareGPT conversations with chosen and rejected", _paired_from("conversations"))
        if is_turns(row.get("messages")):
            return Format("messages with chosen and rejected", _paired_from("messages"))
        if is_turns(prompt):
            return Format("a prompt of messages with chosen and rejected", _paired_from("prompt"))
        if is_conversation(chosen) and is_conversation(rejected):
            return Format("chosen and rejected conversations that share their prompt", _paired_implicit)
        if isinstance(prompt, str):
            return Format("text prompt, chosen and rejected", _paired_from("prompt", chat=chat))
        return None
    if "label" in row:
        if "completion" in row and prompt is not None:
            return Format("prompt, completion and label", _unpaired_from("prompt", chat=chat))
        for name in ("messages", "conversations"):
            if is_turns(row.get(name)):
                return Format(f"{name} and label", _unpaired_last_turn(name))
    return None


def _paired_from(name: str, *, chat: bool = False) -> Callable[[Row], Paired]:
    def read(row: Row) -> Paired:
        prompt, (chosen, rejected), writing = _prompt_and_responses(row, name, ("chosen", "rejected"), chat)
        return Paired(prompt, chosen, rejected, writing)

    return read


def _paired_implicit(row: Row) -> Paired:
    """The prompt is what both conversations begin with; each keeps at least its last turn as the response."""
    chosen = STANDARD.response(column(row, "chosen"), "chosen")
    rejected = STANDARD.response(column(row, "rejected"), "rejected")
    shared = 0
    for ours, theirs in zip(chosen[:-1], rejected[:-1]):
        if ours != theirs:
            break
        shared += 1
    if not shared:
        raise RowError(
            "chosen and rejected do not begin with the same turn, so there is no prompt", "without a shared prompt"
        )
    prompt = with_system(row, chosen[:shared])
    return Paired(prompt, chosen[shared:], rejected[shared:], Writing(tools=read_tools(row)))


def _unpaired_from(name: str, *, chat: bool = False) -> Callable[[Row], Unpaired]:
    def read(row: Row) -> Unpaired:
        prompt, (completion,), writing = _prompt_and_responses(row, name, ("completion",), chat)
        return Unpaired(prompt, completion, label(row), writing)

    return read


def _unpaired_last_turn(name: str) -> Callable[[Row], Unpaired]:
    def read(row: Row) -> Unpaired:
        prompt, completion = STANDARD.conversation(row, name)
        return Unpaired(with_system(row, prompt), completion, label(row), Writing(tools=read_tools(row)))

    return read


def _prompt_and_responses(
    row: Row, name: str, responses: tuple[str, ...], chat: bool
) -> tuple[Content, list[Content], Writing]:
    """All text, or all messages: with any response of messages, a text prompt is a user's turn."""
    prompt = as_content(column(row, name), name)
    values = {response: column(row, response) for response in responses}
    for response, value in values.items():
        if not isinstance(value, str | list | Mapping):
            raise RowError(
                f"{response} must be text or a list of messages, got {shown(value)}", "with a value of another type"
            )
    if isinstance(prompt, str) and all(isinstance(value, str) for value in values.values()) and not chat:
        if row.get("system") or row.get("tools"):
            raise RowError(
                "there is a system prompt or tools here and none in the first row, which was taken for plain text; "
                'name the format, such as "chatml.default"',
                "with a system prompt or tools, unlike the first",
            )
        return prompt, list(values.values()), Writing()
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answers: list[Content] = [STANDARD.response(value, response) for response, value in values.items()]
    return with_system(row, turns), answers, Writing(tools=read_tools(row))
