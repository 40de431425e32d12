"""Settings made before anything imports `datasets` or computes: a cache for this run only, no hub, one thread, and
Triton's interpreter if there is no GPU."""

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

_HOME = tempfile.TemporaryDirectory(prefix="fastpref-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_DATASETS_CACHE"] = os.path.join(_HOME.name, "datasets")
os.environ["FASTPREF_CACHE"] = os.path.join(_HOME.name, "fastpref")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton's kernels run in its interpreter, unless there is a GPU for them, or the truth suite asks for compiled ones.
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Models and tiles this small gain nothing from threads, which wait for each other on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"


class _LeftOut(pytest.Directory):
    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        pytest.skip(
            "tests/truth executes compiled kernels: TRITON_INTERPRET=0 pytest tests/truth, where ttsem is installed"
        )


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Leave out the truth suite unless this is its environment."""
    if path != Path(__file__).parent / "truth":
        return None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return _LeftOut.from_parent(parent, path=path) if interpreted or not find_spec("ttsem") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty working directory, and return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def config(elsewhere: Path) -> Path:
    """Write the config of a short run into an otherwise empty working directory."""
    from tests.support.runs import write_config

    return write_config(elsewhere)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train four steps with adapters and a final checkpoint. Tests must only read the run."""
    return _run(tmp_path_factory.mktemp("run"), "lora={rank=4}")


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the whole model for four steps with a final checkpoint. Tests must only read the run."""
    return _run(tmp_path_factory.mktemp("whole"))


def _run(folder: Path, *overrides: str) -> Path:
    import fastpref
    from tests.support.runs import write_config

    given = [f'output.dir="{(folder / "out").as_posix()}"', "train.steps=4", "output.save_every=4", *overrides]
    return fastpref.train(write_config(folder), given).output_dir
