"""The package as it is installed: the wheel, and the checkout beside the other package named kernels."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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


def run(code: str, where: Path, path: Path) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r});" + code]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("where", [Path("/"), ROOT], ids=["root", "repository"])
def test_the_wheel_holds_its_kernels(wheel: Path, tmp_path: Path, where: Path):
    """The built wheel imports its own kernels as fastpref.kernels, from anywhere, with transformers beside it."""
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        assert not [n for n in names if n.startswith(("kernels/", "tests/", "bench/"))]
        file.extractall(tmp_path)
    assert run(IMPORT, where, tmp_path) == str(tmp_path / "fastpref" / "kernels" / "linear_logprob_torch.py")


def test_a_checkout_finds_the_kernels_beside_it():
    """From a checkout fastpref.kernels is the folder, and the folder's bare name hides transformers from nothing."""
    assert run(IMPORT, ROOT, ROOT) == str(ROOT / "kernels" / "linear_logprob_torch.py")


def test_another_package_named_kernels_is_left_alone(tmp_path: Path):
    """Where the hub's package `kernels` is installed, importing fastpref from a checkout does not hide it."""
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("name = 'the other one'")
    assert run("import fastpref, kernels; print(kernels.name)", tmp_path, tmp_path) == "the other one"
