"""The process of `revision.py`, which answers one JSON object per line, with the first `fastpref` on its path."""

import json
import sys
from typing import Any

import torch

import fastpref
from bench.measure import Case, Local, subject
from bench.methods import METHODS
from bench.objectives import OBJECTIVES
from bench.problems import Shape


def main() -> None:
    ours = next(method for method in METHODS if method.name == "fastpref")
    ready: Local | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if request["ask"] == "where":
            answer = fastpref.__file__
        elif request["ask"] == "take":
            objective = next(known for known in OBJECTIVES if known.name == request["objective"])
            dtype = getattr(torch, request["dtype"])
            case = Case(Shape(**request["shape"]), objective, request["passes"], dtype, request["device"])
            ready = subject(ours, case, case.problem())
        elif ready is not None:
            answer = getattr(ready, request["ask"])()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
