"""`python -m fastpref.patch script.py args…` runs a TRL script with the patch, without editing the script."""

import argparse
import importlib
import runpy
import sys
from pathlib import Path

from fastpref.errors import UserError
from fastpref.patch import patch


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastpref.patch", description="Run a TRL script with fastpref.patch(trl), without editing it."
    )
    parser.add_argument("--report", action="store_true", help="print at the end what was patched and saved")
    parser.add_argument("--no-prefix-sharing", action="store_true", help="exchange the head only")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    options = parser.parse_args()
    if not options.script.is_file():
        parser.error(f"{options.script}: no such file")
    try:
        patched = patch(importlib.import_module("trl"), prefix_sharing=not options.no_prefix_sharing)
    except ImportError as error:
        parser.error(f"{error}; pip install trl")
    except UserError as error:
        parser.error(str(error))
    patched.tally.timed = options.report
    sys.argv = [str(options.script), *options.arguments]
    sys.path[0] = str(options.script.resolve().parent)
    try:
        runpy.run_path(str(options.script), run_name="__main__")
    finally:
        if options.report:
            print(patched.report(), file=sys.stderr)


main()
