"""`python -m bench first-card` without its packages: torch and Triton are enough for the kernels."""

import argparse
from pathlib import Path

from bench.first_card.blocks import BLOCKS
from bench.first_card.outcome import run_cases
from bench.first_card.sizes import GPU, TINY


def first_card(minutes: float, output: Path) -> int:
    """Run all blocks, print the table, and return the exit status: 1 if a comparison is wrong."""
    import torch

    from bench import machine
    from bench.first_card.parent import run_blocks
    from bench.first_card.table import table

    here = machine.describe("cuda" if torch.cuda.is_available() else "cpu")
    records = run_blocks(minutes, output, here, lambda said: print(said, flush=True))
    print(table(here, records))
    print(f"{output}: results.json, results.md and cases.jsonl")
    return int(any(record.outcome.right is False for record in records))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.first_card", description=first_card.__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="the most that all blocks take together")
    parser.add_argument("--output", type=Path, default=Path("first-card"), help="the folder of the results")
    parser.add_argument("--block", choices=BLOCKS, help="run one block in this process; --output is its file")
    parser.add_argument("--tiny", action="store_true", help="take the sizes for a CPU")
    arguments = parser.parse_args()
    if arguments.block is None:
        return first_card(arguments.minutes, arguments.output)
    sizes = TINY if arguments.tiny else GPU
    return run_cases(arguments.block, BLOCKS[arguments.block].cases(sizes), arguments.output)


if __name__ == "__main__":
    raise SystemExit(main())
