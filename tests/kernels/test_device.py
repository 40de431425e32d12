"""A device without an index is the current one, as tensors name it."""

import pytest
import torch

from fastpref.kernels.device import with_index

NAMES = [("cpu", "cpu"), ("meta", "meta"), ("cuda:0", "cuda:0"), ("cuda:3", "cuda:3"), ("mps", "mps:0")]


@pytest.mark.parametrize(("given", "name"), [*NAMES, ("cuda", "cuda:2")])
def test_the_index_is_the_current_one(given: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert with_index(given) == with_index(torch.device(given)) == torch.device(name)


def test_cuda_is_not_initialised_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before CUDA is initialised the current GPU is the first one."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert with_index("cuda") == torch.device("cuda", 0)
