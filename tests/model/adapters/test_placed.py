"""A continued adapter computes what PEFT computes with it; so do its reference, and a stack, which is saved as one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.model.adapters.placed import Placed, place_adapters
from fastpref.model.adapters.source import with_start
from fastpref.model.adapters.switch import only
from fastpref.model.load import Loaded, load_model
from fastpref.run.weights import load_weights, save_weights
from tests.support.adapters import save_adapter
from tests.support.tiny import config_for, save_model

CPU = torch.device("cpu")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rsLoRA": ("llama", {"use_rslora": True, "r": 9}),
    "DoRA": ("llama", {"use_dora": True}),
    "ranks and scalings": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}),
    "one layer": ("llama", {"layers_to_transform": [1]}),
    "head": ("llama", {"target_modules": ["v_proj", "lm_head"]}),
    "tied head": ("llama-tied", {"target_modules": ["v_proj", "lm_head"]}),
    "module in full": ("llama", {"modules_to_save": ["lm_head"]}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "a part of the weights": ("llama", {"init_lora_weights": "gaussian"}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
}
STACKED = [name for name in ADAPTERS if name != "DoRA"]
# The targets of a new adapter on top of one of ADAPTERS: the same layers, or others.
ABOVE = {
    "same": {
        "experts": '[".*(experts.*|q_proj)"]',
        "transposed": '["c_attn","c_proj"]',
        **dict.fromkeys(["head", "tied head"], '["v_proj","lm_head"]'),
    },
    "others": {"experts": '[".*(experts.*|k_proj)"]', "transposed": '["c_fc","c_attn"]'},
}


@pytest.fixture
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Save a model and a random adapter of ADAPTERS, and return both folders."""
    kind, settings = ADAPTERS[getattr(request, "param", "plain")]
    base = save_model(kind, tmp_path / "base")
    return base, save_adapter(tmp_path / "adapter", base, **settings)


def continued(base: Path, adapter: Path, *overrides: str) -> tuple[Config, Placed]:
    config = with_start(config_for(base, f"lora.from={adapter}", *overrides))
    return config, place_adapters(config, plain(base))


def plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=torch.arange(3, 15)[None]).logits


def by_peft(base: Path, adapter: Path) -> Tensor:
    return logits(peft.PeftModel.from_pretrained(plain(base), str(adapter)))


@torch.no_grad()
def move(model: Any) -> None:
    """Change everything that is trained."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("adapter", ADAPTERS, indirect=True)
def test_policy_reference_and_base(adapter: tuple[Path, Path]):
    """The policy begins as the adapter, the reference stays it whatever is trained, and the base is below both."""
    base, folder = adapter
    _, placed = continued(base, folder)
    start, without = by_peft(base, folder), logits(plain(base))
    assert (start - without).abs().max() > 1e-2
    assert not any("reference" in name for name, p in placed.wrapped.named_parameters() if p.requires_grad)
    equal(logits(placed.wrapped), start)
    move(placed.wrapped)
    assert (logits(placed.wrapped) - start).abs().max() > 1e-2
    trained = {name for name, p in placed.wrapped.named_parameters() if p.requires_grad}
    with only(placed.wrapped, placed.reference.names):
        equal(logits(placed.wrapped), start)
    with only(placed.wrapped, ()):
        equal(logits(placed.wrapped), without)
    assert trained == {name for name, p in placed.wrapped.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapter", ADAPTERS, indirect=True)
def test_what_is_saved_is_the_policys_alone(adapter: tuple[Path, Path], tmp_path: Path):
    """PEFT loads the trained adapter from its own layout, in which nothing tells of the reference."""
    base, folder = adapter
    config = with_start(config_for(base, f"lora.from={folder}"))
    loaded = load_model(config, CPU)
    move(loaded.wrapped)
    save_weights(tmp_path / "final", loaded, None)
    assert [path.name for path in (tmp_path / "final").iterdir() if path.is_dir()] == []
    file = "adapter_model.safetensors"
    assert load_file(tmp_path / "final" / file).keys() == load_file(folder / file).keys()
    equal(by_peft(base, tmp_path / "final"), logits(loaded.wrapped))


@pytest.mark.parametrize("adapter", STACKED, indirect=True)
@pytest.mark.parametrize("above", ["same", "others"])
def test_a_stack_is_one_adapter(adapter: tuple[Path, Path], above: str, tmp_path: Path, request: pytest.FixtureRequest):
    """The two adapters compute their sum, and PEFT computes it from what is saved; a resumed run has both again."""
    base, folder = adapter
    below = request.node.callspec.params["adapter"]
    target = ABOVE[above].get(below, '["q_proj","down_proj"]' if above == "same" else '["q_proj","o_proj"]')
    overrides = ["lora.stack=true", "lora.rank=3", f"lora.target={target}"]
    config = with_start(config_for(base, f"lora.from={folder}", *overrides))
    loaded = load_model(config, CPU)
    start = by_peft(base, folder)
    equal(logits(loaded.wrapped), start)
    move(loaded.wrapped)
    after = logits(loaded.wrapped)
    assert (after - start).abs().max() > 1e-2
    with only(loaded.wrapped, loaded.reference.names):
        equal(logits(loaded.wrapped), start)
    save_weights(tmp_path / "final", loaded, None)
    equal(by_peft(base, tmp_path / "final"), after)
    again = load_model(config, CPU)
    load_weights(tmp_path / "final", again)
    assert torch.equal(logits(again.wrapped), after)


def test_a_model_may_be_named_by_its_adapter(adapter: tuple[Path, Path]):
    """`model.name` may name the adapter, or the folder of a run: its base model is found."""
    base, folder = adapter
    config, _ = continued(base, folder)
    assert with_start(config.but({"model.name": str(folder), "lora": None})) == config
    run = folder.with_name("run")
    run.mkdir()
    folder.rename(run / "final")
    found = with_start(config.but({"model.name": str(run), "lora": None}))
    assert found.lora is not None
    assert (found.model.name, found.lora.start) == (str(base), str(run))


# --- another reference ------------------------------------------------------------------------------------------------


def reference_of(base: Path, *overrides: str) -> tuple[Loaded, tuple[str, ...]]:
    loaded = load_model(with_start(config_for(base, *overrides)), CPU)
    return loaded, loaded.reference.names


@pytest.mark.parametrize("start", [True, False])
def test_another_adapter_is_the_reference(adapter: tuple[Path, Path], tmp_path: Path, start: bool):
    """An adapter with other layers and another rank is the reference of a fresh adapter and of a continued one."""
    base, folder = adapter
    other = save_adapter(tmp_path / "other", base, seed=3, r=2, target_modules=["k_proj", "lm_head"])
    overrides = [f"lora.from={folder}"] if start else ["lora={rank=5}"]
    loaded, names = reference_of(base, *overrides, f"reference.name={other}")
    move(loaded.wrapped)
    with only(loaded.wrapped, names):
        equal(logits(loaded.wrapped), by_peft(base, other))


def test_the_reference_may_be_the_base(adapter: tuple[Path, Path]):
    """With reference.adapter = "none" there is no second adapter, and the base model is the reference."""
    loaded, names = reference_of(adapter[0], f"lora.from={adapter[1]}", "reference.adapter=none")
    assert names == ()
    assert list(loaded.wrapped.peft_config) == ["default"]  # pyright: ignore


@pytest.mark.parametrize("overrides", [["reference.mode=precompute"], ["loss.type=orpo"]], ids=str)
def test_no_second_adapter_where_none_is_needed(adapter: tuple[Path, Path], overrides: list[str]):
    """A reference that is computed before the training, and a loss without one, need no second adapter."""
    loaded, _ = reference_of(adapter[0], f"lora.from={adapter[1]}", *overrides)
    assert list(loaded.wrapped.peft_config) == ["default"]  # pyright: ignore


# --- contradictions, and adapters that are not the model's ------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ("lora.rank=16", r"lora.rank = 16: the adapter of lora.from \(.*\) has 4"),
    ("lora.alpha=3.5", "lora.alpha = 3.5: .* has 8"),
    ("lora.rslora=true", "lora.rslora = true: .* has false"),
    ("lora.dora=true", "lora.dora = true: .* has false"),
    ('lora.modules_to_save=["lm_head"]', r'lora.modules_to_save = \["lm_head"\]: .* has \[\]'),
    ('lora.target=["q_proj"]', r'lora.target = \["q_proj"\]: .* it has one on .*down_proj'),
    ("lora.target=all-linear", 'lora.target = "all-linear": .* it has none on .*gate_proj'),
    ('lora.exclude=["q_proj"]', r'lora.exclude = \["q_proj"\]: .*q_proj'),
    ("lora.init=pissa", 'lora.init = "pissa": .* has begun'),
    ('lora.rank_pattern={q_proj=2}', 'lora.rank_pattern = {"q_proj" = 2}: .* has {}'),
    ("lora.layers=[0]", r"lora.layers = \[0\]: "),
    ("reference.mode=copy", "reference.mode.*the reference is the adapter of lora.from"),
    ("reference.dtype=bfloat16", "reference.dtype"),
], ids=str)  # fmt: skip
def test_a_contradiction_names_both_values(adapter: tuple[Path, Path], settings: str, message: str):
    """A key that says something else than the adapter is an error with both values."""
    with pytest.raises(UserError, match=message):
        continued(*adapter, settings)


@pytest.mark.parametrize("settings", [
    "lora.rank=4", "lora.alpha=8", "lora.rslora=false", "lora.dropout=0.1",
    "lora.init=default", 'lora.layers=["0:2"]', 'lora.exclude=["k_proj"]',
    'lora.target=["q_proj","v_proj","down_proj"]', 'lora.target=[".*(q|v|down)_proj"]', "lora.modules_to_save=[]",
])  # fmt: skip
def test_what_agrees_is_no_contradiction(adapter: tuple[Path, Path], settings: str):
    continued(*adapter, settings)


Change = Callable[[Path, Path], Any]  # of the folders of the model and of the adapter


def settings_of(**changes: Any) -> Change:
    def change(_: Path, adapter: Path) -> None:
        config = peft.PeftConfig.from_pretrained(str(adapter))
        for name, value in changes.items():
            setattr(config, name, value)
        config.save_pretrained(str(adapter))

    return change


def renamed(_: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "query"): weight for name, weight in load_file(file).items()}, file)


def pickled(_: Path, adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    torch.save(weights, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()


def of_another_base(base: Path, adapter: Path) -> None:
    other = save_model("llama", base.with_name("another"), seed=5, layers=3)
    settings_of(base_model_name_or_path=str(other))(base, adapter)


def damaged(_: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])


FAULTS: dict[str, tuple[Change, str]] = {
    "another base": (of_another_base, "it is an adapter of .*another, and model.name is .*base"),
    "another name on the hub": (settings_of(base_model_name_or_path="a/b"), "taken to be"),
    "another rank": (settings_of(r=7), "rank 4 and its adapter_config.json says 7"),
    "keys that match nothing": (renamed, "missing in the files.*without a place in the model"),
    "modules that match nothing": (settings_of(target_modules=["qqq"]), "qqq"),
    "a pickle": (pickled, "its weights are pickled"),
    "no weights": (lambda _, adapter: (adapter / "adapter_model.safetensors").unlink(), "there are no weights in"),
    "damaged weights": (damaged, "is damaged"),
    "PiSSA": (settings_of(init_lora_weights="pissa"), "changes the model's own weights too"),
    "trained biases": (settings_of(bias="all"), "sets bias, which is not computed here"),
    "another task": (settings_of(task_type="SEQ_CLS"), "an adapter for SEQ_CLS"),
    "not JSON": (lambda _, adapter: (adapter / "adapter_config.json").write_text("{"), "cannot be read"),
    "no adapter": (lambda _, adapter: (adapter / "adapter_config.json").unlink(), "there is no adapter in it"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("key", ["lora.from", "reference.name"])
def test_an_adapter_that_is_not_the_models_is_refused(adapter: tuple[Path, Path], fault: str, key: str):
    """An adapter is refused by one message if it is not one of this model, or not a whole one."""
    base, folder = adapter
    change, message = FAULTS[fault]
    change(base, folder)
    if fault == "no adapter" and key == "reference.name":
        return  # it is taken for a model then
    config = config_for(base, *(["lora={}"] if key == "reference.name" else []), f"{key}={folder}")
    if fault == "another name on the hub":  # the folder may be its copy, so this is said, and the shapes decide
        assert any(message in note for note in place_adapters(with_start(config), plain(base)).notes)
        return
    with pytest.raises(UserError, match=f"^{key} = '{folder}': .*{message}"):
        place_adapters(with_start(config), plain(base))


@pytest.mark.parametrize(("overrides", "message"), [
    (["lora={stack=true}"], "lora.stack: there is no adapter"),
    (["lora={}", "reference.adapter=start"], "reference.adapter = .*starts from no adapter"),
    (["reference.name=ADAPTER"], "reference.name = .*needs frozen base weights"),
    (["lora={}", "reference.name=ADAPTER", "reference.mode=copy"], "reference.mode"),
    (["lora={}", "reference.name=BASE", "reference.mode=adapter"], "is a whole model"),
    (["lora.from=ADAPTER", "lora.stack=true", "lora.dora=true"], "lora.stack: the new adapter"),
    (["lora.from=BASE"], "it is a whole model, not an adapter"),
    (["lora.from=/nowhere"], "there is no such folder"),
], ids=str)  # fmt: skip
def test_what_cannot_be_is_refused(adapter: tuple[Path, Path], overrides: list[str], message: str):
    base, folder = adapter
    config = config_for(base, *(o.replace("ADAPTER", str(folder)).replace("BASE", str(base)) for o in overrides))
    with pytest.raises(UserError, match=message):
        place_adapters(with_start(config), plain(base))
