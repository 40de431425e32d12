"""The formats of rows, as users name them in `format` under [[data]], and the options of each."""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, PlainValidator, Strict, TypeAdapter, ValidationError, WithJsonSchema

from fastpref.config.paths import PathMark


@dataclass(frozen=True, kw_only=True)
class ChatWriting:
    """The options of every chat_template.* format: how messages are read and written."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    message_property_mappings: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    chat_template: str | None = None
    tools: Sequence[Any] | str | None = None
    field_weight: str = "weight"


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ChatWriting):
    """The options of the chat_template.* formats of pairs and single completions."""

    field_messages: str = "messages"
    field_chosen: str = "chosen"
    field_rejected: str = "rejected"
    field_prompt: str = "prompt"
    field_completion: str = "completion"
    field_label: str = "label"
    field_margin: str = "margin"


@dataclass(frozen=True, kw_only=True)
class Ordered:
    """The options that name the one column or key which says how good the completions of a row are."""

    field_scores: str | None = None
    field_ranks: str | None = None
    field_best: str | None = None

    def __post_init__(self) -> None:
        if len(given := [option for option in _ORDERS if getattr(self, option)]) > 1:
            raise ValueError(f"{given[1]}: {given[0]} says already how good the completions are; remove one of them")

    @property
    def order(self) -> tuple[Any, str] | None:
        """Return "scores", "ranks" or "best", and the name of its column; None for what a row has."""
        given = ((option.removeprefix("field_"), getattr(self, option)) for option in _ORDERS)
        return next(((kind, name) for kind, name in given if name), None)


_ORDERS = tuple(option.name for option in fields(Ordered))


@dataclass(frozen=True, kw_only=True)
class RankedOptions(Ordered, ChatWriting):
    """The options of the chat_template.* formats of lists of completions."""

    field_prompt: str = "prompt"
    field_responses: str = "responses"


@dataclass(frozen=True, kw_only=True)
class UltraFeedbackOptions(RankedOptions):
    field_prompt: str = "instruction"
    field_responses: str = "completions"
    field_scores: str | None = "overall_score"


@dataclass(frozen=True, kw_only=True)
class DistilabelOptions(RankedOptions):
    field_prompt: str = "instruction"
    field_responses: str = "generations"


@dataclass(frozen=True)
class TableOptions:
    """The columns of a user's table, and how each is written. `chosen_format` is text with {chosen} in it, etc."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    field_prompt: str = "prompt"
    field_system: str = "system"
    field_chosen: str = "chosen"
    field_rejected: str = "rejected"
    field_completion: str = "completion"
    field_label: str = "label"
    field_weight: str = "weight"
    field_margin: str = "margin"
    prompt_format: str = "{prompt}"
    chosen_format: str = "{chosen}"
    rejected_format: str = "{rejected}"
    completion_format: str = "{completion}"

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected", "completion"):
            _check_format(f"{name}_format", getattr(self, f"{name}_format"), name)


@dataclass(frozen=True, kw_only=True)
class RankedTableOptions(Ordered):
    """The columns of a user's table with lists of completions, and how each is written."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    field_prompt: str = "prompt"
    field_system: str = "system"
    field_responses: str = "responses"
    field_weight: str = "weight"
    prompt_format: str = "{prompt}"
    response_format: str = "{response}"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt", "response"):
            _check_format(f"{name}_format", getattr(self, f"{name}_format"), name)


def _check_format(option: str, given: str, name: str) -> None:
    allowed = {"prompt", "system"} if name == "prompt" else {name}
    try:
        names = {part for _, part, _, _ in string.Formatter().parse(given) if part is not None}
    except ValueError as error:
        raise ValueError(f"{option}: {error}; a brace that is meant as one is written twice") from None
    if unknown := names - allowed:
        known = " and ".join(f"{{{word}}}" for word in sorted(allowed))
        raise ValueError(f"{option}: {{{min(unknown)}}} is not known here, {known} can be; write {{{{ for a brace")
    if name not in names:
        raise ValueError(f"{option}: {{{name}}} must be in it")


FORMATS: dict[str, type | None] = {
    **dict.fromkeys(
        f"{family}.{name}"
        for family in ("chatml", "llama3")
        for name in ("default", "argilla", "argilla_chat", "icr", "intel", "prompt_pairs", "ultra")
    ),
    **dict.fromkeys((f"chat_template.{name}" for name in ("default", "argilla_chat", "argilla")), ChatOptions),
    "chat_template.ranked": RankedOptions,
    "chat_template.ultrafeedback": UltraFeedbackOptions,
    "chat_template.distilabel": DistilabelOptions,
    "zephyr.nectar": None,
    "passthrough": None,
    "table": TableOptions,
    "table.ranked": RankedTableOptions,
}
"""The options of each named format. The first part of a name is the chat markup that it writes."""
NAMES = ("auto", *FORMATS)
CHATS = "chat_template."
"""The first letters of the formats whose rows always become chats."""


def writes_text(name: str) -> bool:
    """Return whether a format writes its text itself, so that its rows cannot become chats."""
    return name.startswith(("chatml.", "llama3.", "zephyr.")) or name == "passthrough"


def options_of(name: str) -> tuple[str, ...]:
    """Return the names of a format's options."""
    options: Any = FORMATS.get(name)
    return tuple(options.__dataclass_fields__) if options else ()


def is_function(name: str) -> bool:
    module, colon, function = name.rpartition(":")
    return bool(colon and module) and function.isidentifier()


def map_file(name: str, change: Callable[[str], str]) -> str:
    """Apply `change` to the file of `module:function`. Returns the name unchanged if its file does not change."""
    module, _, function = name.rpartition(":")
    file = module if module.endswith(".py") else module.replace(".", "/") + ".py"
    changed = change(file)
    return name if changed == file else f"{changed}:{function}"


def parse_format(given: Any) -> tuple[str, Any]:
    """Return the name of a format and its checked options, for a name or a table of `type` and options.

    A function `module:function` has no options, and neither have most formats: None. Raises ValueError for an unknown
    format or option; the message begins with the option's name.
    """
    if not isinstance(given, str | Mapping):
        raise ValueError(f"must be a name or a table, got {given!r}")
    table = {"type": given} if isinstance(given, str) else dict(given)
    name = table.pop("type", "table")
    if not isinstance(name, str):
        raise ValueError(f"type: must be a format's name, got {name!r}")
    if is_function(name):
        if table:
            raise ValueError(f"{next(iter(table))}: a function of your own takes no options")
        return name, None
    return name, _options(name, table)


def _options(name: str, options: dict[str, Any]) -> Any:
    if name not in NAMES:
        near = get_close_matches(name.lower(), NAMES, n=3, cutoff=0.6)
        hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise ValueError(
            f"there is no format {name!r}{hint}; known are {', '.join(NAMES)}, a table of your columns "
            '({ field_prompt = "question", ... }), and "module:function"'
        )
    schema = FORMATS.get(name)
    if schema is None:
        if options:
            raise ValueError(f"{next(iter(options))}: the format {name} has no options")
        return None
    try:
        return TypeAdapter(schema).validate_python(options)
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


def _known_format(value: Any) -> Any:
    parse_format(value)
    return value


def _map_format(value: Any, change: Callable[[str], Any]) -> Any:
    """Apply `change` to the file of a function `module:function` and to the chat template of a format."""
    if isinstance(value, str):
        return map_file(value, change) if is_function(value) else value
    template = value.get("chat_template") if isinstance(value, dict) else None
    return {**value, "chat_template": change(template)} if template and isinstance(template, str) else value


Format = Annotated[
    str | dict[str, Any],
    PlainValidator(_known_format),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]}),
    PathMark(inside=_map_format),
]


def _known_functions(value: tuple[str, ...]) -> tuple[str, ...]:
    for name in value:
        if not is_function(name):
            raise ValueError(f'{name!r} is not of the form "module:function"')
    return value


Functions = Annotated[
    tuple[str, ...],
    Strict(False),
    AfterValidator(_known_functions),
    PathMark(inside=lambda names, change: tuple(map_file(name, change) for name in names)),
]
"""Functions of the user's own, each `module:function`; a module beside the config is found there."""
