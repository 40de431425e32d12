"""Comparisons with other libraries: `python -m bench`."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler counts memory here, and is silent; read once
