"""The pictures of README and docs: the terminal during and after the quickstart, and the report of its run.

`TMPDIR=/home/you python -m tests.pictures docs/images` writes them again, in a folder below that, whose path is in the
pictures. It needs tmux, in which the command runs as a person would see it, and Chromium. A run that was tried before
is faster, because its tokens are in the cache, and the pictures say so.
"""

import base64
import os
import shutil
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from PIL import Image
from rich.console import Console
from rich.text import Text

from tests.support.browser import SCHEMES, browser_of, show
from tests.support.paths import EXAMPLES

COLUMNS, LINES = 100, 60
COMMAND = "fastpref train examples/quickstart.toml"
HALF, END = "20/40", "health:"
# Rich's own drawing of a terminal, without the fonts that it loads from another site.
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def main(folder: Path) -> None:
    """Write the pictures into a folder."""
    place = Path(gettempdir()) / "fastpref"  # this path is in the pictures
    place.mkdir()
    try:
        shutil.copytree(EXAMPLES, place / "examples")
        half, whole = terminal(place)
        (folder / "terminal.svg").write_text(drawn(half, "while it trains"), encoding="utf-8")
        (folder / "result.svg").write_text(drawn(whole, "at the end"), encoding="utf-8")
        page, chromium = place / "runs" / "quickstart-dpo" / "report.html", browser_of()
        for scheme in SCHEMES:
            screenshot(chromium, page, folder / f"report-{scheme}.png", scheme, 1280, 1250)
        screenshot(chromium, page, folder / "report-phone.png", "light", 390, 844)
        chromium.quit()
    finally:
        shutil.rmtree(place)


def terminal(place: Path) -> tuple[str, str]:
    """Run the quickstart in tmux. Returns the screen halfway and at the end, with its colours."""
    tmux = ["tmux", "-L", f"pictures-{os.getpid()}"]
    environment = os.environ | {"FASTPREF_CACHE": ".cache", "TERM": "xterm-256color"}
    size = ["-x", str(COLUMNS), "-y", str(LINES)]
    subprocess.run([*tmux, "-f", "/dev/null", "new-session", "-d", *size, "bash --noprofile --norc"], cwd=place,
                   env=environment, check=True)  # fmt: skip
    try:
        subprocess.run([*tmux, "send-keys", "PS1='$ '; clear", "Enter"], check=True)
        subprocess.run([*tmux, "send-keys", COMMAND, "Enter"], check=True)
        return _screen(tmux, HALF), _screen(tmux, END, then=2.0)
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)


def _screen(tmux: list[str], words: str, then: float = 0.0) -> str:
    """Wait until the screen shows these words after the command, and return it."""
    capture = [*tmux, "capture-pane", "-e", "-p"]
    for _ in range(3000):
        time.sleep(0.1)
        seen = subprocess.run(capture, capture_output=True, text=True, check=True).stdout
        if words in Text.from_ansi(seen).plain.partition(COMMAND)[2]:
            time.sleep(then)
            return subprocess.run(capture, capture_output=True, text=True, check=True).stdout
    raise SystemExit(f"the quickstart has not shown {words!r} in five minutes")


def drawn(screen: str, when: str) -> str:
    """Return a screen as SVG."""
    console = Console(record=True, width=COLUMNS, file=StringIO())
    lines = screen.rstrip().removesuffix("$").rstrip().split("\n")
    console.print(Text.from_ansi("\n".join(lines)))
    return console.export_svg(title=f"fastpref train, {when}", code_format=SVG, unique_id=when.replace(" ", "-"))


def screenshot(chromium: Any, page: Path, to: Path, scheme: str, width: int, height: int) -> None:
    """Save the upper part of a page as PNG, in 128 colours."""
    show(chromium, page.resolve().as_uri(), scheme, width)
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = chromium.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    to.write_bytes(base64.b64decode(shot["data"]))
    Image.open(to).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(to, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
