"""Measure how the time and memory of the head grow with tokens, vocabulary, rows and the share of the prompt.

Each sweep changes one number and keeps the others. Growth is the exponent b of cost = a·size^b, fitted by least squares
over logarithms: 1 is linear growth, 0 is none. The size for the prompt's share is the number of scored tokens, which
falls with it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import linear_regression
from typing import Any

import torch

from bench.measure import Case, measure
from bench.methods import METHODS
from bench.objectives import TOKENS
from bench.problems import Shape

FASTPREF = [method for method in METHODS if method.name == "fastpref"]


def growth(points: Sequence[dict[str, Any]], what: str) -> float:
    """Return the fitted exponent of "ms" or "bytes"."""
    xs, ys = ([math.log(point[name]) for point in points] for name in ("size", what))
    return linear_regression(xs, ys).slope


def variations(shape: Shape, factors: Sequence[int]) -> Iterator[tuple[str, str, list[tuple[int, Shape]]]]:
    """Yield the sweeps from a shape: name, unit, and shapes with their sizes."""
    lengths = [replace(shape, length=shape.length * f, prompt=shape.prompt * f) for f in factors]
    yield "sequence length", "tokens", [(s.length, s) for s in lengths]
    vocabularies = [replace(shape, vocab=shape.vocab * f) for f in factors]
    yield "vocabulary", "words", [(s.vocab, s) for s in vocabularies]
    rows = [replace(shape, pairs=shape.pairs * f) for f in factors]
    yield "rows", "pairs", [(s.pairs, s) for s in rows]
    shares = [replace(shape, prompt=shape.length - shape.length // f) for f in reversed(factors)]
    yield "prompt share", "scored tokens", [(s.scored, s) for s in shares]


def sweeps(
    shape: Shape, factors: Sequence[int], dtype: torch.dtype, device: str, repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure every sweep. Yield its name, unit, points and growth as JSON values."""
    for name, unit, shapes in variations(shape, factors):
        points = []
        for size, varied in shapes:
            row = measure(Case(varied, TOKENS, "frozen", dtype, device), repeats, FASTPREF, check=False)[1]
            points.append({"size": size, "ms": row.median, "bytes": row.bytes or 0})
        exponents = {what: growth(points, what) for what in ("ms", "bytes")}
        yield {"name": name, "unit": unit, "points": points, "growth": exponents}
