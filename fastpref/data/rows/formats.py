"""Find a format by its name: turn the value of `format` in a config into a function that reads rows.

A format is a function from a row to a `Paired` or an `Unpaired` (content.py). Its prompt and responses are either text
or lists of chat messages, which a chat template writes (template/render.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fastpref.data.rows import chat_formats, templates
from fastpref.data.rows.auto import detect
from fastpref.data.rows.columns import CONTEXT, PAIR, QUESTIONS, SINGLE, Columns, NamedFormat
from fastpref.data.rows.content import Content, Message, Paired, Row, RowError, Unpaired, read_label, unpair
from fastpref.data.rows.function import is_function, load_function
from fastpref.data.rows.reading import Format

__all__ = [
    "NAMES", "Content", "Format", "Message", "Paired", "Row", "RowError", "Unpaired", "check_format", "detect",
    "explained",
    "find_format", "fitting", "options_of", "read_label", "unpair",
]  # fmt: skip


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
    "table": NamedFormat(
        lambda table: table.paired, PAIR, lambda table: table.unpaired, SINGLE, options=templates.Table
    ),
}
NAMES = ("auto", *_FORMATS)


def options_of(name: str) -> tuple[str, ...]:
    """Return the names of a format's options."""
    options = _FORMATS[name].options if name in _FORMATS else None
    return tuple(options.__dataclass_fields__) if options else ()


def check_format(given: Any) -> None:
    """Raise ValueError for an unknown format or option. The message begins with the option's name."""
    name, options = _split(given)
    if not is_function(name):
        _options(name, options)
    elif options:
        raise ValueError(f"{next(iter(options))}: a function of your own takes no options")


def find_format(given: str | Mapping[str, Any], *, unpaired: bool) -> Format | None:
    """Return the format that a config names, by a name or a table of `type` and options; None for "auto".

    With `unpaired`, rows with a single response are read if the format supports them; pairs are still read as pairs.
    Raises ValueError as `check_format`, UserError for a function or chat template that cannot be loaded.
    """
    name, options = _split(given)
    if is_function(name):
        check_format(given)
        return load_function(name)
    settings = _options(name, options)
    if name == "auto":
        return None
    if isinstance(settings, chat_formats.ChatOptions):
        settings = settings.loaded()
    named = _FORMATS[name]
    paired = named.paired(settings)
    if not unpaired or named.unpaired is None:
        return Format(name, paired)
    single = named.unpaired(settings)
    chosen = getattr(settings, "field_chosen", "chosen")
    completion = getattr(settings, "field_completion", "completion")
    pairs = [group for group in named.columns if group[0] == "chosen"]
    alternatives = pairs[0][1:] if pairs else ()

    def read(row: Row) -> Paired | Unpaired:
        is_pair = any(row.get(name) is not None for name in (chosen, *alternatives))
        return paired(row) if is_pair and row.get(completion) is None else single(row)

    return Format(name, read)


def fitting(columns: set[str], *, unpaired: bool) -> list[str]:
    """Return at most three formats that read rows of these columns, the best first, as a config spells them.

    None of them ignores a column of text that belongs to the prompt.
    """
    texts = columns & {"prompt", *CONTEXT}
    asked = next((name for name in QUESTIONS if name in columns), None)
    names: list[str] = []
    if asked is None or texts - {asked, "system"}:
        return names
    pairs = {"chosen", "rejected"} <= columns
    if pairs or (unpaired and {"completion", "label"} <= columns):
        field = "field_messages" if pairs else "field_prompt"
        names.append(f'{{ type = "chat_template.default", {field} = "{asked}" }}')
        if "system" not in texts:
            names.append(f'{{ field_prompt = "{asked}" }}')
    names += [
        f'"{name}"'
        for name, named in _FORMATS.items()
        if name.startswith("chatml.")
        and (_fits(named.columns, columns) or (unpaired and _fits(named.unpaired_columns, columns)))
    ]
    return names[:3]


def _fits(groups: Columns, columns: set[str]) -> bool:
    return bool(groups) and all(columns & set(group) for group in groups)


def _is_known(row: Row) -> bool:
    try:
        return detect(row) is not None
    except RowError:
        return False


def explained(message: str, row: Row | Iterable[str], *, unpaired: bool, auto: bool = False) -> str:
    """Add the formats that would read these columns to a message. With `auto`, that format is tried first."""
    names = ['"auto"'] if auto and isinstance(row, Mapping) and _is_known(row) else []
    names = [*names, *fitting(set(row), unpaired=unpaired)][:3]
    named = f"these columns fit format = {' or '.join(names)}; " if names else ""
    return (
        f'{message}; {named}your own columns are named by format = {{ field_prompt = "...", ... }}, or joined by a '
        'Python function, "module:function"'
    )


def _split(given: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(given, str):
        return given, {}
    if not isinstance(given, Mapping):
        raise ValueError(f"must be a name or a table, got {given!r}")
    options = dict(given)
    name = options.pop("type", "table")
    if not isinstance(name, str):
        raise ValueError(f"type: must be a format's name, got {name!r}")
    return name, options


def _options(name: str, options: Mapping[str, Any]) -> Any:
    """Return a format's checked options. Raises ValueError."""
    if name not in NAMES:
        near = get_close_matches(name.lower(), NAMES, n=3, cutoff=0.6)
        hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise ValueError(
            f"there is no format {name!r}{hint}; known are {', '.join(NAMES)}, a table of your columns "
            '({ field_prompt = "question", ... }), and "module:function"'
        )
    schema = _FORMATS[name].options if name != "auto" else None
    if schema is None:
        if options:
            raise ValueError(f"{next(iter(options))}: the format {name} has no options")
        return None
    try:
        return TypeAdapter(schema).validate_python(dict(options))
    except ValidationError as error:
        problem = error.errors()[0]
    option = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "unexpected_keyword_argument":
        near = get_close_matches(option, options_of(name), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{option}: the format {name} has no such option{hint}; it has {', '.join(options_of(name))}")
    if problem["type"] == "value_error":
        raise ValueError(problem["msg"].removeprefix("Value error, "))
    wanted = {
        "roles": "a table of lists, a role for the template = the roles in the data",
        "message_property_mappings": "a table of names, a message's property = its key in the data",
        "tools": "a list of tools' JSON schemas, or the column that holds them",
    }.get(option, "text")
    raise ValueError(f"{option}: must be {wanted}, got {options[option]!r}")
