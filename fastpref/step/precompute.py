"""References that compute the log-probabilities of a completion once, and find them on disk in later runs.

`Precomputed` computes them before the training. `Remembered` computes them when a step or an evaluation first needs
them. Both keep them in

    $FASTPREF_CACHE (~/.cache/fastpref) / reference / FINGERPRINT / 00000-DIGEST.safetensors, …

The key of a completion's log-probabilities is a digest of the tokens of its prompt and itself. So a change of the
tokens (by the data, format, template or limits) never finds old numbers, and only added data are computed. Everything
else that changes the numbers (the model's files or commit, rows of new tokens, its dtype, quantization and mixed
precision, its attention and liger's kernels, the kind of device, the code that computes it) is in the fingerprint, so
files of another kind are never read. A stopped run continues with what is in the files.

Log-probabilities that are looked up equal computed ones only up to the rounding of another micro-batch. A resumed run
must nevertheless equal the uninterrupted one bit for bit. So its checkpoint names the files that the run had read and
written until then, and the resumed run reads these alone. What the run computes after that, it computes in the same
micro-batches as the uninterrupted run. For the same reason `Remembered` works alike for any number of epochs: a run
that is resumed with more of them equals one that had them from the start.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastpref.atomic import WriteError
from fastpref.config import Config, ModelConfig
from fastpref.data.batch import Layout, PreferenceBatch, collate, completion_key
from fastpref.data.cache import cache_folder
from fastpref.data.example import Example
from fastpref.data.plan import plan_pass
from fastpref.model.experts.kinds import has_packed_experts
from fastpref.model.load import Loaded, mixed_precision
from fastpref.model.new_tokens import rows_of
from fastpref.model.policy import PolicyOutput
from fastpref.model.rope import has_rope_by_length
from fastpref.processes import ALONE, Processes
from fastpref.step.logprob_store import LogprobStore
from fastpref.step.reference import PolicyPass, Reference, both, named_model

VERSION = 3  # changes with the code that computes the numbers and with their format on disk
_SAVE_EVERY = 64  # micro-batches of `Precomputed`
_FILE = 1 << 18  # tokens, after which `Remembered` writes a file of 1 MiB
_LIBRARIES = ("torch", "transformers", "bitsandbytes")  # which compute the numbers


class Remembered:
    """A reference that computes a completion's log-probabilities when they are first needed, and then looks them up.

    If one completion of a micro-batch is not known, the whole micro-batch is computed; what was known stays as it was.
    Only what can be written is remembered, because a resumed run must know it too.
    """

    def __init__(self, reference: Reference, store: LogprobStore, tell: Callable[[str], None]):
        self._reference, self.store, self._tell = reference, store, tell

    @torch.no_grad()
    def __call__(self, batch: PreferenceBatch) -> Tensor:
        return self._known(batch) if self._knows(batch) else self._remember(batch, self._reference(batch))

    def beside(self, policy_pass: PolicyPass, batch: PreferenceBatch) -> tuple[PolicyOutput, Tensor]:
        """Run the policy's pass, and compute the batch, if it is not known, in the same sweep over the layers."""
        if self._knows(batch):
            return policy_pass(), self._known(batch)
        output, logps = both(policy_pass, self._reference, batch)
        assert logps is not None
        return output, self._remember(batch, logps)

    def _knows(self, batch: PreferenceBatch) -> bool:
        return all(key in self.store for key in batch.keys)

    def _known(self, batch: PreferenceBatch) -> Tensor:
        return self.store.lookup(batch.keys, batch.segments.device)

    def _remember(self, batch: PreferenceBatch, logps: Tensor) -> Tensor:
        """Add computed log-probabilities to the store. Returns those that count from now on."""
        logps = logps.float()
        if self.store.folder is None:
            return logps
        self.store.add(batch.keys, logps.split(batch.scored))
        if self.store.waiting >= _FILE:
            self.write()
            if self.store.folder is None:
                return logps
        return self._known(batch)

    def write(self) -> list[str]:
        """Write what is not yet in a file. If the disk refuses, forget it, remember no more, and tell why.

        Returns the names of all files that this run has read and written.
        """
        try:
            self.store.write()
        except WriteError as error:
            self.store.drop()
            self.store.folder = None
            self._tell(f"reference log-probabilities are not remembered any more: {error}")
        return list(self.store.files)


class Precomputed:
    """A reference that looks up the token log-probabilities [M] of a micro-batch's completions."""

    def __init__(self, reference: Reference, store: LogprobStore):
        self._reference, self.store = reference, store

    def __call__(self, batch: PreferenceBatch) -> Tensor:
        return self.store.lookup(batch.keys, batch.segments.device)

    def write(self) -> list[str]:
        """Return the names of all files that this run has read and written; `complete` has written everything."""
        return list(self.store.files)

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
            self.store.keep_only(set.intersection(*map(set, processes.gather(list(self.store)))))
        computed, waiting = 0, {}
        parts = _microbatches(self._missing(examples), layout, budget)
        rounds = iter(lambda: list(islice(parts, processes.count)), [])
        for number, part in enumerate(rounds, start=1):
            # A process without a micro-batch computes one of the round again: FSDP needs every process in a forward.
            own = part[processes.rank % len(part)]
            batch = collate(own, layout, pad_token_id=pad_token_id)
            logps = self._reference(batch.to(device)).float()
            waiting |= zip(batch.keys, logps.split(batch.scored), strict=True)
            computed += sum(len(example.completions) for examples in part for example in examples)
            progress(computed)
            if number % _SAVE_EVERY == 0:
                self._keep(waiting, processes)
                waiting = {}
        self._keep(waiting, processes)
        self._reference = _Released()  # frees a model that only the reference used
        return computed

    def _missing(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Yield the examples with only the completions that are neither known nor yielded before."""
        yielded: set[bytes] = set()
        for example in examples:
            new = []
            for which, completion in enumerate(example.completions):
                key = completion_key(example.prompt, completion, example.context(which))
                if key not in self.store and key not in yielded:
                    yielded.add(key)
                    new.append((example, which))
            if new:
                yield example.with_completions(new)

    def _keep(self, own: dict[bytes, Tensor], processes: Processes) -> None:
        """Keep what all processes have computed, copied from the device at once: until then the host does not wait."""
        logps = torch.cat(list(own.values())).cpu().split(list(map(len, own.values()))) if own else ()
        for part in processes.gather({key: values.clone() for key, values in zip(own, logps)}):
            self.store.add(part, part.values())
        if not processes.first:
            return
        try:
            self.store.write()
        except WriteError as error:
            self.store.notes.append(f"reference log-probabilities are not kept for later runs: {error}")
            self.store.folder = None


class _Released:
    """Stands in the place of a reference that has computed everything."""

    def __call__(self, batch: PreferenceBatch) -> Tensor:
        raise RuntimeError("the reference's log-probabilities are complete")


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


def reference_folder(config: Config, loaded: Loaded, copy: PreTrainedModel | None = None) -> Path:
    """Return the folder of this model's reference log-probabilities. `copy` is a reference that is a model itself."""
    model = loaded.model
    identity = {
        "version": VERSION,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "model": _identity(config.model, loaded.model),
        "dtype": str(model.dtype),
        "mixed precision": mixed_precision(config),
        **_other_reference(config, loaded, copy),
        "float32 products": torch.get_float32_matmul_precision(),
        "quantization": config.model.quantization,
        **({"experts": "in few bits"} if has_packed_experts(model) else {}),  # which they once were not
        "attention": model.config._attn_implementation,
        "liger": loaded.liger,
        "device": model.device.type,
        **({"rows": rows_of(model)} if config.tokens.add else {}),  # each takes a share of every probability
        # `rope.fix_rope` gives every row the frequencies of this length.
        **({"rope_of": config.tokens.max_length} if has_rope_by_length(model) else {}),
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "reference" / fingerprint


def _other_reference(config: Config, loaded: Loaded, copy: PreTrainedModel | None) -> dict[str, Any]:
    """Return what tells a reference apart that is not the base model: its adapter, or another model."""
    if loaded.reference.digest is not None:
        return {"reference": loaded.reference.digest}
    if copy is None or config.reference.name is None:
        return {}
    other = named_model(config, loaded).model
    return {
        "reference": _identity(other, copy),
        "reference's form": [str(copy.dtype), other.quantization, copy.config._attn_implementation],
    }


def _identity(options: ModelConfig, model: PreTrainedModel) -> str:
    """Return the commit of a model on the hub, or a digest of a folder's weights, JSON files and code."""
    folder = Path(options.name).expanduser()
    if not folder.is_dir():
        return f"{options.name}@{getattr(model.config, '_commit_hash', None) or options.revision}"
    digest = hashlib.sha256()
    paths = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.py")])
    with ThreadPoolExecutor() as threads:  # which hash shards at the same time
        for path, own in zip(paths, threads.map(_digest, paths), strict=True):
            digest.update(path.name.encode() + own)
    return digest.hexdigest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
