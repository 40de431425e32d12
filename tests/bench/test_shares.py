"""The shares of matrix products and attention in a block of operations."""

from types import SimpleNamespace

import torch
from torch.autograd import DeviceType
from torch.nn.functional import scaled_dot_product_attention

from bench.shares import Shares, shares, shares_of


def test_shares_are_those_of_the_operations():
    """Products and attention have the time of their operations, forwards and backwards, and other work has neither."""
    matrix = torch.randn(256, 256)
    with shares() as products:
        torch.mm(matrix, matrix)
    assert products.products > 0
    assert products.attention == 0
    query = torch.randn(1, 4, 256, 64, requires_grad=True)
    with shares() as attention:
        scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    assert attention.attention > 0
    assert attention.products + attention.attention <= 1
    with shares() as neither:
        matrix.exp()
    assert (neither.products, neither.attention) == (0, 0)


def test_a_gpu_counts_each_kernel_once():
    """The total is that of the kernels: not of the operations that launched them, nor of spans around several."""

    def row(key: str, time: float, device: DeviceType, *, span: bool = False) -> SimpleNamespace:
        return SimpleNamespace(key=key, self_device_time_total=time, device_type=device, is_user_annotation=span)

    rows = [
        row("aten::mm", 60.0, DeviceType.CPU),
        row("gemm_kernel", 60.0, DeviceType.CUDA),
        row("aten::_scaled_dot_product_flash_attention", 10.0, DeviceType.CPU),
        row("flash_kernel", 10.0, DeviceType.CUDA),
        row("_walk_kernel", 30.0, DeviceType.CUDA),  # launched by no operation of torch
        row("Optimizer.step#AdamW.step", 500.0, DeviceType.CUDA, span=True),
    ]
    assert shares_of(rows, cuda=True) == Shares(0.6, 0.1)
