"""FlexAttention is compiled in one piece, once for all layers with gradient and once without; or it is an error."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpref.data.batch import collate
from fastpref.data.forest import Forest
from fastpref.model import attention, flex_attention, flex_kernel
from fastpref.model.attention import LayerCall, layers_reached
from fastpref.model.attention_choice import FLEX, fault
from fastpref.model.load import load_model
from tests.support.flex_graphs import Graphs, graphs
from tests.support.forests import CALL, CALLS, inputs, layout
from tests.support.tiny import config_for, examples, save_model

__all__ = ["graphs"]  # a fixture
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
flex_tree_attention: Any = flex_attention.flex_tree_attention
tree_attention: Any = attention.tree_attention


def tree(size: int) -> Forest:
    return layout((size, (size // 2, size // 3)), (9, (128, 7)))


LAID: dict[str, Callable[[Tensor], Tensor]] = {  # how the states of a layer, [1, heads, T, D], lie in memory
    "by token": lambda states: states,
    "by head": lambda states: states.contiguous(),
    "part of wider tokens": lambda states: torch.cat([states.transpose(1, 2)] * 2, 2).chunk(2, 2)[0].transpose(1, 2),
    "part of wider heads": lambda states: torch.cat([states] * 2, 3)[..., : states.shape[3]],
}


def attend(
    call: LayerCall, size: int = 140, dtype: torch.dtype = torch.float32,
    gradients: tuple[bool, ...] = (True,) * 3, laid: Callable[[Tensor], Tensor] = LAID["by token"],
) -> None:  # fmt: skip
    """Compute a layer, forward and, where something has a gradient, backward, and compare it with SDPA."""
    forest = tree(size)
    made, options = inputs(call, forest.tokens)
    results = []
    for function in (flex_tree_attention, tree_attention):
        states = [each.to(dtype).requires_grad_(learns) for each, learns in zip(made, gradients, strict=True)]
        out, _ = function(nn.Identity(), *map(laid, states), None, tree=forest, **options)
        if out.requires_grad:
            out.backward(torch.ones_like(out))
        results.append([out, *(each.grad for each in states)])
    half = dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            error = (found - expected).abs().max() / expected.abs().max()
            assert error < (5e-2 if half else 1e-4)


EVERYTHING = pytest.param(CALLS["everything"], torch.bfloat16, id="everything in half precision")


@pytest.mark.parametrize(
    ("call", "dtype"), [*(pytest.param(call, torch.float32, id=name) for name, call in CALLS.items()), EVERYTHING]
)
def test_every_option_is_one_graph_with_gradients(graphs: Graphs, call: LayerCall, dtype: torch.dtype):
    """With every option of a layer, forward and backward are FlexAttention's operator, and give what SDPA gives."""
    assert fault(FLEX, [call], dtype, CPU) is None
    assert (len(graphs), graphs.fused) == (2, 2)  # with gradient, and without
    for size, window in ((300, None), (201, 50), (512, 128)):
        attend(replace(call, window=window), size, dtype)
    assert (len(graphs), graphs.fused) == (2, 2)


def test_other_caps_and_scales_are_other_constants(graphs: Graphs):
    """A softcap or scale that changes between layers is compiled again, and never another layer's."""
    calls = [replace(CALL, softcap=cap, scaling=scale) for cap, scale in product((3.0, 5.0), (None, 0.1))]
    assert fault(FLEX, [*calls, *reversed(calls)], torch.float32, CPU) is None
    assert len(graphs) == graphs.fused == 2 * len(calls)


def test_many_models_in_one_process(graphs: Graphs):
    """Each dtype, number of heads and width has its two graphs, far beyond the eight that torch allows a function."""
    kinds = list(product(DTYPES, ((4, 4), (6, 2)), (16, 24, 32)))
    for dtype, (heads, kv_heads), width in kinds:
        call = replace(CALL, heads=heads, kv_heads=kv_heads, width=width, value_width=width)
        assert fault(FLEX, [call], dtype, CPU) is None
    assert len(graphs) == graphs.fused == 2 * len(kinds)


def test_settings_hold_in_every_thread(graphs: Graphs):
    """Autograd computes checkpointed layers again in a thread of its own, where torch's settings are the defaults."""
    call, failures = replace(CALL, softcap=3.0), []

    def compute() -> None:
        try:
            for width in range(16, 26):
                attend(replace(call, width=width))
        except Exception as failure:
            failures.append(failure)

    thread = Thread(target=compute)
    thread.start()
    thread.join()
    assert failures == []
    assert len(graphs) == graphs.fused == 10


PLACES = [  # which of queries, keys and values have a gradient, and whether torch computes gradients at all
    ((True, True, True), True),
    ((True, False, True), True),  # the first layer, with adapters on queries and values
    ((False, False, True), True),
    ((False, False, False), True),  # layers before the first adapter
    ((True, True, True), False),
    ((False, False, False), False),
]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_training_compiles_nothing_that_the_trial_has_not(graphs: Graphs, half: bool):
    """Whichever inputs have a gradient and however they lie in memory, with autocast or not, training takes the graphs
    of the trial at load."""
    call = replace(CALL, softcap=3.0, scaling=0.1, kv_heads=1)
    assert fault(FLEX, [call], torch.bfloat16 if half else torch.float32, CPU) is None
    assert len(graphs) == 2
    for (gradients, learning), laid in product(PLACES, LAID.values()):
        with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False), torch.set_grad_enabled(learning):
            attend(call, 300, gradients=gradients, laid=laid)
    assert len(graphs) == graphs.fused == 2


@pytest.mark.parametrize("kind", ["gemma2", "gpt-oss", "phi3-longrope"])
def test_a_model_trains_on_the_graphs_of_its_trial(graphs: Graphs, tmp_path: Path, kind: str):
    """With adapters, gradient checkpointing, windows and a reference, a model's layers take the graphs of the trial."""
    overrides = ("train.checkpointing=true", 'lora={rank=2, target=["o_proj"]}')
    loaded = load_model(config_for(save_model(kind, tmp_path), *overrides), CPU)
    assert fault(FLEX, layers_reached(loaded.policy.backbone), torch.float32, CPU) is None
    made = len(graphs)
    loaded.model.set_attn_implementation(flex_attention.NAME)
    batch = collate(examples(30), "tree")
    assert batch.input_ids.shape[1] > 2 * flex_attention.BLOCK
    with torch.no_grad():
        loaded.policy(batch)
    loaded.policy.train()(batch).logp.sum().backward()
    assert len(graphs) == graphs.fused == made


def test_what_is_not_compiled_is_an_error(graphs: Graphs, monkeypatch: pytest.MonkeyPatch):
    """If torch does not compile, or too often, or not in one piece, the trial says so instead of computing densely."""

    def said(call: LayerCall = CALL) -> str:
        return str(fault(FLEX, [call], torch.float32, CPU))

    with torch.compiler.set_stance("force_eager"):
        assert "RuntimeError: torch does not compile FlexAttention" in said()
    assert len(graphs) == 0
    few = flex_kernel._SETTINGS | {"recompile_limit": 1}
    with monkeypatch.context() as limited:
        limited.setattr(flex_kernel, "_SETTINGS", few)
        assert "FailOnRecompileLimitHit" in said()

    def untraceable(score: Tensor, *_: Any) -> Tensor:
        torch._dynamo.graph_break()
        return score

    monkeypatch.setattr(flex_attention, "_capped", lambda softcap: untraceable)
    assert said(replace(CALL, softcap=3.0)) != "None"
    assert len(graphs) == graphs.fused
