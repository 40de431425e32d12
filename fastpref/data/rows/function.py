"""A user's own format, `module:function`: a Python function that returns a row which `auto` reads."""

from collections.abc import Callable, Mapping
from typing import Any

from fastpref.data.rows.auto import Chat, detect
from fastpref.data.rows.content import Row, RowContent, RowError, shown
from fastpref.data.rows.reading import Format
from fastpref.errors import one_line
from fastpref.functions import import_function

_RESULT = "prompt, chosen and rejected, or prompt, completions and scores, or prompt, completion and label"


def load_function(name: str, *, supervised: bool = False, chat: Chat = "auto") -> Format:
    """Return the format of a function, whose results are checked row by row. Raises UserError if it fails to load.

    With `supervised`, it may return rows with a single completion and no label. `chat` is that of `detect`.
    """
    function, function_name = import_function(name, f"format {name!r}"), name.rpartition(":")[2]
    read = _checked(function_name, function, supervised, chat)
    return Format(f"the function {function_name}", read, whole_row=True)


def _checked(
    name: str, function: Callable[[dict[str, Any]], Any], supervised: bool, chat: Chat
) -> Callable[[Row], RowContent]:
    wanted = f"{_RESULT}, or prompt and completion" if supervised else _RESULT

    def read(row: Row) -> RowContent:
        try:
            result = function(dict(row))
        except Exception as error:
            what = f"{name} failed: {one_line(error, named=True)}"
            raise RowError(what, f"where {name} failed") from None
        if not isinstance(result, Mapping):
            raise RowError(f"{name} returned {shown(result)}, not a dict of {wanted}", f"that {name} did not convert")
        form = detect(result, supervised=supervised, chat=chat)
        if form is None:
            keys = ", ".join(map(str, result)) or "nothing"
            raise RowError(f"{name} returned a dict of {keys}, not of {wanted}", f"that {name} did not convert")
        try:
            return form.read(result)
        except RowError as error:
            raise RowError(f"{name} returned a row where {error}", error.kind) from None

    return read
