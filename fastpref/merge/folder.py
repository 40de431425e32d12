"""Write the folder of a merged model. Tensors are merged and written file by file, under their names in the files."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastpref.data.template.text import add_text
from fastpref.errors import UserError
from fastpref.merge.adapter import merged, through_four_bits
from fastpref.merge.checkpoint import COPIED, INDEX
from fastpref.merge.names import Group
from fastpref.merge.plan import Plan
from fastpref.model.files import model_config
from fastpref.run.trained import Trained, trained_tokenizer

SHARD = 5 * 10**9  # bytes per file, if the model's own division would now make larger files


class Writer:
    """Writes a merged model.

    Memory holds the weights of the current file, and in float32 the tensors that transformers converts together, which
    are mostly one tensor, or the experts of a layer.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype | None = None):
        self._plan, self._checkpoint, self._dtype = plan, plan.checkpoint, dtype
        self.changed: set[str] = set()  # the names of the model's tensors that the merge changed
        self._rows = 0  # of tables that have grown
        self.whole = True  # whether all changed tensors are written in float32
        self._touched = {*plan.parts, *plan.through_nf4, *filter(self._is_quantised, plan.conv1d)}
        self._visited: set[str] = set()
        method = self._checkpoint.method
        if dtype is not None and method is not None and not self._checkpoint.dequantised:
            raise UserError(f"--dtype: the model's weights lie quantised by {method}, and are written as they lie")

    def fill(self, folder: Path, trained: Trained) -> None:
        """Write every file of the model. Raises UserError if the adapter has changed nothing."""
        self._write_weights(folder)
        missing = sorted(set(self._plan.parts) - self._visited)
        if missing:
            raise UserError(f"{trained.weights}: {', '.join(missing[:3])} found no place in the model's files")
        if not self.changed:
            kind = "" if self.whole else " in half precision; try --dtype float32"
            raise UserError(f"{trained.weights}: this adapter changes no weight of the model{kind}")
        self._write_config(folder)
        self._copy_files(folder)
        trained_tokenizer(trained).save_pretrained(str(folder))
        add_text(folder, trained.text, model_config(trained.config.model))

    # --- weights -------------------------------------------------------------------------------------------------

    def _write_weights(self, folder: Path) -> None:
        places: dict[str, str] = {}
        total = 0
        for file, names in self._division():
            tensors = dict(self._tensors(names))
            save_file(tensors, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
            del tensors
        if set(places.values()) != {"model.safetensors"}:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _division(self) -> list[tuple[str, list[str]]]:
        """Return the files to write with their tensors' names: the model's own files, or shards if those would grow."""
        files: dict[Path, list[str]] = {file: [] for file in self._checkpoint.files}
        for name, entry in self._checkpoint.tensors.items():
            if not self._is_left_out(name):
                files[entry.file].append(name)
        files = {file: names for file, names in files.items() if names}
        if self._plan.untied and self._head not in self._checkpoint.tensors:
            files[next(reversed(files))].append(self._head)
        sizes = {name: self._size(name) for names in files.values() for name in names}
        if all(sum(sizes[n] for n in names) <= max(SHARD, file.stat().st_size) for file, names in files.items()):
            return [(file.name, names) for file, names in files.items()]
        shards: list[list[str]] = [[]]
        for name in (name for names in files.values() for name in names):
            if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > SHARD:
                shards.append([])
            shards[-1].append(name)
        return [(f"model-{i:05}-of-{len(shards):05}.safetensors", names) for i, names in enumerate(shards, start=1)]

    def _size(self, name: str) -> int:
        """Return how many bytes a tensor takes in its file."""
        entry = self._checkpoint.tensors.get(name) or self._checkpoint.tensors[self._embedding]
        dtype = self._written_dtype(entry.dtype)
        return torch.Size(entry.shape).numel() * (1 if dtype is None else dtype.itemsize)

    def _tensors(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of one file as they are written."""
        ready: dict[str, Tensor] = {}
        wanted = set(names)
        for name in names:
            group = self._plan.names.by_source.get(name)
            if name not in self._checkpoint.tensors:
                yield name, self._new_head()
            elif group is None or self._touched.isdisjoint(group.targets):
                yield name, self._written(self._checkpoint.read(name), self._checkpoint.tensors[name].dtype)
            else:
                if name not in ready:
                    ready |= {n: tensor for n, tensor in self._merged(group).items() if n in wanted}
                yield name, ready.pop(name)

    def _merged(self, group: Group) -> dict[str, Tensor]:
        """Return the merged tensors of a group, as the files hold them."""
        names, entries = self._plan.names, {name: self._checkpoint.tensors[name] for name in group.sources}
        files = {name: self._checkpoint.read(name) for name in group.sources}
        if len({tensor.dtype for tensor in files.values()}) > 1:
            files = {name: tensor.float() for name, tensor in files.items()}
        values = names.to_model(group, files)
        if group.converter is not None:
            back = names.to_files(group, values)
            if not all(torch.equal(back[name], files[name]) for name in files):
                raise UserError(f"{', '.join(group.targets)}: transformers does not write it back as it was read")
            del back
        del files
        dtype = self._written_dtype(next(iter(entries.values())).dtype)
        for target in list(values):
            values[target] = self._trained(target, values[target].float(), dtype)
        written = names.to_files(group, values)
        return {name: self._written(tensor, entries[name].dtype) for name, tensor in written.items()}

    def _trained(self, target: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Merge a tensor of the model, given in float32. Returns it in the dtype in which it is written."""
        plan = self._plan
        if target in plan.conv1d and self._is_quantised(target):
            value = value.T
        if target in plan.through_nf4:
            value = through_four_bits(value.T).T if target in plan.conv1d else through_four_bits(value)
        part, before = plan.parts.get(target), value.to(dtype)
        if part is None:
            return before
        after = merged(part, target, value).to(dtype)
        self._visited.add(target)
        self._rows = max(self._rows, len(after) if len(after) > len(before) else 0)
        self.whole &= dtype == torch.float32
        if not torch.equal(after, before):
            self.changed.add(target)
        return after

    def _new_head(self) -> Tensor:
        """Return the weight of a head that the files lack because it was tied to the embeddings."""
        entry = self._checkpoint.tensors[self._embedding]
        value = self._checkpoint.read(self._embedding).float()
        return self._written(self._trained(self._plan.head, value, self._written_dtype(entry.dtype)), entry.dtype)

    # --- where tensors are ---------------------------------------------------------------------------------------

    @property
    def _head(self) -> str:
        return self._plan.names.in_files(self._plan.head)

    @property
    def _embedding(self) -> str:
        return self._plan.names.in_files(self._plan.embedding)

    def _is_left_out(self, name: str) -> bool:
        """Return whether a tensor is a tied head, of which some files hold a copy."""
        group = self._plan.names.by_source.get(name)
        return group is not None and group.targets == (self._plan.head,) and self._plan.tied and not self._plan.untied

    def _is_quantised(self, target: str) -> bool:
        group = self._plan.names.by_target.get(target)
        return group is not None and any(self._checkpoint.tensors[name].statistics for name in group.sources)

    def _written_dtype(self, stored: torch.dtype | None) -> torch.dtype | None:
        return stored if stored is None else self._dtype or stored

    def _written(self, tensor: Tensor, stored: torch.dtype | None) -> Tensor:
        tensor = tensor.detach().to(self._written_dtype(stored)).contiguous()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        return tensor if whole else tensor.clone()  # a view would keep the whole storage

    # --- the other files -----------------------------------------------------------------------------------------

    def _write_config(self, folder: Path) -> None:
        config: dict[str, Any] = json.loads(json.dumps(self._checkpoint.config))
        for part in (config, config.get("text_config")):
            if not isinstance(part, dict):
                continue
            if self._plan.untied:
                part["tie_word_embeddings"] = False
            if self._checkpoint.dequantised:
                part.pop("quantization_config", None)
            if self._rows and (part is not config or "text_config" not in config):
                part["vocab_size"] = self._rows
            if self._dtype is not None:
                part.pop("torch_dtype", None)
                part["dtype"] = str(self._dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def _copy_files(self, folder: Path) -> None:
        """Copy other files that a model needs, its own code included."""
        source = self._checkpoint.folder
        settings = [source / name for name in ("config.json", "tokenizer_config.json")]
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in settings if path.is_file()]
        code = ["*.py"] if any(content.get("auto_map") for content in contents) else []
        for pattern in (*COPIED, *code):
            for path in source.glob(pattern):
                shutil.copyfile(path, folder / path.name)
