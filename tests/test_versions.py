"""constraints.txt has a version of every package, within the ranges, and permits torch for a GPU."""

import importlib.metadata
import re
import tomllib
from contextlib import nullcontext

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import conftest, versions

TESTED = versions.read(versions.CONSTRAINTS.read_text(encoding="utf-8"))
OTHERS = versions.differing(versions.installed(), TESTED)
PROJECT = tomllib.loads((versions.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]


@pytest.mark.parametrize("requirement", [r for r in DIRECT if r.name != "fastpref"], ids=str)
def test_the_tested_version_is_in_the_range(requirement: Requirement):
    """Every requirement of pyproject.toml has a tested version that it permits."""
    assert TESTED[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.skipif(bool(OTHERS), reason="this environment has other versions than the tested ones")
def test_what_they_need_has_a_version_too():
    """The requirements' own requirements are pinned too, except those that come with a build of torch."""
    missing, seen = set(), set()
    names = [canonicalize_name(r.name) for r in DIRECT if r.name != "fastpref"]
    while names:
        name = names.pop()
        if name in seen or (name.startswith(versions.OF_TORCH) and name != "nvidia-ml-py"):
            continue
        seen.add(name)
        if name not in TESTED:
            missing.add(name)
        try:
            needed = [Requirement(line) for line in importlib.metadata.requires(name) or ()]
        except importlib.metadata.PackageNotFoundError:  # a package for another platform
            continue
        names += [canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert missing == set()


def test_no_build_is_pinned():
    """Versions have no build part, so that the same line permits a build for CPUs and one for GPUs."""
    assert [name for name, version in TESTED.items() if Version(version).local] == []
    assert [name for name in TESTED if name.startswith(versions.OF_TORCH)] == ["nvidia-ml-py"]


def test_what_is_written_is_read():
    ours = {"fastpref": "0.1.0", "pip": "25", "nvidia-cudnn-cu13": "9.20"}
    installed = ({"PyYAML": "6.0", "torch": "2.13.0+cpu"} | ours).items()
    tested = versions.read(versions.write(installed))
    assert tested == {"pyyaml": "6.0", "torch": "2.13.0"}
    assert versions.differing(installed, tested) == []
    lines = ["pyyaml 6.0 (tested: 5.0)", "torch 2.13.0 (tested: none)"]
    assert versions.differing(installed, {"pyyaml": "5.0"}) == lines


def test_the_core_is_there():
    assert [path for path in versions.OLDER if not (versions.ROOT / path).exists()] == []


def test_the_oldest_versions_are_the_lower_bounds():
    """Every requirement for this platform has one, and tests choose a numpy that old Triton's interpreter can use."""
    given = [
        "torch>=2.10",
        "triton>=3.6; platform_system == 'Linux'",
        "a-b>=1.2,<2",
        "c>=1; platform_system == 'Other'",
    ]
    oldest = versions.oldest(given)
    assert oldest == ["torch==2.10", "triton==3.6", "a-b==1.2"]
    assert versions.for_interpreter(oldest) == [*oldest, "numpy<2.4"]
    assert versions.for_interpreter(["triton==3.7"]) == ["triton==3.7"]
    assert versions.for_interpreter(versions.BETWEEN)[-1] == "numpy<2.4"
    bounds = versions.oldest(PROJECT["dependencies"])
    assert len(bounds) == len(PROJECT["dependencies"])


INTERPRETERS = [
    ("3.6.0", "2.4.0", True),
    ("3.6.0", "2.3.5", False),
    ("3.7.1", "2.4.6", False),
    ("3.10.0", "2.5.0", False),
]


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize(("triton", "numpy", "fails"), INTERPRETERS)
def test_a_numpy_that_the_interpreter_cannot_use_is_refused(
    triton: str, numpy: str, fails: bool, interpreted: bool, monkeypatch: pytest.MonkeyPatch
):
    """The tests say what to install, instead of failing one by one; on a GPU the two versions go together."""
    monkeypatch.setattr(conftest, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not interpreted:
        monkeypatch.delenv("TRITON_INTERPRET")
    with (
        pytest.raises(pytest.UsageError, match=r"pip install 'numpy<2\.4'") if fails and interpreted else nullcontext()
    ):
        conftest.pytest_configure()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", ".ci/run"])
def test_developers_and_ci_install_what_was_tested(page: str):
    text = (versions.ROOT / page).read_text(encoding="utf-8")
    assert re.search(r'pip install (--quiet )?-c constraints\.txt -e "\.\[dev\]"', text)
