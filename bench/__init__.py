"""Comparisons with other libraries: `python -m bench`."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silence torch's profiler, which counts memory; read once
