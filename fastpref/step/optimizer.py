"""The optimizers of a run, their groups of parameters, and their state."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.model.head import Head

_MOMENTS = ("state1", "state2")  # bitsandbytes' names


def make_optimizer(policy: nn.Module, config: Config, *, warmup: int = 0) -> torch.optim.Optimizer:
    """Make the optimizer of `train.optimizer` for the policy's trainable parameters. Only matrices have weight decay.

    The 8-bit kinds store the moments of tensors of at least 4,096 entries in 8 bits (arXiv 2110.02861). The paged kinds
    let moments move to host memory when a GPU is full. Muon (`MuonWithAdamW`) takes the matrices of hidden layers and
    of adapters on them. Schedule-free AdamW warms up by itself, in `warmup` steps. Raises UserError for a paged kind
    without a GPU, and for a package that is not installed.
    """
    groups = _groups(policy, config)
    parameters = [p for group in groups for p in group["params"]]
    options: dict[str, Any] = {"lr": config.learning_rate}
    if config.train.betas is not None:
        options["betas"] = config.train.betas
    if config.train.epsilon is not None:
        options["eps"] = config.train.epsilon
    if config.train.optimizer == "muon":
        return MuonWithAdamW(groups, _outside(policy), **options)
    if config.train.optimizer == "schedule_free_adamw":
        options["warmup_steps"] = warmup
    return _kind(config.train.optimizer, parameters)(groups, **options)


def _groups(policy: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Return the groups of the trainable parameters: matrices, the adapters' B matrices if they have a rate of their
    own, and the rest. The first group has the run's learning rate."""
    rate, ratio = config.learning_rate, config.lora.plus_ratio if config.lora else 1.0
    named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    faster = [p for name, p in named if ".lora_B." in name and p.dim() > 1 and ratio != 1]
    known = set(map(id, faster))
    matrices = [p for _, p in named if p.dim() > 1 and id(p) not in known]
    decay = config.train.weight_decay
    groups = [
        {"params": matrices, "weight_decay": decay, "lr": rate},
        {"params": faster, "weight_decay": decay, "lr": rate * ratio},
        {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0, "lr": rate},
    ]
    return [group for group in groups if group["params"]]


def _outside(policy: nn.Module) -> set[int]:
    """Return the ids of the parameters of embeddings and head, and of adapters on them."""
    modules = [module for module in policy.modules() if isinstance(module, nn.Embedding)]
    head: Any = getattr(policy, "head", None)
    if head is not None:
        modules.append(head.module if isinstance(head, Head) else head.model.get_output_embeddings())
    names = ("lora_embedding_", "lm_head")
    outside = {id(p) for module in modules for p in module.parameters()}
    return outside | {id(p) for name, p in policy.named_parameters() if any(word in name for word in names)}


def _kind(name: str, parameters: Iterable[nn.Parameter]) -> Callable[..., torch.optim.Optimizer]:
    if name == "adamw":  # the fused kernel needs no temporary tensors of a parameter's size
        fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") for p in parameters)
        return lambda groups, **options: torch.optim.AdamW(groups, fused=fused, **options)
    if name == "adafactor":
        # As transformers' trainer makes it: the learning rate is that of the schedule, in AdamW's unit. torch's would
        # multiply it by the size of a matrix's entries, which is zero for an adapter's B.
        return lambda groups, **options: Adafactor(groups, scale_parameter=False, relative_step=False, **options)
    if name == "schedule_free_adamw":
        return _schedule_free()
    import bitsandbytes.optim as kinds

    classes: dict[str, Any] = {
        "adamw_8bit": kinds.AdamW8bit,
        "paged_adamw": kinds.PagedAdamW,
        "paged_adamw_8bit": kinds.PagedAdamW8bit,
        "lion": kinds.Lion,
        "lion_8bit": kinds.Lion8bit,
        "paged_lion": kinds.PagedLion,
        "paged_lion_8bit": kinds.PagedLion8bit,
    }
    if name.startswith("paged") and not torch.cuda.is_available():
        plain = name.removeprefix("paged_").removesuffix("_8bit")
        other = f'set "{plain}" or "{plain}_8bit"'
        raise UserError(f'train.optimizer = "{name}": only moments on a GPU can be paged; {other}')
    return classes[name]


def _schedule_free() -> Callable[..., torch.optim.Optimizer]:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        raise UserError(
            'train.optimizer = "schedule_free_adamw" needs the package schedulefree; pip install schedulefree'
        ) from None
    return AdamWScheduleFree


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices of hidden layers, and AdamW for the rest, as one optimizer.

    Muon's step is scaled to the root mean square of AdamW's (arXiv 2502.16982), so one learning rate and one weight
    decay suit both. Embeddings, head, vectors, and tensors of more than two dimensions go to AdamW. An adapter's A and
    B are two matrices.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], outside: set[int], *, lr: float):
        def split(hidden: bool) -> list[dict[str, Any]]:
            parts = [
                group | {"params": [p for p in group["params"] if (p.dim() == 2 and id(p) not in outside) == hidden]}
                for group in groups
            ]
            return [part for part in parts if part["params"]]

        self._parts: list[torch.optim.Optimizer] = []
        if matrices := split(True):
            self._parts.append(torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw"))
        if rest := split(False):
            self._parts.append(_kind("adamw", [p for group in rest for p in group["params"]])(rest, lr=lr))
        super().__init__(groups, {"lr": lr})
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's groups and state."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


@contextmanager
def training_weights(optimizer: Any) -> Iterator[None]:
    """Give the model the weights that a step computes with, inside the block.

    Those of a schedule-free optimizer differ from what it has learnt, an average. Outside of steps the model always has
    the average, so whatever evaluates, answers or saves finds it.
    """
    own = getattr(optimizer, "optimizer", optimizer)
    if not hasattr(own, "train"):
        yield
        return
    own.train()
    try:
        yield
    finally:
        own.eval()


def load_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `state_dict` returned into an optimizer, which Accelerate may have prepared.

    bitsandbytes would move all moments to the GPU as plain tensors. Those of a paged kind may not fit there, so each
    goes from host memory to a buffer like the one that it was saved from. A schedule-free optimizer keeps the warm-up
    of this run, which may have another length.
    """
    own = getattr(optimizer, "optimizer", optimizer)
    if not getattr(own, "is_paged", False):
        warmups = [group.get("warmup_steps") for group in own.param_groups]
        optimizer.load_state_dict(state)
        for group, warmup in zip(own.param_groups, warmups):
            if warmup is not None:
                group["warmup_steps"] = warmup
        return
    own.load_state_dict(state, move_to_device=False)
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # by id, with the tensor, so that ids stay unique
    for parameter, values in own.state.items():
        for name, value in values.items():
            if name in _MOMENTS:
                values[name] = own.get_state_buffer(parameter, dtype=value.dtype)
                values[name].copy_(value)
            elif isinstance(value, Tensor):  # parameters share their tables
                moved.setdefault(id(value), (value, value.to(parameter.device)))
                values[name] = moved[id(value)][1]
