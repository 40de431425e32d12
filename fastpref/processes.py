"""Several processes that share every step: `accelerate launch -m fastpref train cfg.toml`.

All of them plan the same step and cut it into the same micro-batches. Each computes equally many of these, and what a
loss or a metric needs of the whole step is summed over the processes, so a step does not depend on their number except
by rounding. Gradients are joined by DDP or, in shards, by FSDP2 (arXiv 2304.11277; `torch.distributed.fsdp`).
"""

import atexit
import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from socket import gethostname
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedType,
    broadcast_object_list,
    gather_object,
    reduce,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from fastpref.config import Config
from fastpref.errors import UserError

T = TypeVar("T")
_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "bitsandbytes", "liger-kernel")
_GRACE = 0.5  # seconds; a thread that is ready to run waits some milliseconds even on a busy machine


@dataclass(frozen=True)
class Processes:
    """The number of this process, and of all processes."""

    rank: int = 0
    count: int = 1
    sharded: bool = False  # by FSDP2: all processes call every forward together

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, own: Tensor) -> Tensor:
        """Return the sum over all processes, in each of them."""
        total = own if self.count == 1 else reduce(own, "sum")
        assert isinstance(total, Tensor)
        return total

    def gather(self, own: T) -> list[T]:
        """Return the values of all processes in their order, in each of them."""
        if self.count == 1:
            return [own]
        # As arrays: in an object collective torch reads a tensor's storage as one that was saved to a file.
        arrays = tree_map(lambda leaf: leaf.cpu().numpy() if isinstance(leaf, Tensor) else leaf, own)
        return tree_map(
            lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, gather_object([arrays])
        )

    def any(self, own: bool) -> bool:
        return any(self.gather(own))

    def on_first(self, call: Callable[[], T]) -> T:
        """Call in the first process. Each process gets its result, or its UserError."""
        if self.count == 1:
            return call()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = call()
            except UserError as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            _part()
            raise outcome[1]
        return outcome[0]

    def together(self, call: Callable[[], T]) -> T:
        """Call in every process. An exception in one of them ends all with its message: none is left waiting."""
        if self.count == 1:
            return call()
        result: Any = None
        fault: Exception | None = None
        try:
            result = call()
        except Exception as error:  # whatever it is, the others must know
            fault = error
        own = None if fault is None else str(fault) if isinstance(fault, UserError) else repr(fault)
        everyone = enumerate(self.gather((gethostname(), own)))
        failures = [f"process {rank} on {host}: {message}" for rank, (host, message) in everyone if message is not None]
        if failures:
            _part()
            raise fault or UserError(f"ended because of {failures[0]}")
        return result

    def first_then_others(self, call: Callable[[], T]) -> T:
        """Call as `together`, but in the other processes after the first, whose files they find on a shared disk."""
        first = self.together(lambda: call() if self.first else None)
        others = self.together(lambda: None if self.first else call())
        result: Any = first if self.first else others
        return result

    def agree(self, what: Callable[[], Mapping[str, Any]]) -> None:
        """Raise UserError in all processes if one of these values, given by their names, differs between them."""
        if self.count == 1:
            return
        everyone: list[tuple[str, Mapping[str, Any]]] = self.gather((gethostname(), self.together(what)))
        hosts = [f"process {rank} on {host}" for rank, (host, _) in enumerate(everyone)]
        lines = []
        for name in dict.fromkeys(name for _, own in everyone for name in own):
            values = [own.get(name) for _, own in everyone]
            if any(value != values[0] for value in values):
                lines.append(f"  {name}: " + ", ".join(f"{value!r} ({host})" for value, host in zip(values, hosts)))
        if lines:
            _part()
            what_to_do = "Give every host the same config, files and versions"
            raise UserError("\n".join(["what all processes must share differs between them:", *lines, what_to_do]))

    def accumulating(self, policy: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Return the context for a micro-batch's forward and backward. DDP joins gradients after the step's last one.

        FSDP2 joins them after each one, so that no process holds the gradients of more than its shard.
        """
        return nullcontext() if last or not isinstance(policy, DistributedDataParallel) else policy.no_sync()


ALONE = Processes()


def end_together(error: UserError) -> NoReturn:
    """Raise, in all processes, an error that one met before it joined the others, which wait for it in `together`."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        here = Accelerator()
        atexit.register(_leave)

        def end() -> NoReturn:
            raise error

        Processes(here.process_index, here.num_processes).together(end)
    raise error


def _part() -> None:
    """Wait until all processes know the error: one that leaves early breaks a connection that the others still read."""
    with suppress(RuntimeError):  # from a process that left meanwhile, after all had come here
        torch.distributed.barrier()


def _leave() -> None:
    """Leave the process group while the interpreter still runs.

    A gloo thread releases the tensors of an operation after the main thread has gone on. If the interpreter has ended
    by then, the thread aborts the process, whose run was right. Leaving the group does not end that thread where
    DDP or FSDP still hold the group, so it is given time. After an uncaught exception the others may wait for this
    process in the midst of an operation, which ends only with the process itself.
    """
    if torch.distributed.is_initialized() and not hasattr(sys, "last_value"):
        time.sleep(_GRACE)
        torch.distributed.destroy_process_group()


def code() -> dict[str, str]:
    """Return what computes a step: versions of the libraries, and a digest of this package's files."""
    digest, package = hashlib.sha256(), Path(__file__).parent
    for path in sorted({*package.rglob("*.py"), *package.glob("kernels/*.py")}):  # rglob follows no link
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return {f"version of {name}": version(name) for name in _LIBRARIES} | {"code of fastpref": digest.hexdigest()[:16]}


def start_processes(config: Config, mixed_precision: str) -> tuple[Accelerator, Processes]:
    """Join the processes that a launcher started. Raises UserError for what they cannot share."""
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")  # one group a layer
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        # A step is one of the schedule, however many processes take it.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # A cache would keep half-precision copies of all float32 weights through the whole forward pass.
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
    )
    atexit.register(_leave)
    return accelerator, _processes(accelerator, config)


def _processes(accelerator: Accelerator, config: Config) -> Processes:
    requested = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if requested and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate knows FSDP on accelerators only; torch's needs none.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = DistributedType.FSDP
    kind = accelerator.distributed_type
    sharded = kind == DistributedType.FSDP
    if accelerator.num_processes == 1 and not sharded:
        return ALONE
    if config.tokens.add:
        raise UserError("tokens.add: new tokens are trained in one process; start one, without FSDP")
    if sharded and not accelerator.is_fsdp2:
        raise UserError("FSDP of version 1 is not supported; launch with --fsdp_version 2, or without FSDP")
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise UserError(f"{kind.value} is not supported; launch with DDP, or FSDP with --fsdp_version 2")
    if sharded:
        check_sharded(config)
        # Every process loads the model in host memory; the plugin's way needs the model's own loading.
        assert accelerator.state.fsdp_plugin is not None
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    return Processes(accelerator.process_index, accelerator.num_processes, sharded)


def check_sharded(config: Config) -> None:
    """Raise UserError for what FSDP2 cannot shard."""
    refused = {
        f'model.quantization = "{config.model.quantization}"': config.model.quantization != "none",
        f'train.optimizer = "{config.train.optimizer}"': config.train.optimizer != "adamw",
        'reference.mode = "copy"': config.reference.mode == "copy" and config.loss.uses_reference,
        f"lora.init = {config.lora.init if config.lora is not None else None!r}": config.lora is not None
        and (config.lora.init == "olora" or config.lora.init.startswith("pissa")),
        "lora.dora = true": config.lora is not None and config.lora.dora,
        "lora.stack = true": config.lora is not None and config.lora.stack,
        f"reference.name = {config.reference.name!r}": config.reference.name is not None and config.loss.uses_reference,
    }
    for setting, is_set in refused.items():
        if is_set:
            raise UserError(f"{setting} cannot be sharded by FSDP; change it, or launch without --use_fsdp")
