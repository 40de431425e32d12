"""Reference log-probabilities that are computed before training and stored on disk for later runs.

    $FASTPREF_CACHE (~/.cache/fastpref) / reference / FINGERPRINT / 00000.safetensors, 00001.safetensors, …

The key of a completion's log-probabilities is a digest of the tokens of its prompt and itself. So a change of the
tokens (by the data, format, template or limits) never finds old numbers, and only added data are computed. Everything
else that changes the numbers (the model's files or commit, its dtype and quantization) is in the fingerprint. A new
file is written atomically every 64 micro-batches, so a stopped run continues there.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from fastpref.atomic import WriteError, write_file
from fastpref.config import Config
from fastpref.data.batch import Layout, PreferenceBatch, collate, completion_key
from fastpref.data.cache import cache_folder
from fastpref.data.example import Example
from fastpref.data.plan import plan_pass
from fastpref.model.rope import has_rope_by_length
from fastpref.processes import ALONE, Processes
from fastpref.step.reference import Reference

VERSION = 1  # changes with the code that computes the numbers and with their format on disk
_SAVE_EVERY = 64  # micro-batches


class Precomputed:
    """A reference that looks up the token log-probabilities [N] of a micro-batch's completions."""

    def __init__(self, reference: Reference, folder: Path | None):
        self._reference, self.folder = reference, folder
        self._known: dict[bytes, Tensor] = {}  # float32 [n] on the CPU
        self.notes: list[str] = []
        self._files = 0
        for path in sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else ():
            self._files = int(path.stem) + 1
            try:
                stored = load_file(path)
                keys = [row.numpy().tobytes() for row in stored["keys"]]
                self._known |= zip(keys, stored["logps"].split(stored["lengths"].tolist()), strict=True)
            except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
                self.notes.append(f"{path}: cannot be used and is computed again: {error}")

    def __len__(self) -> int:
        return len(self._known)

    def __call__(self, batch: PreferenceBatch) -> Tensor:
        return torch.cat([self._known[key] for key in batch.keys]).to(batch.segments.device)

    def complete(
        self,
        examples: Iterable[Example],
        *,
        layout: Layout,
        budget: int,  # tokens per micro-batch
        device: torch.device,
        pad_token_id: int,
        progress: Callable[[int], None] = lambda computed: None,
        processes: Processes = ALONE,
    ) -> int:
        """Compute the log-probabilities of completions that are not known yet. Return the number of those completions.

        All processes must get the same examples. Each computes a part, and in the end all have all log-probabilities.
        """
        if processes.count > 1:  # with separate disks they may know different ones, and would plan different rounds
            common = set.intersection(*map(set, processes.gather(list(self._known))))
            self._known = {key: logps for key, logps in self._known.items() if key in common}
        computed, waiting = 0, {}
        parts = _microbatches(self._missing(examples), layout, budget)
        rounds = iter(lambda: list(islice(parts, processes.count)), [])
        for number, part in enumerate(rounds, start=1):
            # A process without a micro-batch computes one of the round again: FSDP needs every process in a forward.
            own = part[processes.rank % len(part)]
            batch = collate(own, layout, pad_token_id=pad_token_id)
            lengths = torch.unique_consecutive(batch.segments, return_counts=True)[1].tolist()
            logps = self._reference(batch.to(device)).float().cpu()
            waiting |= zip(batch.keys, logps.split(lengths), strict=True)
            computed += sum(len(example.completions) for examples in part for example in examples)
            progress(computed)
            if number % _SAVE_EVERY == 0:
                self._keep(waiting, processes)
                waiting = {}
        self._keep(waiting, processes)
        return computed

    def _missing(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Yield the examples with only the completions that are neither known nor yielded before."""
        yielded: set[bytes] = set()
        for example in examples:
            new = []
            for which, completion in enumerate(example.completions):
                key = completion_key(example.prompt, completion, example.context(which))
                if key not in self._known and key not in yielded:
                    yielded.add(key)
                    new.append((example, which))
            if new:
                yield example.with_completions(new)

    def _keep(self, own: dict[bytes, Tensor], processes: Processes) -> None:
        found: dict[bytes, Tensor] = {}
        for part in processes.gather({key: logps.clone() for key, logps in own.items()}):
            found |= part
        self._known |= found
        if not found or self.folder is None or not processes.first:
            return
        stored = {
            "keys": torch.tensor([list(key) for key in found], dtype=torch.uint8),
            "lengths": torch.tensor([len(logps) for logps in found.values()]),
            "logps": torch.cat(list(found.values())),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / f"{self._files:05}.safetensors", lambda path: save_file(stored, path))
            self._files += 1
        except (OSError, WriteError, SafetensorError) as error:
            self.notes.append(f"reference log-probabilities are not kept for later runs: {error}")
            self.folder = None


def _microbatches(examples: Iterable[Example], layout: Layout, budget: int) -> Iterator[list[Example]]:
    """Yield micro-batches of examples with the same number of completions, planned for 256 examples at a time."""
    waiting: dict[int, list[Example]] = {}
    for example in examples:
        group = waiting.setdefault(len(example.completions), [])
        group.append(example)
        if len(group) == 256:
            yield from plan_pass(waiting.pop(len(example.completions)), layout, budget).groups
    for group in waiting.values():
        yield from plan_pass(group, layout, budget).groups


def reference_folder(config: Config, model: PreTrainedModel) -> Path:
    """Return the folder of this model's reference log-probabilities."""
    identity = {
        "version": VERSION,
        "model": _identity(config, model),
        "dtype": str(model.dtype),
        "quantization": config.model.quantization,
        "device": next(model.parameters()).device.type,
        # `rope.fix_rope` gives every row the frequencies of this length.
        **({"rope_of": config.tokens.max_length} if has_rope_by_length(model) else {}),
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "reference" / fingerprint


def _identity(config: Config, model: PreTrainedModel) -> str:
    """Return the commit of a model on the hub, or a digest of a folder's weights, JSON files and code."""
    folder = Path(config.model.name).expanduser()
    if not folder.is_dir():
        return f"{config.model.name}@{getattr(model.config, '_commit_hash', None) or config.model.revision}"
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.py")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
