"""Policy and reference of a streamed model compute in one sweep over its layers what they compute in two."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpref.config import Config
from fastpref.config.losses import KTO
from fastpref.errors import UserError
from fastpref.model import load
from fastpref.model.gradient_checkpointing import checkpoint_layers
from fastpref.model.load import Loaded, load_model, pretrained
from fastpref.model.streaming.stream import Streaming, WeightStream, stream_of, stream_weights
from fastpref.model.streaming.sweep import SharedSweep
from fastpref.step.logprob_store import LogprobStore
from fastpref.step.objective import Objective
from fastpref.step.precompute import Remembered
from fastpref.step.reference import ModelReference, make_reference
from tests.support.tiny import config_for, save_model, sharing_examples, sharing_lists

CPU = torch.device("cpu")
LAYERS, SLOTS = 5, 2
WHOLE, PARTS = 10_000, 130  # tokens: one micro-batch a step, or several


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = "llama", "gpt2", "mixtral", "gemma3", "bloom"
    return {kind: save_model(kind, tmp_path_factory.mktemp(kind), layers=LAYERS) for kind in kinds}


@dataclass
class Run:
    """A model with its objective, which may be streamed, and everything that it computes."""

    config: Config
    loaded: Loaded
    objective: Objective
    copied: list[int] = field(default_factory=list)  # the layers, in the order of their copies
    results: list[Any] = field(default_factory=list)

    @classmethod
    def of(
        cls, folder: Path, overrides: list[str], budget: int, streaming: Streaming | None, monkeypatch: Any
    ) -> "Run":
        def streamed(*args: Any) -> Any:
            model = pretrained(*args)
            if streaming is not None:
                stream_weights(model, CPU, streaming)
            return model

        config = config_for(folder, *overrides)
        monkeypatch.setattr(load, "pretrained", streamed)
        torch.manual_seed(1)
        loaded = load_model(config, CPU)
        if config.train.checkpointing is True:
            checkpoint_layers(loaded.model)
        with torch.no_grad():
            for parameter in loaded.policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return cls.with_reference(config, loaded, budget)

    @classmethod
    def with_reference(cls, config: Config, loaded: Loaded, budget: int) -> "Run":
        router = 0.0 if loaded.policy.router is None else loaded.policy.router.coefficient
        reference = make_reference(config, loaded)[0]
        run = cls(
            config, loaded, Objective(loaded.policy, reference, config.loss, loaded.layout, budget, 0, CPU, router)
        )
        if (stream := stream_of(loaded.model)) is not None:
            transfers: Any = stream.schedule.transfers
            copy = transfers.copy
            transfers.copy = lambda layer, slot: (run.copied.append(layer), copy(layer, slot))
        return run

    @property
    def sweep(self) -> SharedSweep:
        reference = self.objective.reference
        assert isinstance(reference, ModelReference)
        assert reference.sweep is not None
        return reference.sweep

    def step(self) -> int:
        """Run a step, keep its metrics and gradients, and return the number of its micro-batches."""
        rows = self._rows()
        self.loaded.policy.train()
        torch.manual_seed(5)
        self.copied.clear()
        metrics, work = self.objective.step(rows, lambda loss: loss.backward())
        gradients = {name: p.grad.clone() for name, p in self.loaded.policy.named_parameters() if p.grad is not None}
        self.results += [metrics.result(), gradients, torch.rand(1)]  # and what randomness is left
        self.loaded.policy.zero_grad()
        return work.microbatches

    def evaluate(self) -> None:
        self.loaded.policy.eval()
        self.copied.clear()
        self.results.append(self.objective.evaluate(self._rows(), 3).result())

    def _rows(self) -> list[Any]:
        return (
            sharing_lists(7)
            if self.config.loss.listwise
            else sharing_examples(7, single=isinstance(self.config.loss, KTO))
        )


def assert_same(found: Any, true: Any) -> None:
    torch.testing.assert_close(found, true, rtol=0, atol=0, equal_nan=True)


_EMBEDDINGS = 'lora={rank=3, modules_to_save=["embed_tokens"]}'
_ON_TABLES = 'lora={rank=3, target=["q_proj", "down_proj", "embed_tokens", "lm_head"]}'
STEPS = {
    "dpo, dropout": ("llama", ["loss.type=dpo", "lora={rank=3, dropout=0.3}"], PARTS),
    "ipo, nf4, DoRA": ("llama", ["loss.type=ipo", "lora={rank=3, dora=true}", 'model.quantization="nf4"'], WHOLE),
    "kto, mismatched completions follow": ("llama", ["loss.type=kto", "lora={rank=3, dropout=0.3}"], WHOLE),
    "kto, a pass before": ("llama", ["loss.type=kto", "lora={rank=3}"], PARTS),
    "pl, trained embeddings": ("llama", ["loss.type=pl", _EMBEDDINGS], PARTS),
    "lipo, adapters on embeddings and head": ("llama", ["loss.type=lipo", _ON_TABLES], PARTS),
    "dpo, sorted": ("llama", ['loss={type="dpo", variants=["aot"]}', "lora={rank=3}"], PARTS),
    "dpo, dropout of the model's own": ("gpt2", ["loss.type=dpo", "lora={rank=3}"], PARTS),
    "dpo, routers": ("mixtral", ["loss.type=dpo", "lora={rank=3}"], PARTS),
    "dpo, layers of two kinds": ("gemma3", ["loss.type=dpo", "lora={rank=3}"], PARTS),
    "dpo, layers that return tuples": ("bloom", ["loss.type=dpo", "lora={rank=3}"], PARTS),
}


@pytest.mark.parametrize(
    ("case", "checkpointing"),
    [(case, "true") for case in STEPS] + [(case, "false") for case in list(STEPS)[:3]],
)
def test_one_sweep_and_two_and_a_resident_model_give_the_same_bits(
    models: dict[str, Path], case: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch
):
    """Metrics, gradients and the randomness that is left are equal, and a reference of its own reads all once more."""
    kind, overrides, budget = STEPS[case]
    overrides = [*overrides, f"train.checkpointing={checkpointing}"]
    resident = Run.of(models[kind], overrides, budget, None, monkeypatch)
    shared, apart = (
        Run.of(models[kind], overrides, budget, Streaming(SLOTS, resident=1), monkeypatch) for _ in range(2)
    )
    apart.sweep.why_not = "for comparison"
    for run in (resident, shared, apart):
        run.evaluate()
        run.step()
        microbatches = run.step()
    assert shared.sweep.why_not is None
    assert_same(shared.results, resident.results)
    assert_same(apart.results, resident.results)
    streamed = LAYERS - 1
    before = {"kto, mismatched completions follow": 1, "kto, a pass before": 2, "dpo, sorted": microbatches}.get(
        case, 0
    )
    assert len(shared.copied) <= 2 * (streamed - SLOTS) * microbatches + streamed * before
    assert len(apart.copied) == len(shared.copied) + streamed * (microbatches + before)
    if not before:
        assert len(shared.copied) == 2 * (streamed - SLOTS) * microbatches


def test_what_is_remembered_needs_no_sweep_and_the_rest_shares_it(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the first epoch the reference computes in the policy's sweep, later not at all, and KTO's copies differ."""
    for loss in ("dpo", "kto"):
        runs = []
        for name, streaming in (("resident", None), ("streamed", Streaming())):
            run = Run.of(models["llama"], [f"loss.type={loss}", "lora={rank=3}"], WHOLE, streaming, monkeypatch)
            assert isinstance(run.objective.reference, ModelReference)
            stored = Remembered(run.objective.reference, LogprobStore(tmp_path / loss / name), lambda _: None)
            run.objective = replace(run.objective, reference=stored)
            for _ in range(2):
                run.evaluate()
                run.step()
            run.step()
            runs.append(run)
        resident, streamed = runs
        assert_same(streamed.results, resident.results)
        if loss == "dpo":
            assert len(streamed.copied) == 2 * (LAYERS - SLOTS)


def test_fake_tensors_take_the_same_way(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """The count of a step's memory runs the shared sweep, because nothing in it depends on numbers."""
    run = Run.of(models["llama"], ["loss.type=dpo", "lora={rank=3}"], WHOLE, Streaming(SLOTS), monkeypatch)
    run.loaded.policy.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(2):
            run.copied.clear()
            run.objective.step(sharing_examples(7), lambda loss: loss.backward())
    assert run.sweep.why_not is None
    assert len(run.copied) == 2 * (LAYERS - SLOTS)


def test_a_copy_of_a_streamed_model_is_refused(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """A copy would need the host's memory a second time and a stream of its own."""
    with pytest.raises(UserError, match="streamed model are not copied; leave the key out"):
        Run.of(
            models["llama"],
            ["loss.type=dpo", "lora={rank=3}", "reference.mode=copy"],
            WHOLE,
            Streaming(SLOTS),
            monkeypatch,
        )


# --- bodies ----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer whose adapter is the number `adapted`."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).requires_grad_(False)
        self.adapted = 1.0

    def forward(self, hidden_states: Tensor, *further: Any, **named: Any) -> Any:
        scale = self.adapted + sum(float(value.mean()) for value in [*further, *named.values()])
        return hidden_states + scale * self.linear(hidden_states).tanh()


class Tuples(Layer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = super().forward(*args, **kwargs)
        return hidden, hidden.mean(), None


class Several(Layer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs), {"cache": 0}


Pass = Callable[[nn.ModuleList, Tensor], Tensor]


def _plain(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden, torch.ones(hidden.shape[0]))
    return hidden.exp()


def _keywords(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden_states=hidden)
    return hidden.exp()


def _first(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden)[0]
    return hidden.exp()


def _embedded(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    embedded = hidden
    for layer in layers:
        hidden = layer(hidden, embedded.sin())
    return hidden


def _rewarded(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    extra: Any = ()
    for layer in layers:
        hidden, *extra = layer(hidden, *extra[:1])
    return hidden


def _summed(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    extra: Any = 0
    for layer in layers:
        hidden, more, _ = layer(hidden)
        extra = extra + more
    return hidden * extra


def _residual(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = hidden + layer(hidden)
    return hidden


def _of_the_first(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    hidden = first = layers[0](hidden)
    for layer in list(layers)[1:]:
        hidden = layer(hidden, first)
    return hidden


def _steered(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden, hidden.abs().argmax().float())
    return hidden


def _all_states(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    states = []
    for layer in layers:
        hidden = layer(hidden)
        states.append(hidden)
    return torch.stack(states).mean(0)


def _backwards(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in reversed(list(layers)):
        hidden = layer(hidden)
    return hidden


def _twice(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in [*layers, *layers]:
        hidden = layer(hidden)
    return hidden


def _some(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in list(layers)[:2]:
        hidden = layer(hidden)
    return hidden


BODIES: dict[str, tuple[type[Layer], Pass, bool]] = {
    "plain": (Layer, _plain, True),
    "keywords": (Layer, _keywords, True),
    "tuples": (Tuples, _first, True),
    "embeddings": (Layer, _embedded, True),  # which the reference has of its own
    "passes more of a layer on": (Tuples, _rewarded, False),
    "sums more of the layers": (Tuples, _summed, False),
    "caches": (Several, _first, False),
    "computes between layers": (Layer, _residual, False),
    "passes the first output on": (Layer, _of_the_first, False),
    "computes an argument of states": (Layer, _steered, False),
    "uses all states": (Layer, _all_states, False),
    "backwards": (Layer, _backwards, False),
    "twice": (Layer, _twice, False),
    "some layers": (Layer, _some, False),
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_shares_its_layers_only_where_that_is_right(kind: str):
    """The reference's states are those of a pass of its own, with its own input, or none; the policy's never change."""
    make, run, shares = BODIES[kind]
    torch.manual_seed(0)
    layers = nn.ModuleList(make() for _ in range(4))
    stream = WeightStream(list(layers), CPU, 2)
    own, others = torch.randn(3, 4), torch.randn(5, 4)
    policy, reference = run(layers, own), _in_state(layers, lambda: run(layers, others))
    sweep, notes = SharedSweep(stream), []
    sweep.tell = notes.append
    with sweep.shared(lambda: _in_state(layers, lambda: run(layers, others)), _State) as states:
        assert_same(run(layers, own), policy)
    assert (states.fault is None, sweep.why_not is None, not notes) == (shares, shares, shares)
    if shares:
        transfers: Any = stream.schedule.transfers
        transfers.copy = None  # no layer is copied, so this is not called
        with states.behind_layers():
            assert_same(_in_state(layers, lambda: run(layers, others)), reference)
    assert not any("forward" in vars(layer) for layer in layers)


class _State:
    """A context in which a layer has no adapter."""

    def __init__(self, layer: nn.Module):
        self._layer: Any = layer

    def __enter__(self) -> None:
        self._layer.adapted = 0.25

    def __exit__(self, *_: Any) -> None:
        self._layer.adapted = 1.0


def _in_state(layers: nn.ModuleList, compute: Callable[[], Tensor]) -> Tensor:
    for layer in layers:
        _State(layer).__enter__()
    try:
        return compute()
    finally:
        for layer in layers:
            _State(layer).__exit__()
