"""A model with fused LoRA layers computes what PEFT's own layers do, and keeps fewer activations."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from fastpref.model.adapters.fused import _Adapted, _GatedAdapted, fuse_lora, unfuse_lora
from tests.support.tiny import VOCABULARY, model_config

KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "cohere", "gpt2", "qwen3-moe")
GATED = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "cohere"}
IDS = torch.arange(2 * 11).view(2, 11) % VOCABULARY


def adapted(kind: str, base: Callable[[Any], Any] | None = None, **options: Any) -> Any:
    """Return a random model with random adapters, whose B is not zero."""
    torch.manual_seed(0)
    sizes = model_config(kind)
    if base is not None:  # rows must be whole blocks of 64
        sizes.hidden_size, sizes.intermediate_size = 64, 128
    model = AutoModelForCausalLM.from_config(sizes)
    model = model if base is None else base(model)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"} | options
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings, task_type="CAUSAL_LM")).eval()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return wrapped


def outcome(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the logits of a few tokens, and the gradient of every adapter."""
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logits = model(input_ids=IDS).logits
    logits.float().cos().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_fused_is_the_same(model: nn.Module) -> dict[str, Tensor]:
    """Fuse a model, compare its outcome with that of before, and return it."""
    expected = outcome(model)
    fuse_lora(model)
    fused = outcome(model)
    assert fused.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(fused[name], value, rtol=2e-5, atol=2e-5 * float(value.abs().max()), msg=name)
    return fused


def calls(model: nn.Module) -> tuple[int, int]:
    """Count the calls of the fused layer, and of the fused end of a gated MLP, in one forward pass."""
    names: list[str] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        node = model(input_ids=IDS).logits.sum().grad_fn
    seen, left = set(), [node]
    while left:
        at = left.pop()
        if at is not None and at not in seen:
            seen.add(at)
            names.append(at.name())
            left += [before for before, _ in at.next_functions]
    return tuple(sum(name == f"{f.__name__}Backward" for name in names) for f in (_Adapted, _GatedAdapted))  # pyright: ignore[reportReturnType]


def in_4_bits(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            quantised = Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            options: Any = {"quant_type": "nf4", "module": quantised}
            quantised.weight = Params4bit(module.weight.data, **options)
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], quantised.to("cpu"))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_fused_is_what_peft_computes(kind: str) -> None:
    """In both decoder layers q, k, v, o, gate, up and the MLP's end are fused; GPT-2's transposed layers are not."""
    model = adapted(kind)
    assert calls(model) == (0, 0)
    assert_fused_is_the_same(model)
    assert calls(model) == ((2 * 6, 2) if kind in GATED else (0, 0) if kind == "gpt2" else (2 * 4, 0))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_4_bits(kind: str) -> None:
    model = adapted(kind, in_4_bits).train()  # otherwise bitsandbytes repacks weights for some processors
    assert_fused_is_the_same(model)
    assert calls(model) == (12, 2)


def in_float64(model: nn.Module) -> nn.Module:
    """Return a copy in float64, with the dequantised values of 4-bit weights."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear4bit):
                plain = nn.Linear(child.in_features, child.out_features, bias=False)
                plain.weight.data = child(torch.eye(child.in_features, dtype=torch.bfloat16)).t().contiguous()
                setattr(module, name, plain.requires_grad_(False))
    return model.double()


@pytest.mark.parametrize("base", [lambda m: m.bfloat16(), lambda m: in_4_bits(m.bfloat16())], ids=["plain", "4 bits"])
def test_half_precision_is_as_near_to_float64_as_pefts(base: Callable[[Any], Any]) -> None:
    """For an MLP with bfloat16 weights and float32 adapters, as on a GPU, error(fused) ≤ 1.3 · error(PEFT)."""
    model = adapted("llama", base).train()
    mlp = model.get_base_model().model.layers[0].mlp
    states, weights = torch.randn(307, 64).bfloat16(), torch.randn(307, 64)

    def outcome(mlp: nn.Module, x: Tensor, *, half: bool) -> list[Tensor]:
        leaves = [x.requires_grad_(), *(p for p in mlp.parameters() if p.requires_grad)]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = mlp(x)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]

    def errors() -> list[float]:
        rounded = outcome(mlp, states.clone(), half=True)
        return [float((value - true).norm() / true.norm()) for value, true in zip(rounded, exact, strict=True)]

    exact = outcome(in_float64(mlp), states.double(), half=False)
    theirs = errors()
    fuse_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(model) == (12, 2)
    ours = errors()
    assert all(error <= 1.3 * allowed for error, allowed in zip(ours, theirs, strict=True)), (ours, theirs)


def second_adapter(model: Any) -> None:
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])


def hooked(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.register_forward_hook(lambda *_: None)


UNFUSED: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "dropout": ({"lora_dropout": 0.5}, lambda m: m.train()),
    "DoRA": ({"use_dora": True}, lambda m: m),
    "biases of adapters": ({"lora_bias": True}, lambda m: m),
    "two adapters": ({}, second_adapter),
    "merged": ({}, lambda m: m.merge_adapter()),
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers()),
    "hooks": ({}, hooked),
    "trained weights": ({}, lambda m: m.requires_grad_(True)),
    "float32 adapters of half a model, without autocast": ({"base": lambda m: m.bfloat16()}, lambda m: m),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFUSED)
def test_what_else_is_asked_for_is_left_to_peft(case: str) -> None:
    """Every other option runs PEFT's code: the logits are bit-identical from the same random numbers."""
    options, change = UNFUSED[case]
    theirs = adapted("llama", **options)
    change(theirs)
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    results = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        results.append(model(input_ids=IDS).logits)
    assert torch.equal(*results)
    if results[1].requires_grad:
        assert calls(ours) == (0, 0)


def test_dropout_is_nothing_in_evaluation() -> None:
    model = adapted("llama", lora_dropout=0.5)
    fuse_lora(model)
    assert calls(model) == (12, 2)
    assert calls(model.train()) == (0, 0)


def kept(model: nn.Module, width: int) -> int:
    """Count the tensors of a width that a forward pass keeps for the backward pass, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    others: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (width,) and tensor.untyped_storage().data_ptr() not in weights:
            others[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logits = model(input_ids=IDS).logits
    assert logits.requires_grad
    return len(others)


@pytest.mark.parametrize("base", [None, in_4_bits], ids=["plain", "4 bits"])
def test_a_gated_mlp_keeps_its_gate_and_up_alone(base: Callable[[Any], Any] | None) -> None:
    model = adapted("llama", base).train()
    width = model.get_base_model().config.intermediate_size
    assert kept(model, width) == 2 * 4
    fuse_lora(model)
    assert kept(model, width) == 2 * 2


def test_a_hook_sees_what_enters_the_last_layer() -> None:
    """For a hook on the last layer the product is computed, and only that MLP's end is not fused."""
    model = adapted("llama")
    fuse_lora(model)
    seen: list[Tensor] = []
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    assert calls(model) == (13, 1)
    (product,) = seen
    assert product.shape == (2, 11, model.get_base_model().config.intermediate_size)


def test_recomputed_in_the_backward_pass() -> None:
    """Checkpointed layers give the same gradients."""
    model = adapted("llama")
    fuse_lora(model)
    expected = outcome(model)
    for layer in model.get_base_model().model.layers:
        plain = layer.forward
        layer.forward = lambda *a, plain=plain, **k: checkpoint(plain, *a, use_reentrant=False, **k)
    for name, value in outcome(model).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("act", "gated"),
    [(nn.Identity(), 2), (torch.relu, 2), (nn.ReLU(inplace=True), 0), (nn.PReLU(), 0)],
    ids=["returns what it was given", "a function", "in place", "trained"],
)
def test_activations(act: Any, gated: int) -> None:
    """The end is fused if the activation is a function or returns its input, but not if it is in-place or trained."""
    model = adapted("llama")
    for module in model.modules():
        if hasattr(module, "act_fn"):
            del module.act_fn
            module.act_fn = act
    assert_fused_is_the_same(model)
    assert calls(model) == (14 - gated, gated)


def test_only_what_needs_a_gradient_gets_one() -> None:
    """An adapter with a frozen A and an input without gradient get no gradient; everything else does."""
    model = adapted("llama")
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert not any("lora_A" in name for name in assert_fused_is_the_same(model))


def test_unfused_is_as_it_was() -> None:
    model = adapted("llama")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    own = model.get_base_model().model.layers[0].mlp.gate_proj
    own.forward = theirs = own.forward  # the forward method of another library
    fuse_lora(model)
    assert own.forward is theirs
    assert calls(model) == (11, 2)
    unfuse_lora(model)
    assert own.forward is theirs
    del own.forward
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name


def test_a_merged_and_unloaded_model_runs() -> None:
    model = adapted("llama")
    fuse_lora(model)
    expected = model(input_ids=IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
