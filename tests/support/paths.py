"""Paths of the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
QUICKSTART = EXAMPLES / "quickstart.toml"
QUICKSTART_MODEL = EXAMPLES / "quickstart" / "model"
QUICKSTART_ROWS = EXAMPLES / "quickstart" / "train.jsonl"
QUICKSTART_HELDOUT = EXAMPLES / "quickstart" / "heldout.jsonl"
