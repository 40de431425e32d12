"""Find a format by its name: turn the value of `format` in a config into a function that reads rows.

A format is a function from a row to a `Paired`, an `Unpaired` or a `Ranked` (content.py). Its prompt and completions
are either text or lists of chat messages, which a chat template writes (template/render.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fastpref.config.formats import RankedTableOptions, TableOptions, is_function, parse_format
from fastpref.data.rows import chat_formats, templates
from fastpref.data.rows.auto import Chat, detect
from fastpref.data.rows.columns import CONTEXT, MARGIN, PAIR, QUESTIONS, SINGLE, WEIGHT, Columns, NamedFormat
from fastpref.data.rows.content import Row, RowContent, RowError
from fastpref.data.rows.function import load_function
from fastpref.data.rows.ranking import LISTS, ORDERS
from fastpref.data.rows.reading import Format
from fastpref.data.rows.templates import as_chat


def _of_template(template: templates.Template, form: NamedFormat) -> NamedFormat:
    """Return a text format whose readers are bound to a template."""
    single = form.unpaired
    return replace(
        form,
        paired=lambda _: lambda row: form.paired(template, row),
        unpaired=single and (lambda _: lambda row: single(template, row)),
    )


_FORMATS: dict[str, NamedFormat] = {
    **{
        f"{family}.{name}": _of_template(template, form)
        for family, template in templates.TEMPLATES.items()
        for name, form in templates.FORMATS.items()
    },
    **{f"chat_template.{name}": form for name, form in chat_formats.FORMATS.items()},
    "zephyr.nectar": NamedFormat(lambda _: templates.nectar, (("prompt",), ("answers",))),
    "passthrough": NamedFormat(lambda _: templates.passthrough, PAIR, lambda _: templates.passthrough_unpaired, SINGLE),
    "table": NamedFormat(templates.table, PAIR, templates.table_unpaired, SINGLE),
    "table.ranked": NamedFormat(templates.table_ranked, (("prompt",), ("responses",))),
}


def find_format(
    given: str | Mapping[str, Any], *, unpaired: bool, supervised: bool = False, chat: Chat = "auto"
) -> Format | None:
    """Return the format that a config names, by a name or a table of `type` and options; None for "auto".

    With `unpaired`, rows with a single completion are read if the format supports them; pairs are still read as pairs.
    With `supervised` too, these need no label. With `chat` true, rows of a table become chats.
    Raises ValueError as `parse_format`, UserError for a function or chat template that cannot be loaded.
    """
    name, options = parse_format(given)
    if is_function(name):
        return load_function(name, supervised=supervised, chat=chat)
    if name == "auto":
        return None
    named = _FORMATS[name]
    paired = named.paired(options)
    others = (WEIGHT, MARGIN, "label")
    numbers: dict[str, Any] = {number: getattr(options, f"field_{number}", number) for number in others}
    numbers["plain"] = getattr(options, "prompt_format", "") == "{prompt}"
    if chat is True and isinstance(options, TableOptions | RankedTableOptions):
        name, numbers = f"{name}, as chats", numbers | {"as_chat": partial(as_chat, options)}
    if not unpaired or named.unpaired is None:
        return Format(name, paired, **numbers)
    single = ((named.imitated if supervised else None) or named.unpaired)(options)
    chosen = getattr(options, "field_chosen", "chosen")
    completion = getattr(options, "field_completion", "completion")
    pairs = [group for group in named.columns if group[0] == "chosen"]
    alternatives = pairs[0][1:] if pairs else ()

    def read(row: Row) -> RowContent:
        is_pair = any(row.get(name) is not None for name in (chosen, *alternatives))
        return paired(row) if is_pair and row.get(completion) is None else single(row)

    return Format(name, read, **numbers)


def fitting(columns: set[str], *, unpaired: bool, supervised: bool = False) -> list[str]:
    """Return at most three formats that read rows of these columns, the best first, as a config spells them.

    None of them ignores a column of text that belongs to the prompt.
    """
    texts = columns & {"prompt", *CONTEXT}
    asked = next((name for name in QUESTIONS if name in columns), None)
    names: list[str] = []
    if asked is None or texts - {asked, "system"}:
        return names
    pairs = {"chosen", "rejected"} <= columns
    single = {"completion"} if supervised else {"completion", "label"}
    if pairs or (unpaired and single <= columns):
        field = "field_messages" if pairs else "field_prompt"
        names.append(f'{{ type = "chat_template.default", {field} = "{asked}" }}')
        if "system" not in texts:
            names.append(f'{{ field_prompt = "{asked}" }}')
    elif (listed := next((name for name in LISTS if name in columns), None)) and columns & set(ORDERS):
        names.append(f'{{ type = "chat_template.ranked", field_prompt = "{asked}", field_responses = "{listed}" }}')
    names += [
        f'"chatml.{name}"'
        for name, form in templates.FORMATS.items()
        if _fits(form.columns, columns)
        or (unpaired and _fits(form.unpaired_columns, columns | ({"label"} if supervised else set())))
    ]
    return names[:3]


def _fits(groups: Columns, columns: set[str]) -> bool:
    return bool(groups) and all(columns & set(group) for group in groups)


def _is_known(row: Row, *, supervised: bool) -> bool:
    try:
        return detect(row, supervised=supervised) is not None
    except RowError:
        return False


def explained(
    message: str, row: Row | Iterable[str], *, unpaired: bool, supervised: bool = False, auto: bool = False
) -> str:
    """Add the formats that would read these columns to a message. With `auto`, that format is tried first."""
    names = ['"auto"'] if auto and isinstance(row, Mapping) and _is_known(row, supervised=supervised) else []
    names = [*names, *fitting(set(row), unpaired=unpaired, supervised=supervised)][:3]
    named = f"these columns fit format = {' or '.join(names)}; " if names else ""
    return (
        f'{message}; {named}your own columns are named by format = {{ field_prompt = "...", ... }}, or joined by a '
        'Python function, "module:function"'
    )
