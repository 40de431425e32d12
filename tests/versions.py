"""The versions that the tests pass with, `constraints.txt`, the oldest that pyproject.toml permits, and the newest.

    python tests/versions.py renew                 # write constraints.txt: the newest of all but torch
    python tests/versions.py renew torch==2.14.0   # with another torch
    python tests/versions.py core                  # in an environment of its own: run the core of the tests, if any
                                                   # version there is not the one in constraints.txt
    python tests/versions.py oldest FOLDER         # run the core and the kernels' tests with the oldest versions that
                                                   # pyproject.toml permits, in the environment FOLDER, made if absent
    python tests/versions.py between FOLDER        # the same with torch 2.11, Triton 3.6 and transformers 5.17

`renew` takes what a fresh environment gets for `fastpref[dev]`. Run `.ci/run` before you commit what it wrote.
`oldest` and `between` take options of pytest after FOLDER. PyPI's builds of torch for Linux need CUDA's libraries, so
an environment takes 5 to 7 GB.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterable
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
CORE = (  # tests that use the libraries below: models, data, TRL, and the README's commands
    "tests/model",
    "tests/data",
    "tests/patch/test_patch.py",
    "tests/patch/test_trl_docs.py",
    "tests/training/test_equivalence.py",
    "tests/run/test_resume.py",
    "tests/commands/test_cli.py",
    "tests/merge/test_merge.py",
    "tests/test_examples.py",
    "tests/test_readme.py",
)
OLDER = (*CORE, "tests/kernels", "tests/test_ops.py", "tests/step", "tests/losses")  # and what older kernels may break
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "tensorboard", "hatchling", "editables", "schedulefree")  # any version
EXTRAS = ("trl", "export")  # that the tests above use
BETWEEN = ("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0")
OF_TORCH = ("nvidia-", "cuda-")  # packages that a CUDA build of torch requires in exactly one version
HEADER = """\
# The versions that the tests pass with: pip install -c constraints.txt -e ".[dev]"
# Written by `python tests/versions.py renew`. Users need none of it: pyproject.toml has the ranges.
# The version of torch is that of all its builds, for CPUs and for GPUs; Triton's is what its CUDA build asks for.
"""


def read(text: str) -> dict[str, str]:
    """Return the version of each name."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return dict(line.split("==") for line in lines if line)


def write(packages: Iterable[tuple[str, str]]) -> str:
    """Return constraints.txt for the installed packages, without build parts or packages of one torch build."""
    versions = {canonicalize_name(name): version.partition("+")[0] for name, version in packages}
    for_torch = {name for name in versions if name.startswith(OF_TORCH)} - {"nvidia-ml-py"}
    kept = {name: versions[name] for name in versions.keys() - for_torch - {"pip", "fastpref"}}
    return HEADER + "".join(f"{name}=={version}\n" for name, version in sorted(kept.items()))


def differing(packages: Iterable[tuple[str, str]], tested: dict[str, str]) -> list[str]:
    """Return a line for each package whose version differs from the tested one, or that was not tested."""
    ours = read(write(packages))
    return [f"{n} {v} (tested: {tested.get(n, 'none')})" for n, v in ours.items() if tested.get(n) != v]


def installed() -> list[tuple[str, str]]:
    """Return the names and versions of this environment."""
    return [(item.metadata["Name"], item.version) for item in distributions()]


def renew(torch: str) -> None:
    """Write constraints.txt from a fresh environment."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        venv.create(folder, with_pip=True)
        pip = [str(Path(folder) / "bin" / "python"), "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", torch], check=True)
        subprocess.run([*pip, "install", "--quiet", "-e", f"{ROOT}[dev]", *_triton(pip, torch)], check=True)
        listed = subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True, text=True).stdout
    CONSTRAINTS.write_text(write((item["name"], item["version"]) for item in json.loads(listed)), encoding="utf-8")


def _triton(pip: list[str], torch: str) -> list[str]:
    """Return Triton's requirement by the build of torch on PyPI; only the metadata is fetched."""
    environment = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    environment["PIP_CONFIG_FILE"] = os.devnull
    ask = ["install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-"]
    command = [*pip, *ask, "--index-url", "https://pypi.org/simple", torch]
    report = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    asked = json.loads(report)["install"][0]["metadata"]["requires_dist"]
    wanted = [Requirement(line) for line in asked]
    return [f"triton{requirement.specifier}" for requirement in wanted if requirement.name == "triton"]


def oldest(requirements: Iterable[str]) -> list[str]:
    """Return the requirements with their lower bounds as the only version, without those of other platforms."""
    parsed = [Requirement(line) for line in requirements]
    bounds = {
        r.name: spec.version
        for r in parsed
        if r.marker is None or r.marker.evaluate()
        for spec in r.specifier
        if spec.operator in (">=", "==")
    }
    return [f"{name}=={version}" for name, version in bounds.items()]


def for_interpreter(requirements: Iterable[str]) -> list[str]:
    """Return the requirements with a numpy that the interpreter of their Triton can use."""
    pinned = list(requirements)
    triton = next(Version(r.partition("==")[2]) for r in pinned if r.startswith("triton=="))
    return [*pinned, "numpy<2.4"] if triton < Version("3.7") else pinned


def older(folder: Path, requirements: Iterable[str], options: Iterable[str]) -> int:
    """Run the core and the kernels' tests in an environment of these versions, and return pytest's exit status."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *for_interpreter(requirements), *TOOLS], check=True)
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)], check=True)
    command = [str(python), "-m", "pytest", "-q", "-m", "not slow and not browser", *OLDER, *options]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def core() -> int:
    """Run the core of the tests if any version here is not the tested one, and return pytest's exit status."""
    other = differing(installed(), read(CONSTRAINTS.read_text(encoding="utf-8")))
    if not other:
        print("the registries serve nothing but the tested versions")
        return 0
    print("not the tested versions:", *other, sep="\n  ", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "logical", "-m", "not slow and not browser", *CORE]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main() -> None:
    match sys.argv[1:]:
        case ["renew"]:
            renew(f"torch=={read(CONSTRAINTS.read_text(encoding='utf-8'))['torch']}")
        case ["renew", torch]:
            renew(torch)
        case ["core"]:
            raise SystemExit(core())
        case ["oldest", folder, *options]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            extras = (project["optional-dependencies"][name] for name in EXTRAS)
            needed = oldest(chain(project["dependencies"], *extras))
            raise SystemExit(older(Path(folder).resolve(), needed, options))
        case ["between", folder, *options]:
            needed = [*BETWEEN, f"fastpref[{','.join(EXTRAS)}] @ {ROOT.as_uri()}"]
            raise SystemExit(older(Path(folder).resolve(), needed, options))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
