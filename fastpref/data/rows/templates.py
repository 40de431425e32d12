"""The formats that write text without the tokenizer's chat template: chatml.*, llama3.*, a table of the user's columns,
Zephyr's Nectar, and plain text."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fastpref.config.formats import RankedTableOptions, TableOptions
from fastpref.data.rows.auto import as_answers
from fastpref.data.rows.columns import (
    CHOSEN,
    MISSING_COLUMN,
    PAIR,
    PROMPTS,
    REJECTED,
    SINGLE,
    Columns,
    NamedFormat,
    column,
    label,
    text,
)  # fmt: skip
from fastpref.data.rows.content import Message, Paired, Ranked, Row, RowContent, RowError, Unpaired, Writing, shown
from fastpref.data.rows.messages import STANDARD, says, words
from fastpref.data.rows.overlap import OTHER_QUESTION, other_turns, untangle, without_question
from fastpref.data.rows.ranking import Order, order_in, read_ranked
from fastpref.data.rows.reading import writing


@dataclass(frozen=True)
class Template:
    """The chat markup of a model family."""

    turn: str  # with {role} and {content}
    generation_prompt: str
    end: str

    def prompt(self, turns: list[Message], name: str) -> str:
        written = (self.turn.format(role=turn["role"], content=words(turn, name)) for turn in turns)
        return "".join(written) + self.generation_prompt

    def paired(self, turns: list[Message], chosen: str, rejected: str, name: str = "prompt") -> Paired:
        asked, answers, remarks = _freed(turns, {"chosen": chosen, "rejected": rejected})
        writing = Writing(end=self.end)
        prompt = self.prompt(asked, name)
        return Paired(prompt, answers["chosen"] + self.end, answers["rejected"] + self.end, writing, remarks)

    def unpaired(self, turns: list[Message], completion: str, good: bool | None, name: str = "prompt") -> Unpaired:
        asked, answers, remarks = _freed(turns, {"completion": completion})
        prompt = self.prompt(asked, name)
        return Unpaired(prompt, answers["completion"] + self.end, good, Writing(end=self.end), remarks)


TEMPLATES = {
    "chatml": Template("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>"),
    "llama3": Template(
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}

ReadPaired = Callable[[Template, Row], Paired]
ReadUnpaired = Callable[[Template, Row], Unpaired]

# --- Pairs ---------------------------------------------------------------------------------------------------------


def default(template: Template, row: Row) -> Paired:
    prompt = _first(row, *PROMPTS)
    chosen = text(row, _present(row, *CHOSEN))
    rejected = text(row, _present(row, *REJECTED))
    return template.paired(_asked(row, text(row, prompt)), chosen, rejected)


def argilla_chat(template: Template, row: Row) -> Paired:
    """Take every turn of `chosen` before its last as the prompt."""
    prompt, answer = STANDARD.conversation(row, "chosen")
    return _last_answers(template, row, prompt, [*prompt, *answer])


def pairs_after(prompt: str) -> ReadPaired:
    """Return a reader of texts after the question in the column `prompt`."""
    return lambda template, row: template.paired(
        _asked(row, text(row, prompt)), text(row, "chosen"), text(row, "rejected")
    )


def ultra(template: Template, row: Row) -> Paired:
    """Take the question in `prompt`, then the turns of `chosen` between its first question and its last answer."""
    turns = _turns(row, "chosen")
    prompt, earlier = _asked(row, text(row, "prompt")), turns[:-1]
    if earlier and earlier[0]["role"] == "system":
        prompt = prompt if prompt[0]["role"] == "system" else [earlier[0], *prompt]
        earlier = earlier[1:]
    other = earlier and words(earlier[0], "chosen").strip() != prompt[-1]["content"].strip()
    content = _last_answers(template, row, prompt + earlier[1:], turns)
    return replace(content, remarks=(*content.remarks, OTHER_QUESTION)) if other else content


def _last_answers(template: Template, row: Row, prompt: list[Message], chosen: list[Message]) -> Paired:
    """Return the last turns of the conversations `chosen` and `rejected`, after a prompt."""
    rejected = _turns(row, "rejected")
    content = template.paired(prompt, words(chosen[-1], "chosen"), words(rejected[-1], "rejected"), "chosen")
    return replace(content, remarks=(*content.remarks, *other_turns(chosen[:-1], rejected)))


# --- Single completions ----------------------------------------------------------------------------------------------


def completion_after(prompt: str) -> ReadUnpaired:
    return lambda template, row: template.unpaired(_asked(row, text(row, prompt)), text(row, "completion"), label(row))


def argilla_chat_completion(template: Template, row: Row) -> Unpaired:
    prompt, completion = STANDARD.conversation(row, "completion")
    return template.unpaired(prompt, words(completion[-1], "completion"), label(row), "completion")


def _after(question: str, paired: ReadPaired | None = None) -> NamedFormat:
    """Return a format of pairs and of single completions whose question is in one column."""
    columns, single_columns = ((question,), *PAIR[1:]), ((question,), *SINGLE[1:])
    return NamedFormat(paired or pairs_after(question), columns, completion_after(question), single_columns)


_ANY: Columns = (PROMPTS, CHOSEN, REJECTED)
FORMATS: dict[str, NamedFormat] = {  # for both templates; a template is the first argument of a reader
    "default": NamedFormat(default, _ANY),
    "argilla": replace(_after("instruction", default), columns=_ANY),
    "argilla_chat": NamedFormat(argilla_chat, PAIR[1:], argilla_chat_completion, SINGLE[1:]),
    "icr": NamedFormat(pairs_after("input"), (("input",), *PAIR[1:])),
    "intel": _after("question"),
    "prompt_pairs": _after("prompt"),
    "ultra": _after("prompt", ultra),
}

# --- Without turns -------------------------------------------------------------------------------------------------


def passthrough(row: Row) -> Paired:
    return Paired(text(row, "prompt"), text(row, "chosen"), text(row, "rejected"))


def passthrough_unpaired(row: Row) -> Unpaired:
    return Unpaired(text(row, "prompt"), text(row, "completion"), label(row))


def nectar(row: Row) -> Ranked:
    """Read answers and their ranks, of which the lowest is the best, in Zephyr's markup."""
    answers, scores = read_ranked(row, "answers", Order("ranks", "rank", inside=True))
    for name, answer in answers.items():
        if not isinstance(answer, str):
            raise RowError(f"{name} must be text, got {shown(answer)}", "with a value of another type")
    system = f"<|system|>\n{row['system']}</s>\n" if row.get("system") else ""
    texts, remarks = as_answers(text(row, "prompt"), answers)
    prompt = f"{system}<|user|>\n{row['prompt']}</s>\n<|assistant|>\n"
    return Ranked(prompt, tuple(texts.values()), scores, remarks=remarks)


# --- A user's own columns ------------------------------------------------------------------------------------------


def table(options: TableOptions) -> Callable[[Row], Paired]:
    def read(row: Row) -> Paired:
        answers = {"chosen": text(row, options.field_chosen), "rejected": text(row, options.field_rejected)}
        answers, remarks = without_question(text(row, options.field_prompt), answers)
        chosen = options.chosen_format.format(chosen=answers["chosen"])
        rejected = options.rejected_format.format(rejected=answers["rejected"])
        return Paired(_table_prompt(options, row), chosen, rejected, remarks=remarks)

    return read


def table_unpaired(options: TableOptions) -> Callable[[Row], Unpaired]:
    def read(row: Row) -> Unpaired:
        answer = {"completion": text(row, options.field_completion)}
        answer, remarks = without_question(text(row, options.field_prompt), answer)
        completion = options.completion_format.format(**answer)
        return Unpaired(_table_prompt(options, row), completion, label(row, options.field_label), remarks=remarks)

    return read


def table_ranked(options: RankedTableOptions) -> Callable[[Row], Ranked]:
    order = order_in(options.field_responses, options.order)

    def read(row: Row) -> Ranked:
        answers, scores = read_ranked(row, options.field_responses, order(row))
        for name, answer in answers.items():
            if not isinstance(answer, str):
                raise RowError(f"{name} must be text, got {shown(answer)}", "with a value of another type")
        answers, remarks = without_question(text(row, options.field_prompt), answers)
        completions = tuple(options.response_format.format(response=answer) for answer in answers.values())
        return Ranked(_table_prompt(options, row), completions, scores, remarks=remarks)

    return read


def _table_prompt(options: TableOptions | RankedTableOptions, row: Row) -> str:
    wanted = "{system}" in options.prompt_format and row.get(options.field_system) is not None
    system = text(row, options.field_system) if wanted else ""
    return options.prompt_format.format(prompt=text(row, options.field_prompt), system=system)


def as_chat(options: TableOptions | RankedTableOptions, row: Row, content: RowContent) -> RowContent:
    """Make a chat of a table's texts: a user turn, after a system turn if the prompt's text does not hold the system
    column, and the assistant's completions."""
    assert isinstance(content.prompt, str)
    own = row.get(options.field_system) and "{system}" not in options.prompt_format
    system = [{"role": "system", "content": text(row, options.field_system)}] if own else []
    shared: dict[str, Any] = {"prompt": [*system, {"role": "user", "content": content.prompt}], "writing": writing(row)}
    completions = [says(str(completion)) for completion in content.by_name.values()]
    match content:
        case Paired():
            return replace(content, chosen=completions[0], rejected=completions[1], **shared)
        case Unpaired():
            return replace(content, completion=completions[0], **shared)
        case Ranked():
            return replace(content, completions=tuple(completions), **shared)


# -------------------------------------------------------------------------------------------------------------------


def _freed(turns: list[Message], answers: dict[str, str]) -> tuple[list[Message], dict[str, str], tuple[str, ...]]:
    """Remove repeated turns from answers, as for every chat. Returns turns, answers and remarks."""
    answers, remarks = as_answers(turns, answers)
    if any(not answer.strip() for answer in answers.values()):  # an empty answer repeats nothing
        return turns, answers, remarks
    first, *second = map(says, answers.values())
    content = untangle(Paired(turns, first, second[0]) if second else Unpaired(turns, first, True))
    assert not isinstance(content.prompt, str)
    return content.prompt, answers, (*remarks, *content.remarks)


def _asked(row: Row, question: str) -> list[Message]:
    """Return a question as a user turn, after the system turn if there is one."""
    system = [{"role": "system", "content": text(row, "system")}] if row.get("system") else []
    return [*system, {"role": "user", "content": question}]


def _turns(row: Row, name: str) -> list[Message]:
    turns = STANDARD.completion(column(row, name), name)
    if not turns:
        raise RowError(f"{name} is empty", "with an empty completion")
    return turns


def _first(row: Row, *names: str) -> str:
    """Return the first of these columns that is not empty, or else the first that exists. Raises RowError."""
    there = [name for name in names if row.get(name) is not None]
    if not there:
        raise RowError(
            f"there is no column {', '.join(names[:-1])} or {names[-1]}; the columns are {', '.join(map(str, row))}",
            MISSING_COLUMN,
        )
    return next((name for name in there if row[name]), there[0])


def _present(row: Row, name: str, other: str) -> str:
    return other if row.get(name) is None and row.get(other) is not None else name
