"""The data pipeline, from a user's rows to the tensors of a step. `render` returns the texts of one row."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpref.data.rows.rendering import render

__all__ = ["render"]


def __getattr__(name: str):
    if name == "render":
        from fastpref.data.rows.rendering import render

        return render
    raise AttributeError(f"module 'fastpref.data' has no attribute {name!r}")
