"""fastpref: preference training on one GPU, without ever materialising the logits.

    result = fastpref.train("my.toml")                        # as the command `fastpref train my.toml`
    result = fastpref.train({"model": {"name": "..."}, "lora": {}}, data=dataset)

    train             train by a file, a dict or a Config, on files or on a datasets.Dataset
    load_config       read a config, and check it
    linear_logprob    token log-probabilities from hidden states, without logits
    preference_loss   the loss of pairs from token log-probabilities
    losses            every loss: its options, and its formula as a function
    patch, unpatch    give TRL's trainers shared beginnings and the fused head
    UserError         what is raised for a user's mistake: what, where, and what to do

docs/python.md describes them. `help(fastpref.train)` describes one.
"""

import ast
import importlib
import logging
from pathlib import Path

if (Path(__file__).parent / "kernels").is_file():
    raise ImportError(
        "fastpref/kernels is a text file: this checkout was made without symbolic links. Make it again with "
        "`git -c core.symlinks=true clone`, or install the package with `pip install .`, which needs no links"
    )

# bitsandbytes warns at its import of a kernel for 4-bit inference on a CPU, about which a user can do nothing.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))

__version__ = "0.1.0"
# `__init__.pyi` lists the public interface, for type checkers and for this file. Each name is imported when it is first
# used, so that `import fastpref` and the help of the command line do not wait for torch.
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
