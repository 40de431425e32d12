"""The model of streaming: its bytes are those of arithmetic, and the page has what the command prints."""

import pytest

from bench.streaming_model import MODELS, Model, section
from tests.support.paths import ROOT


def padded(size: float) -> int:
    return -(-int(size) // 256) * 256


def by_hand(model: Model) -> tuple[int, int]:
    """Return the bytes and weights of a layer by the formats of its matrices."""
    attention, key_value = model.heads * 128, 8 * 128
    shapes = [(attention, model.hidden), (key_value, model.hidden), (key_value, model.hidden),
              (model.hidden, attention)] + 3 * [(model.intermediate, model.hidden)]  # fmt: skip
    counts = [rows * columns for rows, columns in shapes]
    if model.quantization == "none":
        return sum(padded(2 * count) for count in counts), sum(counts)
    parts = [  # packed, a byte of scale for 64, 16 codes, an offset, a scale of scales for 256, and 256 codes of scales
        [count / 2, count / 64, 64, 4, 4 * -(-count // 64 // 256), 1024] for count in counts
    ]
    return sum(padded(size) for part in parts for size in part), sum(counts)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.name} {model.quantization}")
def test_a_layers_bytes_are_those_of_its_formats(model: Model) -> None:
    size = model.layer()
    assert (size.bytes, size.weights) == by_hand(model)


def test_the_page_has_what_the_command_prints() -> None:
    assert section() in (ROOT / "docs" / "benchmarks.md").read_text()
