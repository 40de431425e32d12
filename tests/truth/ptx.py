"""Reads PTX: stores to shared memory that several lanes of a warp make alike, and barriers."""

import re
from collections.abc import Callable
from functools import reduce

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "and": int.__and__, "or": int.__or__, "xor": int.__xor__, "add": int.__add__, "sub": int.__sub__,
    "shl": int.__lshift__, "shr": int.__rshift__, "mul": int.__mul__,
}  # fmt: skip
_COMMUTATIVE = ("max", "min", "add")  # a op b has the bits of b op a
_STORE = re.compile(r"^\s*st\.shared\S*\s+\[\s*(%r\d+)(?: \+ \d+)?\s*\],\s*\{?([^};]*)\}?;")


def barriers(ptx: str) -> list[int]:
    """Return the lines, from 0, of the barriers of the block."""
    return [i for i, line in enumerate(ptx.splitlines()) if re.match(r"\s*(bar\.sync|barrier\.sync)\b", line)]


def without_line(ptx: str, number: int) -> str:
    lines = ptx.splitlines(keepends=True)
    lines[number] = "\n"
    return "".join(lines)


def stored_once(ptx: str, threads: int) -> tuple[str, int]:
    """Let one lane store what several lanes of a warp store at one address; return the PTX and how many stores changed.

    After a reduction over lanes by `shfl.bfly`, those lanes hold equal bits: each has added the same pairs, and the
    operation commutes. If their addresses are equal too, for each thread of the block, one store does for all.
    """
    lines, definitions, changed = ptx.splitlines(), _definitions(ptx), 0
    for i, line in enumerate(lines):
        store = _STORE.match(line)
        if not store:
            continue
        lanes = reduce(int.__and__, (_equal_lanes(value.strip(), definitions) for value in store[2].split(",")))
        addresses = [_value(store[1], definitions, thread) for thread in range(threads)]
        if lanes and None not in addresses and all(addresses[t] == addresses[t & ~lanes] for t in range(threads)):
            changed += 1
            lines[i] = f"{{ .reg .pred %once; .reg .b32 %lane; mov.u32 %lane, %tid.x; and.b32 %lane, %lane, {lanes}; "
            lines[i] += f"setp.eq.u32 %once, %lane, 0; @%once {line.strip()} }}"
    return "\n".join(lines) + "\n", changed


def _definitions(ptx: str) -> dict[str, tuple[str, list[str]]]:
    """Return the operation and operands of each register that is written once."""
    found: dict[str, tuple[str, list[str]] | None] = {}
    for line in ptx.splitlines():
        match = re.match(r"\s*(@\S+\s+)?([a-z][\w.:]*)\s+(%\w+),\s*(.*);", line)
        if match:
            guard, operation, register, operands = match.groups()
            again = guard or register in found
            found[register] = None if again else (operation, [o.strip() for o in operands.split(",")])
    return {register: definition for register, definition in found.items() if definition}


def _equal_lanes(register: str, definitions: dict[str, tuple[str, list[str]]]) -> int:
    """Return the bits of the lane's number that do not change the register's value."""
    operation, operands = definitions.get(register, ("", []))
    if operation.partition(".")[0] == "mov" and len(operands) == 1:
        return _equal_lanes(operands[0], definitions)
    if operation.partition(".")[0] not in _COMMUTATIVE or len(operands) != 2:
        return 0
    for own, other in (operands, operands[::-1]):
        shuffle, of = definitions.get(other, ("", []))
        if shuffle.startswith("shfl.sync.bfly") and of[0] == own:
            return int(of[1]) | _equal_lanes(own, definitions)
    return 0


def _value(operand: str, definitions: dict[str, tuple[str, list[str]]], thread: int) -> int | None:
    """Return a register's value in a thread, or None if it depends on more than the thread's number."""
    if re.fullmatch(r"-?\d+", operand):
        return int(operand)
    if operand == "%tid.x":
        return thread
    if re.fullmatch(r"[A-Za-z_]\w*", operand):
        return 0  # the address of a variable, the same in all threads
    operation, operands = definitions.get(operand, ("", []))
    values = [_value(o, definitions, thread) for o in operands]
    name = operation.partition(".")[0]
    if None in values or not values:
        return None
    if name in ("mov", "cvt") and len(values) == 1:
        return values[0]
    if name in _OPERATIONS and len(values) == 2:
        return _OPERATIONS[name](*values) & 0xFFFFFFFF  # type: ignore[arg-type]
    return None
