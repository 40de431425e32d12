"""Attention over forests by flash-attn's varlen function: its sequences, outputs and gradients.

The package needs a GPU; on a CPU a plain implementation of its documented interface stands in for it. The expected
results are those of `tree_attention`, which computes each completion as a separate sequence.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastpref.data.batch import collate, collate_after, following
from fastpref.data.forest import Forest, encode, lay_apart, lay_out, places
from fastpref.data.mismatched import mismatched
from fastpref.errors import UserError
from fastpref.model import attention, varlen_attention
from fastpref.model.attention import LayerCall
from fastpref.model.attention_choice import VARLEN, fault
from fastpref.model.later import keeping
from fastpref.model.load import load_model
from fastpref.model.varlen_attention import Sequences, varlen_sequences
from tests.support.forests import CALL, CALLS, EDGES, LAYOUTS, count, inputs, layout, random_layout
from tests.support.tiny import config_for, save_model, sharing_examples
from tests.support.varlen import flash_attn_varlen_func, install, visible

CPU = torch.device("cpu")
varlen_tree_attention: Any = varlen_attention.varlen_tree_attention
tree_attention: Any = attention.tree_attention
WINDOWS = (None, 1, 2, 7, 150)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the package, in float32 too."""
    install(monkeypatch, exact=True)


def test_the_stand_in_has_the_documented_masks():
    """Causal masks and windows are aligned at the last query and key, as the package's documentation shows them."""
    assert visible(2, 5, True, (-1, -1)).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert visible(5, 2, True, (-1, -1)).int().tolist() == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    assert visible(2, 5, True, (1, 0)).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


# --- the sequences ---------------------------------------------------------------------------------------------------


@st.composite
def tokens(draw: st.DrawFn) -> list[list[int]]:
    """Return sequences that often begin like an earlier one: nested, identical, or one the beginning of another."""
    sequences: list[list[int]] = []
    for _ in range(draw(st.integers(1, 7))):
        source = draw(st.sampled_from(sequences)) if sequences else []
        own = draw(st.lists(st.sampled_from((0, 1, 300)), max_size=40))
        sequences.append(source[: draw(st.integers(0, len(source)))] + own or [7])
    return sequences


def keys_of(sequences: Sequences, length: int) -> list[list[int]]:
    """Return the positions of the keys of each chain."""
    at = torch.arange(length) if sequences.places is None else sequences.places
    return [at[start:stop].tolist() for start, stop in zip(sequences.keys[:-1], sequences.keys[1:])]


@settings(max_examples=200, deadline=None)
@given(tokens(), st.one_of(st.none(), st.integers(1, 60)))
def test_the_keys_of_a_chain_spell_its_sequence(drawn: list[list[int]], window: int | None):
    """The chains fill the row; each one's keys are, in order, what its tokens see: the end of one sequence's path."""
    laid = lay_out([encode(ids) for ids in drawn], [len(ids) // 2 for ids in drawn])
    found = varlen_sequences(laid.forest, window, CPU)
    length = laid.forest.tokens
    paths = {tuple(places(path)) for path in laid.paths}
    assert found.queries[0] == 0
    assert found.queries[-1] == length
    assert (found.queries.dtype, found.keys.dtype) == (torch.int32, torch.int32)
    for start, stop, keys in zip(found.queries[:-1].tolist(), found.queries[1:].tolist(), keys_of(found, length)):
        assert start < stop
        assert keys[start - stop :] == list(range(start, stop))
        whole = [path for path in paths if path[-1] == stop - 1]
        assert len(whole) == 1
        before = len(whole[0]) - (stop - start)
        needed = before if window is None else min(before, window - 1)
        assert keys == list(whole[0][before - needed :])
    assert found.most_queries == max(2, *found.queries.diff().tolist())
    assert found.most_keys == max(found.keys.diff().tolist())


@settings(max_examples=100, deadline=None)
@given(tokens(), st.one_of(st.none(), st.integers(1, 60)))
def test_gathered_keys_are_no_more_than_packed_rows_have(drawn: list[list[int]], window: int | None):
    """Without a window there are as many keys as tokens of the distinct sequences that begin no other one."""
    encoded = [encode(ids) for ids in drawn]
    forest = lay_out(encoded, [len(ids) // 2 for ids in drawn]).forest
    found = varlen_sequences(forest, window, CPU)
    alone = [a for a in set(encoded) if not any(b != a and b.startswith(a) for b in encoded)]
    packed = sum(len(ids) // 4 for ids in alone)
    assert int(found.keys[-1]) == packed if window is None else int(found.keys[-1]) <= packed


@pytest.mark.parametrize("window", WINDOWS)
def test_the_bags_undo_the_gathering(window: int | None):
    """`order` and `bags` list the keys of every position, each key once; without copies there are none."""
    for tree in LAYOUTS:
        found = varlen_sequences(tree, window, CPU)
        if found.places is None:
            assert [key for keys in keys_of(found, tree.tokens) for key in keys] == list(range(tree.tokens))
            continue
        assert found.order is not None
        assert found.bags is not None
        assert found.order.sort().values.tolist() == list(range(len(found.places)))
        ends = [*found.bags[1:].tolist(), len(found.order)]
        for place, (start, stop) in enumerate(zip(found.bags.tolist(), ends, strict=True)):
            copies = found.order[start:stop].tolist()
            assert found.places[copies].tolist() == [place] * (stop - start)
            assert copies == sorted(copies)  # the order in which their gradients are added


def test_rows_that_share_nothing_are_not_gathered():
    apart = lay_apart([encode(range(9)), encode(range(30))]).forest
    assert varlen_sequences(apart, None, CPU).places is None
    shared = layout((20, (5, 6)))
    assert varlen_sequences(shared, 1, CPU).places is None  # a token that sees only itself
    assert varlen_sequences(shared, 2, CPU).places is not None


# --- outputs and gradients -------------------------------------------------------------------------------------------

VARLEN_CALLS = CALLS | {
    "wide values": replace(CALL, value_width=24),
    "window and softcap": replace(CALL, window=5, softcap=2.0, kv_heads=1),
    "everything it has": LayerCall(6, 2, 16, 8, 0.0, 0.2, 20, 2.0, False),
}


def results(attend: Any, made: list[Tensor], tree: Forest, **options: Any) -> list[Tensor]:
    """Return the output and the gradients of queries, keys and values."""
    given = [states.detach().requires_grad_() for states in made]
    out, _ = attend(nn.Identity(), *given, None, tree=tree, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given, weights)]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("call", VARLEN_CALLS.values(), ids=VARLEN_CALLS)
def test_both_ways_equal_sdpa(call: LayerCall):
    """With every option of a layer's attention, outputs and gradients are those of SDPA for each completion alone."""
    for seed, tree in enumerate(EDGES + [random_layout(100 + seed) for seed in range(6)]):
        made, options = inputs(call, tree.tokens, seed)
        found = results(varlen_tree_attention, made, tree, **options)
        expected = results(tree_attention, made, tree, **options)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(tokens(), st.one_of(st.none(), st.integers(1, 60)), st.sampled_from((None, 3.0)), st.sampled_from((1, 2, 4)))
def test_random_forests_equal_sdpa(drawn: list[list[int]], window: int | None, softcap: float | None, kv_heads: int):
    """Nested, identical and contained sequences, and windows shorter than a prompt, give what SDPA gives."""
    tree = lay_out([encode(ids) for ids in drawn], [len(ids) // 2 for ids in drawn]).forest
    made, options = inputs(replace(CALL, window=window, softcap=softcap, kv_heads=kv_heads), tree.tokens)
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch, exact=True)
        found = results(varlen_tree_attention, made, tree, **options)
    for ours, theirs in zip(found, results(tree_attention, made, tree, **options), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_sdpas(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    """In half precision its error against float32 is no larger than SDPA's, up to one rounding."""
    install(monkeypatch)
    tree = layout((60, (20, 31, 9, 14)), (5, (8,)))
    made, options = inputs(replace(CALL, kv_heads=2), tree.tokens)
    halves = [states.to(dtype) for states in made]
    truth = results(tree_attention, [states.float() for states in halves], tree, **options)
    ours, theirs = (results(attend, halves, tree, **options) for attend in (varlen_tree_attention, tree_attention))
    for found, sdpa, exact in zip(ours, theirs, truth, strict=True):
        assert found.dtype == dtype
        error, allowed = ((some.float() - exact).abs().max() for some in (found, sdpa))
        assert error <= allowed + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_copies_are_summed_in_float32(dtype: torch.dtype):
    """A prompt's gradient is the float32 sum of those of its two hundred copies, rounded once."""
    found = varlen_sequences(layout((30, (7,) * 200)), None, CPU)
    assert found.places is not None
    states = torch.randn(int(found.queries[-1]), 2, 4).to(dtype).requires_grad_()
    gathered = varlen_attention._gathered(states, found)
    assert torch.equal(gathered, states[found.places])
    grad = torch.rand(gathered.shape).to(dtype)
    gathered.backward(grad)
    exact = torch.zeros(states.shape, dtype=torch.float64).index_add_(0, found.places, grad.double())
    torch.testing.assert_close(states.grad, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(("autocast", "expected"), [(True, torch.float16), (False, torch.bfloat16)])
def test_queries_keys_and_values_have_one_dtype(monkeypatch: pytest.MonkeyPatch, autocast: bool, expected: torch.dtype):
    """RoPE may return float32 queries with bfloat16 values: all three are cast to autocast's dtype or the values'."""
    calls: list[Any] = []
    install(monkeypatch, lambda *given, **options: calls.extend(given) or flash_attn_varlen_func(*given, **options))
    tree = layout((30, (20, 9)))
    made, _ = inputs(CALL, tree.tokens)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        out, _ = varlen_tree_attention(nn.Identity(), made[0], made[1], made[2].bfloat16(), None, tree=tree)
    assert [given.dtype for given in (*calls, out)] == [expected] * 4


def test_float32_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Without autocast float32 is an error with advice, and never rounded silently."""
    install(monkeypatch)
    tree = layout((30, (20, 9)))
    made, _ = inputs(CALL, tree.tokens)
    with pytest.raises(UserError, match=r'this model computes in float32; set model.attention = "sdpa"'):
        varlen_tree_attention(nn.Identity(), *made, None, tree=tree)


@pytest.mark.parametrize("on", [True, False])
def test_deterministic_algorithms_are_asked_for(monkeypatch: pytest.MonkeyPatch, on: bool):
    """The backward pass is the deterministic one if torch is told to use deterministic algorithms."""
    asked: list[bool] = []

    def recorded(*given: Any, deterministic: bool, **options: Any) -> Tensor:
        asked.append(deterministic)
        return flash_attn_varlen_func(*given, **options)

    install(monkeypatch, recorded, exact=True)
    tree = layout((30, (20, 9)))
    made, _ = inputs(CALL, tree.tokens)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        results(varlen_tree_attention, made, tree)
    finally:
        torch.use_deterministic_algorithms(before)
    assert asked == [on]


@pytest.mark.usefixtures("exact")
def test_dropout_is_the_packages():
    """Dropout reaches the package: outputs vary around those without it."""
    tree = layout((6, (4, 3)))
    made, _ = inputs(CALL, tree.tokens)
    plain, _ = varlen_tree_attention(nn.Identity(), *made, None, tree=tree)
    torch.manual_seed(0)
    draws = torch.stack(
        [varlen_tree_attention(nn.Identity(), *made, None, dropout=0.2, tree=tree)[0] for _ in range(1500)]
    )
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(0), plain, rtol=0, atol=0.1)


@pytest.mark.parametrize("options", [{"softcap": 3.0, "dropout": 0.5}, {"s_aux": torch.linspace(-2, 2, 4)}])
def test_what_it_lacks_is_sdpas(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]):
    """Sinks, a softcap with dropout, and rows without a tree are computed by SDPA, without the package."""
    install(monkeypatch, None)
    tree = layout((30, (20, 9)))
    made, _ = inputs(CALL, tree.tokens)
    for told in (options | {"tree": tree}, {"softcap": 3.0}, {}):
        torch.manual_seed(0)
        found, _ = varlen_tree_attention(nn.Identity(), *made, None, **told)
        torch.manual_seed(0)
        assert torch.equal(found, tree_attention(nn.Identity(), *made, None, **told)[0])


# --- whole models ----------------------------------------------------------------------------------------------------

KINDS = {"llama": 1, "qwen2": 2, "mistral": 1, "gemma2": 2, "gemma3": 2, "mixtral": 1, "cohere": 1}  # windows of each


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("kind", "windows"), KINDS.items())
@pytest.mark.parametrize("how", ["tree", "packed"])
def test_models_give_the_same_with_one_index_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, windows: int, how: Any
):
    """Real models with windows and softcaps give what SDPA gives, and indices are made once per window."""
    loaded = load_model(config_for(save_model(kind, tmp_path)), CPU)
    batch = collate(sharing_examples(20), how)
    made = []
    monkeypatch.setattr(varlen_attention, "_sequences", count(varlen_attention._sequences, made))
    with torch.no_grad():
        expected = loaded.policy(batch).logp
        loaded.model.set_attn_implementation(varlen_attention.NAME)
        found = loaded.policy(batch).logp
        assert len(made) == windows
        again = loaded.policy(batch.to("cpu")).logp
    assert len(made) == windows
    assert torch.equal(found, again)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2", "mixtral"])
@pytest.mark.parametrize("adapters", [[], ["lora={rank=4}"]], ids=["whole", "lora"])
def test_gradients_through_checkpoints_and_adapters(tmp_path: Path, kind: str, adapters: list[str]):
    """Under gradient checkpointing and with adapters all gradients are those of SDPA."""
    folder, found = save_model(kind, tmp_path), []
    for name in (varlen_attention.NAME, None):
        torch.manual_seed(0)
        loaded = load_model(config_for(folder, "train.checkpointing=true", *adapters), CPU)
        if name is not None:
            loaded.model.set_attn_implementation(name)
        loaded.policy.train()
        loaded.policy(collate(sharing_examples(12), "tree")).logp.sum().backward()
        found.append({n: p.grad for n, p in loaded.policy.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-4)


def gradients(folder: Path, device: str, dtype: str, attend: str, checkpointing: str = "false") -> dict[str, Tensor]:
    """Return the gradients of a model with a registered attention, computed in a dtype in which no run trains it."""
    config = config_for(folder, f"train.checkpointing={checkpointing}", "model.attention=sdpa")
    loaded = load_model(config, torch.device(device))
    loaded.model.to(getattr(torch, dtype))
    loaded.model.set_attn_implementation(attend)
    loaded.policy.train()
    logp = loaded.policy(collate(sharing_examples(30), "tree").to(device)).logp
    (logp * torch.linspace(-1, 1, len(logp), device=device)).sum().backward()
    return {name: p.grad.float() for name, p in loaded.policy.named_parameters() if p.grad is not None}


def assert_as_exact(found: dict[str, Tensor], other: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Check that gradients are about as close to float32's as those of the other attention in half precision."""
    assert found.keys() == other.keys() == truth.keys()
    for name, exact in truth.items():
        error, allowed = ((some[name] - exact).norm() / exact.norm() for some in (found, other))
        assert error < 1.5 * allowed + 0.01, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2"])
def test_a_model_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str):
    """A model whose weights are in half precision has gradients about as exact as SDPA's."""
    install(monkeypatch)
    folder = save_model(kind, tmp_path)
    truth = gradients(folder, "cpu", "float32", attention.NAME)
    found, other = (gradients(folder, "cpu", dtype, name) for name in (varlen_attention.NAME, attention.NAME))
    assert_as_exact(found, other, truth)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_later_completions_follow_the_kept_row(tmp_path: Path, kind: str):
    """KTO's mismatched completions, which follow a row that flash-attn computed, are those after SDPA's row."""
    loaded = load_model(config_for(save_model(kind, tmp_path)), CPU)
    rows = sharing_examples(8, single=True)
    found = []
    for name in (attention.NAME, varlen_attention.NAME):
        loaded.model.set_attn_implementation(name)
        batch = collate(rows, "tree")
        assert batch.tree is not None
        with torch.no_grad(), keeping(batch.tree) as kept:
            loaded.policy(batch)
            assert len(kept) == 2  # layers
            found.append(loaded.policy(following(collate_after(batch, list(mismatched(rows))), kept)).logp)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "call",
    [replace(c, width=64, value_width=48 if c.value_width < c.width else 64) for c in VARLEN_CALLS.values()],
    ids=VARLEN_CALLS,
)
def test_both_ways_equal_sdpa_on_a_card(call: LayerCall, dtype: torch.dtype):
    """With every option of a layer, the package's kernels give the outputs and gradients of SDPA."""
    pytest.importorskip("flash_attn")
    assert fault(VARLEN, [call], dtype, torch.device("cuda")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("kind", ["llama-wide", "gemma2", "qwen2"])
def test_a_model_trains_the_same_on_a_card(tmp_path: Path, kind: str, checkpointing: str):
    """With the package itself, gradients in bfloat16 are about as exact as SDPA's, with or without checkpointing."""
    pytest.importorskip("flash_attn")
    folder = save_model(kind, tmp_path)
    truth = gradients(folder, "cuda", "float32", attention.NAME)
    found, other = (
        gradients(folder, "cuda", "bfloat16", name, checkpointing) for name in (varlen_attention.NAME, attention.NAME)
    )
    assert_as_exact(found, other, truth)


@pytest.mark.gpu
def test_a_config_gets_it_on_a_card(tmp_path: Path):
    """`model.attention = "varlen"` gives a model the attention after its trial, and a note names it."""
    pytest.importorskip("flash_attn")
    config = config_for(save_model("llama-wide", tmp_path), "model.attention=varlen", "model.dtype=bfloat16")
    loaded = load_model(config, torch.device("cuda"))
    assert attention.has_attention(loaded.model, varlen_attention.NAME)
    assert "attention: flash-attn" in loaded.notes
