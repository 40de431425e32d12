"""Optimizers: each is that of its library, and the state of every kind is restored where it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.optim import AdamW, AdamW8bit, Lion, Lion8bit, PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.optim import Muon
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.optimization import Adafactor

from fastpref.config import Config, make_config
from fastpref.config.optimization import OPTIMIZERS
from fastpref.model.policy import Policy
from fastpref.run.state import read_state, write_state
from fastpref.step.optimizer import MuonWithAdamW, load_state, make_optimizer, training_weights
from tests.support.tiny import model_config

KINDS = {
    "paged_adamw": (AdamW, PagedAdamW), "paged_adamw_8bit": (AdamW8bit, PagedAdamW8bit),
    "paged_lion": (Lion, PagedLion), "paged_lion_8bit": (Lion8bit, PagedLion8bit),
}  # fmt: skip
SHAPES = ((400, 256), (64, 65), (7,))  # of at least 1e5 entries, which are paged, of 8 bits, and of neither


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def steps(optimizer: Any, weights: list[nn.Parameter], count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def paging(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let the optimizer make buffers as on a GPU, with the mark of bitsandbytes. Return those made."""
    made = []

    def buffer(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = torch.full(parameter.shape, 7, dtype=dtype)
        tensor.is_paged = parameter.numel() >= 1e5  # pyright: ignore[reportAttributeAccessIssue]
        made.append(tensor)
        return tensor

    monkeypatch.setattr(optimizer, "get_state_buffer", buffer)
    monkeypatch.setattr(optimizer, "prefetch_state", lambda parameter: None)
    return made


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_paged_moments_are_paged_again(kind: str, prepared: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    """After loading, every moment lies in a buffer of the optimizer's own making, with its numbers, and later steps
    are those of an optimizer that was not stopped."""
    plain, paged = KINDS[kind]
    whole, stopped = parameters(), parameters()
    first, other = (plain(weights, lr=1e-2) for weights in (whole, stopped))
    steps(first, whole, 3, seed=1)
    steps(other, stopped, 3, seed=1)
    write_state(tmp_path, {"optimizer": other.state_dict()})
    resumed = paged(stopped, lr=1e-2)
    given = Accelerator().prepare_optimizer(resumed) if prepared else resumed
    made = paging(resumed, monkeypatch)
    moves: list[bool] = []
    load = resumed.load_state_dict
    monkeypatch.setattr(
        resumed, "load_state_dict", lambda s, move_to_device=True: (moves.append(move_to_device), load(s))[1]
    )
    load_state(given, read_state(tmp_path)["optimizer"])
    assert moves == [False]  # nothing goes to the GPU as a whole
    states = [resumed.state[weight] for weight in stopped]
    moments = [[state[name] for name in ("state1", "state2") if name in state] for state in states]
    assert [{moment.is_paged for moment in each} for each in moments] == [{True}, {False}, {False}]
    assert {id(moment) for each in moments for moment in each} == {id(tensor) for tensor in made}
    for weight, state in zip(whole, states):
        for name, value in first.state[weight].items():
            assert torch.equal(state[name], value) if isinstance(value, Tensor) else state[name] == value
    tables = [state["qmap1"] for state in states if "qmap1" in state]
    assert all(table is tables[0] for table in tables)
    steps(first, whole, 2, seed=2)
    steps(resumed, stopped, 2, seed=2)
    assert all(map(torch.equal, whole, stopped))


RATE, DECAY = 1e-2, 0.1
SETTINGS = [f"train.learning_rate={RATE}", f"train.weight_decay={DECAY}"]


def weights_of(policy: nn.Module) -> list[nn.Parameter]:
    return [p for p in policy.parameters() if p.requires_grad]


def config_of(*overrides: str) -> Config:
    return make_config({"model": {"name": "none"}, "data": [{"path": "none"}]}, overrides)


def small_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(model_config("llama"))


def policies(*overrides: str) -> tuple[Config, Policy, Policy]:
    """Return a config, and two policies of the same small model."""
    return config_of(*overrides), Policy.of(small_model()), Policy.of(small_model())


def train(optimizer: Any, weights: list[nn.Parameter], count: int = 4, seed: int = 3) -> None:
    """Take steps with random gradients, with the weights of training in each step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        with training_weights(optimizer):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()


Make = Callable[..., torch.optim.Optimizer]


def adamw(groups: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True, **options)


def adafactor(groups: Any, **options: Any) -> torch.optim.Optimizer:
    return Adafactor(groups, scale_parameter=False, relative_step=False, **options)


BETAS = ["train.betas=[0.8, 0.95]"]
EPSILON = ["train.epsilon=1e-3"]
LIBRARIES: dict[str, tuple[list[str], Make, dict[str, Any]]] = {
    "adamw": ([], adamw, {}),
    "adamw, betas, epsilon": (BETAS + EPSILON, adamw, {"betas": (0.8, 0.95), "eps": 1e-3}),
    "adamw_8bit": (["train.optimizer=adamw_8bit"], AdamW8bit, {}),
    "adamw_8bit, epsilon": (["train.optimizer=adamw_8bit", *EPSILON], AdamW8bit, {"eps": 1e-3}),
    "lion": (["train.optimizer=lion"], Lion, {}),
    "lion, betas": (["train.optimizer=lion", *BETAS], Lion, {"betas": (0.8, 0.95)}),
    "lion_8bit": (["train.optimizer=lion_8bit"], Lion8bit, {}),
    "adafactor": (["train.optimizer=adafactor"], adafactor, {}),
}


@pytest.mark.parametrize(("overrides", "library", "options"), LIBRARIES.values(), ids=LIBRARIES)
def test_an_optimizer_is_that_of_its_library(overrides: list[str], library: Make, options: dict[str, Any]):
    """A policy's weights after four steps equal those of the library's own optimizer; only matrices decay."""
    config, policy, other = policies(*SETTINGS, *overrides)
    weights = weights_of(other)
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": DECAY},
        {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
    ]
    reference = library(groups, lr=RATE, **options)
    for optimizer, each in ((make_optimizer(policy, config), weights_of(policy)), (reference, weights)):
        train(optimizer, each)
    assert all(map(torch.equal, weights_of(policy), weights))
    assert not any(map(torch.equal, weights, weights_of(policies()[1])))


def test_muon_takes_the_matrices_of_hidden_layers():
    """Hidden matrices get torch's Muon at AdamW's size of a step; embeddings, head and norms get AdamW."""
    config, policy, other = policies(*SETTINGS, "train.optimizer=muon")
    named = dict(other.named_parameters())
    outside = [w for name, w in named.items() if "embed_tokens" in name or name.startswith("head")]
    hidden = [w for name, w in named.items() if "proj" in name]
    norms = [w for w in named.values() if w.dim() == 1]
    assert len(outside) == 2
    assert len(hidden) + len(norms) + 2 == len(named)
    muon = Muon(hidden, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    rest = adamw([{"params": outside, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}], lr=RATE)
    optimizer = make_optimizer(policy, config)
    train(optimizer, weights_of(policy))
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        for weight in weights_of(other):
            weight.grad = torch.randn(weight.shape, generator=generator)
        muon.step()
        rest.step()
    assert all(map(torch.equal, weights_of(policy), weights_of(other)))


def adapted() -> tuple[Any, Policy]:
    """Return a small model with adapters on projections and on the head, and its policy."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(small_model(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    return wrapped, Policy.of(wrapped.base_model.model)  # pyright: ignore[reportArgumentType]


def test_muon_takes_the_adapters_of_hidden_layers():
    """Muon's state is of A and B on hidden layers; the adapter of the head has AdamW's."""
    config = config_of("lora={}", "train.optimizer=muon")
    policy = adapted()[1]
    optimizer = make_optimizer(policy, config)
    assert isinstance(optimizer, MuonWithAdamW)
    train(optimizer, weights_of(policy))
    for name, weight in policy.named_parameters():
        if weight.requires_grad:
            assert ("momentum_buffer" in optimizer.state[weight]) == ("q_proj" in name), name


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_plus_ratio_is_that_of_peft(kind: str):
    """With lora.plus_ratio a step equals that of PEFT's create_loraplus_optimizer, and differs from one without."""
    settings = [f"train.learning_rate={RATE}", "train.weight_decay=0.1", f"train.optimizer={kind}"]
    config = config_of("lora={plus_ratio=16.0}", *settings)
    plain = config_of("lora={}", *settings)
    (_, policy), (wrapped, other), (_, without) = adapted(), adapted(), adapted()
    library: Any = torch.optim.AdamW if kind == "adamw" else AdamW8bit
    options: dict[str, Any] = {"fused": True} if kind == "adamw" else {}
    reference = create_loraplus_optimizer(
        wrapped, library, lr=RATE, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1, weight_decay=0.1, **options
    )
    made = ((make_optimizer(policy, config), policy), (reference, other), (make_optimizer(without, plain), without))
    for optimizer, each in made:
        train(optimizer, weights_of(each))
    assert all(map(torch.equal, weights_of(policy), weights_of(other)))
    for (name, ours), theirs in zip(policy.named_parameters(), without.parameters()):
        if ours.requires_grad:
            assert torch.equal(ours, theirs) == ("lora_A" in name)


def test_a_schedule_free_model_has_the_average_between_steps():
    """After each step the model has the weights that schedulefree evaluates with, and steps go on from the others."""
    config, policy, other = policies(*SETTINGS, "train.optimizer=schedule_free_adamw")
    weights = weights_of(other)
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": DECAY},
        {"params": [w for w in weights if w.dim() == 1]},
    ]
    reference = AdamWScheduleFree(groups, lr=RATE, warmup_steps=2)
    reference.train()
    optimizer = make_optimizer(policy, config, warmup=2)
    for step in range(5):
        train(optimizer, weights_of(policy), 1, seed=step)
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        reference.step()
        training = [weight.detach().clone() for weight in weights]
        reference.eval()
        torch.testing.assert_close(weights_of(policy), weights, rtol=0, atol=1e-6)
        reference.train()
        with training_weights(optimizer):
            torch.testing.assert_close([w.detach() for w in weights_of(policy)], training, rtol=0, atol=1e-6)
        assert step < 1 or not torch.allclose(weights_of(policy)[0], training[0], atol=1e-4)


def test_a_fault_in_a_step_leaves_the_average():
    """An exception inside a step of a schedule-free optimizer does not leave the weights of training in the model."""
    config, policy, _ = policies(*SETTINGS, "train.optimizer=schedule_free_adamw")
    optimizer: Any = make_optimizer(policy, config)
    train(optimizer, weights_of(policy), 3)
    before = [weight.detach().clone() for weight in weights_of(policy)]

    def fails() -> None:
        with training_weights(optimizer):
            assert not torch.allclose(weights_of(policy)[0], before[0], atol=1e-4)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    torch.testing.assert_close([w.detach() for w in weights_of(policy)], before, rtol=0, atol=1e-6)


UNPAGED = [name for name in OPTIMIZERS if not name.startswith("paged")]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", UNPAGED)
def test_a_loaded_state_goes_on_bit_for_bit(kind: str, prepared: bool, tmp_path: Path):
    """The state of every optimizer passes through a checkpoint's files, and later steps are the same bits."""
    config, whole, stopped = policies(*SETTINGS, f"train.optimizer={kind}")
    first, other = (make_optimizer(policy, config) for policy in (whole, stopped))
    for optimizer, policy in ((first, whole), (other, stopped)):
        train(optimizer, weights_of(policy), 3)
    write_state(tmp_path, {"optimizer": other.state_dict()})
    resumed = make_optimizer(stopped, config)
    given = Accelerator().prepare_optimizer(resumed) if prepared else resumed
    load_state(given, read_state(tmp_path)["optimizer"])
    train(first, weights_of(whole), 2, seed=5)
    train(given, weights_of(stopped), 2, seed=5)
    assert all(map(torch.equal, weights_of(whole), weights_of(stopped)))
