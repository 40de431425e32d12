"""The Dockerfile copies what is there and what its build needs, and its first RUN line for Python lists the
dependencies."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.support.paths import DOCS, ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LINES = [line.strip() for line in re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", TEXT)).splitlines() if line.strip()]
COPIED = [word for line in LINES if line.startswith("COPY ") for word in line.split()[1:-1]]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_it_copies_what_the_build_needs():
    """Every source is there and not ignored by .dockerignore, and the wheel's files are among them."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    for name in COPIED:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored
    needed = [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "fastpref", "kernels"]
    assert set(needed) <= set(COPIED)


def test_the_dependencies_are_those_of_the_project(tmp_path: Path):
    """The line that lists the dependencies for a layer of their own, run as it is, lists the project's."""
    (line,) = (line for line in LINES if "requirements.txt" in line)
    listing = line.removeprefix("RUN ").partition(" && ")[0].replace("python", sys.executable, 1)
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    subprocess.run(listing, shell=True, cwd=tmp_path, check=True)
    listed = (tmp_path / "requirements.txt").read_text(encoding="utf-8").split("\n")
    extras = PROJECT["project"]["optional-dependencies"]
    assert listed == [*PROJECT["project"]["dependencies"], *extras["export"], *extras["schedule-free"], ""]
    assert "-c constraints.txt -r requirements.txt" in line


def test_the_entry_point_is_the_command():
    """The image runs `fastpref`, and the page shows the commands of the file's header."""
    assert 'ENTRYPOINT ["fastpref"]' in LINES
    assert "fastpref" in PROJECT["project"]["scripts"]
    page = (DOCS / "docker.md").read_text(encoding="utf-8")
    for word in ("docker build -t fastpref .", "--gpus all", '--user "$(id -u):$(id -g)"', "fastpref-cache:/cache"):
        assert word in TEXT
        assert word in page
