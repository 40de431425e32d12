"""The training run. `fastpref.train` names this package and, as the public interface has it, the function in `loop`;
so the package can be called, and that is the function."""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from fastpref.train.loop import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
