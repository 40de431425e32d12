"""Supervised training is TRL's: ten steps of SFTTrainer on the same rows have the same losses and weights."""

import json
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import fastpref
from fastpref.data.order import data_order
from tests.support.paths import QUICKSTART_MODEL, QUICKSTART_ROWS
from tests.support.runs import rows

STEPS, BATCH, RATE = 10, 6, 1e-3
MARKED = """{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}
{%- if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""The quickstart's chat template with the marks by which TRL knows the assistant's words, without the line end after
the last turn, which TRL would score as a part of a completion, and fastpref does not."""
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def completions() -> list[dict[str, Any]]:
    """Return prompts and completions as messages, of unequal lengths."""
    pairs = map(json.loads, QUICKSTART_ROWS.read_text(encoding="utf-8").splitlines()[:23])
    return [
        {"prompt": pair["prompt"], "completion": [turn | {"content": turn["content"] * (1 + at % 3)}
                                                  for turn in pair["chosen"]]}
        for at, pair in enumerate(pairs)
    ]  # fmt: skip


def conversations() -> list[dict[str, Any]]:
    """Return conversations of one to three exchanges, some of which share a beginning."""
    talks = [row["prompt"] + row["completion"] for row in completions()]
    return [{"messages": [turn for talk in talks[at - at % 3 : at + 1] for turn in talk]} for at in range(len(talks))]


DATA: dict[str, tuple[Any, dict[str, Any]]] = {
    "completion only": (completions, {"completion_only_loss": True}),
    "assistant only": (conversations, {"assistant_only_loss": True}),
}


class InOrder(SFTTrainer):
    """TRL's trainer on the rows as they come, because each library shuffles in its own way."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]


def trl_run(folder: Path, given: list[dict[str, Any]], parts: int, **options: Any) -> tuple[list[float], Any]:
    """Return the losses of TRL's steps, and the trained model."""
    order = islice(data_order(len(given), BATCH, 0), STEPS)
    data = Dataset.from_list([given[at] for places in order for at in places])
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART_MODEL)
    tokenizer.chat_template = MARKED
    settings = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=STEPS, per_device_train_batch_size=BATCH // parts,
        gradient_accumulation_steps=parts, learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, max_length=None, weight_decay=0.0, max_grad_norm=1.0, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = InOrder(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


def config_of(folder: Path, given: list[dict[str, Any]]) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    path = folder / "sft.toml"
    path.write_text(
        f'[model]\nname = "{QUICKSTART_MODEL.as_posix()}"\n[loss]\ntype = "sft"\n[[data]]\npath = "rows.jsonl"\n'
        f"[tokens]\nchat_template = {json.dumps(UNMARKED)}\n"
        f'[train]\nsteps = {STEPS}\nbatch = {BATCH}\nlearning_rate = {RATE}\nschedule = "constant"\nwarmup = 0\n'
        f'seed = 0\nweight_decay = 0.0\nmax_grad_norm = 1.0\n[output]\ndir = "{(folder / "run").as_posix()}"\n'
    )
    return path


def unequal(one: Any, other: Any) -> Iterator[float]:
    """Yield the largest difference of each weight of two models."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        yield float((weight - theirs[name]).abs().max())


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", DATA)
def test_ten_steps_are_those_of_trl(kind: str, parts: int, tmp_path: Path):
    """The loss of each step is that of TRL's SFTTrainer to 1e-5, whether TRL computes the step at once or accumulates
    it and fastpref packs it into shared beginnings, and the trained weights agree."""
    make, options = DATA[kind]
    theirs, their_model = trl_run(tmp_path, make(), parts, **options)
    overrides = [] if parts == 1 else ["train.tokens_per_microbatch=150"]
    result = fastpref.train(config_of(tmp_path, make()), overrides, cache=False)
    ours = [row["loss"] for row in rows(result.output_dir) if "loss" in row]
    assert len(ours) == len(theirs) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert ours[-1] < 0.9 * ours[0]
    own_model = AutoModelForCausalLM.from_pretrained(result.output_dir / "final", dtype=torch.float32)
    assert max(unequal(own_model, their_model)) < RATE / 2


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_layouts_train_the_same(layout: str, tmp_path: Path):
    """Ten steps of packed and padded rows have the losses of shared beginnings to 1e-5."""
    config = config_of(tmp_path, conversations())
    losses = []
    for way in ("tree", layout):
        out = f"output.dir={(tmp_path / way).as_posix()}"
        result = fastpref.train(config, [f"train.layout={way}", out], cache=False)
        losses.append([row["loss"] for row in rows(result.output_dir) if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-5)
