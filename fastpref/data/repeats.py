"""Count rows that are there twice, held-out rows that are training rows, and rows that ask nothing."""

import hashlib
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpref.data.table import Examples


def repeated(examples: Examples) -> int:
    """Return how many examples repeat an earlier one of another place in the data, which a weight of a source does not.

    Only tokens and labels are compared.
    """
    different = set(zip(examples.table.column("place").to_pylist(), _digests(examples)))
    return len(different) - len({digest for _, digest in different})


def leaked(train: Examples, heldout: Examples) -> int:
    """Return how many held-out examples are training examples, by their tokens and labels."""
    if not len(heldout):
        return 0
    known = set(_digests(train))
    return sum(digest in known for digest in _digests(heldout))


def questionless(examples: Examples) -> int:
    """Return how many examples have a prompt whose last turn is empty."""
    return int(pc.sum(pc.equal(pc.utf8_trim_whitespace(examples.table.column("question")), "")).as_py() or 0)  # pyright: ignore[reportAttributeAccessIssue]


def _digests(examples: Examples) -> Iterator[bytes]:
    """Yield a hash of every example's tokens and label."""
    labels = examples.table.column("label").to_pylist()
    prompts = _rows(examples.table.column("prompt"))
    for label, prompt, completions in zip(labels, prompts, _completions(examples), strict=True):
        digest = hashlib.blake2b(f"{label}".encode(), digest_size=16)
        for ids in (prompt, *completions):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.tobytes())
        yield digest.digest()


def _completions(examples: Examples) -> Iterator[list[np.ndarray]]:
    flat = _rows(pc.list_flatten(examples.table.column("completions")))  # pyright: ignore[reportAttributeAccessIssue]
    for count in examples.completions:
        yield [next(flat) for _ in range(int(count))]


def _rows(lists: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """Yield the numbers of each list of a column."""
    for chunk in lists.chunks:
        values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        for start, stop in pairwise(offsets):
            yield values[start:stop]
