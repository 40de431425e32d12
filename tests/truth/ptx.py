"""Reads PTX: stores to shared memory that several lanes of a warp make alike, and barriers."""

import re
from collections.abc import Callable

_OPERATIONS: dict[str, Callable[..., int]] = {
    "and": int.__and__, "or": int.__or__, "xor": int.__xor__, "add": int.__add__, "sub": int.__sub__,
    "shl": int.__lshift__, "shr": int.__rshift__, "mul": int.__mul__,
    "bfe": lambda value, first, count: value >> first & (1 << count) - 1,
}  # fmt: skip
_COMMUTATIVE = ("max", "min", "add")  # a op b has the bits of b op a
_INSTRUCTION = re.compile(r"\s*(?:@!?(%\w+)\s+)?([a-z][\w.:]*)\s+(\{[^}]*\}|%\w+)\s*,\s*(.*);")
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
    operation commutes. What is computed from equal values is equal. If their addresses are equal too, for each thread
    of the block, one store does for all.
    """
    lines, registers, changed = ptx.splitlines(), Registers(ptx, threads), 0
    for i, line in enumerate(lines):
        store = _STORE.match(line)
        if not store:
            continue
        lanes = registers.equal_lanes(store[1])
        for value in store[2].split(","):
            lanes &= registers.equal_lanes(value.strip())
        if lanes and registers.values(store[1]):
            changed += 1
            lines[i] = f"{{ .reg .pred %once; .reg .b32 %lane; mov.u32 %lane, %tid.x; and.b32 %lane, %lane, {lanes}; "
            lines[i] += f"setp.eq.u32 %once, %lane, 0; @%once {line.strip()} }}"
    return "\n".join(lines) + "\n", changed


class Registers:
    """What the registers of a kernel are computed from."""

    def __init__(self, ptx: str, threads: int) -> None:
        self.threads = threads
        self.definitions: dict[str, tuple[str, list[str]]] = {}
        for line in ptx.splitlines():
            if match := _INSTRUCTION.match(line):
                for register in re.findall(r"%\w+", match[3]):
                    self._define(register, match[1], match[2], re.findall(r"[^\s,\[\]{}]+", match[4]))
        self.known: dict[str, int] = {}

    def _define(self, register: str, guard: str | None, operation: str, operands: list[str]) -> None:
        before = self.definitions.get(register)
        if guard and before and before[0].startswith("mov."):  # a masked load: a default, and a value over it
            self.definitions[register] = ("select", [guard, *before[1], *operands])
        elif before != (operation, operands) or "%" in "".join(operands):  # the same constant again is no change
            self.definitions[register] = ("unknown", []) if guard or before else (operation, operands)

    def equal_lanes(self, operand: str) -> int:
        """Return the bits of the lane's number that an operand does not depend on."""
        if not operand.startswith("%") or operand.startswith("%ctaid"):
            return 31
        if operand not in self.known:
            self.known[operand] = 0  # of a register that depends on itself
            self.known[operand] = self._equal_lanes(operand)
        return self.known[operand]

    def _equal_lanes(self, register: str) -> int:
        values = self.values(register)
        if values:
            bits = [1 << i for i in range(5)]
            return sum(bit for bit in bits if all(values[t] == values[t ^ bit] for t in range(self.threads)))
        operation, operands = self.definitions.get(register, ("unknown", []))
        if operation == "unknown" or operation.startswith(("atom", "activemask")):
            return 0
        if operation.partition(".")[0] in _COMMUTATIVE and len(operands) == 2:
            for own, other in (operands, operands[::-1]):
                shuffle, of = self.definitions.get(other, ("", []))
                if shuffle.startswith("shfl.sync.bfly") and of[0] == own:
                    return int(of[1]) | self.equal_lanes(own)
        lanes = 31
        for operand in operands:
            lanes &= self.equal_lanes(operand)
        return lanes

    def values(self, register: str) -> list[int]:
        """Return a register's value in each thread; nothing if it depends on more than the thread's number."""
        if self._value(register, 0) is None:
            return []
        values = [self._value(register, thread) for thread in range(self.threads)]
        return [value for value in values if value is not None]

    def _value(self, operand: str, thread: int) -> int | None:
        if re.fullmatch(r"-?\d+", operand):
            return int(operand)
        if operand == "%tid.x":
            return thread
        if re.fullmatch(r"[A-Za-z_]\w*", operand):
            return 0  # the address of a variable, the same in all threads
        operation, operands = self.definitions.get(operand, ("unknown", []))
        name = operation.partition(".")[0]
        if name not in ("mov", "cvt", *_OPERATIONS):
            return None
        values = [self._value(o, thread) for o in operands]
        if None in values:
            return None
        if name in ("mov", "cvt"):
            return values[0] if len(values) == 1 else None
        return _OPERATIONS[name](*values) & 0xFFFFFFFF
