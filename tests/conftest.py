"""Before anything imports `datasets`: its cache goes to a folder of this run alone, and nothing asks the hub."""

import os
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="fastpref-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_DATASETS_CACHE"] = os.path.join(_HOME.name, "datasets")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
