"""Read content in parts. Only text is read; pictures, video and audio are refused."""

from collections.abc import Mapping
from typing import Any

from fastpref.data.rows.columns import MEDIA
from fastpref.data.rows.content import Message, Row, RowError, shown

MEDIA_KIND = "with images, video or audio"
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_parts(value: list[Any], name: str, role: Any) -> str | list[dict[str, str]]:
    """Read parts of text as {"type": "text", "text": ...}; a single part becomes a string.

    Raises RowError, naming the column `name`, for a part of any other kind.
    """
    texts = [_text_of(part, name, role) for part in value]
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def joined(content: Any) -> str:
    """Return a message's content as text, its parts joined."""
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else part["text"] for part in content)
    return "" if content is None else content


def text_of(message: Message) -> str:
    """Return a message's text."""
    return joined(message.get("content"))


def refuse_media(row: Row) -> None:
    """Raise RowError if a row has pictures, video or audio in a column of its own."""
    for name in MEDIA:
        value = row.get(name)
        if _is_filled(value):
            raise RowError(
                f"the column {name} is filled ({shown(value)}), and images, video and audio are not read: the model "
                "would be trained on answers to what it does not see",
                MEDIA_KIND,
            )


def _is_filled(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_filled(item) for item in value)
    if isinstance(value, Mapping):
        return any(_is_filled(item) for item in value.values())
    if isinstance(value, str | bytes):
        return value.strip() not in ("", b"", "[]", "null", "None")
    return value is not None and value is not False


def _text_of(part: Any, name: str, role: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind in _TEXT_PARTS and isinstance(text, str):
        return text
    if kind in _TEXT_PARTS or not isinstance(kind, str):
        raise RowError(
            f"{name} has a turn of role {role!r} with the part {shown(part)}; a part has a type, and text under text",
            "with a part that is none",
        )
    raise RowError(
        f"{name} has a turn of role {role!r} with a part of type {kind!r}; only parts of text are read: images, video "
        "and audio are not",
        MEDIA_KIND,
    )
