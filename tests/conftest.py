"""Set up before anything imports `datasets` or computes: a cache of this run's own, no hub, one thread."""

import os
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="fastpref-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_DATASETS_CACHE"] = os.path.join(_HOME.name, "datasets")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Models and tiles this small gain nothing from threads, which on a busy machine wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
