"""A run records what its report shows."""

from pathlib import Path

import fastpref
from fastpref.run.history import read_facts


def test_lengths_and_cut_tokens_are_counted(config: Path):
    """Of a single row all percentiles are its lengths, and what a shorter row lacks is counted as cut."""
    found = {}
    for length in (96, 30):
        given = ["train.steps=1", "train.batch=1", "data.0.rows=1", "eval.data.0.rows=1", f"tokens.max_length={length}"]
        fastpref.train(config, [*given, f"output.dir=of{length}"])
        found[length] = read_facts(Path(f"of{length}"))["tokens"]
    for part in ("train", "heldout"):
        assert list(found[96][part]) == ["prompt", "chosen", "rejected"]
        for (*whole, none), (*left, cut) in zip(found[96][part].values(), found[30][part].values(), strict=True):
            assert len(set(whole)) == len(set(left)) == 1
            assert none == 0
            assert left[0] + cut == whole[0]
        assert sum(counts[-1] for counts in found[30][part].values()) > 0
