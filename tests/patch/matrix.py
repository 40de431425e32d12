"""Run the tests of `fastpref.patch` with every supported TRL, each in an environment of its own.

    python -m tests.patch.matrix                       # all of them
    python -m tests.patch.matrix 1.16.0 0.29.0 -- -x   # some; what follows -- goes to pytest

An environment lies over the one that runs this: it has its own TRL, and what that version needs in another version.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.trl_versions import VERSIONS


def make_environment(folder: Path, version: str) -> Path:
    """Make an environment with this TRL over the running one, and return its Python."""
    venv.create(folder, with_pip=False)
    own = next(folder.glob("lib/python*/site-packages"))
    (own / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wanted = [f"trl=={version}", *VERSIONS[version]]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(own), *wanted]
    subprocess.run(install, check=True)
    return folder / "bin" / "python"


def run(version: str, arguments: list[str]) -> bool:
    """Return whether the tests pass with this TRL."""
    print(f"--- TRL {version}", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        python = make_environment(Path(folder), version)
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/patch", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def main() -> None:
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    named, arguments = given[:end], given[end + 1 :]
    unknown = set(named) - VERSIONS.keys()
    if unknown:
        raise SystemExit(f"not among {', '.join(VERSIONS)}: {', '.join(sorted(unknown))}")
    failed = [version for version in named or VERSIONS if not run(version, arguments)]
    if failed:
        raise SystemExit(f"failed with TRL {', '.join(failed)}")


if __name__ == "__main__":
    main()
