"""Make and run the mutants of the Triton kernels.

TRITON_INTERPRET=0 python -m tests.truth.mutants results.json              executed by ttsem
TRITON_INTERPRET=1 python -m tests.truth.mutants results.json              in Triton's interpreter, to compare
"""

import argparse
import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from triton import knobs

from tests.support.paths import ROOT
from tests.truth.mutants import problems
from tests.truth.mutants.generate import mutants_of
from tests.truth.mutants.run import run_mutants

PROBLEMS = {"linear_logprob_triton.py": problems.of_walk, "preference_loss_triton.py": problems.of_losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", default="", help="part of the names of the mutants to run")
    parser.add_argument("--every", type=int, default=1, help="run every n-th mutant")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    rows = []
    with nullcontext() if knobs.runtime.interpret else _executed():
        for file, of in PROBLEMS.items():
            runs = of()
            for run in runs.values():
                run()  # the kernels themselves must pass
            mutants = [m for m in mutants_of(ROOT / "kernels" / file) if arguments.only in m.name]
            for mutant, verdict in run_mutants(mutants[:: arguments.every], runs, arguments.jobs):
                rows.append({"name": mutant.name, "mistake": mutant.mistake, "line": mutant.line, **asdict(verdict)})
                print(f"{verdict.by or 'SURVIVES'}: {mutant.name} [{verdict.place or verdict.problem}]", flush=True)
    arguments.results.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    print(Counter(row["by"] or "survives" for row in rows))


def _executed() -> Any:
    from tests.truth.execution import executed_launches  # needs ttsem

    return executed_launches(90)


if __name__ == "__main__":
    main()
