"""New tokens of a vocabulary: rows of their own in the embeddings and the head."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import DistributedType
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref.config import Config
from fastpref.data.batch import collate
from fastpref.data.example import Example, Origin
from fastpref.errors import UserError
from fastpref.model.load import Loaded, load_model
from fastpref.model.new_tokens import grow, rows_of
from fastpref.model.tokenizer import add_tokens, run_tokenizer
from fastpref.processes import _processes
from fastpref.step.reference import make_reference
from tests.support.paths import QUICKSTART_MODEL
from tests.support.tiny import config_for, save_model

CPU = torch.device("cpu")
FIRST = 949  # the id of the first new token of the quickstart's tokenizer
IDS = [FIRST, FIRST + 1]
ADD = "tokens.add=['<think>', '</think>']"
LORA = "lora={rank=2}"
KINDS = ("llama", "llama-tied", "gemma3")  # the last one scales its embeddings
SPARE = 960  # rows of a vocabulary that has room for the new tokens
EXAMPLE = Example([3, FIRST, 5], ([FIRST + 1, 4, 3], [5, FIRST, 7]), None, Origin("a row"))


def save(kind: str, folder: Path, rows: int = FIRST) -> Path:
    """Save a tiny model with the quickstart's tokenizer and this many rows."""
    save_model(kind, folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(QUICKSTART_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    cases = [(kind, FIRST) for kind in KINDS] + [("llama-tied", SPARE)]
    return {(kind, rows): save(kind, tmp_path_factory.mktemp(kind), rows) for kind, rows in cases}


def config(folder: Path, *overrides: str) -> Config:
    return config_for(folder, ADD, *overrides)


def gradients(loaded: Loaded) -> tuple[Tensor, dict[str, Tensor]]:
    loaded.policy.zero_grad()
    logp = loaded.policy(collate([EXAMPLE], "padded")).logp
    (logp * torch.arange(1, len(logp) + 1)).sum().backward()
    return logp.detach(), {n: p.grad.clone() for n, p in loaded.wrapped.named_parameters() if p.grad is not None}


def shake(loaded: Loaded) -> None:
    """Change what is trained, so that rows are not those of the model any more."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in loaded.wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_gradients_equal_those_of_peft(folders: dict[tuple[str, int], Path], kind: str):
    """PEFT's own layers, whose logits are computed in full, have the same log-probabilities and gradients."""
    loaded = load_model(config(folders[kind, FIRST], LORA), CPU)
    shake(loaded)
    ours, grads = gradients(loaded)
    rows = [grad for name, grad in grads.items() if "trainable_tokens_delta" in name]
    assert [len(grad) for grad in rows] == [2] * (2 if kind == "llama" else 1)
    assert all((grad.abs().sum(1) > 0).all() for grad in rows)
    for module in loaded.model.modules():
        if isinstance(module, TrainableTokensLayer):
            del module.forward
    batch = collate([EXAMPLE], "padded")
    loaded.policy.zero_grad()
    logits = loaded.wrapped(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    logp = logits[batch.predictors].log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    if batch.rows is not None:
        logp = logp[batch.rows]
    (logp * torch.arange(1, len(logp) + 1)).sum().backward()
    torch.testing.assert_close(ours, logp.detach(), atol=1e-5, rtol=1e-5)
    for name, parameter in loaded.wrapped.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_own_forward_of_generation(folders: dict[tuple[str, int], Path], kind: str):
    """The model's own logits, as generation takes them, equal those of PEFT's layers, with the adapters off too."""
    loaded = load_model(config(folders[kind, FIRST], LORA), CPU)
    shake(loaded)
    ids, wrapped = torch.tensor([[3, FIRST, 5, FIRST + 1]]), loaded.wrapped
    assert isinstance(wrapped, peft.PeftModel)

    def both() -> tuple[Tensor, Tensor]:
        on = wrapped(input_ids=ids).logits
        with wrapped.disable_adapter():
            return on, wrapped(input_ids=ids).logits

    with torch.no_grad():
        ours = both()
        for module in loaded.model.modules():
            if isinstance(module, TrainableTokensLayer):
                del module.forward
        theirs = both()
    assert not torch.allclose(*ours, atol=1e-3)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


SETTINGS = {"adapters": (LORA,), "copy": (LORA, "reference.mode=copy"), "full": ("reference.mode=copy",)}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("case", [("llama", FIRST), ("llama-tied", FIRST), ("llama-tied", SPARE)])
def test_reference_equals_the_policy_at_the_start(
    folders: dict[tuple[str, int], Path], case: tuple[str, int], settings: str
):
    """Of rows with new tokens too; and afterwards the reference stays."""
    chosen = config(folders[case], *SETTINGS[settings])
    loaded = load_model(chosen, CPU)
    reference, _ = make_reference(chosen, loaded)
    batch = collate([EXAMPLE], "padded")
    with torch.no_grad():
        first = loaded.policy(batch).logp
        torch.testing.assert_close(reference(batch), first, atol=1e-6, rtol=1e-6)
        shake(loaded)
        assert not torch.allclose(loaded.policy(batch).logp, first, atol=1e-3)
        torch.testing.assert_close(reference(batch), first, atol=1e-6, rtol=1e-6)


def test_rows_that_are_not_used_are_taken_as_they_are(folders: dict[tuple[str, int], Path]):
    loaded = load_model(config(folders["llama-tied", SPARE], LORA), CPU)
    assert rows_of(loaded.model) == SPARE
    assert loaded.notes[0] == "tokens.add: 2 new (numbers 949 to 950); 2 take rows that no other token has"


def test_further_rows_are_the_mean_of_the_others(folders: dict[tuple[str, int], Path]):
    """Whatever the seed, so that a model that is loaded again has them too; the random numbers of a run stay."""
    state = torch.get_rng_state()
    model: Any = AutoModelForCausalLM.from_pretrained(folders["llama", FIRST])
    before = {end: getattr(model, end)().weight.detach().clone() for end in ENDS}
    torch.set_rng_state(state)
    assert grow(model, FIRST + 2, "here") == 2
    assert torch.equal(torch.get_rng_state(), state)
    for end, table in before.items():
        weight = getattr(model, end)().weight
        assert torch.equal(weight[:FIRST], table)
        torch.testing.assert_close(weight[FIRST:], table.mean(0).expand(2, -1))
    assert model.config.vocab_size == FIRST + 2
    assert grow(model, FIRST, "here") == 0


ENDS = ("get_input_embeddings", "get_output_embeddings")
FAULTS: dict[str, tuple[tuple[str, ...], str]] = {
    "a known token": (("tokens.add=['<think>', 'ing']",), r"tokens\.add: 'ing' is a token already, number \d+"),
    "twice": (("tokens.add=['<a>', '<a>']",), r"tokens\.add.*'<a>' is named twice"),
    "empty": (("tokens.add=['']",), r"tokens\.add.*'' cannot be a token"),
    "with space": (("tokens.add=[' a']",), r"tokens\.add.*' a' cannot be a token"),
    "a continued adapter": ((ADD, "lora={from='x'}"), r"tokens\.add: an adapter that is continued"),
    "another reference": (
        (ADD, LORA, "reference.name=m"),
        r"tokens\.add: another model or adapter knows no new tokens",
    ),
    "streamed": (
        (ADD, LORA, "model.streaming=true"),
        r"tokens\.add: the trained rows .* set model\.streaming to false",
    ),
    "an adapter on the head": (
        (ADD, "lora={target=['q_proj', 'lm_head']}"),
        r"tokens\.add: the rows of lm_head .* remove it from lora\.target",
    ),
    "the embeddings in full": (
        (ADD, "lora={modules_to_save=['embed_tokens']}"),
        r"tokens\.add: the rows of model\.embed_tokens .* remove it from lora\.modules_to_save",
    ),
}


def start(folder: Path, *overrides: str) -> None:
    """Read a config, the tokenizer and the model, as a run does."""
    chosen = config_for(folder, *overrides)
    run_tokenizer(chosen)
    load_model(chosen, CPU)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(folders: dict[tuple[str, int], Path], fault: str):
    overrides, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        start(folders["llama", FIRST], *overrides)


def test_tokenizers_get_the_tokens(folders: dict[tuple[str, int], Path]):
    """Text becomes the new tokens, and these become the text again, although special tokens are left out."""
    tokenizer: Any = run_tokenizer(config(folders["llama", FIRST]))
    ids = tokenizer.encode("is<think>two</think>", add_special_tokens=False)
    assert [number for number in ids if number >= FIRST] == IDS
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "is<think>two</think>"


def test_a_token_that_text_does_not_become(monkeypatch: pytest.MonkeyPatch):
    tokenizer: Any = AutoTokenizer.from_pretrained(QUICKSTART_MODEL)
    encode: Callable[..., list[int]] = lambda *args, **options: [3, 4]  # noqa: E731
    monkeypatch.setattr(tokenizer, "encode", encode)
    with pytest.raises(UserError, match=r"tokens\.add: this tokenizer makes '.*', '.*' of '<a>' instead of one token"):
        add_tokens(tokenizer, ["<a>"])


def test_several_processes_are_refused(folders: dict[tuple[str, int], Path]):
    kind = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, num_processes=2, process_index=0)
    accelerator: Any = kind
    with pytest.raises(UserError, match=r"tokens\.add: new tokens are trained in one process"):
        _processes(accelerator, config(folders["llama", FIRST]))
