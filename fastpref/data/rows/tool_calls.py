"""Convert tool calls, tools and template keywords of any data set to OpenAI's form, as mappings."""

import json
from collections.abc import Mapping
from typing import Any

from fastpref.data.rows.content import RowError, shown

_BAD_CALL = "with a tool call that is none"
_BAD_TOOLS = "with tools that are none"
_ARGUMENTS = ("arguments", "parameters", "args", "input")
"""The keys of a call's arguments: OpenAI's, Llama's, LangChain's, Anthropic's."""


def read_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Read the calls of a message: one or a list, each an object or JSON text of one. Returns [] for none.

    A call is {"function": {"name", "arguments"}} with any other keys, or the bare {"name", "arguments"}; its arguments
    may be called parameters, args or input. Raises RowError, naming the column `name`, for anything else,
    and for arguments that are not a JSON object.
    """
    value = _decoded(value, f"{name}: a tool call", _BAD_CALL)
    calls = value if isinstance(value, list) else [] if value is None else [value]
    return [_call(_decoded(call, f"{name}: a tool call", _BAD_CALL), name) for call in calls]


def read_tools(value: Any, name: str) -> tuple[Any, ...] | None:
    """Read tools' JSON schemas: a list, JSON text of one, or a list of JSON texts. A single schema becomes a list.

    Raises RowError naming the column `name`.
    """
    value = _decoded(value, name, _BAD_TOOLS)
    if isinstance(value, Mapping) and value:
        value = [value]
    if not value:
        return None
    listed = value if isinstance(value, list | tuple) else ()
    tools = [_decoded(tool, name, _BAD_TOOLS) if _is_json(tool) else tool for tool in listed]
    if not tools or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"{name} must be a list of tools' JSON schemas, got {shown(value)}", _BAD_TOOLS)
    return tuple(_tool(tool) for tool in tools)


def read_keywords(value: Any, name: str) -> dict[str, Any] | None:
    """Read keywords for the chat template: a mapping, or JSON text of one. Raises RowError naming the column `name`."""
    kind = "with keywords of the chat template that are none"
    value = _decoded(value, name, kind)
    if value is None or value == {}:
        return None
    if not isinstance(value, Mapping):
        raise RowError(f"{name} must be a table of keywords for the chat template, got {shown(value)}", kind)
    return dict(value)


def _call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if isinstance(function, str) and _is_json(function):
        function = _decoded(function, f"{name}: a tool call", _BAD_CALL)
    bare = isinstance(call, Mapping) and function is None and isinstance(call.get("name"), str)
    inner = call if bare else function
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise RowError(
            f"{name} has a tool call {shown(call)}; a call has a name and arguments, alone or under function", _BAD_CALL
        )
    call = {key: value for key, value in call.items() if value is not None}  # a table fills its rows with nulls
    places = [key for key in _ARGUMENTS if inner.get(key) is not None]
    if len(places) > 1:
        raise RowError(f"{name} calls {inner['name']} with both {' and '.join(places)}: {shown(inner)}", _BAD_CALL)
    if not places and (key := next((key for key, item in inner.items() if item and isinstance(item, Mapping)), None)):
        raise RowError(
            f"{name} calls {inner['name']} with {key}, which is not read: what it is called with is under arguments",
            _BAD_CALL,
        )
    given = inner[places[0]] if places else None
    arguments = _decoded(given, f"{name}: what {inner['name']} is called with", _BAD_CALL)
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise RowError(
            f"{name} calls {inner['name']} with arguments {shown(given)}, which are no JSON object", _BAD_CALL
        )
    others = {
        key: value for key, value in inner.items() if key not in ("name", "function", *_ARGUMENTS) and value is not None
    }
    if bare:
        return {**others, "type": "function", "function": {"name": inner["name"], "arguments": dict(arguments)}}
    return {**call, "function": {**others, "name": inner["name"], "arguments": dict(arguments)}}


def _tool(tool: Mapping[str, Any]) -> Any:
    """Return a schema unchanged, or wrapped in OpenAI's form if it is bare."""
    if "function" not in tool and isinstance(tool.get("name"), str) and "type" not in tool:
        return {"type": "function", "function": dict(tool)}
    return tool


def _decoded(value: Any, what: str, kind: str) -> Any:
    """Decode JSON text that was encoded once or twice. Returns None for white space. Raises RowError."""
    for _ in range(2):
        if not isinstance(value, str):
            break
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{what} is not valid JSON: {error}, in {shown(value)}", kind) from None
    return value


def _is_json(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip()[:1] in ("{", '"')
