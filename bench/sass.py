"""Reading of a kernel's machine code as `nvdisasm` prints it: what its main loop does, and how wide it stores.

A line of SASS is an address, a predicate, an opcode and operands, such as

    /*1a30*/  @P0 STG.E.128 desc[UR4][R2.64], R8 ;

Labels stand on lines of their own. A loop is what lies between a label and a branch back to it; the main loop is the
innermost loop that multiplies matrices, or the largest of them.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

PRODUCTS = ("HMMA", "IMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCMMA")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_BITS = re.compile(r"\.(U8|S8|U16|S16|64|128|256)(?=\.|$)")


def disassembled(cubin: bytes) -> tuple[str, str]:
    """Return the report of a kernel's resources and its machine code, by the tools in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([tools / "cuobjdump", "-res-usage", file.name])
        return usage.stdout + usage.stderr, run([tools / "nvdisasm", "-c", file.name]).stdout


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bits(self) -> int:
        """The width of a load or store, bits a thread."""
        match = _BITS.search(self.opcode)
        return int(match.group(1).lstrip("US")) if match else 32


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel."""

    instructions: Sequence[Instruction]
    labels: dict[str, int]  # the index of the instruction after each label

    @classmethod
    def parse(cls, text: str) -> "Code":
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := _LABEL.match(line):
                labels[label.group(1)] = len(instructions)
            elif found := _INSTRUCTION.match(line):
                instructions.append(Instruction(found.group(1), found.group(2).strip()))
        return cls(instructions, labels)

    def loops(self) -> list[range]:
        """Return the instructions of every loop, from the label to the branch back to it."""
        loops = []
        for i, instruction in enumerate(self.instructions):
            target = re.search(r"`\((\.L_\w+)\)", instruction.operands)
            if instruction.name == "BRA" and target and self.labels.get(target.group(1), i + 1) <= i:
                loops.append(range(self.labels[target.group(1)], i + 1))
        return loops

    @cached_property
    def main_loop(self) -> range:
        """The innermost loop with most matrix products; empty if no loop multiplies matrices."""
        loops = [(self._count(loop, PRODUCTS), -len(loop), loop) for loop in self.loops()]
        multiplying = [entry for entry in loops if entry[0]]
        if not multiplying:
            return range(0)
        inner = [
            (count, size, loop) for count, size, loop in multiplying
            if not any(o is not loop and loop.start <= o.start and o.stop <= loop.stop for _, _, o in multiplying)
        ]  # fmt: skip
        return max(inner, key=lambda entry: entry[:2])[2]

    def _count(self, places: Iterable[int], names: Sequence[str]) -> int:
        return sum(self.instructions[i].name in names for i in places)

    def count(self, *names: str) -> int:
        """Count instructions by name."""
        return self._count(range(len(self.instructions)), names)

    def count_outside(self) -> int:
        """Count the instructions outside the main loop."""
        return len(self.instructions) - len(self.main_loop)

    def spilled(self, *, inside: bool) -> int:
        """Return the bytes that a thread stores to or loads from local memory, inside or outside the main loop.

        Outside it, what is stored is counted, or loaded if that is more; inside it, both, as each pass pays for both.
        """
        bits = {"STL": 0, "LDL": 0}
        for i, instruction in enumerate(self.instructions):
            if instruction.name in bits and (i in self.main_loop) == inside:
                bits[instruction.name] += instruction.bits
        return (sum(bits.values()) if inside else max(bits.values())) // 8

    def widths(self, name: str) -> dict[int, int]:
        """Return how often a load or store has each width in bits, widest first."""
        return dict(sorted(Counter(i.bits for i in self.instructions if i.name == name).items(), reverse=True))

    def product_shapes(self) -> list[str]:
        """Return the shapes M×N×K of the matrix products of a warp or a warp group; none if a register has them."""
        found = set()
        for instruction in self.instructions:
            if instruction.name in PRODUCTS:
                found |= {tuple(s.split("x")) for s in re.findall(r"\.(\d+x\d+x\d+)", instruction.opcode)}
                found |= {("16", "8", k) for k in re.findall(r"\.168(\d+)\.", instruction.opcode)}
        return ["×".join(shape) for shape in sorted(found)]
