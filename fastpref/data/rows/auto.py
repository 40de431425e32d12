"""The format `auto`, which chooses how to read a row by its columns and their types."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastpref.data.rows.columns import LABELS, column, label, text
from fastpref.data.rows.content import (
    Content,
    Message,
    Paired,
    Ranked,
    Row,
    RowError,
    Unpaired,
    Writing,
    shown,
)
from fastpref.data.rows.messages import STANDARD, SYSTEM_ROLES, as_content, as_turns, is_turns, with_system
from fastpref.data.rows.overlap import OTHER_MESSAGES, OTHER_PROMPT, same, without_question
from fastpref.data.rows.parts import text_of
from fastpref.data.rows.ranking import LISTS, Order, find_order, read_answer, read_ranked
from fastpref.data.rows.reading import Format, without_json, writing
from fastpref.data.rows.transcripts import TEMPLATE, is_transcript, read_transcript

Chat = Literal["auto"] | bool
"""What data.chat can be."""
_NOT_ASKING = (*SYSTEM_ROLES, "assistant", "tool")
KNOWN = (
    "prompt, chosen and rejected; chosen and rejected conversations; messages or conversations, chosen and rejected; "
    "instruction, input, chosen and rejected; messages and rejected_response; prompt and responses with scores, ranks "
    "or best; instruction and completions with overall_score; instruction, generations and ratings; prompt, completion "
    "and label; messages and label"
)
"""The columns that `auto` reads, in words."""
KNOWN_IMITATED = (
    "messages or conversations; prompt, instruction (with input), question, query or input, and completion, response, "
    "output or answer"
)
"""The columns that `auto` reads in addition for supervised training, in words."""


def detect(row: Row, *, supervised: bool = False, chat: Chat = "auto") -> "AutoFormat | None":
    """Return the format that fits a row's columns and types, or None. Raises RowError for messages in broken JSON.

    With `supervised`, rows with a single completion and no label have one too. Rows of plain text become chats if
    `chat` is true; if it is false, rows of another kind are a RowError.
    """
    plain = without_json(row)
    needed = any(row.get(name) not in (None, "") for name in ("system", "tools"))  # plain text cannot express them

    def found(turned: bool) -> AutoFormat | None:
        return _recognised(plain, turned) or (_imitated(plain, turned) if supervised else None)

    form = found(needed)
    if form and not form.chat and chat is True:
        form = found(True)
        form = form and replace(form, name=f"{form.name}, as chats")
    if form and form.chat and chat is False:
        raise RowError(
            f"data.chat = false is for rows of plain text, and this is a chat: {form.name}"
            f"{' with a system prompt or tools' * needed}; remove the key",
            "that are chats",
        )
    extra = " and ".join(name for name in ("system", "tools") if row.get(name) not in (None, ""))
    return replace(form, name=f"{form.name}, with {extra}") if form and extra else form


@dataclass(frozen=True)
class AutoFormat(Format):
    chat: bool = True
    """Whether rows of plain text also become chats."""
    listed: str = ""
    """The column of the completions of rows that have a list of them."""
    answer: str = ""
    """The column of the completion of rows that have one."""


def _recognised(row: Row, chat: bool) -> AutoFormat | None:
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return _pairs(row, ("chosen", "rejected"), chat)
    conversations = ("chosen_conversations", "rejected_conversations")
    if all(is_turns(row.get(name)) for name in conversations):
        return _pairs(row, conversations, chat)
    if is_turns(row.get("messages")):
        for name in ("rejected_response", "rejected_messages"):
            if row.get(name):
                return AutoFormat(f"messages and {name}", _swift(name))
    for name in LISTS:
        if (order := find_order(row, name)) and (form := _ranked(row, name, order, chat)):
            return form
    for name in LABELS:
        if name in row:
            return _labelled(row, name, chat)
    return None


def _format(
    name: str, first: str | None, answers: Sequence[str], tag: str = "", *, chat: bool = True, spoken: bool = False
) -> AutoFormat:
    """Return a format of pairs, or of single completions whose label is in the column `tag`, if there is one.

    The prompt is in the column `first`, or (None) in the answers; some rows may differ.
    """

    def read(row: Row) -> Paired | Unpaired:
        values = {answer: column(row, answer) for answer in answers}
        prompt, contents, remarks = _read(row, first, values, chat, spoken)
        if len(answers) == 1:
            good = label(row, tag) if tag else None
            return Unpaired(prompt, contents[0], good, _written(row, prompt, spoken), remarks)
        return Paired(prompt, contents[0], contents[1], _written(row, prompt, spoken), remarks)

    return AutoFormat(name, read, chat=chat, label=tag, answer=answers[0] if len(answers) == 1 else "")


# --- Pairs ---------------------------------------------------------------------------------------------------------

_CHATS = {
    "conversations": "ShareGPT conversations with",
    "messages": "messages with",
    "prompt": "a prompt of messages with",
}


def _pairs(row: Row, completions: tuple[str, str], chat: bool) -> AutoFormat | None:
    both = " and ".join(completions)
    own = [row[name] for name in completions]
    for name, words in _CHATS.items():
        if is_turns(row.get(name)) and not (_is_answered(row, name) and all(map(_is_conversation, own))):
            return _format(f"{words} {both}", name, completions)
    prompt = row.get("prompt")
    if all(map(_is_conversation, own)):
        return _format(f"{both} conversations that share their prompt", None, completions)
    if all(map(is_transcript, own)):
        return _format(f"{both} transcripts of Human and Assistant", None, completions, spoken=True)
    if is_transcript(prompt):
        name = "a transcript of Human and Assistant, chosen and rejected"
        return _format(name, "prompt", completions, spoken=True)
    if isinstance(prompt, str):
        chat = chat or not all(isinstance(value, str) for value in own)
        return _format("text prompt, chosen and rejected", "prompt", completions, chat=chat)
    if isinstance(row.get("instruction"), str) and prompt is None:
        return _format(f"instruction, input, {both}", "instruction", completions)
    return None


def _swift(name: str) -> Callable[[Row], Paired]:
    """Return a reader of ms-swift's pairs: the chosen conversation, and the worse answer or conversation."""

    def read(row: Row) -> Paired:
        prompt, chosen = STANDARD.conversation(row, "messages")
        value = column(row, name)
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            value = value[0]
        rejected = STANDARD.completion(value, name)
        if name == "rejected_messages":
            return Paired(with_system(row, []), [*prompt, *chosen], rejected, writing(row))
        return Paired(with_system(row, prompt), chosen, rejected, writing(row))

    return read


# --- Lists of completions ------------------------------------------------------------------------------------------

_PROMPTS = ("prompt", "instruction", "question", "input")


def _ranked(row: Row, listed: str, order: Order, chat: bool) -> AutoFormat | None:
    """Return the format of a prompt with a list of completions; the prompt may be in the completions."""
    first = next((name for name in _CHATS if is_turns(row.get(name))), None)
    first = first or next((name for name in _PROMPTS if isinstance(row.get(name), str)), None)
    answers = [read_answer(answer, f"{listed}[{at}]") for at, answer in enumerate(row[listed])]
    if first is None and not all(map(_is_conversation, answers)):
        return None
    prompt = row.get(first) if first else None
    spoken = is_transcript(prompt)
    texts = all(isinstance(value, str) for value in (prompt, *answers))
    chat = chat or spoken or first != "prompt" or not texts

    def read(row: Row) -> Ranked:
        values, scores = read_ranked(row, listed, order)
        prompt, contents, remarks = _read(row, first, values, chat, spoken)
        return Ranked(prompt, tuple(contents), scores, _written(row, prompt, spoken), remarks)

    kind = "a transcript of Human and Assistant" if spoken else "text prompt" if not chat else first
    name = f"{listed} and {order.name}" if kind is None else f"{kind}, {listed} and {order.name}"
    return AutoFormat(name, read, chat=chat, listed=listed)


# --- Single completions ----------------------------------------------------------------------------------------------


def _labelled(row: Row, tag: str, chat: bool) -> AutoFormat | None:
    prompt, completion = row.get("prompt"), row.get("completion")
    if "completion" in row:
        answer = ("completion",)
        for name in ("conversations", "messages"):
            if is_turns(row.get(name)) and prompt is None:
                return _format(f"{name}, completion and {tag}", name, answer, tag)
        if is_transcript(prompt):
            name = f"a transcript of Human and Assistant, completion and {tag}"
            return _format(name, "prompt", answer, tag, spoken=True)
        if prompt is not None:
            chat = chat or not isinstance(prompt, str) or isinstance(completion, list | Mapping)
            return _format(f"prompt, completion and {tag}", "prompt", answer, tag, chat=chat)
        if _is_conversation(completion):
            return _format(f"completion conversations and {tag}", None, answer, tag)
        if is_transcript(completion):
            return _format(f"completion transcripts and {tag}", None, answer, tag, spoken=True)
    for name in ("messages", "conversations"):
        if is_turns(row.get(name)):
            return AutoFormat(f"{name} and {tag}", _last_turn(name, tag), label=tag)
    for name in ("completion", "output"):
        if isinstance(row.get("instruction"), str) and row.get(name) is not None:
            return _format(f"instruction, input, {name} and {tag}", "instruction", (name,), tag)
    return None


def _last_turn(name: str, tag: str) -> Callable[[Row], Unpaired]:
    def read(row: Row) -> Unpaired:
        prompt, completion = STANDARD.conversation(row, name, all_of_it=True)
        return Unpaired(with_system(row, prompt), completion, label(row, tag), writing(row))

    return read


_ANSWERS = ("completion", "response", "output", "answer")


def _imitated(row: Row, chat: bool) -> AutoFormat | None:
    """Return the format of a row without a label, whose completion is imitated."""
    for answer in _ANSWERS:
        value = row.get(answer)
        if value is None:
            continue
        for name in _CHATS:
            if is_turns(row.get(name)) and not (name != "prompt" and row.get("prompt")):
                return _format(f"{_CHATS[name]} {answer}", name, (answer,))
        first = next((name for name in (*_PROMPTS, "query") if isinstance(row.get(name), str)), None)
        if first is not None and isinstance(value, str | list | Mapping):
            spoken = is_transcript(row[first])
            texts = first == "prompt" and isinstance(value, str)
            words = "a transcript of Human and Assistant" if spoken else "text prompt" if texts and not chat else first
            words += ", input" if first == "instruction" else ""
            return _format(f"{words} and {answer}", first, (answer,), chat=chat or spoken or not texts, spoken=spoken)
        if _is_conversation(value):
            return _format(f"{answer} conversations", None, (answer,))
        if is_transcript(value):
            return _format(f"{answer} transcripts", None, (answer,), spoken=True)
    for name in ("messages", "conversations"):
        if is_turns(row.get(name)):
            return AutoFormat(name, _whole(name))
    return None


def _whole(name: str) -> Callable[[Row], Unpaired]:
    """Return a reader of conversations in which all turns of the assistant are imitated."""

    def read(row: Row) -> Unpaired:
        prompt, completion, remarks = STANDARD.answered(row, name)
        return Unpaired(with_system(row, prompt), completion, None, writing(row), remarks)

    return read


# --- Prompt and completions ------------------------------------------------------------------------------------------


def _prompt_column(row: Row, values: Mapping[str, Any], first: str | None) -> tuple[str | None, tuple[str, ...]]:
    """Return the column of this row's prompt, None if its completions hold it, and `first` if that is unclear.

    Messages that end with an answer are the prompt only if the completions belong to them, or if no other column fits.
    """
    remarks: tuple[str, ...] = ()
    other = (isinstance(row.get("prompt"), str | list) and row["prompt"]) or all(map(_is_conversation, values.values()))
    for name in _CHATS:
        if is_turns(row.get(name)):
            if name == "prompt" or not other or not _is_answered(row, name) or _agrees(row, name, values):
                return name, remarks
            remarks = (OTHER_MESSAGES,)
    if isinstance(row.get("prompt"), str):
        return "prompt", remarks
    if all(map(_is_conversation, values.values())):
        return None, remarks
    if first == "prompt" and row.get("prompt") is None and isinstance(row.get("instruction"), str):
        return "instruction", remarks
    return first, remarks


def _is_answered(row: Row, name: str) -> bool:
    turns = row[name]
    role = turns[-1].get("role") or turns[-1].get("from")
    return isinstance(role, str) and STANDARD.known_roles.get(role) == "assistant"


def _agrees(row: Row, name: str, values: Mapping[str, Any]) -> bool:
    """Return whether a conversation begins as those of the completions do, or ends with one of the answers."""
    turns = [turn for turn in STANDARD.turns(row[name], name) if turn["role"] not in SYSTEM_ROLES]
    for completion, value in values.items():
        own = [turn for turn in STANDARD.completion(value, completion) if turn["role"] not in SYSTEM_ROLES]
        at = 0 if _is_conversation(value) else -1
        if turns and own and same(turns[at], own[at]):
            return True
    return False


def _read(
    row: Row, first: str | None, values: Mapping[str, Any], chat: bool, spoken: bool
) -> tuple[Content, list[Content], tuple[str, ...]]:
    """Read a row as text, or with `chat` as messages, in which a prompt of text becomes a user turn."""
    for completion, value in values.items():
        if not isinstance(value, str | list | Mapping):
            raise RowError(
                f"{completion} must be text or a list of messages, got {shown(value)}", "with a value of another type"
            )
    name, remarks = _prompt_column(row, values, first)
    prompt = _prompt(row, name, spoken)
    if not chat:
        if row.get("system") or row.get("tools") or not all(isinstance(v, str) for v in (prompt, *values.values())):
            raise RowError(
                "there are messages, a system prompt or tools here and none in the first rows, which were taken for "
                'plain text; name the format, such as "chatml.default"',
                "with messages, a system prompt or tools, unlike the first",
            )
        return prompt, list(values.values()), remarks
    if spoken:
        values = {name: _spoken(value) for name, value in values.items()}
    if all(isinstance(value, str) for value in values.values()):
        values, more = as_answers(prompt, values)
        remarks += more
    answers: list[Content] = [STANDARD.completion(value, completion) for completion, value in values.items()]
    if isinstance(prompt, str) and all(map(_is_conversation, values.values())) and not _says(answers, prompt):
        prompt, remarks = [], (*remarks, OTHER_PROMPT)
    return with_system(row, as_turns(prompt)), answers, remarks


def _spoken(value: Any) -> Any:
    """Return the turns of a transcript, or an answer to one stripped of white space."""
    if is_transcript(value):
        return read_transcript(value, answered=True)
    return value.strip() if isinstance(value, str) else value


def _says(answers: list[Content], words: str) -> bool:
    return any(
        text_of(turn).strip() == words.strip() for answer in answers for turn in answer if isinstance(turn, dict)
    )


def as_answers(prompt: Content, answers: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Remove the question from answers to a chat's prompt that begin with it. Returns the answers and remarks."""
    question = prompt if isinstance(prompt, str) else prompt[-1].get("content") if prompt else None
    if not isinstance(question, str):
        return dict(answers), ()
    rest, remarks = without_question(question, answers)
    return ({name: answer.strip() for name, answer in rest.items()} if rest != dict(answers) else rest), remarks


def _prompt(row: Row, name: str | None, spoken: bool) -> Content:
    if name is None:
        return []
    if name == "instruction":
        return _instruction(row)
    value = column(row, name)
    return read_transcript(value) if spoken and is_transcript(value) else as_content(value, name)


def _instruction(row: Row) -> Content:
    """Return LLaMA-Factory's prompt: the history, then the instruction with the input on the next line."""
    words = [text(row, "instruction"), text(row, "input") if row.get("input") is not None else ""]
    question = "\n".join(part for part in words if part)
    turns: list[Message] = []
    if row.get("history"):
        history = row["history"]
        pairs = history if isinstance(history, list) else [history]
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
                raise RowError(
                    f"history holds {shown(pair)}; it is a list of pairs, a question and its answer",
                    "with a history that is none",
                )
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [*turns, {"role": "user", "content": question}] if turns else question


def _written(row: Row, prompt: Content, spoken: bool) -> Writing:
    if isinstance(prompt, str) and not row.get("tools") and not row.get("chat_template_kwargs"):
        return Writing()
    written = writing(row)
    return replace(written, without_template=TEMPLATE) if spoken else written


def _is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages with its own prompt: a user turn before the last one."""
    if not is_turns(value) or len(value) < 2:
        return False
    roles = [turn.get("role") or turn.get("from") for turn in value]
    known = STANDARD.known_roles
    return any(not isinstance(role, str) or known.get(role, "user") not in _NOT_ASKING for role in roles[:-1])
