"""docs/python.md: its code runs in a checkout, and its tables are whole; `help()` tells the same."""

import inspect
import pydoc
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

import fastpref
from tests.support.paths import DOCS, QUICKSTART, QUICKSTART_HELDOUT, QUICKSTART_MODEL, QUICKSTART_ROWS

PAGE = (DOCS / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_code_runs(elsewhere: Path):
    """The blocks run one after the other, as written, on fewer rows for fewer steps. Each run leaves its weights."""
    (elsewhere / "examples" / "quickstart").mkdir(parents=True)
    (elsewhere / "examples" / "quickstart" / "model").symlink_to(QUICKSTART_MODEL)
    shutil.copy(QUICKSTART, elsewhere / "examples")
    for path in (QUICKSTART_ROWS, QUICKSTART_HELDOUT):
        first = path.read_text(encoding="utf-8").splitlines(keepends=True)[:20]
        (elsewhere / "examples" / "quickstart" / path.name).write_text("".join(first), encoding="utf-8")
    names: dict[str, object] = {}
    code = "\n".join(BLOCKS)
    assert code.count("steps") == 2
    short = code.replace('steps": 20', 'steps": 1')
    exec(compile(short, "docs/python.md", "exec"), names)
    finals = [path.parent for path in elsewhere.glob("runs/*/final/adapter_config.json")]
    assert len(finals) == code.count("fastpref.train(")


def table(heading: str) -> dict[str, str]:
    """Return the last column of a table of the page by the names in its first column."""
    rows = PAGE.partition(f"\n| {heading} |")[2].partition("\n\n")[0]
    return {name: last.strip(" `") for name, last in re.findall(r"^\| `(\w+)` \|.*\|(.*)\|$", rows, re.MULTILINE)}


def test_the_tables_name_everything():
    """The page has a row for every argument of `train`, with its default, and for every part of its result."""
    words = {(): "none", None: "those of the config", inspect.Parameter.empty: "", "run": '"run"'}
    arguments = inspect.signature(fastpref.train).parameters
    assert table("argument") == {name: words.get(a.default, str(a.default)) for name, a in arguments.items()}
    results = re.findall(r"^\| `(\w+)` \|", PAGE.partition("| result |")[2].partition("\n\n")[0], re.MULTILINE)
    assert results == [part.name for part in fields(fastpref.RunResult)]


@pytest.mark.parametrize("name", fastpref.__all__)
def test_help_says_what_a_name_is(name: str):
    """Every public name has a docstring of its own, and a function names its types."""
    value = getattr(fastpref, name)
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        untyped = [word for word, given in inspect.signature(value).parameters.items() if not given.annotation]
        assert untyped == []
        assert "return" in value.__annotations__


def test_help_lists_the_functions():
    """`help(fastpref)` begins with a table of the public functions, and has the arguments of `train`."""
    text = pydoc.plain(pydoc.render_doc(fastpref))
    begin, _, rest = text.partition("PACKAGE CONTENTS")
    for name in ("train", "load_config", "linear_logprob", "preference_loss", "losses", "patch", "UserError"):
        assert re.search(rf"^ +{name}\b", begin, re.MULTILINE)
    assert "train(config: " in rest
    for argument in inspect.signature(fastpref.train).parameters:
        assert re.search(rf"^ +\|? +{argument}: ", rest, re.MULTILINE)
