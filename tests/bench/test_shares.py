"""The shares of matrix products and attention in a block of operations."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.shares import shares


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
