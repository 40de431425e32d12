"""Unsloth's fused head, loaded apart from its package, which needs a GPU and a TRL before 1.16 to be imported.

    pip install --no-deps unsloth_zoo

Its module of preference losses needs neither. On a CPU it runs torch code in chunks of rows, on a GPU Triton kernels;
Unsloth's DPO, KTO, ORPO and CPO trainers score completions with the same operator.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

PACKAGE = "unsloth_zoo"


@functools.cache
def token_logps() -> Callable[..., dict[str, Any]]:
    """Return `fused_linear_token_logps` of the installed unsloth_zoo.

    The package's own first lines are left out if it was not imported before. Raises ImportError for another version
    without the function.
    """
    for name in (PACKAGE, f"{PACKAGE}.fused_losses"):
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ImportError(f"{name} is not installed")
        sys.modules[name] = importlib.util.module_from_spec(spec)  # and its code does not run
    return importlib.import_module(f"{PACKAGE}.fused_losses.preference_loss").fused_linear_token_logps
