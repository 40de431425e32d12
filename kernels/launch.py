"""Launching a Triton kernel."""

from typing import Any


def launch(kernel: Any, grid: tuple[Any, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel of `triton.jit` over a grid; `options` are its constants, `num_warps` and `num_stages`.

    A type checker gives a launch the signature of the kernel's body, which has no such options: so `kernel` is Any.
    """
    kernel[grid](*arguments, **options)
