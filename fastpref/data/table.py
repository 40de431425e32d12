"""Examples in an Arrow table, in memory or in a memory-mapped file. Each becomes a Python object when it is read."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpref.data.example import Example, Origin, Spans

_ORIGIN = tuple(field.name for field in fields(Origin))
_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "prompt": _IDS,
        "completions": pa.list_(_IDS),
        "contexts": pa.list_(_IDS),  # of each completion start, stop, start, stop, …; none where all is scored
        "label": pa.bool_(),
        "scores": pa.list_(pa.float64()),  # of each completion; none for pairs and labels
        "weight": pa.float64(),
        "margin": pa.float64(),  # null where there is none
        "place": pa.string(),
        "question": pa.string(),
        "prompt_cut": pa.int32(),
        "turns_cut": pa.int32(),
        "completions_cut": _IDS,
        "merged": pa.int32(),
    }
)


class Examples(Sequence[Example]):
    """The examples of a table with SCHEMA. A slice is a list of them."""

    def __init__(self, table: pa.Table):
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        at = index % len(self)

        def value(name: str) -> Any:
            return self.table.column(name)[at]

        origin: dict[str, Any] = {name: value(name).as_py() for name in _ORIGIN}
        origin["completions_cut"] = tuple(origin["completions_cut"])
        return Example(
            prompt=_ids(value("prompt").values),
            completions=tuple(_ids(ids.values) for ids in value("completions")),
            label=value("label").as_py(),
            row=Origin(**origin),
            contexts=tuple(_pairs(places) for places in value("contexts").as_py()),
            scores=tuple(value("scores").as_py()),
            weight=value("weight").as_py(),
            margin=value("margin").as_py(),
        )

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Return the number of tokens of each prompt, [E], without reading the tokens."""
        return pc.list_value_length(self.table.column("prompt")).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def completion_lengths(self) -> np.ndarray:
        """Return the number of tokens of each completion, [E, K], without reading the tokens.

        K is the most completions of an example; one with fewer has zeros at the end.
        """
        flat = pc.list_value_length(pc.list_flatten(self.table.column("completions"))).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
        counts = self.completions
        if not len(counts):
            return flat.reshape(0, 0)
        lengths = np.zeros((len(counts), counts.max()), flat.dtype)
        lengths[np.arange(lengths.shape[1]) < counts[:, None]] = flat
        return lengths

    @property
    def completions(self) -> np.ndarray:
        """Return the number of completions of each example, [E]."""
        return pc.list_value_length(self.table.column("completions")).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def ranked(self) -> bool:
        """Whether the examples have lists of completions with scores."""
        return bool(pc.sum(pc.list_value_length(self.table.column("scores"))).as_py())  # pyright: ignore[reportAttributeAccessIssue]

    def digest(self) -> str:
        """Hash all tokens, lengths, labels, scores, weights and margins in their order, regardless of the table's
        chunks. Returns 16 digits.
        """
        digest, labels = hashlib.sha256(), self.table.column("label").to_pylist()
        for values in (self._prompt_ids.to_numpy(), self._completion_ids.to_numpy(), self.prompt_lengths,
                       self.completion_lengths, np.asarray(labels, dtype=str), *self._numbers()):  # fmt: skip
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()[:16]

    def _numbers(self) -> Iterator[np.ndarray]:
        """Yield the scores, weights and margins with their names, but none that no example has."""
        scores = pc.list_flatten(self.table.column("scores")).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
        weights = self.table.column("weight").to_numpy()
        margins = self.table.column("margin")
        given = {"scores": len(scores), "weight": (weights != 1).any(), "margin": margins.null_count < len(margins)}
        numbers = {"scores": scores, "weight": weights, "margin": margins.to_numpy()}
        for name in (name for name, is_given in given.items() if is_given):
            yield np.frombuffer(name.encode(), np.uint8)
            yield numbers[name]

    @property
    def highest_ids(self) -> tuple[int, int]:
        """Return the highest token id of all prompts, and of all completions; −1 where there is none."""
        return _highest(self._prompt_ids), _highest(self._completion_ids)

    def with_ids_from(self, first: int, of_prompts: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return [M] rows and [M] ids of all tokens with ids from `first` on, in the prompts or in the completions."""
        ids = (self._prompt_ids if of_prompts else self._completion_ids).to_numpy()
        lengths = self.prompt_lengths if of_prompts else self.completion_lengths.sum(axis=1)
        places = np.flatnonzero(ids >= first)
        return np.searchsorted(np.cumsum(lengths), places, side="right"), ids[places]

    @property
    def _prompt_ids(self) -> pa.ChunkedArray:
        return pc.list_flatten(self.table.column("prompt"))  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def _completion_ids(self) -> pa.ChunkedArray:
        return pc.list_flatten(pc.list_flatten(self.table.column("completions")))  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def context_lengths(self) -> np.ndarray:
        """Return the number of unscored tokens of each completion, [E, K] as `completion_lengths`, from the spans."""
        lengths = np.zeros_like(self.completion_lengths)
        column = self.table.column("contexts")
        given = pc.greater(pc.list_value_length(column), 0).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
        for row in np.flatnonzero(given):
            counts = [sum(stop - start for start, stop in _pairs(of)) for of in column[int(row)].as_py()]
            lengths[row, : len(counts)] = counts
        return lengths

    @property
    def labels(self) -> np.ndarray | None:
        """Return the labels of KTO's completions, [E] bool, or None for other examples."""
        column = self.table.column("label")
        return None if column.null_count else column.to_numpy()


def in_memory(batches: Iterable[Sequence[Example]]) -> Examples:
    return Examples(pa.Table.from_batches([_record(batch) for batch in batches], SCHEMA))


def write(batches: Iterable[Sequence[Example]], path: Path) -> None:
    """Write an Arrow file. Raises OSError."""
    with path.open("wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(_record(batch))


def read(path: Path) -> Examples:
    """Map a file of examples. Raises OSError or pyarrow.ArrowInvalid if it is not such a file."""
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    if table.schema != SCHEMA:
        raise pa.ArrowInvalid(f"{path}: its columns are others")
    return Examples(table)


def _record(examples: Sequence[Example]) -> pa.RecordBatch:
    rows = [example.row for example in examples]
    completions = [ids for example in examples for ids in example.completions]
    columns = {
        "prompt": _lists([example.prompt for example in examples]),
        "completions": pa.ListArray.from_arrays(
            _offsets([len(example.completions) for example in examples]), _lists(completions)
        ),
        "contexts": [
            [[place for span in spans for place in span] for spans in example.contexts] for example in examples
        ],
        **{name: [getattr(example, name) for example in examples] for name in ("label", "scores", "weight", "margin")},
        **{name: [getattr(row, name) for row in rows] for name in _ORIGIN},
    }
    return pa.record_batch(
        [pa.array(columns[field.name], field.type) if isinstance(columns[field.name], list) else columns[field.name]
         for field in SCHEMA],
        schema=SCHEMA,
    )  # fmt: skip


def _lists(lists: Sequence[Sequence[int]]) -> pa.ListArray:
    """Return lists of token ids as an Arrow array, without a new Python object for each id."""
    values = np.concatenate([np.asarray(ids, np.int32) for ids in lists]) if lists else np.zeros(0, np.int32)
    return pa.ListArray.from_arrays(_offsets([len(ids) for ids in lists]), pa.array(values))


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int32)]), pa.int32())


def _highest(ids: pa.ChunkedArray) -> int:
    highest = pc.max(ids).as_py()  # pyright: ignore[reportAttributeAccessIssue]
    return -1 if highest is None else highest


def _ids(values: pa.Array) -> list[int]:
    return values.to_numpy().tolist()


def _pairs(places: Sequence[int]) -> Spans:
    return tuple(zip(places[::2], places[1::2]))
