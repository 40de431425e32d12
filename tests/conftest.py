"""Set up before anything imports `datasets` or computes: a cache of this run's own, no hub, one thread,
and Triton in its interpreter where there is no card."""

import os
import tempfile

import pytest

_HOME = tempfile.TemporaryDirectory(prefix="fastpref-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_DATASETS_CACHE"] = os.path.join(_HOME.name, "datasets")
os.environ["FASTPREF_CACHE"] = os.path.join(_HOME.name, "fastpref")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton's kernels run in its interpreter, unless there is a card that runs them itself.
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ["TRITON_INTERPRET"] = "1"
# Models and tiles this small gain nothing from threads, which on a busy machine wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))
