"""Short runs of TRL's trainers on a very small model with sharp predictions, and all that they log."""

import inspect
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fastpref.patch.trainers import find_trainer
from tests.support.tiny import model_config
from tests.support.toy_tokenizers import toy_tokenizer

STEPS = 5
NOT_COMPARED = ("runtime", "per_second", "epoch", "step", "total_flos", "train_loss")


@dataclass(frozen=True)
class Run:
    """One run: what is trained, how, and with which model."""

    trainer: str  # "DPO", "KTO", "ORPO", "CPO", "TPO"
    loss: Any = None  # loss_type
    lora: bool = True
    precomputed: bool = False
    left: bool = False  # side of the padding
    kind: str = "llama"
    lora_head: bool = False
    accumulation: int = 1
    evaluate: bool = False
    alike: bool = False  # all rows have the same prompt and chosen text
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __str__(self) -> str:
        marks = {
            "lora": "LoRA",
            "precomputed": "precomputed",
            "left": "left",
            "lora_head": "head",
            "evaluate": "eval",
            "alike": "alike",
        }
        words = [self.trainer, "+".join([self.loss] if isinstance(self.loss, str) else self.loss or [])]
        words += [word for name, word in marks.items() if getattr(self, name)]
        words += [] if self.kind == "llama" else [self.kind]
        words += [f"{name}={value}" for name, value in self.settings.items()]
        return "-".join(filter(None, words)) + (f"-x{self.accumulation}" if self.accumulation > 1 else "")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = toy_tokenizer(eos="</s>", special=["<pad>"])
    tokenizer.pad_token = "<pad>"
    return tokenizer


@cache
def _model_folder(kind: str, root: Path) -> Path:
    folder = root / kind
    config = model_config(kind)
    config.vocab_size = len(tokenizer())
    config.pad_token_id, config.eos_token_id = tokenizer().pad_token_id, tokenizer().eos_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.get_output_embeddings().weight.mul_(4)  # sharp predictions
    model.save_pretrained(folder)
    return folder


def make_model(kind: str, root: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(_model_folder(kind, root), dtype=torch.float32)


def rows(count: int = 14, seed: int = 0) -> list[dict[str, Any]]:
    """Return pairs of texts of unaligned lengths; some prompts occur twice."""
    rng = Random(seed)

    def text(low: int, high: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(low, high)))

    prompts = [text(2, 24) for _ in range(count)]
    prompts[1] = prompts[0]
    return [{"prompt": p, "chosen": text(1, 15), "rejected": text(1, 15)} for p in prompts]


def dataset(run: Run, root: Path, seed: int = 0) -> Dataset:
    pairs = rows(seed=seed)
    if run.alike:
        pairs = [row | {"prompt": pairs[2]["prompt"], "chosen": pairs[2]["chosen"]} for row in pairs]
    if run.trainer == "TPO":
        pairs = [row | {"reference": row["chosen"][::-1] + "x"} for row in pairs]
    if run.trainer == "KTO":
        pairs = [
            {"prompt": row["prompt"], "completion": row["chosen" if at % 3 else "rejected"], "label": at % 3 != 0}
            for at, row in enumerate(pairs)
        ]
    if not run.precomputed:
        return Dataset.from_list(pairs)
    folder = Path(tempfile.mkdtemp(dir=root))  # TRL caches its computations next to a file
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return Dataset.from_json(str(file), cache_dir=str(folder))  # pyright: ignore[reportReturnType]


def left_padded(collator: Any) -> Callable[[Any], Any]:
    """Return a collator that moves all padding of another collator's batch to the left."""

    def collate(features: Any) -> Any:
        batch = collator(features)
        for name in [name for name in batch if name.endswith("attention_mask") and name != "prompt_attention_mask"]:
            prefix = name.removesuffix("attention_mask")
            missing = (batch[name] == 0).sum(1)
            parts = [prefix + part for part in ("input_ids", "attention_mask", "labels")]
            for part in [*parts, prefix.removesuffix("completion_") + "completion_mask"]:
                if part in batch:
                    batch[part] = torch.stack([torch.roll(row, int(n)) for row, n in zip(batch[part], missing)])
        return batch

    return collate


def fit(run: Run) -> Run:
    """Return the run with the losses that this TRL has, or skip the test if it has none of them."""
    trainer = find_trainer(trl, f"{run.trainer}Trainer")
    if trainer is None:
        pytest.skip(f"TRL {trl.__version__} has no {run.trainer}Trainer")
    source = Path(inspect.getfile(trainer)).read_text()
    losses = [run.loss] if isinstance(run.loss, str) else run.loss or []
    known = [loss for loss in losses if f'"{loss}"' in source]
    if losses and not known:
        pytest.skip(f"TRL {trl.__version__}'s {run.trainer}Trainer has no loss {losses[0]}")
    return replace(run, loss=known if isinstance(run.loss, list) else run.loss)


@dataclass(frozen=True)
class Trained:
    logs: list[dict[str, float]]
    weights: dict[str, Tensor]  # the trained weights
    trainer: Any


def make_trainer(run: Run, root: Path, adapters: peft.PeftConfig | None = None) -> Any:
    trainer_class = find_trainer(trl, f"{run.trainer}Trainer")
    module = inspect.getmodule(trainer_class)
    make_settings = getattr(module, f"{run.trainer}Config")
    known = inspect.signature(make_settings).parameters
    settings: dict[str, Any] = {
        "output_dir": str(root / "out"), "max_steps": STEPS, "logging_steps": 1, "report_to": "none",
        "per_device_train_batch_size": 3, "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": run.accumulation, "learning_rate": 3e-3, "lr_scheduler_type": "constant",
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "max_length": 64,
        "max_prompt_length": 40,  # before TRL 1.0
        "adam_epsilon": 1e-5,  # otherwise directions without a gradient follow rounding errors
        "remove_unused_columns": run.trainer == "DPO",
    }  # fmt: skip
    settings |= {"loss_type": run.loss} if run.loss else {}
    settings |= {"precompute_ref_log_probs": True} if run.precomputed else {}
    settings |= {"eval_strategy": "steps", "eval_steps": 2} if run.evaluate else {}
    settings = {name: value for name, value in {**settings, **run.settings}.items() if name in known}
    targets: Any = ["q_proj", "down_proj", "lm_head"] if run.lora_head else "all-linear"
    adapters = adapters or peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    model = make_model(run.kind, root)
    torch.manual_seed(0)  # for the adapters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class(
            model=model,
            args=make_settings(**settings),
            train_dataset=dataset(run, root),
            eval_dataset=dataset(run, root, seed=1) if run.evaluate else None,
            processing_class=tokenizer(),
            **({"peft_config": adapters} if run.lora else {}),
        )
    if run.left:
        trainer.data_collator = left_padded(trainer.data_collator)
    return trainer


def train(run: Run, root: Path) -> Trained:
    """Train with TRL in its current state, patched or not."""
    trainer = make_trainer(run, root)
    with torch.no_grad():  # move away from the reference, where rounding decides whose reward is higher
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
            elif not run.lora and "mlp" in name:
                parameter.mul_(1.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    model: nn.Module = trainer.model
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return Trained(trainer.state.log_history, weights, trainer)


_unpatched: dict[Run, Trained] = {}


def unpatched(run: Run, root: Path) -> Trained:
    """Return the run of TRL without the patch; it is trained only once."""
    if run not in _unpatched:
        _unpatched[run] = replace(train(run, root), trainer=None)
    return _unpatched[run]


def numbers(trained: Trained) -> dict[tuple[int, str], float]:
    """Return every logged number by its place in the log and its name."""
    return {
        (at, name): float(value)
        for at, entry in enumerate(trained.logs)
        for name, value in entry.items()
        if not any(word in name for word in NOT_COMPARED)
    }


def residuals(ours: Trained, theirs: Trained, rtol: float = 1e-4, atol: float = 5e-6) -> list[float]:
    """Return the relative differences of all logged numbers; raise AssertionError if one exceeds `rtol`."""
    a, b = numbers(ours), numbers(theirs)
    assert a.keys() == b.keys()
    assert len([entry for entry in theirs.logs if "loss" in entry]) == STEPS
    apart = {
        key: (a[key], b[key])
        for key in b
        if not (math.isclose(a[key], b[key], rel_tol=rtol, abs_tol=atol) or (math.isnan(a[key]) and math.isnan(b[key])))
    }
    assert not apart, apart
    return [(a[key] - b[key]) / max(abs(b[key]), 1e-3) for key in b if not math.isnan(b[key])]
