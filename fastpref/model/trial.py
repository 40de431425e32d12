"""A numerical trial of a model, to find a layout in which tokens get the same hidden states as alone in a row.

A layout may reach the attention of every layer and the result may still be silently wrong: a module besides attention
may mix neighbouring positions (a state-space branch, a convolution), a mask may depend on positions in the row, or the
code may check the attention's name. So a prompt with two completions and a second tree go through the model in the
layout, and each completion after its prompt goes through the model with its own attention, alone in a row.

For a second pass, windows and chunks of thousands of tokens are shortened in the model's config and in its modules, so
that a few tokens exceed them in both computations.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastpref.data.batch import Layout, PreferenceBatch, collate
from fastpref.data.example import Example, Origin
from fastpref.errors import UserError, one_line
from fastpref.model.attention import (
    NAME,
    AttentionState,
    LayerCall,
    UnknownArgument,
    attention_of,
    give_attention,
    probe_layers,
    restore_attention,
)
from fastpref.model.body import TOWERS
from fastpref.model.failure import is_out_of_memory
from fastpref.model.limits import limits_of_model
from fastpref.model.policy import Policy
from fastpref.model.precision import in_float32, rounded_once_more
from fastpref.model.rope import BY_LENGTH

_SHAPES = ((23, (17, 21)), (19, (22, 13)))  # tokens of each prompt and of its completions
_LONGEST = max(prompt + max(completions) for prompt, completions in _SHAPES)
_SHORT = 8  # tokens of a window or chunk that is made short
_FEW, _MOST = 0.05, 0.25  # errors of half precision: less is rounding in any model, more may be a leak in any
_LIMITS = re.compile(
    r"(window(_size|_len|_length)?|(attention|attn)_chunk_(size|length)|local_attention|floor(_scale)?|index_topk|rel_extent"
    r"|max_distance|original_max_position_embeddings)$"
)


@dataclass(frozen=True)
class Choice:
    """The layout that a model is given."""

    layout: Layout
    why_padded: str | None = None  # the reason for padded rows that the config did not ask for
    calls: tuple[LayerCall, ...] = ()  # the arguments of the layers to an attention that takes trees
    notes: tuple[str, ...] = ()


def choose_layout(
    model: PreTrainedModel,
    policy: Policy,
    wanted: Layout | Literal["auto"],
    *,
    max_length: int | None = None,
    compare: bool = True,
) -> Choice:
    """Find the layout by trial, and give the model the attention that it needs: ours for trees, else its own.

    The model has its own attention, and no adapters around its layers yet. "auto" stands for trees. Windows of
    `max_length` tokens and more are not tested with padded rows. Fake tensors have no numbers to `compare`.
    Raises UserError for a model that computes padded rows differently from each row alone.
    """
    layout: Layout = "tree" if wanted == "auto" else wanted
    why = None
    if layout != "padded":
        calls, why = give_layout(model, policy, layout, compare=compare)
        if why is None:
            return Choice(layout, None, calls)
    if not compare:
        return Choice("padded", why)
    with in_float32(model) as exact:
        return _Trial(model, policy, attention_of(model), exact=exact).padded(why, max_length)


def give_layout(
    model: PreTrainedModel, policy: Policy, layout: Layout = "tree", *, name: str = NAME, compare: bool = True
) -> tuple[tuple[LayerCall, ...], str | None]:
    """Give a model the registered attention `name` if it computes trees, or packed rows, correctly.

    Returns the arguments of its layers to that attention, and the reason why the model keeps its own, or None.
    """
    own = attention_of(model)
    give_attention(model, name)
    calls, why = probe_layers(model, policy.backbone, name)
    if why is None and compare:
        with in_float32(model) as exact:
            why = _Trial(model, policy, own, exact=exact).fault(layout)
    if why is not None:
        restore_attention(own)
    return tuple(calls), why


class _Trial:
    """A model with its `own` attention, and the rows on which layouts are compared with it."""

    def __init__(self, model: PreTrainedModel, policy: Policy, own: AttentionState, *, exact: bool):
        self._model, self._policy, self._own, self._exact = model, policy, own, exact
        self._examples = _examples(model)
        self._kind = model.config.model_type
        self._device = model.device

    def fault(self, layout: Layout) -> str | None:
        """Return a message if a layout is wrong with the model's current attention, or None."""
        for short in (False, True):
            with short_limits(self._model) if short else nullcontext([]) as limits:
                if short and not limits:
                    continue
                try:
                    truth = self._truth()
                except Exception as fault:
                    if not short:
                        return f"its own attention fails: {_reason(fault)}"
                    continue  # for code that fails with a short window, only the first pass counts
                try:
                    error = _difference(self._states(layout), truth)
                except Exception as fault:
                    return f"{self._kind} models refuse the layout: {_reason(fault)}"
                if not self._is_rounding(error):
                    where = f", past its {' and '.join(limits)}" if short else ""
                    size = f"{error.largest:.2g} of their size from those of each row alone{where}"
                    return f"the hidden states of this {self._kind} model would differ by {size}"
                if not short and (why := self._training_fault(layout, truth)) is not None:
                    return why
        return None

    def padded(self, why: str | None, max_length: int | None) -> Choice:
        """Choose padded rows with the model's own attention. Raises UserError if they differ from each row alone."""
        try:
            truth = self._truth()
        except Exception as fault:
            raise UserError(f"{self._kind} models cannot be run here: {_reason(fault)}") from None
        if self._looks_ahead(truth):
            raise UserError(
                f"{self._kind} models are not causal as they are loaded here: the hidden states of a prompt change "
                "with what comes after it, so a completion has no log-probability"
            )
        notes: tuple[str, ...] = ()
        if (why_not := self._padding_fault(truth)) is not None:
            if not give_attention(self._model, "eager") or self._padding_fault(truth) is not None:
                no_trees = f"they take no trees either, because {why}" if why else "train.layout asks for them"
                raise UserError(f"{why_not}; {no_trees}. They are not trained here")
            notes = (f"attention: eager, because {why_not}",)
        if (why_not := self._training_fault("padded", truth)) is not None:
            raise UserError(f"{why_not}. They are not trained here")
        with short_limits(self._model, below=max_length) as limits:
            if limits and (why_not := self._short_padding_fault()) is not None:
                past = " and ".join(limits)
                raise UserError(f"{why_not}, past its {past}; set tokens.max_length to no more than that")
        return Choice("padded", why, (), notes)

    def _short_padding_fault(self) -> str | None:
        try:
            truth = self._truth()
        except Exception:  # code that fails with a short window
            return None
        return self._padding_fault(truth)

    def _padding_fault(self, truth: "_States") -> str | None:
        """Return a message if padded rows are wrong with the model's current attention, or None."""
        try:
            error = _difference(self._states("padded"), truth)
        except Exception as fault:
            return f"{self._kind} models cannot compute padded rows: {_reason(fault)}"
        if self._is_rounding(error):
            return None
        size = f"they differ by {error.largest:.2g} of their size"
        return f"{self._kind} models give padded rows other hidden states than each row alone ({size})"

    def _training_fault(self, layout: Layout, truth: "_States") -> str | None:
        """Return a message if a layout is wrong only in training mode, where full experts drop tokens; or None.

        If training is random (dropout), nothing can be compared.
        """
        body = self._policy.backbone
        training = body.training
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            body.train()
            try:
                states = self._states(layout)
                if self._is_rounding(_difference(states, truth)):
                    return None
                if not self._is_rounding(_difference(states, self._states(layout))):
                    return None
                if self._is_rounding(_difference(states, self._truth())):
                    return None
            except Exception as fault:
                return f"{self._kind} models fail in training mode: {_reason(fault)}"
            finally:
                body.train(training)
        return f"{self._kind} models give a row other hidden states in training mode than alone"

    def _looks_ahead(self, truth: "_States") -> bool:
        """Return whether a prompt's hidden states depend on the completion after it."""
        both: tuple[_States, _States] = ({}, {})
        for k, states in enumerate(both):  # the prompt's states, including its last position, before either completion
            for e in range(len(self._examples)):
                states[e, -1] = torch.cat([truth[e, -1 - k], truth[e, k][:1]])
        return not self._is_rounding(_difference(*both))

    def _is_rounding(self, error: "_Error") -> bool:
        if self._exact:
            return error.largest <= 1e-3
        return error.typical <= _FEW or error.typical <= min(_MOST, 4 * self._noise())

    def _noise(self) -> float:
        """Return the error of the states, as `_Error.typical`, if every layer's output is rounded once more.

        Layers amplify the rounding of those before them, some models' far more than others'. A layout's products and
        sums round at as many places as this adds.
        """
        try:
            truth = self._truth()
            with rounded_once_more(self._model):
                return _difference(self._truth(), truth).typical
        except Exception as fault:
            _reason(fault)
            return 0.0

    # --- hidden states -------------------------------------------------------------------------------------------

    def _truth(self) -> "_States":
        """Compute the states of each completion and its prompt alone in a row, by eager attention if possible."""
        current = attention_of(self._model)
        restore_attention(self._own)
        give_attention(self._model, "eager")
        states: _States = {}
        try:
            for e, example in enumerate(self._examples):
                for k, completion in enumerate(example.completions):
                    alone = Example(example.prompt, (completion,), None, example.row)
                    row = self._run(collate([alone], "padded", score_prompts=True))
                    states[e, k] = row[0, 0]
                    states[e, -1 - k] = row[0, -1]  # the prompt, before this completion
        finally:
            restore_attention(current)
        return states

    def _states(self, layout: Layout) -> "_States":
        return self._run(collate(self._examples, layout, score_prompts=True))

    @torch.no_grad()
    def _run(self, batch: PreferenceBatch) -> "_States":
        """Compute the hidden states that predict each completion's tokens (e, k), and those of each prompt (e, −1)."""
        batch = batch.to(self._device)
        hidden = self._policy.hidden_states(batch)[batch.of_tokens(batch.predictors)].float()
        states: _States = {}
        for segment in range(len(batch.lengths)):
            k, e = divmod(segment, batch.examples)
            states[e, k if k < batch.completions else -1] = hidden[batch.segments == segment]
        return states


_States = dict[tuple[int, int], Tensor]  # [tokens, H] of (example, completion), or of (example, −1) its prompt


def _examples(model: PreTrainedModel) -> list[Example]:
    """Make two prompts with two completions each, of tokens that have no special meaning to the model."""
    config = model.config.get_text_config()
    special = _token_ids(model.config) | _token_ids(config)
    ordinary = [token for token in range(min(int(config.vocab_size), 50_000)) if token not in special]
    draw = (ordinary[(7919 * at + 13 * at * at) % len(ordinary)] for at in range(3, 10_000))
    scale = min(1, (limits_of_model(model).positions or _LONGEST) / _LONGEST)

    def ids(tokens: int) -> list[int]:
        return list(islice(draw, max(2, int(scale * tokens))))

    return [
        Example(ids(prompt), tuple(map(ids, completions)), None, Origin("a trial")) for prompt, completions in _SHAPES
    ]


def _token_ids(config: Any) -> set[int]:
    """Return the ids to which a config gives a special meaning: padding, end of text, image placeholders."""
    special: set[int] = set()
    for name, value in vars(config).items():
        if re.search(r"token_ids?$|token_index$", name):
            special |= {v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)}
    return special


class _Error(NamedTuple):
    """The errors of hidden states, relative to their size.

    Half precision may send single tokens to other experts, so `typical` decides if the comparison cannot be made in
    float32. It also covers the beginning of each sequence by itself, where a leak from another sequence shows.
    """

    largest: float  # over all tokens
    typical: float  # the largest median over a sequence's tokens, or over its first five


def _difference(states: _States, truth: _States) -> _Error:
    largest, typical = 0.0, 0.0
    for key, ours in states.items():
        error = (ours - truth[key]).norm(dim=-1) / truth[key].norm(dim=-1).clamp(min=1e-12)
        error = error.nan_to_num(nan=torch.inf)
        largest = max(largest, float(error.max()))
        typical = max(typical, float(error.median()), float(error[:5].median()))
    return _Error(largest, typical)


def _reason(error: BaseException) -> str:
    """Return the message of an error. Raises it again if it is out of memory, which does not depend on the layout."""
    if is_out_of_memory(error):
        raise error
    return str(error) if isinstance(error, UnknownArgument) else one_line(error, named=True)


# --- windows ----------------------------------------------------------------------------------------------------------


@contextmanager
def short_limits(model: PreTrainedModel, below: int | None = None) -> Iterator[list[str]]:
    """Shorten windows and chunks that no row of the trial exceeds to a few tokens, in configs and modules.

    With `below`, only windows of fewer tokens than that are shortened. Yields their names with their true lengths. They
    are restored after the block.
    """
    owners: dict[int, Any] = {id(config): config for config in (model.config, model.config.get_text_config())}
    tables = [rope for config in owners.values() for rope in _rope_tables(config)]
    owners |= {id(m): m for name, m in model.named_modules() if not TOWERS.search(name)}
    before: list[tuple[dict[str, Any], str, int]] = []
    for values in [*map(vars, owners.values()), *tables]:
        for name, value in values.items():
            number = isinstance(value, int) and not isinstance(value, bool)
            if number and _LIMITS.search(name) and value >= _LONGEST and (below is None or value < below):
                before.append((values, name, value))
    try:
        for values, name, _ in before:
            values[name] = _SHORT
        yield list(dict.fromkeys(f"{name} of {value:,}" for _, name, value in before))
    finally:
        for values, name, value in before:
            values[name] = value


def _rope_tables(config: Any) -> list[dict[str, Any]]:
    """Return a config's RoPE tables, one per kind of layer: their lengths may also scale queries.

    Tables whose frequencies depend on the length of a call are left out, because `rope.py` fixes these.
    """
    table = getattr(config, "rope_parameters", None) or {}
    tables = [table, *(inner for inner in table.values() if isinstance(inner, dict))]
    return [some for some in {id(t): t for t in tables}.values() if some.get("rope_type") not in BY_LENGTH]
