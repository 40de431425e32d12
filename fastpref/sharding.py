"""Tensors that FSDP has sharded over the processes."""

import sys
from typing import Any


def is_sharded(value: Any) -> bool:
    """Return whether a value is a DTensor. Who shards has imported their module, which takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)
