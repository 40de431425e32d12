"""The numerical trial: a model gets trees only if its hidden states are then those of each row computed alone."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastpref.data.batch import collate
from fastpref.errors import UserError
from fastpref.model import attention, flex_attention, precision, trial, varlen_attention
from fastpref.model.load import load_model
from fastpref.model.policy import Policy
from tests.support import varlen
from tests.support.tiny import config_for, examples, model_config, save_model

CPU = torch.device("cpu")
LORA = 'lora={rank=2, target=["q_proj"]}'  # frozen weights have half precision


def logps_of_each_row(model: Any, rows: list[Any]) -> list[Tensor]:
    """Return each completion's log-probabilities after its prompt, each in its own row, by plain transformers."""
    completions = []
    for k in range(2):
        for row in rows:
            ids = torch.tensor([row.prompt + row.completions[k]])
            logps = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0, :-1]
            completions.append(logps.gather(1, ids[0, 1:, None])[len(row.prompt) - 1 :, 0])
    return completions


@pytest.mark.parametrize(
    ("kind", "layout", "reason"),
    [
        ("llama", "tree", None),
        ("gemma3", "tree", None),
        ("hyperclovax", "tree", None),
        ("falcon-h1", "padded", "would differ by"),
        ("bloom", "padded", "their own code"),
        ("mamba", "padded", "mamba"),
    ],
)
def test_every_model_trains_on_its_own_numbers(kind: str, layout: str, reason: str | None, tmp_path: Path):
    """In the chosen layout, log-probabilities and gradients are those of plain transformers for each row."""
    loaded = load_model(config_for(save_model(kind, tmp_path)), CPU)
    assert loaded.layout == layout
    assert (loaded.why_padded is None) if reason is None else (reason in str(loaded.why_padded))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    rows = examples(5)
    expected = logps_of_each_row(plain, rows)
    batch = collate(rows, loaded.layout)
    logp = loaded.policy(batch).logp
    parts = [logp[batch.segments == sequence] for sequence in range(10)]
    for part, truth in zip(parts, expected, strict=True):
        torch.testing.assert_close(part, truth, rtol=1e-5, atol=2e-5)
    for sequences in (parts, expected):
        torch.cat([torch.linspace(-1, 1, len(part)) * part for part in sequences]).sum().backward()
    truth = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    scale = max(float(grad.abs().max()) for grad in truth.values())
    ours = {name: p.grad for name, p in loaded.model.named_parameters()}
    for name, grad in truth.items():
        torch.testing.assert_close(ours[name], grad, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("kind", ["bloom", "mamba", "llama"])
def test_padded_rows_have_the_models_own_attention(kind: str, tmp_path: Path):
    """A model that takes no trees, or is told to take none, keeps its own attention: no config has our name."""
    overrides = ["train.layout=padded"] if kind == "llama" else []
    loaded = load_model(config_for(save_model(kind, tmp_path), *overrides), CPU)
    assert loaded.layout == "padded"
    assert {name for _, name in attention.attention_of(loaded.model)} <= {"eager", "sdpa"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt-oss", "qwen3-moe", "cohere"])
def test_rounding_is_no_fault(kind: str, dtype: str, tmp_path: Path):
    """A model whose results in trees are right takes trees in half precision too."""
    loaded = load_model(config_for(save_model(kind, tmp_path), f"model.dtype={dtype}", LORA), CPU)
    assert (loaded.layout, loaded.why_padded) == ("tree", None)


@pytest.mark.parametrize("layers", [2, 32])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3-moe"])
def test_rounding_that_many_layers_amplify_is_no_fault(
    kind: str, dtype: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where float32 does not fit, the margin is that of the model's own rounding, which grows with its layers."""
    monkeypatch.setattr(precision, "_free", lambda model: -1)
    loaded = load_model(config_for(save_model(kind, tmp_path, layers=layers), f"model.dtype={dtype}", LORA), CPU)
    assert (loaded.layout, loaded.why_padded) == ("tree", None)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_leak_is_a_fault_in_half_precision_too(
    dtype: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not fits:
        monkeypatch.setattr(precision, "_free", lambda model: -1)
    loaded = load_model(config_for(save_model("falcon-h1", tmp_path), f"model.dtype={dtype}", LORA), CPU)
    assert loaded.layout == "padded"


def earlier_token(mlp: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """Read the token before each token too, as convolutions and token shifts do."""
    return out + 0.3 * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def later_token(mlp: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    return out + 0.3 * torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


def whole_batch(mlp: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """Depend on the batch, as statistics over a row do."""
    return earlier_token(mlp, x, out * (x.shape[0] + 1))


def capacity(mlp: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """Drop tokens from the fiftieth on in training, as experts of a fixed capacity do."""
    kept = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) < 50
    return out * kept[..., None] if mlp.training else out


Change = Callable[[nn.Module, Tensor, Tensor], Tensor]


def planted(kind: str, folder: Path, change: Change | None = None) -> tuple[Any, Policy]:
    """Return a model, and its policy, with a change of what the MLP in its first layer computes."""
    model: Any = AutoModelForCausalLM.from_pretrained(save_model(kind, folder), dtype=torch.float32).eval()
    if change is not None:
        model.model.layers[0].mlp.register_forward_hook(lambda mlp, args, out: change(mlp, args[0], out))
    return model, Policy.of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["tree", "packed"])
def test_a_module_that_looks_at_its_neighbours_is_seen(layout: Any, dtype: torch.dtype, tmp_path: Path):
    """If every layer's attention takes the layout but the result is wrong, rows are padded and the reason is given."""
    model, policy = planted("llama", tmp_path, earlier_token)
    model.to(dtype)
    assert trial.choose_layout(model, policy, layout, compare=False).layout == layout
    assert attention.give_attention(model, "sdpa")
    choice = trial.choose_layout(model, policy, layout)
    assert choice.layout == "padded"
    assert "hidden states" in str(choice.why_padded)
    assert attention.has_attention(model, "sdpa")


def test_windows_longer_than_the_trial_are_passed(monkeypatch: pytest.MonkeyPatch):
    """Rows of forty tokens reveal an attention that ignores its window of 4,096 tokens."""
    config = model_config("mistral")
    config.sliding_window = 4096
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert trial.choose_layout(model, Policy.of(model), "auto").layout == "tree"
    assert model.config.sliding_window == 4096
    real = attention.CausalAttention
    monkeypatch.setattr(
        attention, "CausalAttention", lambda dropout, scaling, _, *more: real(dropout, scaling, None, *more)
    )
    assert attention.give_attention(model, "sdpa")
    choice = trial.choose_layout(model, Policy.of(model), "auto")
    assert choice.layout == "padded"
    assert "past its sliding_window of 4,096" in str(choice.why_padded)


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        (later_token, "padded", "not causal"),
        (later_token, "auto", "not causal"),
        (whole_batch, "auto", r"llama models give padded rows other hidden states.*not trained here"),
        (capacity, "auto", "in training mode"),
    ],
)
def test_what_no_layout_computes_is_refused(change: Change, layout: Any, message: str, tmp_path: Path):
    """A model is refused whose states change with what follows, with the batch in padded rows too, or in training."""
    model, policy = planted("llama", tmp_path, change)
    with pytest.raises(UserError, match=message):
        trial.choose_layout(model, policy, layout)
    assert not model.training


@pytest.mark.parametrize(
    "attend", [attention.tree_attention, flex_attention.flex_tree_attention, varlen_attention.varlen_tree_attention]
)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"block_indices": torch.zeros(1)}, "block_indices"),
        ({"is_causal": False}, "not causal"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "mask of its own"),
    ],
)
def test_no_argument_is_swallowed(monkeypatch: pytest.MonkeyPatch, attend: Any, options: dict[str, Any], message: str):
    """An argument that trees do not compute raises an error; None and disabled flags do not."""
    varlen.install(monkeypatch, exact=True)
    tree = collate(examples(1), "tree").tree
    assert tree is not None
    states = [torch.randn(1, 2, tree.tokens, 16) for _ in range(3)]
    given = {"attention_mask": None, "tree": tree, "position_bias": None, "use_cache": False, "is_causal": True}
    attend(nn.Identity(), *states, **given)
    with pytest.raises(attention.UnknownArgument, match=message):
        attend(nn.Identity(), *states, **{**given, **options})


def test_layers_that_hand_nothing_down_are_told_apart():
    """If layers do not pass the layout on, the message says so, instead of naming mismatched tensor sizes."""
    empty = torch.empty((1, 1, 0, 0), dtype=torch.bool)
    with pytest.raises(attention.UnknownArgument, match="do not hand the layout down"):
        attention.tree_attention(nn.Identity(), *[torch.randn(1, 2, 4, 8)] * 3, attention_mask=empty)


def test_the_trial_leaves_no_trace(tmp_path: Path):
    """A trial leaves the model's mode, gradients, weights and config unchanged."""
    model, policy = planted("gemma2", tmp_path)
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = model.config.to_dict()
    trial.choose_layout(model, policy, "auto")
    assert model.config.to_dict() == config
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_a_models_own_code_makes_the_logits_that_are_not_known(tmp_path: Path):
    """HyperCLOVAX multiplies its logits where other models divide: its own code computes them, and a note says so."""
    config = config_for(save_model("hyperclovax", tmp_path), 'lora={rank=2, target=["lm_head"]}')
    loaded = load_model(config, CPU)
    assert any(note.startswith("logits: by the model's own code") for note in loaded.notes)
    batch = collate(examples(3), "tree")
    tokens = loaded.policy(batch, ("entropy", "mean_logit", "log_sum_sq_probs", "is_top1")).tokens
    hidden = loaded.policy.hidden_states(batch)[batch.of_tokens(batch.predictors)]
    logits = loaded.policy.head.logits(hidden)
    assert tokens.entropy is not None
    torch.testing.assert_close(tokens.entropy, torch.distributions.Categorical(logits=logits).entropy())
    tokens.logp.sum().backward()
    trained = [p for p in loaded.policy.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)


def test_dropout_is_no_fault(tmp_path: Path):
    """A model with dropout is judged by its results without dropout."""
    model, policy = planted("gpt2", tmp_path)
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    assert trial.choose_layout(model, policy, "auto").layout == "tree"


# These fields are named like lengths, but no distance between tokens changes what they do.
_NO_DISTANCES = {
    "chunk_size_feed_forward", "chunk_size_lm_head", "local_num_chunks_after", "local_num_chunks_before",
    "lsh_num_chunks_after", "lsh_num_chunks_before", "max_inference_chunksize", "max_window_layers",
    "chunk_size", "mamba_chunk_size",  # chunks of any length give the same state-space results
    "num_local_experts", "moe_topk", "loop_layer_index_start", "loop_layer_index_end", "sliding_window_pattern",
    "_sliding_window_pattern", "prefix_dense_sliding_window_pattern", "time_step_floor",
    "index_head_dim", "index_n_heads", "unk_index", "mask_index", "image_token_index",
    "index_block_size", "index_topk_blocks", "index_local_blocks",  # MiniMax-M3 passes block_indices at any length
}  # fmt: skip


def test_every_window_that_transformers_names_is_made_short():
    """The trial shortens every integer of a causal model's config that is named like a window."""
    like = re.compile(r"window|chunk|local|extent|floor|topk$|index_|distance|original_max")
    missed = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[kind]().get_text_config()
        except Exception:  # a config of several models, or one that needs arguments
            continue
        tables = [vars(config), *trial._rope_tables(config)]
        for name, value in (item for table in tables for item in table.items()):
            known = trial._LIMITS.search(name) or name in _NO_DISTANCES
            if like.search(name) and isinstance(value, int) and not isinstance(value, bool) and not known:
                missed.setdefault(name, []).append(kind)
    assert missed == {}
