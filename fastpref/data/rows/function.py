"""A user's own format, `module:function`: a Python function that returns a row which `auto` reads."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastpref.data.rows.auto import detect
from fastpref.data.rows.content import Row, RowContent, RowError, shown
from fastpref.data.rows.reading import Format
from fastpref.errors import UserError, one_line

_RESULT = "prompt, chosen and rejected, or prompt, completions and scores, or prompt, completion and label"


def load_function(name: str, *, supervised: bool = False) -> Format:
    """Return the format of a function, whose results are checked row by row. Raises UserError if it fails to load.

    With `supervised`, it may return rows with a single completion and no label.
    """
    module_name, _, function_name = name.rpartition(":")
    try:
        module = _from_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        raise UserError(
            f"format {name!r}: {module_name} cannot be imported: {one_line(error, named=True)}; it is looked for "
            "beside the config and on Python's path"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"format {name!r}: {module_name} has no function {function_name}")
    read = _checked(function_name, function, supervised)
    return Format(f"the function {function_name}", read, whole_row=True)


def source_file(name: str) -> Path | None:
    """Return the file that a function is read from, or None if it is not read from a file."""
    module, _, _ = name.rpartition(":")
    if module.endswith(".py"):
        return Path(module)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"fastpref_user_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError("there is no such file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # for its imports of modules in the same folder
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _checked(name: str, function: Callable[[dict[str, Any]], Any], supervised: bool) -> Callable[[Row], RowContent]:
    wanted = f"{_RESULT}, or prompt and completion" if supervised else _RESULT

    def read(row: Row) -> RowContent:
        try:
            result = function(dict(row))
        except Exception as error:
            what = f"{name} failed: {one_line(error, named=True)}"
            raise RowError(what, f"where {name} failed") from None
        if not isinstance(result, Mapping):
            raise RowError(f"{name} returned {shown(result)}, not a dict of {wanted}", f"that {name} did not convert")
        form = detect(result, supervised=supervised)
        if form is None:
            keys = ", ".join(map(str, result)) or "nothing"
            raise RowError(f"{name} returned a dict of {keys}, not of {wanted}", f"that {name} did not convert")
        try:
            return form.read(result)
        except RowError as error:
            raise RowError(f"{name} returned a row where {error}", error.kind) from None

    return read
