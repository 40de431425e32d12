"""The formats chat_template.*, whose rows become chats that a chat template writes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ConfigDict

from fastpref.data.rows.auto import as_answers, as_turns
from fastpref.data.rows.columns import PAIR, NamedFormat
from fastpref.data.rows.content import Message, Paired, Row, Unpaired, Writing, column, label
from fastpref.data.rows.messages import Reader, as_content, with_system
from fastpref.data.rows.overlap import other_turns
from fastpref.data.rows.reading import writing
from fastpref.data.template.named import load_chat_template


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
        """Replace the chat template's name or file by its text. Raises UserError."""
        return replace(self, chat_template=load_chat_template(self.chat_template, "format.chat_template"))

    def reader(self) -> Reader:
        roles = {source: target for target, sources in self.roles.items() for source in sources}
        return Reader(self.message_property_mappings, roles | {target: target for target in self.roles})

    def writing(self, row: Row) -> Writing:
        if isinstance(self.tools, str):
            return writing(row, chat_template=self.chat_template, tools_column=self.tools)
        return writing(row, chat_template=self.chat_template, tools=self.tools)


Read = Callable[[Row], Any]


def default(options: ChatOptions) -> Read:
    """Read a prompt in `messages`, with `chosen` and `rejected` after it."""
    reader = options.reader()

    def read(row: Row) -> Paired:
        fields = options.field_chosen, options.field_rejected
        prompt, (chosen, rejected), remarks = _read(row, options.field_messages, fields, reader)
        return Paired(prompt, chosen, rejected, options.writing(row), remarks)

    return read


def last_turns(options: ChatOptions) -> Read:
    """Take `chosen` without its last turn as the prompt, and the last turns as the responses."""
    reader = options.reader()

    def read(row: Row) -> Paired:
        prompt, chosen = reader.conversation(row, options.field_chosen)
        rejected = reader.response(column(row, options.field_rejected), options.field_rejected)
        remarks = other_turns(prompt, rejected)
        return Paired(with_system(row, prompt), chosen, rejected[-1:], options.writing(row), remarks)

    return read


def default_unpaired(options: ChatOptions) -> Read:
    """Read `messages` and a `completion`, messages that end with the completion, or a `prompt` and a completion."""
    reader = options.reader()

    def read(row: Row) -> Unpaired:
        messages, completion = options.field_messages, options.field_completion
        good = label(row, options.field_label)
        if row.get(completion) is None and row.get(messages) is not None:
            prompt, last = reader.conversation(row, messages, all_of_it=True)
            return Unpaired(with_system(row, prompt), last, good, options.writing(row))
        asked = messages if row.get(messages) is not None else options.field_prompt
        prompt, (response,), remarks = _read(row, asked, (completion,), reader)
        return Unpaired(prompt, response, good, options.writing(row), remarks)

    return read


_SINGLE = (("messages", "prompt"), ("label",))
FORMATS: dict[str, NamedFormat] = {
    "default": NamedFormat(default, (("messages",), *PAIR[1:]), default_unpaired, _SINGLE, options=ChatOptions),
    "argilla_chat": NamedFormat(last_turns, PAIR[1:], options=ChatOptions),
    "argilla": NamedFormat(last_turns, PAIR[1:], options=ChatOptions),
}


def _read(
    row: Row, asked: str, responses: Sequence[str], reader: Reader
) -> tuple[list[Message], list[list[Message]], tuple[str, ...]]:
    """Read a prompt of messages, or of text as one user turn, and its responses. Also returns remarks."""
    prompt = as_content(column(row, asked), asked, reader)
    values = {name: column(row, name) for name in responses}
    remarks: tuple[str, ...] = ()
    if all(isinstance(value, str) for value in values.values()):
        values, remarks = as_answers(prompt, values)
    return with_system(row, as_turns(prompt)), [reader.response(values[name], name) for name in responses], remarks
