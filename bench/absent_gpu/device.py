"""The device of a GPU that is not there: the part in C++, which is compiled on this machine. Imports no torch."""

import ctypes
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")


def _torch() -> Path:
    found = find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def obstacle() -> str | None:
    """Return the reason why no GPU can be pretended on this machine, or None."""
    if sys.platform != "linux":
        return f"Triton compiles on Linux, and this is {sys.platform}"
    if any((_torch() / "lib" / f"libtorch_{kind}.so").exists() for kind in ("cuda", "hip")):
        return "this torch is built for GPUs and asks the driver itself; its build for CPUs is needed"
    if shutil.which("g++") is None:
        return "there is no C++ compiler: apt-get install g++"
    return None


def build(folder: Path) -> Path:
    """Compile the device against this torch and return the library. Raises RuntimeError with the compiler's message."""
    library, torch = folder / "device.so", _torch()
    places = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", str(SOURCE), "-o", str(library)]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", *places, "-ltorch_cpu", "-lc10"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise RuntimeError(f"{SOURCE.name} does not compile: {made.stderr[-2000:]}")
    return library


def take_over(library: Path) -> None:
    """Make it this process's "cuda", for good.

    Raises RuntimeError after `import torch`, which asks for a GPU, and would not ask again.
    """
    for name in ("libgomp.so.1", "libtorch_cpu.so"):
        if (path := _torch() / "lib" / name).exists():
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    function = ctypes.CDLL(str(library)).take_over
    function.restype = ctypes.c_bool
    if not function():
        raise RuntimeError("the device of an absent GPU must be there before torch is imported")
