"""Write which kernels sentryward proves free of races, and for which GPUs.

TRITON_INTERPRET=0 python -m tests.truth.race_report docs/truth.md --seconds 600
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import triton

from tests.truth.execution import executed_launches
from tests.truth.launches import KERNELS, every_kernel
from tests.truth.races import Finding, compiled_ptx, find_races

ARCHITECTURES = (80, 86, 90, 100, 120)
BEGIN, END = "<!-- races: begin -->", "<!-- races: end -->"
CAUSES = {
    "control_predicate_not_static": "a branch or loop depends on data",
    "tmem_unresolved_use_pointer": "an address of tensor memory is not followed",
    "time_budget": "not finished",
    "conflicting_accesses_unordered": "**possible race**",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--seconds", type=float, default=600, help="the most that a proof may take")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    arguments = parser.parse_args()
    found = dict(_findings(arguments.architectures, arguments.seconds))
    page = arguments.page.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    arguments.page.write_text(before + BEGIN + _table(found, arguments) + END + after, encoding="utf-8")


def _findings(architectures: list[int], seconds: float) -> Iterator[tuple[tuple[int, str], Finding]]:
    for architecture in architectures:
        with executed_launches(architecture):
            launches = every_kernel(architecture)
        for kernel in KERNELS:
            ptx = compiled_ptx(launches[kernel], architecture)
            finding = find_races(ptx, launches[kernel], architecture, seconds)
            print(architecture, kernel, finding, flush=True)
            yield (architecture, kernel), finding


def _table(found: dict[tuple[int, str], Finding], arguments: argparse.Namespace) -> str:
    architectures = sorted({architecture for architecture, _ in found})
    lines = [
        f"\nTriton {triton.__version__}, at most {arguments.seconds:.0f} s a proof:\n",
        "| kernel | " + " | ".join(f"sm_{architecture}" for architecture in architectures) + " |",
        "|---|" + "---|" * len(architectures),
    ]
    for kernel in KERNELS:
        lines.append(f"| {kernel} | " + " | ".join(_cell(found[a, kernel]) for a in architectures) + " |")
    return "\n".join(lines) + "\n"


def _cell(finding: Finding) -> str:
    if finding.result == "race_free":
        return f"proved ({finding.merged} merged)" if finding.merged else "proved"
    return CAUSES.get(finding.cause, finding.cause or finding.result)


if __name__ == "__main__":
    main()
