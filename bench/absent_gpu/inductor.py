"""Inductor's kernels for the GPU that `pretend.py` makes a process believe in."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch._inductor import config
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = torch.device("cuda", 0)


@contextmanager
def compiled_kernels(fake: FakeTensorMode) -> Iterator[list[Any]]:
    """Yield the list to which Inductor's kernels, as Triton has compiled them, are appended inside the block.

    They are compiled in this process and without a cache, and their launches do nothing: the graphs run on the tensors
    of `fake`.
    """
    kernels: list[Any] = []
    compile_one = CachingAutotuner._precompile_config

    def recorded(self: CachingAutotuner, choice: Any) -> Any:
        result = compile_one(self, choice)
        kernels.append(result.kernel)
        return result

    def empty(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        with fake:
            return torch.empty_strided(size, stride, dtype=dtype, device=DEVICE)

    guards: Any = import_module("torch._C._dynamo.guards")
    options = {
        "compile_threads": 1,
        "force_disable_caches": True,
        "fx_graph_cache": False,
        "use_static_cuda_launcher": False,
        "pattern_matcher": False,  # its patterns for other operators are traced on the GPU at the first use
        "joint_graph_constant_folding": False,
    }
    nothing = mock.Mock(return_value=None)
    with (
        config.patch({name: value for name, value in options.items() if hasattr(config, name)}),
        mock.patch.multiple(CachingAutotuner, _precompile_config=recorded, run=nothing, _make_launchers=nothing),
        mock.patch.object(CachingAutotuner, "_dynamic_scale_rblock", nothing),
        mock.patch.object(joint_graph, "lazy_init", nothing),
        mock.patch.object(post_grad, "lazy_init", nothing),
        mock.patch.multiple(guards, _empty_strided_cuda=empty, assert_size_stride=nothing),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", mock.Mock(return_value=0), create=True),
    ):
        yield kernels
