"""A user's own Python function, which a config names as `module:function`."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastpref.errors import UserError, one_line


def import_function(name: str, what: str) -> Callable[..., Any]:
    """Import the function `module:function`, or `file.py:function`. `what` begins the message of the UserError."""
    module_name, _, function_name = name.rpartition(":")
    try:
        module = _from_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        raise UserError(
            f"{what}: {module_name} cannot be imported: {one_line(error, named=True)}; it is looked for "
            "beside the config and on Python's path"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{what}: {module_name} has no function {function_name}")
    return function


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
