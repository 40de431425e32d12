"""Another revision of this repository, measured in turn with this one by the same benchmark, in another process."""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.measure import Case

ROOT = Path(__file__).parent.parent


class UnknownRevision(Exception):
    """A revision that git does not know, with git's message."""


class Revision:
    """A process with the `fastpref` and `kernels` of a revision, or of the current files, while the context lasts.

    Two revisions need two such processes, because in the calling process busy-waiting threads would disturb the times.
    """

    def __init__(self, name: str | None):
        self.name = name or "here"
        self._committed = name is not None

    def __enter__(self) -> "Revision":
        self._folder = tempfile.TemporaryDirectory()
        place = Path(self._folder.name) if self._committed else ROOT
        if self._committed:
            archive = ["git", "archive", "--format=tar", self.name, "fastpref", "kernels"]
            tree = subprocess.run(archive, cwd=ROOT, capture_output=True)
            if tree.returncode:
                raise UnknownRevision(tree.stderr.decode().strip())
            with tarfile.open(fileobj=BytesIO(tree.stdout)) as files:  # a zip file would lose the link to the kernels
                files.extractall(place, filter="data")
        path = os.pathsep.join([str(place), str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "bench.worker"],  # -P keeps the current folder off the start of the path
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        used = self._ask({"ask": "where"})
        assert Path(used).is_relative_to(place), used
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    def take(self, case: Case) -> "Revision":
        """Prepare a case, which `peak_bytes` and `ms` then measure."""
        self._ask(
            {
                "ask": "take",
                "shape": asdict(case.shape),
                "objective": case.objective.name,
                "passes": case.passes,
                "dtype": str(case.dtype).removeprefix("torch."),
                "device": case.device,
            }
        )
        return self

    def peak_bytes(self) -> int:
        return self._ask({"ask": "peak_bytes"})

    def ms(self) -> float:
        return self._ask({"ask": "ms"})

    def _ask(self, what: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} cannot run this benchmark; its process printed the reason above")
        return json.loads(answer)
