"""Runs for test_hosts.py, in one of two processes that share no disk: `python host_runs.py FOLDER`."""

import json
import os
import sys
from pathlib import Path

import fastpref
from fastpref.errors import UserError

RESUME = {"no checkpoint", "another checkpoint"}
OVERRIDES = {"another setting": lambda rank: [f"train.batch={4 + rank}"]}


def run_all(folder: Path, rank: int) -> None:
    """Run each case in its folder for this host, and write its outcome: a message, or the metrics of the last step."""
    came = {}
    for case in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        os.chdir(folder / case / f"host{rank}")
        os.environ["FASTPREF_CACHE"] = str(Path("cache").resolve())
        try:
            overrides = OVERRIDES.get(case, lambda _: [])(rank)
            result = fastpref.train("cfg.toml", overrides, resume=case in RESUME)
            came[case] = {"loss": result.metrics["loss"]}
        except UserError as error:
            came[case] = str(error)
    (folder / f"came{rank}.json").write_text(json.dumps(came))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), int(os.environ["RANK"]))
