"""Import torch and bitsandbytes without torch's compiler, which most runs never use and which takes seconds to import.

Other libraries name `torch._dynamo` when they are imported or when an optimizer makes its first step, to say what the
compiler should leave alone. Until something is compiled, a stand-in answers these few calls; whatever else it is asked
for loads the real module, in its place. bitsandbytes compiles functions when it is imported, and here when they are
first called.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NAME = "torch._dynamo"
_ALONE = (f"{_NAME}._trace_wrapped_higher_order_op",)  # its modules that need none of the others


def defer_compiler() -> None:
    """Put the stand-in in the place of torch's compiler, unless that is loaded. For a process that is ours alone."""
    import torch

    if _NAME in sys.modules:
        return
    spec = importlib.util.find_spec(_NAME)
    if spec is None or spec.loader is None:
        return
    module = _StandIn(_NAME)
    vars(module).update(
        __spec__=spec, __loader__=spec.loader, __file__=spec.origin, __package__=_NAME,
        __path__=spec.submodule_search_locations, _allowed=[],
    )  # fmt: skip
    sys.modules[_NAME] = module
    torch._dynamo = module
    sys.meta_path.insert(0, _Submodules(module))


def import_bitsandbytes() -> None:
    """Import bitsandbytes, if it is installed, and let it compile only what is called."""
    if "bitsandbytes" not in sys.modules and importlib.util.find_spec("bitsandbytes") is not None:
        with suppress(Exception), _compiling_later():  # whoever needs it is told when it is imported again
            import bitsandbytes  # noqa: F401


class _StandIn(ModuleType):
    """What `torch._dynamo` is until it is loaded. Its own names are those that nothing needs to be loaded for."""

    class eval_frame:
        class OptimizedModule:
            """A compiled module: there is none."""

    @staticmethod
    def disable(fn: Callable[..., Any] | None = None, recursive: bool = True, **options: Any) -> Any:
        """Return a function that is not compiled, also if the compiler is loaded later."""
        if fn is None:
            return lambda fn: _StandIn.disable(fn, recursive, **options)

        @wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            module: Any = sys.modules[_NAME]
            if isinstance(module, _StandIn):
                return fn(*args, **kwargs)
            return module.disable(fn, recursive, **options)(*args, **kwargs)

        return call

    @staticmethod
    def graph_break(msg: str = "") -> None:
        """Do what torch's function does where nothing is compiled."""

    @staticmethod
    def assume_constant_result(fn: Any) -> Any:
        fn._dynamo_marked_constant = True
        return fn

    def allow_in_graph(self, fn: Any) -> Any:
        vars(self)["_allowed"].append(fn)
        return fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_loading" in vars(self):
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}")
        self.load()
        return getattr(self, name)

    def load(self) -> None:
        """Become the real module."""
        vars(self)["_loading"] = True
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(self)
        self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]
        del vars(self)["_loading"]
        real: Any = self
        for function in vars(self).pop("_allowed"):
            real.allow_in_graph(function)


class _Submodules(MetaPathFinder):
    """Loads the package before one of its modules is imported, as it would be without the stand-in."""

    def __init__(self, module: _StandIn):
        self._module = module

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if not fullname.startswith(f"{_NAME}.") or fullname in _ALONE or type(self._module) is ModuleType:
            return None
        if "_loading" in vars(self._module):
            return None
        self._module.load()
        known = sys.modules.get(fullname)
        return None if known is None else ModuleSpec(fullname, _Known(known))


class _Known(Loader):
    """Gives a module that the loading of its package has imported."""

    def __init__(self, module: ModuleType):
        self._module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _compiling_later() -> Iterator[None]:
    """Let `torch.compile` return a function that is compiled at its first call."""
    import torch

    compiled = torch.compile

    def later(fn: Any = None, **options: Any) -> Any:
        if fn is None:
            return lambda fn: later(fn, **options)
        made: list[Any] = []

        @wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not made:
                made.append(compiled(fn, **options))
            return made[0](*args, **kwargs)

        return call

    namespace: Any = torch
    namespace.compile = later
    try:
        yield
    finally:
        namespace.compile = compiled
