"""FlexAttention over trees: its mask, its block mask, its forward pass on a CPU, and forward and backward on a GPU.

The expected results are those of `tree_attention`, which computes each completion as a separate sequence.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxOutput, BlockMask, create_block_mask, create_mask

from fastpref.data.batch import PreferenceBatch, collate
from fastpref.data.forest import Forest
from fastpref.model import attention, flex_attention
from fastpref.model.attention import LayerCall, layers_reached
from fastpref.model.attention_choice import FLEX, fault
from fastpref.model.flex_attention import block_mask, visible
from fastpref.model.load import load_model
from tests.support.forests import CALL, CALLS, EDGES, LAYOUTS, count, inputs, layout, random_layout
from tests.support.tiny import config_for, examples, save_model

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")
flex_tree_attention: Any = flex_attention.flex_tree_attention
tree_attention: Any = attention.tree_attention
WINDOWS = (None, 1, 7, 128, 150)


def dense(tree: Forest, window: int | None) -> Tensor:
    """Return the mask, [T, T] bool, by definition: a token sees those before it in its node and in the nodes before."""
    mask = torch.zeros(tree.tokens, tree.tokens, dtype=torch.bool)
    for at, node in enumerate(tree.nodes):
        path, before = [], at
        while before is not None:
            path = [*range(tree.nodes[before].start, tree.nodes[before].stop), *path]
            before = tree.nodes[before].parent
        for place in range(node.start, node.stop):
            seen = path[: path.index(place) + 1]
            mask[place, seen[-(window or len(seen)) :]] = True
    return mask


@pytest.mark.parametrize("window", WINDOWS)
def test_the_mask_is_that_of_the_trees(window: int | None):
    """The mask from three numbers a token equals the definition by the nodes before it."""
    for tree in LAYOUTS:
        length = tree.tokens
        found = create_mask(visible(tree, window).mask_mod(), None, None, length, length, "cpu")
        assert torch.equal(found[0, 0], dense(tree, window))


def blocks(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Return which blocks are computed with the mask function and which without it, [Q blocks, KV blocks] bool each."""
    count = mask.kv_num_blocks.shape[-1]
    pairs = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    found = []
    for numbers, indices in pairs:
        assert numbers is not None
        assert indices is not None
        chosen = torch.zeros(count, count, dtype=torch.bool)
        for row in range(count):
            chosen[row, indices[0, 0, row, : int(numbers[0, 0, row])].long()] = True
        found.append(chosen)
    return found[0], found[1]


MANY = pytest.param(range(100, 300), marks=pytest.mark.slow, id="two hundred")


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("seeds", [pytest.param(range(24), id="some"), MANY])
def test_the_block_mask_is_the_one_torch_makes(window: int | None, seeds: range):
    """Our block mask has the same partial and full blocks as the one that torch computes."""
    for tree in EDGES + [random_layout(seed) for seed in seeds]:
        length = tree.tokens
        expected = create_block_mask(visible(tree, window).mask_mod(), None, None, length, length, "cpu")
        ours = block_mask(tree, window, CPU)
        assert ours.seq_lengths == expected.seq_lengths
        for found, wanted in zip(blocks(ours), blocks(expected), strict=True):
            assert torch.equal(found, wanted)
        assert ours.q_num_blocks is not None  # the backward pass reads it
        assert expected.q_num_blocks is not None
        assert torch.equal(ours.q_num_blocks, expected.q_num_blocks)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_forward_equals_sdpa(call: LayerCall):
    """With every option of a layer's attention, FlexAttention gives what SDPA gives for each completion alone."""
    for seed, tree in enumerate(EDGES + [random_layout(100 + seed) for seed in range(3)]):
        made, options = inputs(call, tree.tokens, seed)
        with torch.no_grad():
            found, _ = flex_tree_attention(nn.Identity(), *made, None, tree=tree, **options)
            expected, _ = tree_attention(nn.Identity(), *made, None, tree=tree, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_autocast_is_honoured(monkeypatch: pytest.MonkeyPatch):
    """RoPE returns float32 queries with bfloat16 values: under autocast all three are passed on in autocast's dtype."""
    handed: list[Tensor] = []
    monkeypatch.setattr(flex_attention, "_flex", lambda kind: lambda *given, **_: handed.extend(given) or given[2])
    tree = layout((30, (20, 9)))
    made, _ = inputs(CALL, tree.tokens)
    with torch.autocast("cpu", torch.bfloat16):
        flex_tree_attention(nn.Identity(), made[0], made[1], made[2].bfloat16(), None, tree=tree)
    assert [given.dtype for given in handed] == [torch.bfloat16] * 3


def test_dropout_and_rows_without_a_tree_are_sdpas():
    """FlexAttention has no dropout and no padding masks: SDPA computes these, with the same random numbers."""
    tree = layout((30, (20, 9)))
    made, _ = inputs(CALL, tree.tokens)
    for options in ({"tree": tree, "dropout": 0.5}, {"softcap": 3.0}, {}):
        torch.manual_seed(0)
        found, _ = flex_tree_attention(nn.Identity(), *made, None, **options)
        torch.manual_seed(0)
        assert torch.equal(found, tree_attention(nn.Identity(), *made, None, **options)[0])


# --- whole models ----------------------------------------------------------------------------------------------------

KINDS = {"llama": 1, "qwen2": 2, "mistral": 1, "gemma2": 2, "gemma3": 2, "gpt-oss": 2, "cohere": 1}


@pytest.mark.parametrize(("kind", "windows"), KINDS.items())
@pytest.mark.parametrize("how", ["tree", "packed"])
def test_models_give_the_same_with_one_block_mask_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, windows: int, how: Any
):
    """Real models with windows, softcaps and sinks give what SDPA gives, and block masks are made once per window."""
    loaded = load_model(config_for(save_model(kind, tmp_path)), CPU)
    batch = collate(examples(20), how)
    made = []
    monkeypatch.setattr(flex_attention, "_block_mask", count(flex_attention._block_mask, made))
    with torch.no_grad():
        expected = loaded.policy(batch).logp
        loaded.model.set_attn_implementation(flex_attention.NAME)
        found = loaded.policy(batch).logp
        assert len(made) == windows
        again = loaded.policy(batch.to("cpu")).logp
    assert len(made) == windows
    assert torch.equal(found, again)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def dense_flex(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any, block_mask: Any, scale: Any, enable_gqa: bool,
    return_aux: Any, kernel_options: Any,
) -> Any:  # fmt: skip
    """Compute what `torch.nn.attention.flex_attention` defines, with the backward pass that it lacks on a CPU."""
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    none = torch.zeros(())
    scores = scores if score_mod is None else score_mod(scores, none, none, none, none)
    length = query.shape[2]
    scores = scores.masked_fill(~create_mask(block_mask.mask_mod, 1, 1, length, length, "cpu"), -torch.inf)
    out = scores.softmax(-1) @ value
    return out if return_aux is None else (out, AuxOutput(lse=scores.logsumexp(-1)))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("adapters", [[], ["lora={rank=4}"]], ids=["whole", "lora"])
def test_gradients_through_checkpoints_and_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, adapters: list[str]
):
    """Under gradient checkpointing, recomputed layers reuse the block masks, and all gradients are those of SDPA."""
    monkeypatch.setattr(flex_attention, "_flex", lambda device: dense_flex)
    made = []
    monkeypatch.setattr(flex_attention, "_block_mask", count(flex_attention._block_mask, made))
    folder, found = save_model(kind, tmp_path), []
    for name in (flex_attention.NAME, None):
        torch.manual_seed(0)
        loaded = load_model(config_for(folder, "train.checkpointing=true", *adapters), CPU)
        if name is not None:
            loaded.model.set_attn_implementation(name)
        loaded.policy.train()
        loaded.policy(collate(examples(12), "tree")).logp.sum().backward()
        found.append({n: p.grad for n, p in loaded.policy.named_parameters() if p.grad is not None})
    assert len(made) == KINDS[kind]
    assert found[0].keys() == found[1].keys()
    assert adapters or kind != "gpt-oss" or any("sinks" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-4)


def test_the_layers_tell_what_they_ask_for(tmp_path: Path):
    """The recorded calls have the dropout of training mode, and the model stays in its previous mode."""
    loaded = load_model(config_for(save_model("gpt2", tmp_path)), CPU)
    assert [call.dropout for call in layers_reached(loaded.policy.backbone)] == [0.1, 0.1]
    assert not loaded.policy.backbone.training
    loaded = load_model(config_for(save_model("gpt-oss", tmp_path)), CPU)
    calls = layers_reached(loaded.policy.backbone)
    assert [(call.window, call.sinks, call.kv_heads) for call in calls] == [(4, True, 2), (None, True, 2)]


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", [replace(c, width=64, value_width=64) for c in CALLS.values()], ids=CALLS)
def test_both_ways_equal_sdpa_on_a_card(call: LayerCall, dtype: torch.dtype):
    """With every option of a layer, the compiled kernels give the outputs and gradients of SDPA."""
    torch._dynamo.reset()
    assert fault(FLEX, [call], dtype, torch.device("cuda")) is None


@pytest.mark.gpu
def test_lengths_do_not_compile_again():
    """Two kernels, with gradient and without, serve rows of every length and window."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    call = replace(CALL, width=64, value_width=64)
    compiled = []
    for size in (140, 300, 201, 77, 512, 1000):
        for window in (None, 50):
            tree = layout((size, (size // 2, size // 3)), (9, (128, 7)))
            made, options = inputs(call, tree.tokens)
            query, key, value = (x.to("cuda", torch.bfloat16).requires_grad_() for x in made)
            options["sliding_window"] = window
            with torch.no_grad():
                flex_tree_attention(nn.Identity(), query, key, value, None, tree=tree, **options)
            out, _ = flex_tree_attention(nn.Identity(), query, key, value, None, tree=tree, **options)
            out.sum().backward()
            compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[-1] == compiled[0]


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("adapters", [[], ["lora={rank=4}"]])
def test_a_model_trains_the_same_on_a_card(tmp_path: Path, checkpointing: str, adapters: list[str]):
    """Gradients with FlexAttention are those with SDPA, with or without gradient checkpointing and adapters."""
    folder = save_model("llama-wide", tmp_path)
    told = [f"train.checkpointing={checkpointing}", "model.dtype=float32", *adapters]
    found = []
    for name in ("flex", "sdpa"):
        torch.manual_seed(0)
        loaded = load_model(config_for(folder, *told, f"model.attention={name}"), torch.device("cuda"))
        batch: PreferenceBatch = collate(examples(30), "tree").to("cuda")
        loaded.policy.train()
        loaded.policy(batch).logp.sum().backward()
        found.append({n: p.grad for n, p in loaded.policy.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-3)
