"""Stored log-probabilities: each completion has its own, in files that damage, other runs and full disks cannot mix."""

from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from fastpref.atomic import WriteError
from fastpref.step.logprob_store import LogprobStore

CPU = torch.device("cpu")


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def numbers(number: int) -> Tensor:
    """Return log-probabilities that no other completion has, of another length than its neighbours'."""
    return -torch.arange(1 + number % 5).float() / 7 - number


def add(store: LogprobStore, *given: int, more: float = 0.0) -> None:
    store.add(map(key, given), [numbers(n) + more for n in given])


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_every_completion_has_its_own_numbers(seed: int, on_disk: bool, tmp_path: Path):
    """Whenever files are written between additions, and after reading them, a lookup gives what was added first."""
    random, store, known = Random(seed), LogprobStore(tmp_path if on_disk else None), set[int]()
    for _ in range(12):
        some = random.sample(range(40), random.randint(0, 6))
        add(store, *some)
        add(store, *some[:2], more=1.0)
        known |= set(some)
        if random.random() < 0.4:
            store.write()
        asked = random.sample(sorted(known), len(known)) * 2
        if asked:
            assert torch.equal(store.lookup(map(key, asked), CPU), torch.cat([numbers(n) for n in asked]))
        assert {n for n in range(40) if key(n) in store} == known
        assert len(store) == len(list(store)) == len(known)
    store.write()
    assert (store.waiting == 0) == on_disk
    again = LogprobStore(tmp_path)
    assert (set(again), again.files, again.notes) == (set(store) if on_disk else set(), store.files, [])
    if on_disk:
        assert all(torch.equal(again[key(n)], numbers(n)) for n in known)


@pytest.mark.parametrize("place", [9, 0.3, 0.6, 0.99])
def test_any_damage_is_noticed(place: float, tmp_path: Path):
    """One changed bit anywhere in a file is told; the completions of that file, and no others, are unknown."""
    store = LogprobStore(tmp_path)
    for some in ((1, 2, 3), (4, 5)):
        add(store, *some)
        store.write()
    harmed = tmp_path / store.files[0]
    content = bytearray(harmed.read_bytes())
    content[place if isinstance(place, int) else int(place * len(content))] ^= 4
    harmed.write_bytes(content)
    again = LogprobStore(tmp_path)
    assert (again.files, set(again)) == (store.files[1:], {key(4), key(5)})
    (note,) = again.notes
    assert note.startswith(f"{harmed}: cannot be used and is computed again")


def test_many_lost_files_are_one_note(tmp_path: Path):
    again = LogprobStore(tmp_path / "gone", ["00000-a.safetensors", "00001-b.safetensors", "00002-c.safetensors"])
    (note,) = again.notes
    assert "00000-a.safetensors: cannot be used" in note
    assert note.endswith("; and 2 more files")
    assert len(again) == 0


def test_runs_at_the_same_time_replace_nothing(tmp_path: Path):
    """Two runs that began with the same files keep both new files, and each goes on with its own numbers."""
    one, other = LogprobStore(tmp_path), LogprobStore(tmp_path)
    add(one, 1, 2)
    add(other, 2, 3, more=1e-6)
    one.write()
    other.write()
    assert torch.equal(one[key(2)], numbers(2))
    assert torch.equal(other[key(2)], numbers(2) + 1e-6)
    assert set(LogprobStore(tmp_path)) == {key(1), key(2), key(3)}


def test_named_files_alone_are_read_in_their_order(tmp_path: Path):
    """With names of files, others are not read, and the first that holds a completion counts."""
    stores = []
    for more in (0.0, 1.0, 2.0):
        stores.append(LogprobStore(tmp_path / "empty"))
        stores[-1].folder = tmp_path
        add(stores[-1], 1, int(2 + more), more=more)
        stores[-1].write()
    names = [stores[2].files[0], stores[1].files[0]]
    again = LogprobStore(tmp_path, names)
    assert set(again) == {key(1), key(3), key(4)}
    assert torch.equal(again[key(1)], numbers(1) + 2.0)
    add(again, 9)
    again.write()
    assert again.files[:2] == names
    assert LogprobStore(tmp_path, again.files).files == again.files


def test_a_refused_write_changes_nothing(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    store = LogprobStore(tmp_path / "file")
    add(store, 1)
    with pytest.raises(WriteError, match="file: cannot be written"):
        store.write()
    assert torch.equal(store[key(1)], numbers(1))
    store.drop()
    assert (len(store), store.waiting, store.files) == (0, 0, [])
