"""Conversion of errors inside the code of models and libraries into one message for the user."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from traceback import walk_tb
from typing import Concatenate, ParamSpec, TypeVar

import torch

from fastpref.config import Config
from fastpref.errors import UserError, one_line

P = ParamSpec("P")
T = TypeVar("T")
_OURS = ("fastpref", "kernels")
_BELOW = frozenset({"torch", *sys.stdlib_module_names})  # packages that are never named as the origin of an error


def told_of_model(what: str) -> Callable[[Callable[Concatenate[Config, P], T]], Callable[Concatenate[Config, P], T]]:
    """Decorate a function of a config so that its errors become a UserError with the model's name, `what`, and a line.

    An out-of-memory error passes unchanged: the caller knows how to save memory.
    """

    def around(function: Callable[Concatenate[Config, P], T]) -> Callable[Concatenate[Config, P], T]:
        @wraps(function)
        def wrapped(config: Config, *args: P.args, **options: P.kwargs) -> T:
            try:
                return function(config, *args, **options)
            except Exception as error:  # model code may raise any error
                if isinstance(error, UserError) or is_out_of_memory(error):
                    raise
                message = f"{what}: {words(error)} ({_origin(error)[1]})"
                raise UserError(f"model.name = {config.model.name!r}: {message}") from error

        return wrapped

    return around


@contextmanager
def told_of_memory(while_what: str, advice: str) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a UserError with `while_what` and `advice`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory {while_what}; {advice}") from None


def in_others_code(error: BaseException) -> str | None:
    """Return an exception's message and line if it was raised in a model's or a library's code, or None if in ours."""
    package, place = _origin(error)
    return None if package in _OURS else f"{words(error)} ({place})"


def words(error: BaseException) -> str:
    """Return an exception's message on one line, with its type if the message alone is rarely clear."""
    return one_line(error, named=not isinstance(error, ValueError | RuntimeError | OSError))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is out of memory. On a CPU torch raises a RuntimeError that only its message shows."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        part in message for part in ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")
    )


def _origin(error: BaseException) -> tuple[str, str]:
    """Return the package and the line of the innermost code in a traceback that is neither torch's nor Python's."""
    origin = "fastpref", "an unknown place"
    for frame, line in walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _BELOW:
            origin = package, f"{Path(frame.f_code.co_filename).name}, line {line}"
    return origin
