"""examples/quickstart.ipynb runs from its first cell to its last.

python -m tests.test_notebook     # run it as it stands, and store what its cells print: about two minutes
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.paths import EXAMPLES, ROOT

NOTEBOOK = EXAMPLES / "quickstart.ipynb"


def execute(notebook: Any, folder: Path) -> None:
    """Run all cells in a kernel whose working directory is a copy of examples/ in `folder`. A cell's error raises."""
    shutil.copytree(EXAMPLES / "quickstart", folder / "quickstart")
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True)
    client.execute(cwd=str(folder))


def printed(notebook: Any) -> list[str]:
    """Return what each cell of code prints or shows as text."""
    return [
        "".join(output.get("text") or output["data"]["text/plain"] for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every cell runs, with fewer steps than stand there, and prints what the stored outputs show: plain lines, the
    same columns, an answer before and after."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = printed(notebook)
    for cell in notebook.cells:
        cell.source = cell.source.replace('"steps": 40', '"steps": 2').replace('"batch": 16', '"batch": 4')
        cell.source = cell.source.replace('"every": 10', '"samples": 0')
    execute(notebook, tmp_path)
    now = printed(notebook)
    assert [bool(text) for text in now] == [bool(text) for text in stored]
    assert "step 0: held-out loss 0.6931  accuracy 50.0%" in now[3]
    assert "\x1b" not in now[3]
    assert now[4].splitlines()[0] == stored[4].splitlines()[0]
    assert now[6].splitlines()[0] == stored[6].splitlines()[0]  # the model before the training
    assert (tmp_path / "runs" / "notebook" / "final" / "adapter_config.json").is_file()


def test_what_is_stored_is_of_no_one_machine():
    """The stored outputs belong to the stored cells, in order, and name no folder of the machine that made them."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert [word for word in ("/home/", "/root", "/tmp", "C:\\\\") if word in text] == []


def renew() -> None:
    """Run the notebook and store its outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"FASTPREF_CACHE": f"{folder}/cache", "HF_HOME": f"{folder}/hub", "PYTHONPATH": str(ROOT)}
        execute(notebook, Path(folder) / "examples")
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "text" in output:
                output["text"] = output["text"].replace(f"{folder}/cache", "~/.cache/fastpref")
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    renew()
