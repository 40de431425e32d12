"""`Logits`, which takes the place of a model's logits in TRL's own code and computes only the values that it uses.

TRL's trainers that use a model's logits slice them, and then compute log-probabilities of the labels, a mean, an
entropy, an argmax. A `Logits` stores the positions of the padded batch that it stands for. Slicing it slices those
positions, and the values that TRL then computes come from one pass over the vocabulary. Any other operation gets the
real logits of its positions.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.patch.states import States


class Scores:
    """The head's results for a padded batch, computed once for every position that needs them."""

    def __init__(
        self,
        states: States,
        input_ids: Tensor,  # [B, T]
        wanted: Tensor,  # [B, T] bool: tokens whose log-probability the loss reads
        outputs: tuple[str, ...],
        around: Callable[[int, int], AbstractContextManager[None]],
        row_states: Callable[[], States] | None,
    ):
        """Store the arguments, and compute the wanted log-probabilities now if gradients are off.

        `outputs` are computed in addition to the log-probabilities. The head runs inside the context `around`, which
        gets the number of positions in the batch and the number of scored ones. `row_states` also computes the states
        of padding.
        """
        self.states, self.outputs, self._around, self._row_states = states, outputs, around, row_states
        self._row_means: Tensor | None = None
        self._with_grad = torch.is_grad_enabled()
        # Every value is stored at the position that predicts its token, the one before the token's own.
        self.next_ids = torch.roll(input_ids, -1, 1).to(states.hidden.device)  # [B, T]
        self.wanted = _before(wanted.to(states.hidden.device))
        self.have, self._any = torch.zeros_like(self.wanted), False  # what is computed, and whether anything is
        self.table = states.hidden.new_zeros(self.have.shape, dtype=torch.float32)
        self.extra: dict[str, Tensor] = {}
        if not self._with_grad:  # a reference's adapters are off only now
            self.logp(self.wanted)

    def logp(self, where: Tensor) -> Tensor:
        """Return the log-probability of the next token, [B, T], where `where` or `wanted` is True, and 0 elsewhere.

        Positions that were computed before keep their values.
        """
        untouched = where is self.wanted and not self._any
        missing = self.wanted if untouched else (where | self.wanted) & ~self.have
        if bool(missing.any()):
            targets = self.next_ids[missing]
            with torch.set_grad_enabled(self._with_grad), self._around(self.have.numel(), len(targets)):
                score = self.states.score_labels if missing is self.wanted else self.states.score
                tokens = score(missing, targets, self.outputs)
            self.table = self.table.masked_scatter(missing, tokens.logp.to(self.table.dtype))
            for name in self.outputs:
                values = getattr(tokens, name)
                empty = torch.zeros(self.have.shape, dtype=values.dtype, device=values.device)
                self.extra[name] = self.extra.get(name, empty).masked_scatter(missing, values)
            self.have, self._any = self.have | missing, True
        return self.table

    def mean_logits(self) -> Tensor:
        """Return the mean of the logits over the vocabulary, [B, T], valid where there are tokens."""
        with torch.set_grad_enabled(self._with_grad), self._around(0, 0):
            return self.states.mean_logits()

    @property
    def knows_padding(self) -> bool:
        return self._row_states is not None or self._row_means is not None

    def row_means(self) -> Tensor:
        """Return the mean of the logits over the vocabulary, [B, T], at padding too, without gradient."""
        if self._row_means is None:
            with torch.no_grad():
                states = self.states if self._row_states is None else self._row_states()
                with self._around(0, 0):
                    self._row_means = states.mean_logits()
            self._row_states = None
        return self._row_means


def _before(mask: Tensor) -> Tensor:
    """Move each token's mark to the position before it, [B, T]. The first token's mark is dropped."""
    mask = mask.clone()
    mask[:, 0] = False
    return torch.roll(mask, -1, 1)


class Logits:
    """A stand-in for logits [*places, V]."""

    def __init__(self, scores: Scores, at: Tensor, *, with_grad: bool = True):
        self.scores, self.at, self.with_grad = scores, at, with_grad  # at: [*places] into the flattened [B, T]

    # --- properties of a tensor ---------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.at.shape, self.scores.states.head.vocabulary))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.at.dim() + 1

    ndim = property(dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.scores.states.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.scores.states.hidden.device

    @property
    def requires_grad(self) -> bool:
        return self.with_grad and self.scores.states.hidden.requires_grad

    # --- cutting ------------------------------------------------------------------------------------------------

    def _at(self, at: Tensor) -> "Logits":
        return Logits(self.scores, at, with_grad=self.with_grad)

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, key: Any) -> Any:
        keys = list(key) if isinstance(key, tuple) else [key]
        if any(k is None for k in keys):
            return self.materialize()[key]
        used = sum(k.dim() if isinstance(k, Tensor) and k.dtype == torch.bool else 1 for k in keys if k is not Ellipsis)
        if Ellipsis in [k for k in keys if not isinstance(k, Tensor)]:
            gap = next(i for i, k in enumerate(keys) if k is Ellipsis)
            keys[gap : gap + 1] = [slice(None)] * (self.dim() - used)
            used = self.dim()
        if used == self.dim():
            if not (isinstance(keys[-1], slice) and keys[-1] == slice(None)):
                return self.materialize()[key]
            keys = keys[:-1]
        return self._at(self.at[tuple(keys)].clone() if keys else self.at)

    def index_select(self, dim: int, index: Tensor) -> Any:
        if dim in (-1, self.dim() - 1):
            return self.materialize().index_select(dim, index)
        return self._at(self.at.index_select(dim, index.to(self.at.device)))

    def chunk(self, chunks: int, dim: int = 0) -> Any:
        if dim in (-1, self.dim() - 1):
            return self.materialize().chunk(chunks, dim)
        return tuple(self._at(part) for part in self.at.chunk(chunks, dim))

    def view(self, *shape: Any) -> Any:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if shape[-1] not in (-1, self.shape[-1]) or (shape[-1] == -1 and -1 in shape[:-1]):
            return self.materialize().reshape(shape)
        if shape[-1] == -1 and math.prod(shape[:-1]) != self.at.numel():
            return self.materialize().reshape(shape)
        return self._at(self.at.reshape(shape[:-1]))

    reshape = view

    def detach(self) -> "Logits":
        return Logits(self.scores, self.at, with_grad=False)

    def to(self, *_: Any, **__: Any) -> "Logits":
        return self  # float32 inside, and on the device of the hidden states

    contiguous = float = to

    # --- results ------------------------------------------------------------------------------------------------

    def materialize(self) -> Tensor:
        """Compute the real logits [*places, V] by the model's own head. At padding they are those of some token."""
        states = self.scores.states
        logits = states.head.logits(states.hidden[states.place.flatten()[self.at]])
        return logits if self.with_grad else logits.detach()

    def mean(self, dim: Any = None, **options: Any) -> Tensor:
        """Return the mean over all logits, or over the vocabulary."""
        exact = self.scores.states.head.settings.softcap is None or not self.requires_grad
        if options or dim not in (None, -1, self.dim() - 1) or not exact:
            return self.materialize().mean(dim, **options)
        # A mean over all logits may include padding. After a mean over the vocabulary, TRL drops padding itself.
        whole_rows = dim is None and not self.requires_grad and self.scores.knows_padding
        table = self.scores.row_means() if whole_rows else self.scores.mean_logits()
        means = table.flatten()[self.at]
        return means.mean() if dim is None else means

    def nansum(self) -> Tensor:
        """Return the sum of all logits without gradient, which TRL logs."""
        return self.scores.row_means().flatten()[self.at].nansum() * self.shape[-1]

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Tensor:
        """Return the next token's id where it is wanted and the likeliest, −1 elsewhere, to compare with labels."""
        if dim not in (-1, self.dim() - 1) or keepdim or "is_top1" not in self.scores.outputs:
            return self.materialize().argmax(dim, keepdim)
        self.scores.logp(self.scores.wanted)
        top = self.scores.extra["is_top1"].flatten()[self.at]
        return torch.where(top, self.scores.next_ids.flatten()[self.at], -1)

    def entropy(self) -> Tensor:
        """Return the entropy, [*places], 0 where it is not wanted."""
        if "entropy" not in self.scores.outputs:
            log_probs = self.materialize().log_softmax(-1)
            return -(log_probs.exp() * log_probs).sum(-1)
        self.scores.logp(self.scores.wanted)
        return self.scores.extra["entropy"].flatten()[self.at]

    def logp(self, labels: Tensor) -> Tensor:
        """Return the log-probabilities of labels, [*places], 0 where TRL masks them (it sets these labels to zero)."""
        wanted = self.scores.wanted.flatten()[self.at]
        labels = labels.to(self.device)
        if not torch.equal(labels[wanted], self.scores.next_ids.flatten()[self.at][wanted]):
            return self.materialize().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
        return torch.where(wanted, self.scores.logp(self.scores.wanted).flatten()[self.at], 0.0)

    def cross_entropy(self, labels: Tensor, ignore_index: int = -100) -> Tensor:
        """Return the mean cross-entropy over labels that are not ignored."""
        labels = labels.to(self.device)
        kept = labels != ignore_index
        at = self.at[kept]
        if not torch.equal(labels[kept], self.scores.next_ids.flatten()[at]):
            return F.cross_entropy(self.materialize(), labels, ignore_index=ignore_index)
        where = torch.zeros_like(self.scores.have)
        where.view(-1)[at] = True
        return -self.scores.logp(where).flatten()[at].mean()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handle torch's functions: flatten and the mean cross-entropy here, all others with the real logits."""
        kwargs = dict(kwargs or {})
        if func is torch.flatten and len(args) == 1 and kwargs == {"end_dim": args[0].dim() - 2}:
            return args[0].view(-1, args[0].shape[-1])
        if func is F.cross_entropy and isinstance(args[0], Logits) and args[0].at.dim() == 1:
            plain = {"weight": None, "size_average": None, "reduce": None, "reduction": "mean", "label_smoothing": 0.0}
            others = {name: kwargs[name] for name in plain if name in kwargs}
            if len(args) == 2 and all(others[name] == plain[name] for name in others):
                return args[0].cross_entropy(args[1], kwargs.get("ignore_index", -100))
        args = [a.materialize() if isinstance(a, Logits) else a for a in args]
        kwargs = {name: a.materialize() if isinstance(a, Logits) else a for name, a in kwargs.items()}
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return getattr(self.materialize(), name)


def _arithmetic(name: str) -> None:
    def operate(self: Logits, *others: Any) -> Any:
        others = tuple(o.materialize() if isinstance(o, Logits) else o for o in others)
        return getattr(self.materialize(), name)(*others)

    setattr(Logits, name, operate)


for _name in ("add", "sub", "mul", "truediv", "pow"):
    _arithmetic(f"__{_name}__")
    _arithmetic(f"__r{_name}__")
_arithmetic("__neg__")


def understanding(function: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap TRL's function of logits so that `answer` computes it for a `Logits`, if it can."""

    @functools.wraps(function)
    def answered(logits: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(logits, Logits):
            return function(logits, *args, **kwargs)
        result = answer(logits, *args, **kwargs)
        return function(logits.materialize(), *args, **kwargs) if result is None else result

    return answered


def log_softmax_of(logits: Logits, index: Tensor, **options: Any) -> Tensor | None:
    """Compute TRL's `selective_log_softmax(logits, index)`, or return None with a temperature or another shape."""
    plain = index.shape == logits.at.shape and options.get("temperature", 1.0) == 1.0
    return logits.logp(index) if plain else None


def log_softmax_and_entropy_of(logits: Logits, index: Tensor, **options: Any) -> tuple[Tensor, Tensor] | None:
    """Compute TRL's `selective_log_softmax_and_entropy(logits, index)`, or return None as `log_softmax_of` does."""
    logp = log_softmax_of(logits, index, **options)
    return None if logp is None else (logp, logits.entropy())


def entropy_of(logits: Logits, **options: Any) -> Tensor:
    """Compute TRL's `entropy_from_logits(logits)`."""
    return logits.entropy()


UNDERSTOOD: dict[str, Callable[..., Any]] = {
    "selective_log_softmax": log_softmax_of,
    "selective_log_softmax_and_entropy": log_softmax_and_entropy_of,
    "entropy_from_logits": entropy_of,
}
