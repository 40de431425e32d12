"""Patching and unpatching: what is replaced, when, and that everything is restored."""

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
import trl
from accelerate.state import AcceleratorState
from transformers import LlavaConfig, LlavaForConditionalGeneration, T5Config, T5ForConditionalGeneration

import fastpref
from fastpref.errors import UserError
from fastpref.kernels import linear_logprob_torch
from fastpref.patch import plan
from fastpref.patch.plan import make_plan
from fastpref.patch.trainers import HOMES, find_trainer
from tests.support.paths import EXAMPLES
from tests.support.trl_runs import Run, make_model, make_trainer, numbers, train, unpatched

TRAINERS = [trainer for name in HOMES if (trainer := find_trainer(trl, name)) is not None]
SHORT = Run("DPO", ["sigmoid"])


@pytest.fixture(autouse=True)
def unpatch() -> Iterator[None]:
    yield
    fastpref.unpatch(trl)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("patch")


def attributes() -> dict[str, Any]:
    """Return every attribute of TRL's loaded modules and of their classes, as stored in its `__dict__`."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or not (name == "trl" or name.startswith("trl.")):
            continue
        for key, value in list(vars(module).items()):
            found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{key}.{inner}": held for inner, held in vars(value).items()}
    return found


def differing(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    return {name for name in a.keys() | b.keys() if a.get(name) is not b.get(name)}


def test_unpatch_restores_every_attribute() -> None:
    """Only attributes of the patched trainers differ while patched, and none afterwards."""
    before = attributes()
    patch = fastpref.patch(trl)
    exchanged = differing(before, attributes())
    assert exchanged
    homes = {trainer.__module__ for trainer in TRAINERS}
    assert {name for name in exchanged if not name.startswith(tuple(homes))} == set()
    assert len(exchanged) == len(patch.patched)
    fastpref.unpatch(trl)
    assert differing(before, attributes()) == set()


def test_patching_twice_is_patching_once() -> None:
    """The second call returns the same patch with the new options, and one unpatch undoes both calls."""
    before = attributes()
    first = fastpref.patch(trl)
    patched = attributes()
    second = fastpref.patch(trl, prefix_sharing=False)
    assert second is first
    assert not first.prefix_sharing
    assert differing(patched, attributes()) == set()
    fastpref.unpatch(trl)
    assert differing(before, attributes()) == set()
    fastpref.unpatch(trl)  # has nothing to do


def test_with_restores_after_an_error() -> None:
    """As a context manager, a patch is undone also after an error."""
    before = attributes()
    with pytest.raises(ZeroDivisionError), fastpref.patch(trl):
        raise ZeroDivisionError
    assert differing(before, attributes()) == set()


def test_a_class_imported_before_is_patched() -> None:
    """The classes themselves are changed, so that it does not matter who imported them before."""
    held = {trainer: dict(vars(trainer)) for trainer in TRAINERS}
    fastpref.patch(trl)
    assert all(differing(held[trainer], dict(vars(trainer))) for trainer in TRAINERS)
    from trl import DPOTrainer

    assert find_trainer(trl, "DPOTrainer") is DPOTrainer


@pytest.mark.parametrize("name", ["SFTTrainer", "GRPOTrainer", "RewardTrainer"])
def test_other_trainers_are_untouched(name: str) -> None:
    """Classes of other trainers, and all names of their modules, are the same objects as before."""
    module = sys.modules[getattr(trl, name).__module__]
    before = dict(vars(module)), dict(vars(getattr(trl, name)))
    fastpref.patch(trl)
    assert (dict(vars(module)), dict(vars(getattr(trl, name)))) == before


def test_an_unpatched_model_is_itself_again(root: Path) -> None:
    """After unpatching, model and trainer have the same attention and forward method as before, and TRL's numbers."""
    trainer = make_trainer(SHORT, root)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.get_base_model()
    before, forward = model.config._attn_implementation, vars(model).get("forward")
    theirs = trainer.compute_loss(trainer.model, batch)
    with fastpref.patch(trl):
        ours = trainer.compute_loss(trainer.model, batch)
        assert vars(model).get("forward") is forward
    assert model.config._attn_implementation == before
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), theirs, rtol=0, atol=0)


def test_an_unknown_trl_is_refused_by_name() -> None:
    """The error gives its version, what is not recognised and the known versions, and nothing is replaced."""
    strange, home = ModuleType("trl"), ModuleType("trl.trainer.dpo_trainer")
    strange.__version__ = "7.3"  # pyright: ignore[reportAttributeAccessIssue]
    vars(home)["DPOTrainer"] = type("DPOTrainer", (), {"__module__": home.__name__, "compute_loss": lambda self: 0})
    before = attributes()
    held = {name: module for name, module in sys.modules.items() if name == "trl" or name.startswith("trl.")}
    for name in held:
        del sys.modules[name]
    sys.modules |= {"trl": strange, "trl.trainer": ModuleType("trl.trainer"), home.__name__: home}
    try:
        with pytest.raises(UserError, match=r"trl 7\.3 is not known here: its DPOTrainer .* known are TRL 0\.24 to"):
            fastpref.patch(strange)
    finally:
        sys.modules |= held
    assert differing(before, attributes()) == set()
    with pytest.raises(UserError, match="takes the module trl"):
        fastpref.patch(fastpref)


def test_rows_stay_padded_where_trees_cannot_be_had(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For a model without such attention, rows stay padded, one log message names it, and training is the same."""
    run = Run("DPO", ["sigmoid"], kind="mamba", lora=False, precomputed=True)
    theirs = unpatched(run, root)
    with caplog.at_level(logging.WARNING, "fastpref.patch"), fastpref.patch(trl):
        ours = train(run, root)
    assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-4, abs=1e-6)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "fastpref.patch"]
    assert "MambaForCausalLM" in message
    assert "rows stay padded" in message


def test_prompt_learning_is_left_to_trl(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For prompt tuning, TRL's own code runs, with its numbers or its error (0.29), and one log message says so."""
    prompts = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    losses: list[float | str] = []

    def outcome(trainer: Any, batch: Any) -> float | str:
        try:
            return trainer.compute_loss(trainer.model, batch).item()
        except RuntimeError as error:
            return str(error)

    for patched in (False, True):
        with caplog.at_level(logging.WARNING, "fastpref.patch"), fastpref.patch(trl) if patched else nullcontext():
            trainer = make_trainer(SHORT, root, prompts)
            batch = next(iter(trainer.get_train_dataloader()))
            losses += [outcome(trainer, batch) for _ in range(2)]
    assert losses == [losses[0]] * 4
    (message,) = [record.getMessage() for record in caplog.records if record.name == "fastpref.patch"]
    assert "DPOTrainer with LlamaForCausalLM: PROMPT_TUNING is prompt learning" in message.replace("PeftType.", "")
    assert "TRL's own path is taken" in message


def test_models_that_are_left_to_trl(root: Path) -> None:
    """Encoder-decoders, vision-language models, and modules that are no transformers model are refused by name."""
    trainer = SimpleNamespace(args=SimpleNamespace(), accelerator=SimpleNamespace(mixed_precision="no"))
    small: dict[str, Any] = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    t5 = T5ForConditionalGeneration(T5Config(**small))
    assert "t5 is an encoder-decoder" in str(make_plan(trainer, t5, sharing=True).refused)
    text: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "model_type": "llama"}
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = {name: text[name] for name in sizes} | {
        "image_size": 8,
        "patch_size": 4,
        "model_type": "clip_vision_model",
    }
    llava = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    assert "llava models take images" in str(make_plan(trainer, llava, sharing=True).refused)
    assert "Linear is no transformers model" in str(make_plan(trainer, torch.nn.Linear(2, 2), sharing=True).refused)
    llama = make_model("llama", root)
    compiled = SimpleNamespace(args=SimpleNamespace(torch_compile=True))
    assert "torch.compile" in str(make_plan(compiled, llama, sharing=True).refused)
    assert make_plan(trainer, llama, sharing=True).refused is None


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("no", torch.float32)]
)
def test_attention_is_tried_in_the_dtype_that_training_uses(
    monkeypatch: pytest.MonkeyPatch, root: Path, precision: str, dtype: torch.dtype
) -> None:
    """FlexAttention of a model in float32 is tried in the trainer's mixed precision: float32 may not fit the GPU."""
    tried: list[torch.dtype] = []
    monkeypatch.setattr(plan, "why_not", lambda kernel, calls, dtype, device: tried.append(dtype) or "no GPU")
    trainer = SimpleNamespace(args=SimpleNamespace(), accelerator=SimpleNamespace(mixed_precision=precision))
    assert make_plan(trainer, make_model("llama", root), sharing=True).padded is None
    assert tried == [dtype]


def test_a_script_runs_patched(tmp_path: Path) -> None:
    """`python -m fastpref.patch` passes a script its arguments and name, patches before it runs, and reports."""
    script = tmp_path / "mine.py"
    script.write_text(
        "import sys, beside\nfrom trl import DPOTrainer\n"
        "loss = getattr(DPOTrainer, '_compute_loss', None) or DPOTrainer.concatenated_forward\n"
        "print(__name__, sys.argv[1:], beside.x, loss.__module__)\n"
    )
    (tmp_path / "beside.py").write_text("x = 5\n")
    command = [sys.executable, "-m", "fastpref.patch", "--report", str(script), "--lr", "1", "-v"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["__main__", "['--lr',", "'1',", "'-v']", "5", "trl.trainer.dpo_trainer"]
    assert re.search("DPOTrainer: (_compute_loss|concatenated_forward)", done.stderr)
    assert "no patched trainer has computed anything" in done.stderr
    missing = subprocess.run([*command[:3], "none.py"], capture_output=True, text=True, check=False)
    assert missing.returncode == 2
    assert "none.py: no such file" in missing.stderr


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 5 wrote the example's tokenizer")
def test_the_example_saves_tokens(tmp_path: Path) -> None:
    """The example script has the same losses patched and unpatched, and computes fewer tokens when patched."""
    script = str(EXAMPLES / "trl_dpo.py")
    losses = []
    for command in ([script], ["-m", "fastpref.patch", "--report", script]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        losses.append([float(loss) for loss in re.findall(r"'loss': '?([0-9.e-]+)", done.stdout)])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=0.1)  # Adam follows rounding errors if there is no gradient
    saved = re.search(r"([0-9]+)% saved by shared beginnings", done.stderr)
    assert saved is not None
    assert int(saved[1]) >= 20


@pytest.fixture
def own_accelerator() -> Iterator[None]:
    """Forget the precision that a trainer has set for the whole process, so that later runs can set theirs."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("own_accelerator")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("trainer", ["DPO", "KTO", "CPO"])
def test_the_head_multiplies_in_the_trainers_precision(
    trainer: str, lora: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run of TRL with bf16, the head of a float32 model multiplies in bfloat16, as TRL's own does, and the loss
    is TRL's up to its rounding."""
    run = Run(trainer, lora=lora, settings={"bf16": True})
    seen, walk = set(), linear_logprob_torch.walk_vocabulary

    def watched(hidden: torch.Tensor, weight: Any, *args: Any, **options: Any) -> Any:
        seen.update((hidden.dtype, weight.rows(0, 5).dtype))
        return walk(hidden, weight, *args, **options)

    made = make_trainer(run, root)
    batch = next(iter(made.get_train_dataloader()))
    losses = []
    for patching in (nullcontext(), fastpref.patch(trl)):
        with patching:
            made.compute_loss(made.model, dict(batch))  # the first call also tries the head, without autocast
            monkeypatch.setattr(linear_logprob_torch, "walk_vocabulary", watched)
            losses.append(float(made.compute_loss(made.model, dict(batch)).detach()))
            monkeypatch.undo()
    assert seen == {torch.bfloat16}
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
