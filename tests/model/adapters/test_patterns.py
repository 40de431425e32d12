"""Which decoder layers get adapters, and modules whose adapters have another rank or alpha."""

from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from fastpref.errors import UserError
from fastpref.model.adapters.fresh import with_adapters
from tests.model.adapters.test_fresh import config, model
from tests.support.tiny import SIZES

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapters(wrapped: Any) -> dict[str, tuple[int, float]]:
    """Return the rank and the scaling of every adapter, by the name of its layer or parameter."""
    base = wrapped.get_base_model()
    return {
        f"{name.replace('.base_layer', '')}.{getattr(m, 'parameter_name', '')}": (m.r["default"], m.scaling["default"])
        for name, m in base.named_modules()
        if isinstance(m, LoraLayer)
    }


def made(kind: str = "llama", count: int = 2, **lora: Any) -> dict[str, tuple[int, float]]:
    return adapters(with_adapters(config(**lora), model(kind, layers=count)))


PATTERNS: dict[str, dict[str, Any]] = {
    "names": {"rank_pattern": {"q_proj": 3, "down_proj": 1}, "alpha_pattern": {"q_proj": 8.0}},
    "a longer name": {"rank_pattern": {"layers.1.self_attn.q_proj": 3}},
    "a pattern": {"rank_pattern": {r"model\.layers\.1\..*": 3}, "alpha_pattern": {r".*(q|v)_proj": 1.0}},
    "the first counts": {"rank_pattern": {"layers.0.mlp.up_proj": 5, "up_proj": 3}},
    "rsLoRA": {"rank_pattern": {"q_proj": 9}, "rslora": True},
    "the head": {"target": ["all-linear", "lm_head"], "rank_pattern": {"lm_head": 7}},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_equal_those_of_peft(case: str):
    """PEFT gives the same ranks and scalings to the same modules by its own rank_pattern and alpha_pattern."""
    options = {"rank": 2, "alpha": 4.0} | PATTERNS[case]
    targets = [*LINEAR, "lm_head"] if "target" in options else LINEAR
    settings = peft.LoraConfig(
        r=2, lora_alpha=4.0, target_modules=targets, use_rslora=options.get("rslora", False),  # pyright: ignore[reportArgumentType]
        rank_pattern=options.get("rank_pattern", {}), alpha_pattern=options.get("alpha_pattern", {}),
    )  # fmt: skip
    own = made(**options)
    assert own == adapters(peft.get_peft_model(model("llama"), settings))
    assert len(set(own.values())) > 1


def test_a_pattern_is_for_a_whole_name():
    """PEFT would also match the end of a name with a pattern, and take it for another module."""
    own = made(rank_pattern={r"[^.]*\.layers\.1\.mlp\.up_proj": 3, r".*\.up_proj": 4, r"(x|.*\.)?down_proj": 5})
    assert {name: rank for name, (rank, _) in own.items() if rank != 2} == {
        "model.layers.0.mlp.up_proj.": 4, "model.layers.1.mlp.up_proj.": 3,
        "model.layers.0.mlp.down_proj.": 5, "model.layers.1.mlp.down_proj.": 5,
    }  # fmt: skip


def test_experts_have_a_rank_for_each_matrix():
    """A parameter that holds two matrices of each expert has twice the rank, and the same scaling, whatever it is."""
    own = made("mixtral", rank=2, alpha=6.0, rank_pattern={r".*layers\.0\..*experts.*": 3, "q_proj": 1})
    gate, down = (f"model.layers.{{}}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    assert own[gate.format(0)] == (6, 2.0)
    assert own[down.format(0)] == (3, 2.0)
    assert own[gate.format(1)] == (4, 3.0)
    assert own[down.format(1)] == (2, 3.0)
    assert own["model.layers.0.self_attn.q_proj."] == (1, 6.0)


LAYERS: dict[str, tuple[Any, list[int]]] = {
    "one": (2, [2]),
    "the last": (-1, [4]),
    "a slice": ("1:3", [1, 2]),
    "the last two": ("-2:", [3, 4]),
    "several": ([0, "3:5", -1], [0, 3, 4]),
    "all": (":", [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("case", LAYERS)
def test_layers_are_those_of_peft(kind: str, case: str):
    """PEFT's layers_to_transform adapts the same layers; experts are chosen in the same way."""
    wanted, places = LAYERS[case]
    own = made(kind, 5, layers=wanted)
    if kind == "llama":
        settings = peft.LoraConfig(r=2, lora_alpha=32, target_modules=LINEAR, layers_to_transform=places)
        assert own == adapters(peft.get_peft_model(model(kind, layers=5), settings))
    assert {int(name.split(".")[2]) for name in own} == set(places)
    assert len(own) == len(places) * (7 if kind == "llama" else 6)


def test_a_head_is_in_no_layer():
    own = made(layers=[0], target=["q_proj", "lm_head"])
    assert set(own) == {"model.layers.0.self_attn.q_proj.", "lm_head."}


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no such layer": ({"layers": [0, 2]}, "lora.layers: 2 is out of range: this model has 2 layers, 0 to 1, and -1"),
    "no such layer from the end": ({"layers": -3}, "lora.layers: -3 is out of range"),
    "a slice past the end": ({"layers": "1:3"}, "lora.layers: '1:3' is out of range"),
    "an empty slice": ({"layers": "1:1"}, "lora.layers: '1:1' is empty"),
    "nothing left": ({"layers": [1], "target": [r".*layers\.0\..*_proj"]}, "lora.target: nothing is left to adapt"),
    "no such module": ({"rank_pattern": {"q_prj": 3}}, r"lora.rank_pattern: .*'q_prj' \(did you mean 'q_proj'"),
    "no such pattern": ({"alpha_pattern": {r".*\.q": 3.0}}, "lora.alpha_pattern: .*whole name of a layer"),
    "no adapter": (
        {"target": ["q_proj"], "rank_pattern": {"v_proj": 3}},
        r"lora.rank_pattern: v_proj names model.layers.\*.self_attn.v_proj, which get no adapter",
    ),
    "hidden by another": (
        {"rank_pattern": {r".*_proj": 3, "v_proj": 4}}, "lora.rank_pattern: v_proj changes nothing: earlier entries",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_matches_nothing_is_refused(fault: str):
    options, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        with_adapters(config(**options), model("llama"))


def test_ranks_of_one_forward_pass():
    """The fused computation takes each adapter's own rank and scaling: logits equal those of PEFT's code."""
    wrapped: Any = with_adapters(config(rank_pattern={"q_proj": 5}, alpha_pattern={"down_proj": 1.0}), model("llama"))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.arange(3, 15)[None] % SIZES["vocab_size"]
    with torch.no_grad():
        own = wrapped(input_ids=ids).logits
        merged = wrapped.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(own, merged)
