"""Read the type annotations of the schema."""

from collections.abc import Iterator
from typing import Any, get_args


def classes_in(annotation: Any) -> Iterator[type]:
    """Yield the classes inside a type such as `tuple[A, ...] | None`."""
    inner = get_args(annotation)
    if isinstance(annotation, type) and not inner:
        yield annotation
    for part in inner:
        yield from classes_in(part)


def metadata_of(annotation: Any) -> Iterator[Any]:
    """Yield the metadata of every `Annotated` inside a type."""
    yield from getattr(annotation, "__metadata__", ())
    for part in get_args(annotation):
        yield from metadata_of(part)
