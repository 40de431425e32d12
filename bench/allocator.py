"""Compare the simulated caching allocator with torch's own, which needs no GPU for that.

    python -m bench.allocator FOLDER

FOLDER is the site-packages of an environment with torch 2.11 for CUDA 13, from which come the allocator's library
(`libc10_cuda.so`) and its headers; g++ is needed. The library runs on a CUDA runtime that only hands out addresses
(bench/absent_gpu/runtime.cpp). Both allocators get the same requests: random ones, and those of a step of Llama-3-8B
(DPO, nf4, adapters of rank 16, a pair of 4,095 tokens) followed by shorter and equally long ones. The table has the
most bytes that were allocated and reserved; the command fails if the simulation differs in one of them.
"""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from bench.step_memory import LLAMA_3_8B, config
from fastpref.memory import step
from fastpref.memory.caching_allocator import CachingAllocator, requests

_SOURCES = Path(__file__).parent / "absent_gpu"
# What the library links to, and the allocator does not call.
_NOT_SUPPORTED = (
    *("cudaDeviceCanAccessPeer", "cudaDeviceEnablePeerAccess", "cudaDeviceGetDefaultMemPool", "cudaMemPoolTrimTo"),
    *("cudaEventCreateWithFlags", "cudaEventDestroy", "cudaEventElapsedTime", "cudaEventQuery", "cudaEventRecord"),
    *("cudaEventSynchronize", "cudaFreeAsync", "cudaMallocAsync", "cudaGraphNodeGetDependencies"),
    *("cudaIpcCloseMemHandle", "cudaIpcGetMemHandle", "cudaIpcOpenMemHandle", "cudaMemPoolGetAttribute"),
    *("cudaMemPoolSetAccess", "cudaMemPoolSetAttribute", "cudaMemcpy", "cudaMemcpyAsync", "cudaMemcpyPeerAsync"),
    *("cudaStreamCreateWithPriority", "cudaStreamQuery", "cudaStreamSynchronize", "cudaStreamWaitEvent"),
)
Request = tuple[int, int]  # the number of an allocation, and its bytes or 0 when it is freed


def random_requests(seed: int, count: int = 20_000) -> Iterator[Request]:
    """Yield requests of sizes from a byte to 64 MiB, evenly spread on a logarithmic scale; about 200 are in use."""
    random, used = Random(seed), list[int]()
    for number in range(count):
        if len(used) > random.randint(100, 300):
            yield used.pop(random.randrange(len(used))), 0
        used.append(number)
        yield number, int(2 ** random.uniform(0, 26))


def step_requests(**train: Any) -> list[Request]:
    """Return the requests of steps of Llama-3-8B, with further keys of `[train]`."""
    found: list[Request] = []
    replayed = step.replayed

    def listen(trace: Any, **options: Any) -> CachingAllocator:
        found.extend(requests(trace, **options))
        return replayed(trace, **options)

    step.replayed = listen
    try:
        step.count_step(config({"train": train}), torch.device("cuda"), architecture=LLAMA_3_8B)
    finally:
        step.replayed = replayed
    return found


def simulated(asked: Iterable[Request], *, expandable: bool) -> tuple[int, int]:
    allocator = CachingAllocator(expandable=expandable)
    for number, size in asked:
        if size:
            allocator.allocate(number, size)
        else:
            allocator.free(number)
    return allocator.peak, allocator.reserved


class RealAllocator:
    """Torch's caching allocator on a CUDA runtime without a GPU, built in a folder."""

    def __init__(self, packages: Path, folder: Path):
        self._folder, libraries = folder, packages / "torch" / "lib"
        # Triton's headers have what is missing in CUDA's, and are of another version.
        own, triton = packages.glob("nvidia/*/include"), packages / "triton" / "backends" / "nvidia" / "include"
        include = [f"-I{path}" for path in (packages / "torch" / "include", *own, triton)]
        missing = "".join(f'extern "C" int {name}() {{ return 801; }}\n' for name in _NOT_SUPPORTED)
        (folder / "missing.cpp").write_text(missing)
        (folder / "versions").write_text("libcudart.so.13 { global: *; };")
        self._runtime = folder / "libcudart.so.13"
        names = ["-shared", "-fPIC", "-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={folder / 'versions'}"]
        self._compile(*include, *names, _SOURCES / "runtime.cpp", folder / "missing.cpp", "-o", self._runtime)
        links = [f"-L{libraries}", "-lc10", "-lc10_cuda", f"-Wl,-rpath,{libraries}", "-Wl,--allow-shlib-undefined"]
        self._compile(*include, _SOURCES / "replay.cpp", self._runtime, *links, "-o", folder / "replay")

    def _compile(self, *arguments: object) -> None:
        subprocess.run(["g++", "-O1", "-std=c++20", "-w", *map(str, arguments)], check=True)

    def __call__(self, asked: Iterable[Request], *, expandable: bool) -> tuple[int, int]:
        (self._folder / "requests").write_text("".join(f"{number} {size}\n" for number, size in asked))
        options = f"expandable_segments:{expandable}"
        environment = os.environ | {"LD_PRELOAD": str(self._runtime), "PYTORCH_CUDA_ALLOC_CONF": options}
        command = [str(self._folder / "replay"), str(self._folder / "requests")]
        words = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
        return int(words[0]), int(words[1])


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    logging.disable(logging.WARNING)  # hide a warning of bitsandbytes on a CPU
    cases: dict[str, list[Request]] = {f"random, seed {seed}": list(random_requests(seed)) for seed in range(3)}
    cases["a step, all layers checkpointed"] = step_requests(checkpointing=True)
    cases["a step, none checkpointed"] = step_requests(checkpointing=False)
    different = 0
    with tempfile.TemporaryDirectory() as name:
        real = RealAllocator(Path(sys.argv[1]), Path(name))
        print("| requests | segments | number | allocated | reserved | simulated: allocated | reserved |")
        print("|---|---|---|---|---|---|---|")
        for words, asked in cases.items():
            for expandable in (True, False):
                sizes = [*real(asked, expandable=expandable), *simulated(asked, expandable=expandable)]
                different += sizes[:2] != sizes[2:]
                kind = "that grow" if expandable else "of fixed size"
                print(
                    f"| {words} | {kind} | {len(asked):,} | {' | '.join(f'{size:,}' for size in sizes)} |", flush=True
                )
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
