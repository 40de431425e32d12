"""The lines of a generated Markdown page."""

import textwrap

WIDTH = 120


def filled(page: str) -> str:
    """Break sentences into lines of at most 120 characters. Titles, tables and code stay as they are."""
    lines, code = [], False
    for line in page.split("\n"):
        code ^= line.startswith("```")
        if code or len(line) <= WIDTH or line.startswith(("#", "|")):
            lines.append(line)
        else:
            lines += textwrap.wrap(
                line, WIDTH, subsequent_indent="  " * line.startswith("- "), break_long_words=False,
                break_on_hyphens=False,
            )  # fmt: skip
    return "\n".join(lines)
