"""Kernels of liger-kernel in a model's body: which modules get one, that nothing else changes, and their results.

Without a GPU the kernels run in Triton's interpreter, which lacks the functions of CUDA's library that they call.
"""

import copy
import os
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from liger_kernel.transformers.swiglu import LigerSwiGLUMLP
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama
from triton.runtime.jit import KernelInterface

from fastpref.data.batch import collate
from fastpref.errors import UserError
from fastpref.model import liger
from fastpref.model.gradient_checkpointing import checkpoint_layers
from fastpref.model.load import Loaded, load_model
from fastpref.model.policy import Policy
from fastpref.model.streaming.tables import keep_head
from tests.support.tiny import config_for, examples, model_config, save_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = CPU if INTERPRETED else CUDA
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

# Norms and MLPs of two layers, the last norm, and the attention layers, which apply RoPE.
TAKEN = {
    "llama": {"RMSNorm": 5, "SwiGLU": 2, "RoPE": 2},
    "mistral": {"RMSNorm": 5, "SwiGLU": 2, "RoPE": 2},
    "qwen2": {"RMSNorm": 5, "SwiGLU": 2, "RoPE": 2},
    "qwen3": {"RMSNorm": 9, "SwiGLU": 2, "RoPE": 2},
    "gemma2": {"RMSNorm": 9, "GeGLU": 2, "RoPE": 2},
    "gemma3": {"RMSNorm": 13, "GeGLU": 2, "RoPE": 2},
    "gpt-oss": {"RMSNorm": 5, "RoPE": 2},
    "mixtral": {"RMSNorm": 5, "RoPE": 2},
    "qwen3-moe": {"RMSNorm": 9, "RoPE": 2},
}


def plain(kind: str, **changes: Any) -> PreTrainedModel:
    config = model_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def counts(model: PreTrainedModel) -> dict[str, int]:
    """Count the modules with each kernel; a module with RoPE has a copy of transformers' own forward method."""
    modules = [module for module in model.modules() if "forward" in vars(module)]
    copied = [vars(m)["forward"].__func__.__qualname__ == type(m).forward.__qualname__ for m in modules]
    return Counter("RoPE" if copy else str(liger._kind(m)) for m, copy in zip(modules, copied, strict=True))


def transformers_now() -> dict[str, dict[str, Any]]:
    modules = {name: m for name, m in sys.modules.items() if name.startswith("transformers.models.")}
    return {name: dict(vars(m)) for name, m in modules.items() if isinstance(m, ModuleType)}


@pytest.mark.parametrize("kind", TAKEN)
def test_which_modules_change(kind: str):
    """Only this instance gets the kernels that liger has for its type; experts and the model's own forward stay.

    No name in any module of transformers changes, and neither earlier nor later models have kernels.
    """
    model, other = plain(kind), plain(kind)
    before = transformers_now()
    assert liger.take_kernels(model) == (sorted(TAKEN[kind]), {})
    after = transformers_now()
    for name, values in before.items():
        changed = [key for key, value in values.items() if after[name].get(key) is not value]
        assert changed == [], name
    assert counts(model) == TAKEN[kind]
    assert counts(other) == counts(plain(kind)) == {}
    assert "forward" not in vars(model)


def test_another_activation_is_left_alone():
    """An MLP whose config names another activation keeps its code, though liger has SwiGLU for its model type."""
    model = plain("llama", hidden_act="gelu")
    assert liger.take_kernels(model) == (["RMSNorm", "RoPE"], {"SwiGLU": "the config names another activation"})
    assert counts(model) == {"RMSNorm": 5, "RoPE": 2}


# --- RoPE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TAKEN)
def test_every_attention_calls_it(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Each layer calls liger's function once, with the arguments of the model's own."""
    model = plain(kind)
    home = sys.modules[type(model).__module__]
    own = home.apply_rotary_pos_emb
    ids = torch.arange(7)[None]
    expected = model(ids).logits
    calls = []

    def recording(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return own(*args, **options)

    def apply(*, rope: bool = True, model: Any = None, **options: Any) -> None:
        if rope:
            vars(home)["apply_rotary_pos_emb"] = recording

    recording.__module__ = "liger_kernel.test"
    monkeypatch.setitem(liger._known(), model.config.model_type, apply)  # RoPE is liger's only kernel
    assert liger.take_kernels(model) == (["RoPE"], {})
    assert torch.equal(model(ids).logits, expected)
    assert len(calls) == model.config.num_hidden_layers
    plain(kind)(ids)
    assert len(calls) == model.config.num_hidden_layers


WAYS = """
import functools

def rotate(x): return "own " + x

def plain(self, x): return rotate(x)

def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **options): return "logged " + function(*args, **options)
    return wrapper

def bare(function): return lambda *args: function(*args)

decorated = logged(plain)
decorated_twice = logged(bare(logged(plain)))

def helped(self, x): return helper(x)
def helper(x): return logged(deeper)(x)
def deeper(x): return "".join(rotate(y) for y in [x])

def keywords(self, x="q", *, rotations=1):
    for _ in range(rotations): x = rotate(x)
    return x
"""
OUTCOMES = {
    "plain": "own q", "decorated": "logged own q", "decorated_twice": "logged logged own q", "helped": "logged own q",
    "keywords": "own q",
}  # fmt: skip


@pytest.mark.parametrize("way", OUTCOMES)
def test_ways_from_a_layer_to_the_function(way: str):
    """A copied method calls the other function and otherwise does the same; the method and its module do not change."""
    home = ModuleType("home")
    exec(WAYS, vars(home))
    method = vars(home)[way]
    copied = liger._with_globals(method, home, {"rotate": lambda x: "liger " + x})
    assert copied is not None
    assert copied(None, "q") == OUTCOMES[way].replace("own", "liger")
    assert method(None, "q") == OUTCOMES[way]
    assert copied.__name__ == method.__name__
    assert liger._with_globals(method, home, {"another": print}) is None


LLAMA_FORWARD = modeling_llama.LlamaAttention.forward


@pytest.mark.parametrize(
    ("name", "value", "kind", "why"),
    [
        ("LlamaAttention.forward", lambda *args, **options: LLAMA_FORWARD(*args, **options), "RoPE",
         "its layers call no apply_rotary_pos_emb that can be replaced"),
        ("LlamaMLP.forward", lambda self, x: x, None, ""),
    ],
)  # fmt: skip
def test_what_is_expected_and_not_taken_is_told(
    name: str, value: Any, kind: str | None, why: str, monkeypatch: pytest.MonkeyPatch
):
    """If liger has a kernel for the type but no layer got it, the model's notes give the reason."""
    monkeypatch.setattr(f"transformers.models.llama.modeling_llama.{name}", value)
    model = plain("llama")
    kinds = ", ".join(k for k in ("RMSNorm", "RoPE", "SwiGLU") if k != kind)
    missing = [] if kind is None else [f"liger-kernel: its {kind} for llama models is not taken: {why}"]
    notes = [f"liger-kernel: {kinds}", *missing]
    assert liger.give_kernels(model, model.model, must=True, trial=None) == (True, notes)


def test_a_module_may_have_a_forward_that_is_no_method():
    """A head that stays in host memory is called through a function; the body gets its kernels all the same."""
    model = plain("llama")
    head: Any = model.get_output_embeddings()
    keep_head(head, CPU, lambda size: torch.empty(size, dtype=torch.uint8))
    assert liger.give_kernels(model, model.model, must=True, trial=None)[0]


def test_a_class_that_has_another_name_now_is_missed(monkeypatch: pytest.MonkeyPatch):
    """A kernel that liger sets under a class name that transformers no longer has is reported as missing."""
    apply = liger._known()["llama"]

    @wraps(apply)
    def older(**options: Any) -> None:
        apply(**options | {"swiglu": False})
        if options.get("swiglu", True):
            modeling_llama.__dict__["LlamaFeedForward"] = LigerSwiGLUMLP

    monkeypatch.setitem(liger._known(), "llama", older)
    assert liger.take_kernels(plain("llama")) == (["RMSNorm", "RoPE"], {"SwiGLU": "liger-kernel gave it to no module"})
    assert not hasattr(modeling_llama, "LlamaFeedForward")


WANTED = [
    ("auto", "cuda", "llama", True),
    ("auto", "cpu", "llama", False),
    ("auto", "mps", "llama", False),
    ("auto", "cuda", "cohere", False),
    (True, "cuda", "gemma2", True),
    (True, "cuda", "gpt2", r"model.liger = true: liger-kernel knows no gpt2 models; leave the key out"),
    (True, "cpu", "llama", r"model.liger = true: they run on GPUs only; leave the key out"),
    (False, "cuda", "llama", False),
]


@pytest.mark.parametrize(("wanted", "device", "kind", "outcome"), WANTED, ids=str)
def test_when_they_are_taken(wanted: Any, device: str, kind: str, outcome: bool | str):
    if isinstance(outcome, bool):
        assert liger.wants_kernels(wanted, device, model_config(kind)) is outcome
    else:
        with pytest.raises(UserError) as raised:
            liger.wants_kernels(wanted, device, model_config(kind))
        assert str(raised.value) == outcome


def test_a_run_on_a_cpu_refuses_before_it_loads(tmp_path: Path):
    """The key is refused before the weights, which are missing here, are loaded."""
    model_config("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.liger = true: they run on GPUs only"):
        load_model(config_for(tmp_path, "model.liger=true"), CPU)


# --- the trial -------------------------------------------------------------------------------------------------------


def wrong(model: PreTrainedModel) -> liger.Kernels:
    """Install kernels that ignore the norms' weights."""
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            vars(module)["forward"] = lambda x: x * 2
    return liger.Kernels(["RMSNorm"], {})


def failing(model: PreTrainedModel) -> liger.Kernels:
    wrong(model)
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize(
    ("take", "why"),
    [
        (wrong, "its hidden states differ from those of the model's own code by "),
        (failing, "RuntimeError: out of resource: shared memory"),
        (lambda model: liger.Kernels([], {}), "no module of it is of the kind that liger-kernel knows"),
    ],
)
def test_what_does_not_do_the_same_is_undone(take: Any, why: str, monkeypatch: pytest.MonkeyPatch):
    """Kernels with other results are removed, with a note; if the config asks for kernels, this is an error."""
    model = plain("llama")
    before = [dict(vars(module)) for module in model.modules()]
    monkeypatch.setattr(liger, "take_kernels", take)
    taken, (note,) = liger.give_kernels(model, model.model, must=False, trial=nullcontext)
    assert not taken
    assert note.startswith(f"liger-kernel: not taken: {why}")
    assert [dict(vars(module)) for module in model.modules()] == before
    with pytest.raises(UserError, match=r"model\.liger = true: cannot be had for this model here: "):
        liger.give_kernels(model, model.model, must=True, trial=nullcontext)
    assert counts(model) == {}


# --- numbers ---------------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _rsqrt(x):
    return 1 / tl.sqrt(x)


class _Scalar(float):
    """A float with the `to` method that compiled kernels use."""

    def to(self, dtype: object) -> "_Scalar":
        return self


def _with_scalars(run: Any, *args: Any, **options: Any) -> None:
    run(*(_Scalar(arg) if isinstance(arg, float) else arg for arg in args), **options)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make liger's kernels run here, and make `load_model` accept this device for them."""
    if INTERPRETED:
        from liger_kernel.ops import geglu, rms_norm, rope, swiglu

        for module in (geglu, rms_norm, rope, swiglu):
            for kernel in vars(module).values():
                if isinstance(kernel, KernelInterface):
                    monkeypatch.setattr(kernel, "run", partial(_with_scalars, kernel.run))
        monkeypatch.setattr(rms_norm, "rsqrt", _rsqrt)
        monkeypatch.setattr(geglu, "tanh", _tanh)
        wants = liger.wants_kernels
        monkeypatch.setattr(liger, "wants_kernels", lambda wanted, _, model: wants(wanted, "cuda", model))


def gradients(loaded: Loaded, layers: int = 0) -> dict[str, Tensor]:
    """Return the log-probabilities and every gradient of one micro-batch of trees."""
    checkpoint_layers(loaded.model, layers)
    torch.manual_seed(1)
    for name, parameter in loaded.policy.named_parameters():
        if "lora_B" in name:  # while B is zero, the gradient of A is zero too
            torch.nn.init.normal_(parameter, std=0.1)
    loaded.policy.train()
    torch.manual_seed(2)
    logp = loaded.policy(collate(ROWS, loaded.layout).to(loaded.model.device)).logp
    (logp * torch.arange(len(logp), device=logp.device).cos()).sum().backward()
    grads = {name: p.grad for name, p in loaded.policy.named_parameters() if p.grad is not None}
    return {"logp": logp.detach(), **grads}


CASES = [
    ("llama", 0, []),
    ("llama", 2, ["lora={rank=2, dropout=0.3}"]),
    ("llama", 0, ["lora={rank=2, modules_to_save=['norm']}", "train.layout=padded"]),
    ("qwen3", 0, ["lora={rank=2}"]),
    ("gemma2", 1, []),
    ("gemma2", 2, ["lora={rank=2}"]),
]
ROWS = examples(2, seed=11)[1:]  # one short pair, because the interpreter is slow


@pytest.mark.parametrize(
    "device", [pytest.param(CPU, marks=pytest.mark.skipif(not INTERPRETED, reason="runs on the card")),
               pytest.param(CUDA, marks=pytest.mark.gpu)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("kind", "layers", "overrides"), CASES, ids=str)
def test_outputs_and_gradients_are_the_models_own(
    kernels: None, tmp_path: Path, device: torch.device, kind: str, layers: int, overrides: list[str]
):
    """In float32, results are the model's own up to rounding, for any adapters, layout and checkpointing."""
    folder = save_model(kind, tmp_path)
    options = [*overrides, "model.dtype=float32"]
    torch.manual_seed(0)
    expected = gradients(load_model(config_for(folder, *options, "model.liger=false"), device), layers)
    torch.manual_seed(0)
    loaded = load_model(config_for(folder, *options), device)
    assert loaded.liger
    assert f"liger-kernel: {', '.join(sorted(TAKEN[kind]))}" in loaded.notes
    found = gradients(loaded, layers)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * (1 + value.abs().max().item()))


def test_a_frozen_copy_has_weights_of_its_own(kernels: None, tmp_path: Path):
    """In a copy of a model, the kernels use the copy's weights."""
    loaded = load_model(config_for(save_model("llama", tmp_path), "model.dtype=float32"), DEVICE)
    batch = collate(ROWS, "tree").to(DEVICE)
    frozen = Policy.of(copy.deepcopy(loaded.model))
    with torch.no_grad():
        before = frozen(batch).logp
        for parameter in loaded.model.parameters():
            parameter.zero_()
        assert torch.equal(frozen(batch).logp, before)


def test_the_trial_sees_the_kernels(kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """If liger sets a wrong offset, as it once did for Gemma, the trial removes the kernels."""
    apply = liger._known()["llama"]

    @wraps(apply)
    def mistaken(*, model: PreTrainedModel | None, **options: Any) -> None:
        apply(model=model, **options)
        if model is not None:
            model.model.norm.offset = 1.0

    monkeypatch.setitem(liger._known(), "llama", mistaken)
    loaded = load_model(config_for(save_model("llama", tmp_path)), DEVICE)
    assert not loaded.liger
    assert any("not taken: its hidden states differ" in note for note in loaded.notes)
    assert counts(loaded.model) == {}
    assert modeling_llama.LlamaRMSNorm.__module__ == "transformers.models.llama.modeling_llama"
