"""The attention that computes a model's forests: what "auto" takes, what is refused by name, and the trial."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.errors import UserError
from fastpref.model import attention_choice, flex_attention, varlen_attention
from fastpref.model.attention import LayerCall, has_attention
from fastpref.model.attention_choice import FLEX, VARLEN, choose_attention, fault
from fastpref.model.load import load_model
from tests.support import varlen
from tests.support.forests import CALL, CALLS
from tests.support.tiny import config_for, save_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DROPS = replace(CALL, dropout=0.1)
SINKS = replace(CALL, sinks=True)
CAPPED = replace(CALL, softcap=3.0, dropout=0.1)
WIDE = replace(CALL, width=320, value_width=128)
HALF = torch.bfloat16
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Replace the trial, which needs a GPU: return the set of kernels that fail it, which a test fills."""
    kinds: set[str] = set()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(
        attention_choice, "fault", lambda kernel, *_: "no shared memory" if kernel.wanted in kinds else None
    )
    return kinds


def chosen(wanted: Any, device: str, how: Any, calls: list[LayerCall], dtype: torch.dtype = HALF) -> tuple[Any, Any]:
    kernel, note = choose_attention(wanted, how, "state-space", calls, dtype, torch.device(device))
    return kernel.wanted if kernel is not None else None, note


_SDPA = "attention: SDPA, a call a completion: "
_FAILED = "FlexAttention: no shared memory"
_NO_DROPOUT = "FlexAttention: it has no dropout, which this model's config asks of its attention"
CHOICES = [  # wanted, device, layout, calls, installed, which fail their trial → the attention, and the note
    ("auto", "cuda", "tree", [CALL], True, "", "flex", "attention: FlexAttention"),
    ("auto", "cuda", "packed", [CALL], False, "", "flex", "attention: FlexAttention"),
    ("flex", "cuda", "packed", [CALL], True, "", "flex", "attention: FlexAttention"),
    ("varlen", "cuda", "packed", [CALL], True, "flex", "varlen", "attention: flash-attn"),
    ("varlen", "cuda", "tree", [DROPS], True, "", "varlen", "attention: flash-attn"),
    ("sdpa", "cuda", "tree", [CALL], True, "", None, None),
    ("auto", "cpu", "tree", [CALL], True, "", None, None),
    ("auto", "mps", "tree", [CALL], True, "", None, None),
    ("auto", "cuda", "padded", [], True, "", None, None),
    ("auto", "cuda", "tree", [CALL], True, "flex", "varlen", f"attention: flash-attn ({_FAILED})"),
    ("auto", "cuda", "tree", [CALL, DROPS], True, "", "varlen", f"attention: flash-attn ({_NO_DROPOUT})"),
    ("auto", "cuda", "tree", [CALL], False, "flex", None, _SDPA + _FAILED),
    ("auto", "cuda", "tree", [DROPS], False, "", None, _SDPA + _NO_DROPOUT),
    ("auto", "cuda", "tree", [CALL], True, "flex varlen", None, f"{_SDPA}{_FAILED}; flash-attn: no shared memory"),
    ("auto", "cuda", "tree", [SINKS], True, "flex", None,
     f"{_SDPA}{_FAILED}; flash-attn: it has no attention sinks, which this model has"),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "device", "how", "calls", "installed", "fail", "expected", "note"), CHOICES)
def test_auto_takes_flex_then_varlen_then_sdpa(
    monkeypatch: pytest.MonkeyPatch, broken: set[str],
    wanted: Any, device: str, how: Any, calls: list[LayerCall], installed: bool, fail: str, expected: Any, note: Any,
) -> None:  # fmt: skip
    """On a GPU "auto" is FlexAttention, or the package if FlexAttention fails, and a note gives the reason."""
    broken |= set(fail.split())
    if installed:
        varlen.install(monkeypatch)
    else:
        monkeypatch.setattr(varlen_attention, "installed", lambda: False)
    assert chosen(wanted, device, how, calls) == (expected, note)


OLD = "FlexAttention: it takes the tensor cores of GPUs of compute capability 8.0 and newer, and this GPU has 7.5"
LACKING: list[tuple[tuple[int, int], LayerCall, torch.dtype, str | None]] = [
    ((7, 5), CALL, torch.float16, f"{_SDPA}{OLD}"),
    ((8, 0), CALL, torch.float16, "attention: FlexAttention"),
    ((12, 0), replace(CALL, width=512), HALF, "attention: FlexAttention"),
    ((9, 0), replace(CALL, width=513), HALF,
     f"{_SDPA}FlexAttention: its heads have at most 512 dimensions in bfloat16, and this model's 513"),
    ((9, 0), replace(CALL, value_width=320), torch.float32,
     f"{_SDPA}FlexAttention: its heads have at most 256 dimensions in float32, and this model's 320"),
    ((9, 0), replace(CALL, value_width=8), HALF,
     f"{_SDPA}FlexAttention: its heads have at least 16 dimensions, and this model's 8"),
]  # fmt: skip


@pytest.mark.parametrize(("capability", "call", "dtype", "note"), LACKING)
@pytest.mark.usefixtures("broken")
def test_flex_is_not_tried_where_it_has_no_fitting_kernel(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], call: LayerCall, dtype: torch.dtype, note: str
) -> None:
    """A GPU without tensor cores for it, and heads that fit no GPU's shared memory, get SDPA, and the note says why."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(varlen_attention, "installed", lambda: False)
    assert chosen("auto", "cuda", "tree", [CALL, call], dtype)[1] == note


@pytest.mark.parametrize(
    ("wanted", "device", "how", "calls", "dtype", "said"),
    [
        ("flex", "cpu", "tree", [CALL], HALF, "this is a cpu device"),
        ("flex", "cuda", "padded", [], HALF, r"tree and packed rows only \(state-space\)"),
        ("flex", "cuda", "tree", [DROPS], HALF, "no dropout"),
        ("varlen", "cpu", "tree", [CALL], HALF, "this is a cpu device"),
        ("varlen", "cuda", "padded", [], HALF, r"tree and packed rows only \(state-space\)"),
        ("varlen", "cuda", "tree", [CALL, SINKS], HALF, "no attention sinks"),
        ("varlen", "cuda", "tree", [CAPPED], HALF, "no dropout with a softcap"),
        ("varlen", "cuda", "tree", [WIDE], HALF, "at most 256 dimensions, and this model's 320"),
        (
            "varlen",
            "cuda",
            "tree",
            [CALL],
            torch.float32,
            "bfloat16 only, and this model computes in float32",
        ),
    ],
)
@pytest.mark.usefixtures("broken")
def test_what_cannot_be_had_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, wanted: str, device: str, how: Any, calls: Any, dtype: torch.dtype, said: str
):
    varlen.install(monkeypatch)
    with pytest.raises(UserError, match=f'model.attention = "{wanted}": .*{said}.*; leave the key out'):
        chosen(wanted, device, how, calls, dtype)


def test_a_kernel_that_fails_its_trial_is_refused(monkeypatch: pytest.MonkeyPatch, broken: set[str]):
    broken |= {"flex", "varlen"}
    varlen.install(monkeypatch)
    for wanted in ("flex", "varlen"):
        with pytest.raises(UserError, match=f'model.attention = "{wanted}": .* cannot be had: no shared memory'):
            chosen(wanted, "cuda", "tree", [CALL])


def without_softcap(q: Any, k: Any, v: Any, window_size: Any, deterministic: bool) -> None: ...


def unloadable() -> None:
    raise ImportError("undefined symbol: _ZN3c10")


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("none", "the package flash-attn is not installed: pip install"),
        ("other", "the package cannot be imported .*flash_attn_varlen_func.*: pip install"),
        ("broken", "the package cannot be imported .ImportError: undefined symbol.*: pip install"),
        ("old", "this version of it has no softcap: pip install"),
    ],
)
def test_a_package_that_does_not_serve_is_named(monkeypatch: pytest.MonkeyPatch, package: str, said: str):
    """A package that is missing, broken, old or another one of the same name is refused with what to install."""
    if package == "none":
        monkeypatch.setattr(varlen_attention, "find_spec", lambda name: None)
    else:
        varlen.install(monkeypatch, without_softcap if package == "old" else None)
    if package == "broken":
        monkeypatch.setattr(varlen_attention, "import_module", lambda name: unloadable())
    with pytest.raises(UserError, match=f'model.attention = "varlen": flash-attn cannot be had: {said}'):
        chosen("varlen", "cuda", "tree", [CALL])


@pytest.mark.parametrize("wanted", ["flex", "varlen"])
def test_kernels_are_refused_on_a_cpu_before_training(tmp_path: Path, wanted: str):
    with pytest.raises(UserError, match=f'model.attention = "{wanted}": .*GPUs only'):
        load_model(config_for(save_model("llama", tmp_path), f"model.attention={wanted}"), CPU)


@pytest.mark.parametrize("kernel", [FLEX, VARLEN])
def test_the_model_gets_what_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernel: Any):
    """The chosen attention is that of the loaded model's layers, and the run's notes name it."""
    monkeypatch.setattr("fastpref.model.load.choose_attention", lambda *given: (kernel, f"attention: {kernel.title}"))
    loaded = load_model(config_for(save_model("llama", tmp_path)), CPU)
    assert has_attention(loaded.model, kernel.name)
    assert f"attention: {kernel.title}" in loaded.notes


# --- the trial -------------------------------------------------------------------------------------------------------

WITHOUT_SINKS = {name: call for name, call in CALLS.items() if not call.sinks}


@pytest.mark.parametrize("call", WITHOUT_SINKS.values(), ids=WITHOUT_SINKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_pass_the_trial(monkeypatch: pytest.MonkeyPatch, call: LayerCall, dtype: torch.dtype):
    varlen.install(monkeypatch, exact=True)
    assert fault(VARLEN, [call, call], dtype, CPU) is None


def but(**wrong: Any) -> Any:
    return lambda *given, **options: varlen.flash_attn_varlen_func(*given, **options | wrong)


FAULTS = {
    "a window of one token less": ("window", but(window_size=(7, 0))),
    "no window": ("window", but(window_size=(-1, -1))),
    "no softcap": ("softcap", but(softcap=0.0)),
    "another scale": ("scaled", but(softmax_scale=0.11)),
    "later tokens": ("plain", but(causal=False)),
}


@pytest.mark.parametrize(("name", "function"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_kernels_fail_the_trial(monkeypatch: pytest.MonkeyPatch, name: str, function: Any, dtype: torch.dtype):
    varlen.install(monkeypatch, function, exact=True)
    assert "its result differs by" in str(fault(VARLEN, [CALLS[name]], dtype, CPU))


def test_masks_aligned_at_the_first_key_fail_the_trial(monkeypatch: pytest.MonkeyPatch):
    """flash-attn before 2.1 aligned causal masks at the first query and the first key."""
    varlen.install(monkeypatch, exact=True)
    monkeypatch.setattr(varlen, "visible", lambda q, k, *_: torch.ones(q, k, dtype=torch.bool).tril())
    assert "its result differs by" in str(fault(VARLEN, [CALL], torch.float32, CPU))


def test_wrong_gradients_fail_the_trial(monkeypatch: pytest.MonkeyPatch):
    """A kernel with right outputs and without the gradient of its keys fails."""

    def no_gradient(q: Any, k: Any, v: Any, **options: Any) -> Any:
        return varlen.flash_attn_varlen_func(q, k.detach() + 0.0 * k, v, **options)

    varlen.install(monkeypatch, no_gradient, exact=True)
    assert "its result differs by" in str(fault(VARLEN, [CALL], torch.float32, CPU))


def test_kernels_that_raise_fail_the_trial_with_their_reason(monkeypatch: pytest.MonkeyPatch):
    def fails(*given: Any, **options: Any) -> Any:
        raise RuntimeError("\nFlashAttention only supports Ampere GPUs or newer.\nat line 7")

    varlen.install(monkeypatch, fails)
    expected = "RuntimeError: FlashAttention only supports Ampere GPUs or newer."
    assert fault(VARLEN, [CALL], HALF, CPU) == expected
    monkeypatch.setattr(flex_attention, "_flex", lambda device: fails)
    assert fault(FLEX, [CALL], HALF, CPU) == expected
