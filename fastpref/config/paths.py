"""Which keys of a config are paths: the schema marks them, and all that is done to paths derives from the marks."""

import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fastpref.config.annotations import classes_in, metadata_of

Table = TypeVar("Table", bound=BaseModel)


@dataclass(frozen=True)
class PathMark:
    """Marks a key of the schema whose value is a path, or has paths inside."""

    written: bool = False
    """Whether a run writes to the path; otherwise it reads from it."""
    inside: Callable[[Any, Callable[[str], Any]], Any] | None = None
    """Applies a function to the paths inside a value; None where the value itself is the path."""

    def map(self, value: Any, change: Callable[[str], Any]) -> Any:
        """Apply `change` to the path, or to the paths inside the value. A key without a value stays so."""
        if self.inside is not None:
            return self.inside(value, change)
        return change(value) if isinstance(value, str) and value else value


def has_wildcards(name: str) -> bool:
    """Return whether a name may be a pattern of files, such as data/*.jsonl, and is no text such as a template."""
    return any(sign in name for sign in "*?[") and not any(sign in name for sign in "{\n")


def matches(name: str, folder: Path) -> bool:
    """Return whether a relative or absolute name, which may be a pattern, is that of something in a folder."""
    path = folder / Path(name).expanduser()
    if path.exists():
        return True
    return has_wildcards(name) and any(glob.iglob(str(Path(name).expanduser()), root_dir=folder, recursive=True))


ReadPath = Annotated[str, PathMark()]
WrittenPath = Annotated[str, PathMark(written=True)]


def map_paths(
    table: Table, read: Callable[[str], str], written: Callable[[str], str | None] = lambda path: path
) -> Table:
    """Return a config, or a table of one, with `read` and `written` applied to the paths that a run reads and writes.

    A name on the hub and an inline chat template stand where a path can stand, so `read` gets them too.
    """
    changes: dict[str, Any] = {}
    for name, info in type(table).model_fields.items():
        value, mark = getattr(table, name), _mark(info)
        if mark is not None:
            changes[name] = mark.map(value, written if mark.written else read)
        elif isinstance(value, BaseModel):
            changes[name] = map_paths(value, read, written)
        elif isinstance(value, tuple):
            changes[name] = tuple(map_paths(v, read, written) if isinstance(v, BaseModel) else v for v in value)
    return table.model_copy(update={name: value for name, value in changes.items() if value != getattr(table, name)})


def path_marks(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, PathMark]]:
    """Yield the dotted keys that have a mark, with `*` for any entry of an array: `data.*.path`."""
    for name, info in schema.model_fields.items():
        mark = _mark(info)
        if mark is not None:
            yield f"{prefix}{info.alias or name}", mark
        entry = ".*" if "tuple" in str(info.annotation) else ""
        for inner in classes_in(info.annotation):
            if issubclass(inner, BaseModel):
                yield from path_marks(inner, f"{prefix}{name}{entry}.")


def _mark(info: FieldInfo) -> PathMark | None:
    metadata = (*info.metadata, *metadata_of(info.annotation))
    return next((mark for mark in metadata if isinstance(mark, PathMark)), None)
