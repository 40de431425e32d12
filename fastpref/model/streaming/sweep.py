"""Compute the hidden states of policy and reference in one sweep over a streamed model's layers.

The reference is the same model in another state: adapters off, no dropout, no gradient. While a layer's weights are in
their slot for the policy's pass, the layer computes the reference's hidden states as well, so that its weights need not
be copied again. What comes before and behind the layers is little, and is computed apart for the reference: its
embeddings, masks and everything else that a layer is given, by running the model's body with layers that pass their
input on, while the policy is in its first layer; and then the norm and the head, by a pass whose last layer returns the
reference's states.

That is right only for a body that hands each layer's output to the next one, and gives layers nothing else that
depends on outputs of layers. The first run of the body checks this. If it does not hold, nothing is shared, and the
reference computes in a sweep of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastpref.model.streaming.stream import WeightStream

State = Callable[[nn.Module], AbstractContextManager[Any]]  # puts a layer into the reference's state inside the block
Forward = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_HIDDEN = "hidden_states"  # the keyword of a layer's input where it is not the first argument
_SHAPES = {"__get__", "size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "get_device"}


class SharedSweep:
    """Sweeps over the layers of a streamed model that compute the hidden states of policy and reference."""

    def __init__(self, stream: WeightStream):
        self._stream = stream
        self.why_not: str | None = None  # the reason if the layers cannot be shared
        self.tell: Callable[[str], None] = lambda note: None  # called with a note on that reason

    @contextmanager
    def shared(self, body: Callable[[], Any], state: State) -> Iterator["Reference"]:
        """Let a pass of the policy inside the block compute the reference's states, too.

        `body` runs the model's body, in the reference's state, on the reference's batch.
        """
        reference = Reference(self._stream, body, state)
        with _replaced(self._stream.decoder_layers, reference.after_policy):
            yield reference
        if reference.fault is None and reference.computed != len(self._stream.decoder_layers):
            reference.fault = f"{reference.computed} of its layers were called"
        self.why_not = reference.fault
        if self.why_not is not None:
            self.tell(f"streaming: the reference copies all layers again, because {self.why_not}")


@dataclass
class Reference:
    """The reference's states during a shared sweep."""

    stream: WeightStream
    body: Callable[[], Any]
    state: State
    fault: str | None = None  # why they cannot be computed in this sweep
    computed: int = 0  # layers
    _hidden: Any = None  # the states behind the last computed layer, [B, T, H] in most models
    _given: list[Arguments] = field(default_factory=list)  # what the layers from here on are given besides them
    _further: tuple[Any, ...] | None = None  # what a layer returns in addition to them, if it returns a tuple

    @contextmanager
    def behind_layers(self) -> Iterator[None]:
        """Let the model's layers return the states in a pass inside the block, so that only the rest is computed."""
        last = len(self.stream.decoder_layers) - 1

        def returned(place: int, _: Forward, *args: Any, **kwargs: Any) -> Any:
            return self._output(self._hidden if place == last else _input(args, kwargs))

        with self.stream.paused(), _replaced(self.stream.decoder_layers, returned):
            yield
        self._hidden = None

    def after_policy(self, place: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """Run a layer for the policy, and then for the reference."""
        output = forward(*args, **kwargs)
        if self.fault is None:
            # transformers records routers' logits for the pass of a context variable; an empty context has none.
            Context().run(self._compute, place, forward, output)
        return output

    def _compute(self, place: int, forward: Forward, output: Any) -> None:
        if place != self.computed:
            self.fault = f"layer {place} is called in the place of layer {self.computed}"
            return
        if place == 0:
            self._prepare(output)
            if self.fault is not None:
                return
        args, kwargs = _with_input(self._hidden, *self._given.pop(0))
        with self.state(self.stream.decoder_layers[place]):
            self._hidden = _hidden_of(forward(*args, **kwargs))
        self.computed += 1

    def _prepare(self, output: Any) -> None:
        """Find the reference's input of the first layer, and what else the layers are given."""
        if isinstance(output, tuple):
            self._further = output[1:]
        if not all(
            value is None or isinstance(value, Tensor) for value in (_hidden_of(output), *(self._further or ()))
        ):
            self.fault = "a layer returns more than tensors"
            return
        watch = _Watch()
        with self.stream.paused(), _replaced(self.stream.decoder_layers, partial(self._pass_on, watch)), watch:
            self.body()
        self._further = self._further and tuple(None for _ in self._further)
        if self.fault is None and len(self._given) != len(self.stream.decoder_layers):
            self.fault = f"{len(self._given)} of its layers were called"
        if self.fault is None and watch.touched:
            self.fault = f"its code computes with a layer's output between the layers ({watch.touched})"

    def _pass_on(self, watch: "_Watch", place: int, _: Forward, *args: Any, **kwargs: Any) -> Any:
        """Note what a layer is given, and return its input."""
        given, rest = _input(args, kwargs), _without_input(args, kwargs)
        if not isinstance(given, Tensor):
            self.fault = "a layer's input is not its first argument"
        elif place == 0 and not self._given:
            self._hidden = given
        elif place != len(self._given) or given is not watch.expected:
            self.fault = "a layer's input is not the output of the layer before"
        elif watch.has(rest):
            self.fault = "a layer is given more than one output of other layers"
        if self.fault is not None:
            return self._output(given)
        self._given.append(rest)
        passed = self._hidden.detach()  # a tensor for each layer, which tells them apart
        watch.expected = passed
        if place < len(self.stream.decoder_layers) - 1:
            watch.outputs.append(passed)
        watch.outputs += [value for value in self._further or () if value is not None]
        return self._output(passed)

    def _output(self, hidden: Any) -> Any:
        """Return a layer's output with these hidden states."""
        return hidden if self._further is None else (hidden, *self._further)


class _Watch(TorchFunctionMode):
    """Notes the first torch function that computes with the output of a layer outside of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []  # but not the hidden states of the last layer
        self.expected: Tensor | None = None  # the hidden states that the next layer must be given
        self.touched: str | None = None

    def has(self, values: Any) -> bool:
        """Return whether there is an output among values."""
        return any(value is output for value in _flat(values) for output in self.outputs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if (name not in _SHAPES or isinstance(result, Tensor)) and self.has([args, kwargs]):
            self.touched = self.touched or name
        return result


@contextmanager
def _replaced(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let layers call `forward(place, own, …)` inside the block, where `own` is the forward that they have outside."""
    with ExitStack() as after:
        for place, layer in enumerate(layers):
            own = vars(layer).get("forward")
            vars(layer)["forward"] = partial(forward, place, layer.forward)
            after.callback(_restore, layer, own)
        yield


def _restore(layer: nn.Module, own: Forward | None) -> None:
    del vars(layer)["forward"]
    if own is not None:
        vars(layer)["forward"] = own


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the hidden states among a layer's arguments."""
    return args[0] if args else kwargs.get(_HIDDEN)


def _without_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return a layer's arguments with None in the place of the hidden states."""
    return ((None, *args[1:]), kwargs) if args else ((), kwargs | {_HIDDEN: None})


def _with_input(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return the arguments of `_without_input` with hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {_HIDDEN: hidden})


def _hidden_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value
