"""Places at which the names in a table may break on a narrow screen: after an underscore, a slash, and in code a dot.

MkDocs calls this for each page. Without it a name takes a line of its own, and the table may be wider than the screen.
"""

import re

_CELL = re.compile(r"<t[dh][^>]*>.*?</t[dh]>", re.DOTALL)
_TEXT = re.compile(r"(?<=>)([^<>]+)(?=<(/code)?)")
_IN_WORDS = re.compile(r"([_/:]+)(?=\w)")
_IN_CODE = re.compile(r"((?:[_/=:]|(?<!\d)[.,])+)(?=[\w\"'{])")


def on_page_content(html: str, **_: object) -> str:
    """Return the page's content with such places in the cells of its tables."""
    return _CELL.sub(lambda cell: _TEXT.sub(_with_places, cell[0]), html)


def _with_places(text: re.Match[str]) -> str:
    return (_IN_CODE if text[2] else _IN_WORDS).sub(r"\1<wbr>", text[0])
