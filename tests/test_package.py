"""The installed package: the wheel, and a checkout with the other package named kernels."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

IMPORT = (
    "import fastpref, fastpref.kernels.linear_logprob_torch as k, importlib.util, transformers, sys;"
    "from transformers import AutoModelForCausalLM;"
    "import torch; w = torch.eye(3); y = torch.tensor([0]);"
    "assert fastpref.linear_logprob(w[:1], w, y).logp.shape == (1,);"
    "print(k.__file__)"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def run(code: str, where: Path, path: Path, *options: str) -> str:
    command = [sys.executable, *options, "-c", f"import sys; sys.path.insert(0, {str(path)!r});" + code]
    process = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("where", [Path("/"), ROOT], ids=["root", "repository"])
def test_the_wheel_holds_its_kernels(wheel: Path, tmp_path: Path, where: Path):
    """The built wheel imports its own kernels as fastpref.kernels from any folder, also after transformers."""
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        assert not [n for n in names if n.startswith(("kernels/", "tests/", "bench/"))]
        file.extractall(tmp_path)
    assert run(IMPORT, where, tmp_path) == str(tmp_path / "fastpref" / "kernels" / "linear_logprob_torch.py")


def test_a_checkout_finds_the_kernels_by_its_link():
    """A checkout imports its kernels also from the repository's root, where transformers sees `kernels` as a folder."""
    assert run(IMPORT, ROOT, ROOT) == str(ROOT / "fastpref" / "kernels" / "linear_logprob_torch.py")


def test_an_editable_install_gives_other_programs_no_kernels(tmp_path: Path):
    """An editable install makes only `fastpref` importable, because transformers looks for a package `kernels`."""
    build = (
        f"import os, hatchling.build; os.chdir({str(ROOT)!r}); print(hatchling.build.build_editable({str(tmp_path)!r}))"
    )
    with zipfile.ZipFile(tmp_path / run(build, ROOT, tmp_path)) as file:
        file.extractall(tmp_path)
    # Without `site`, this environment's own installs of the project are not found.
    look = (
        f"import sys, site; sys.path.append({sysconfig.get_path('purelib')!r}); site.addsitedir({str(tmp_path)!r});"
        "import fastpref.kernels.tiles as tiles; from importlib.util import find_spec;"
        "print(tiles.__file__, find_spec('kernels'), find_spec('bench'))"
    )
    isolated = [sys.executable, "-I", "-S", "-c", look]
    done = subprocess.run(isolated, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(ROOT / "fastpref" / "kernels" / "tiles.py"), "None", "None"]


def test_a_checkout_without_links_says_so(tmp_path: Path):
    """An error says so if Git has written the link as a text file, as it does where links are not permitted."""
    (tmp_path / "fastpref").mkdir()
    shutil.copy(ROOT / "fastpref" / "__init__.py", tmp_path / "fastpref")
    (tmp_path / "fastpref" / "kernels").write_text("../kernels")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fastpref"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: fastpref/kernels is a text file")


def test_another_package_named_kernels_is_left_alone(tmp_path: Path):
    """If the hub's package `kernels` is installed, other programs import that one."""
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("name = 'the other one'")
    assert run("import fastpref, kernels; print(kernels.name)", ROOT, tmp_path) == "the other one"
