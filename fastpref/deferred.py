"""Import torch, transformers and bitsandbytes without what most runs never use and what takes long to import.

Other libraries name `torch._dynamo` when they are imported or when an optimizer makes its first step, to say what the
compiler should leave alone. They ask of every weight whether it is a `DTensor`, sharded over processes, and of every
tensor without memory whether its sizes are symbols. Until something is compiled or sharded, stand-ins answer these few
questions; whatever else they are asked for loads the real module, in its place. bitsandbytes compiles functions when
it is imported, and here when they are first called.
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


def defer_compiler() -> None:
    """Put stand-ins in the place of torch's compiler and its symbols. For a process that is ours alone."""
    import torch
    import torch.fx.experimental

    _stand_in(_Compiler("torch._dynamo"), torch)
    _stand_in(_SymbolicShapes("torch.fx.experimental.symbolic_shapes"), torch.fx.experimental)
    _stand_in(_Sympy("sympy"))


def defer_sharding() -> None:
    """Put a stand-in in the place of torch's sharded tensors, and let transformers do without.

    Transformers asks once whether torch was built to work in several processes, which some builds are not. For a
    process that is ours, and trains alone.
    """
    import torch
    from transformers.utils import import_utils

    _stand_in(_Sharding("torch.distributed.tensor"), torch.distributed)
    answer: Any = getattr(import_utils, "is_torch_distributed_available", None)
    if hasattr(answer, "cache_clear"):  # so the answer is kept
        answer.cache_clear()
        built, torch.distributed.is_available = torch.distributed.is_available, lambda: False
        try:
            answer()
        finally:
            torch.distributed.is_available = built


def import_bitsandbytes() -> None:
    """Import bitsandbytes, if it is installed, and let it compile only what is called."""
    if "bitsandbytes" not in sys.modules and importlib.util.find_spec("bitsandbytes") is not None:
        with suppress(Exception), _compiling_later():  # whoever needs it is told when it is imported again
            import bitsandbytes  # noqa: F401


def _stand_in(module: "_StandIn", parent: Any = None) -> None:
    """Register a stand-in, as an attribute of its parent too, unless the real module is loaded."""
    name = module.__name__
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    vars(module).update(
        __spec__=spec, __loader__=spec.loader, __file__=spec.origin, __package__=name,
        __path__=spec.submodule_search_locations,
    )  # fmt: skip
    sys.modules[name] = module
    if parent is not None:
        setattr(parent, name.rpartition(".")[2], module)
    sys.meta_path.insert(0, _Submodules(module))


class _StandIn(ModuleType):
    """A package until it is loaded. Its subclasses define the names for which nothing is loaded."""

    alone: tuple[str, ...] = ()
    """The package's modules that need none of the others."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_loading" in vars(self):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
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


class _Compiler(_StandIn):
    """`torch._dynamo` while nothing is compiled."""

    alone = ("torch._dynamo._trace_wrapped_higher_order_op",)

    class eval_frame:
        class OptimizedModule:
            """A compiled module: there is none."""

    @staticmethod
    def disable(fn: Callable[..., Any] | None = None, recursive: bool = True, **options: Any) -> Any:
        """Return a function that is not compiled, also if the compiler is loaded later."""
        if fn is None:
            return lambda fn: _Compiler.disable(fn, recursive, **options)

        @wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            module: Any = sys.modules["torch._dynamo"]
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
        vars(self).setdefault("_allowed", []).append(fn)
        return fn

    def load(self) -> None:
        """Become the real module, with what was registered before."""
        super().load()
        real: Any = self
        for function in vars(self).pop("_allowed", ()):
            real.allow_in_graph(function)


class _Absent(type):
    """The type of a class that has no instances until the real one is loaded, and is as that one from then on."""

    package: str

    def _real(cls, load: bool) -> Any:
        """Return the real class, or None while it is not loaded."""
        module: Any = sys.modules[cls.package]
        if load and isinstance(module, _StandIn):
            module.load()
        return None if isinstance(module, _StandIn) else getattr(module, cls.__name__)

    def __instancecheck__(cls, value: Any) -> bool:
        real = cls._real(load=False)
        return real is not None and isinstance(value, real)

    def __subclasscheck__(cls, kind: type) -> bool:
        real = cls._real(load=False)
        return real is not None and issubclass(kind, real)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._real(load=True)(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls._real(load=True), name)


class _Sharding(_StandIn):
    """`torch.distributed.tensor` while no tensor is sharded."""

    class DTensor(metaclass=_Absent):
        """A tensor sharded over processes: there is none."""

        package = "torch.distributed.tensor"


def _of_numbers(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that answers for numbers itself, and for symbols has torch's function of that name called."""

    def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
        if all(map(_is_of_numbers, args)):
            return answer(*args)
        if isinstance(self, _StandIn):
            self.load()
        return getattr(self, name)(*args, **kwargs)

    return ask


def _is_of_numbers(value: Any) -> bool:
    """Return whether a value is a number, or a shape of them."""
    return type(value) in (bool, int) or (isinstance(value, tuple) and all(type(size) is int for size in value))


class _SymbolicShapes(_StandIn):
    """`torch.fx.experimental.symbolic_shapes` while all sizes are numbers: what is asked of tensors without memory."""

    expect_true = _of_numbers("expect_true", lambda a, *_: bool(a))
    guard_or_false = _of_numbers("guard_or_false", bool)
    guard_or_true = _of_numbers("guard_or_true", bool)
    guard_size_oblivious = _of_numbers("guard_size_oblivious", bool)
    is_nested_int = _of_numbers("is_nested_int", lambda _: False)
    has_guarding_hint = _of_numbers("has_guarding_hint", lambda _: True)
    guarding_hint_or_throw = _of_numbers("guarding_hint_or_throw", int)
    statically_known_true = _of_numbers("statically_known_true", bool)
    sym_and = _of_numbers("sym_and", lambda *values: all(values))
    sym_eq = _of_numbers("sym_eq", lambda a, b: a == b)
    sym_or = _of_numbers("sym_or", lambda *values: any(values))


class _Sympy(_StandIn):
    """`sympy` while all numbers are numbers."""

    class Basic(metaclass=_Absent):
        """An expression: there is none."""

        package = "sympy"


class _Submodules(MetaPathFinder):
    """Loads the package before one of its modules is imported, as it would be without the stand-in."""

    def __init__(self, module: _StandIn):
        self._module = module
        self._name, self._alone = module.__name__, module.alone

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if not fullname.startswith(f"{self._name}.") or fullname in self._alone or type(self._module) is ModuleType:
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
