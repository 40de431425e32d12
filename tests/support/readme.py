"""The commands in README.md, CONTRIBUTING.md and three pages of docs/."""

import re

from tests.support.paths import DOCS, ROOT

PAGES = [
    path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", DOCS / "estimate.md", DOCS / "runs.md", DOCS / "use.md")
]


def commands(page: str) -> list[str]:
    """Return the lines of a page's code blocks that are commands, without their comments."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    blocks = [text for language, text in fenced if language in ("", "bash")]
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(fastpref|pip|accelerate|python) ", line)]


COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands(page)))
OURS = [line for line in COMMANDS if line.startswith("fastpref ") and " examples/" not in line]
