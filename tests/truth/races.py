"""Proofs by sentryward that the threads of a compiled kernel do not race: in PTX, for one launch, in every schedule."""

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentryward  # pyright: ignore[reportMissingImports]
from ttsem import harness  # pyright: ignore[reportMissingImports]

from tests.truth.ptx import stored_once

_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32", "i1": "u8"}


@dataclass(frozen=True)
class Finding:
    result: str  # one of sentryward's results, such as "race_free", "potential_race", "unsupported", "timeout"
    cause: str = ""  # the code of its first diagnosis
    merged: int = 0  # stores of several lanes that had to become one store for the proof


def compiled_ptx(launch: harness.LaunchRecord, architecture: int) -> str:
    target = harness.target_for("cpu", architecture)
    return harness._compile_asm(launch.fn, launch.args, launch.kwargs, target)["ptx"]


def find_races(ptx: str, launch: harness.LaunchRecord, architecture: int, seconds: float) -> Finding:
    """Ask for a proof; if there is none, ask again with stores of equal values to one address merged into one."""
    threads = int(re.findall(r"\.reqntid (\d+)", ptx)[0])
    first = _verify(ptx, launch, architecture, threads, seconds)
    if first.result != "potential_race":
        return first
    once, merged = stored_once(ptx, threads)
    if not merged:
        return first
    second = _verify(once, launch, architecture, threads, seconds)
    return Finding(second.result, second.cause, merged)


def _verify(ptx: str, launch: harness.LaunchRecord, architecture: int, threads: int, seconds: float) -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        kernel, given = Path(folder) / "kernel.ptx", Path(folder) / "input.json"
        kernel.write_text(ptx, encoding="utf-8")
        given.write_text(json.dumps(_input(launch, architecture, threads)), encoding="utf-8")
        result = sentryward.verify(kernel, input=given, timeout_seconds=seconds)
    codes = [diagnosis.get("code", "") for diagnosis in result.get("diagnostics", [])]
    return Finding(result["result"], codes[0] if codes else "")


def _input(launch: harness.LaunchRecord, architecture: int, threads: int) -> dict[str, Any]:
    """Describe the launch: its grid, its numbers, and which of its pointers are one tensor."""
    target = harness.target_for("cpu", architecture)
    types = harness._specialize(launch.fn, launch.args, launch.kwargs, target)[1]
    pointers, numbers, objects = [], [], {}
    names = harness._runtime_param_names(launch)
    for i, name in enumerate(names):
        if types[name].startswith("*"):
            tensor = objects.setdefault(launch.bases[name], name)
            pointers.append({"parameter": i, "type": "pointer", "space": "global", "object": tensor})
        else:
            numbers.append({"parameter": i, "type": _TYPES[types[name]], "value": launch.bound[name]})
    scratch = [{"parameter": len(names) + i, "type": "pointer", "value": None} for i in range(2)]  # Triton's, unused
    grid = [*launch.grid, 1, 1][:3]
    block = {"block_dim": [threads, 1, 1], "dynamic_shared_bytes": harness.shared_memory(launch, target)}
    return {
        "schema": "spverify.kernel-input/v1",
        "launch": {"grid_dim": grid, **block},
        "declarations": pointers,
        "arguments": numbers + scratch,
    }
