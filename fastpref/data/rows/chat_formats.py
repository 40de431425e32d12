"""The formats chat_template.*, whose rows become chats that a chat template writes."""

from collections.abc import Callable, Mapping
from typing import Any

from fastpref.config.formats import ChatOptions, ChatWriting, RankedOptions
from fastpref.data.rows.auto import as_answers
from fastpref.data.rows.columns import PAIR, NamedFormat, column, label
from fastpref.data.rows.content import Message, Paired, Ranked, Row, Unpaired, Writing
from fastpref.data.rows.messages import Reader, as_content, as_turns, with_system
from fastpref.data.rows.overlap import other_turns
from fastpref.data.rows.ranking import order_in, read_ranked
from fastpref.data.rows.reading import writing
from fastpref.data.template.named import load_chat_template

Read = Callable[[Row], Any]


def default(options: ChatOptions) -> Read:
    """Read a prompt in `messages`, with `chosen` and `rejected` after it."""
    reader, write = _reader(options), _writing(options)

    def read(row: Row) -> Paired:
        values = {name: column(row, name) for name in (options.field_chosen, options.field_rejected)}
        prompt, (chosen, rejected), remarks = _read(row, options.field_messages, values, reader)
        return Paired(prompt, chosen, rejected, write(row), remarks)

    return read


def last_turns(options: ChatOptions) -> Read:
    """Take `chosen` without its last turn as the prompt, and the last turns as the completions."""
    reader, write = _reader(options), _writing(options)

    def read(row: Row) -> Paired:
        prompt, chosen = reader.conversation(row, options.field_chosen)
        rejected = reader.completion(column(row, options.field_rejected), options.field_rejected)
        remarks = other_turns(prompt, rejected)
        return Paired(with_system(row, prompt), chosen, rejected[-1:], write(row), remarks)

    return read


def default_unpaired(options: ChatOptions) -> Read:
    """Read `messages` and a `completion`, messages that end with the completion, or a `prompt` and a completion."""
    reader, write = _reader(options), _writing(options)

    def read(row: Row) -> Unpaired:
        messages, completion = options.field_messages, options.field_completion
        good = label(row, options.field_label)
        if row.get(completion) is None and row.get(messages) is not None:
            prompt, last = reader.conversation(row, messages, all_of_it=True)
            return Unpaired(with_system(row, prompt), last, good, write(row))
        asked = messages if row.get(messages) is not None else options.field_prompt
        prompt, (completion,), remarks = _read(row, asked, {completion: column(row, completion)}, reader)
        return Unpaired(prompt, completion, good, write(row), remarks)

    return read


def default_imitated(options: ChatOptions) -> Read:
    """Read as `default_unpaired`, but imitate all the assistant's turns of messages without a completion or label."""
    reader, write, other = _reader(options), _writing(options), default_unpaired(options)

    def read(row: Row) -> Unpaired:
        messages = options.field_messages
        others = (options.field_completion, options.field_label)
        if row.get(messages) is None or any(row.get(name) is not None for name in others):
            return other(row)
        prompt, completion, remarks = reader.answered(row, messages)
        return Unpaired(with_system(row, prompt), completion, None, write(row), remarks)

    return read


def ranked(options: RankedOptions) -> Read:
    """Read a prompt of messages or of text, and a list of completions with their scores, their ranks or the best."""
    reader, write, order = _reader(options), _writing(options), order_in(options.field_responses, options.order)

    def read(row: Row) -> Ranked:
        values, scores = read_ranked(row, options.field_responses, order(row))
        prompt, answers, remarks = _read(row, options.field_prompt, values, reader)
        return Ranked(prompt, tuple(answers), scores, write(row), remarks)

    return read


_SINGLE = (("messages", "prompt"), ("label",))
FORMATS: dict[str, NamedFormat] = {
    "default": NamedFormat(default, (("messages",), *PAIR[1:]), default_unpaired, _SINGLE, default_imitated),
    "ranked": NamedFormat(ranked, (("prompt",), ("responses",))),
    "ultrafeedback": NamedFormat(ranked, (("instruction",), ("completions",))),
    "distilabel": NamedFormat(ranked, (("instruction",), ("generations",))),
    "argilla_chat": NamedFormat(last_turns, PAIR[1:]),
    "argilla": NamedFormat(last_turns, PAIR[1:]),
}


def _reader(options: ChatWriting) -> Reader:
    roles = {source: target for target, sources in options.roles.items() for source in sources}
    return Reader(options.message_property_mappings, roles | {target: target for target in options.roles})


def _writing(options: ChatWriting) -> Callable[[Row], Writing]:
    """Return a function from a row to its writing. Raises UserError for a chat template that cannot be read."""
    chat_template = load_chat_template(options.chat_template, "format.chat_template")
    column, tools = (options.tools, None) if isinstance(options.tools, str) else ("tools", options.tools)
    return lambda row: writing(row, chat_template=chat_template, tools=tools, tools_column=column)


def _read(
    row: Row, asked: str, values: Mapping[str, Any], reader: Reader
) -> tuple[list[Message], list[list[Message]], tuple[str, ...]]:
    """Read a prompt of messages, or of text as one user turn, and its completions. Also returns remarks."""
    prompt = as_content(column(row, asked), asked, reader)
    remarks: tuple[str, ...] = ()
    if all(isinstance(value, str) for value in values.values()):
        values, remarks = as_answers(prompt, values)
    completions = [reader.completion(value, name) for name, value in values.items()]
    return with_system(row, as_turns(prompt)), completions, remarks
