"""fastpref: preference training on one GPU, without ever materialising the logits.

`__init__.pyi` lists the public interface, for type checkers and for this file. Each name is imported when it is first
used, so that `import fastpref` and the help of the command line do not wait for torch.
"""

import ast
import importlib
from pathlib import Path

if (Path(__file__).parent / "kernels").is_file():
    raise ImportError(
        "fastpref/kernels is a text file: this checkout was made without symbolic links. Make it again with "
        "`git -c core.symlinks=true clone`, or install the package with `pip install .`, which needs no links"
    )

__version__ = "0.1.0"
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_MODULES = {
    name.name: node.module or "" for node in _STUB.body if isinstance(node, ast.ImportFrom) for name in node.names
}
__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'fastpref' has no attribute {name!r}")
    if name in ("losses", "patch"):  # modules; the second can be called
        return importlib.import_module(f"fastpref.{name}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
