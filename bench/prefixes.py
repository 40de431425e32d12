"""Whole DPO steps on pairs that share their beginnings, in every layout and by TRL: the profile `prefixes`.

The layouts compute the same examples with the same model, one micro-batch a step. "trees" is what fastpref did before a
micro-batch was a forest: each example's completions share its prompt, and examples share nothing. It exists only here.
Every engine has the same adapters, which the tiny learning rate leaves as they are, so the layouts must have the
same loss. TRL's differs a little where the chat template writes a newline after a turn, which TRL scores too.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.engines import Job, trl_model, trl_trainer
from bench.measure import Local, Row, take_turns
from bench.results import TREES, TRL
from bench.step_data import TOKENIZER, StepShape, choose_rows, shared_beginnings, write_model, write_rows
from fastpref.config import Config
from fastpref.data import batch
from fastpref.data.batch import Layout, computed_tokens
from fastpref.data.cache import load_examples
from fastpref.data.example import Example
from fastpref.data.forest import Forest, Laid, Tokens, forest_tokens, lay_out
from fastpref.model.load import load_model, mixed_precision
from fastpref.model.policy import Policy
from fastpref.model.tokenizer import load_tokenizer
from fastpref.processes import start_processes
from fastpref.step.objective import Objective
from fastpref.step.optimizer import make_optimizer
from fastpref.step.reference import Reference, make_reference

LAYOUTS: dict[str, Layout] = {"padded": "padded", "packed": "packed", TREES: "tree", "forest": "tree"}
ROWS = TOKENIZER.parent / "train.jsonl"
LEARNING_RATE = 1e-12  # an optimizer step costs what it costs, and changes no number
LONGEST = 1 << 17  # tokens; nothing is cut
LOSS_ERROR = {"cpu": 1e-4, "cuda": 1e-2}  # in float32 and in bfloat16


@dataclass(frozen=True)
class Prefixes:
    """The sizes of the profile."""

    shape: StepShape  # of the random model; its batch is the number of pairs a step
    tool_tokens: int
    completions: int  # of a prompt
    turns: int  # of a conversation
    longest: int  # tokens of a pair of the file
    repeats: int

    @property
    def rule(self) -> str:
        return (
            f"DPO with LoRA of rank 16; a step is {self.shape.batch} pairs in one micro-batch. The pairs are the "
            f"first of the file with at most {self.longest} tokens a side. Tokens are those that the policy computes a "
            "step, padding included; the reference computes as many. Pairs/s is the median of the turns; × TRL and × "
            "trees are the medians of the ratios of each turn, ± the distance of p20 or p80, the larger. MiB is the "
            "most that torch's allocator held in addition to the model, its adapters and the optimizer. "
            f"{self.repeats} turns."
        )


def compare_layouts(sizes: Prefixes, model: Path | None, data: Path | None) -> Iterator[dict[str, Any]]:
    """Measure the four data sets, made from a file of pairs and for a model: by default the quickstart's and random."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if model is None:
            model = place / "model"
            write_model(sizes.shape, model)
        pairs = choose_rows(str(model), data or ROWS, sizes.shape.batch, sizes.longest)
        config = _config(model, place / "rows.jsonl", sizes.shape.batch)
        tokenizer = load_tokenizer(config.model)
        sets = shared_beginnings(pairs, tokenizer, sizes.tool_tokens, sizes.completions, sizes.turns)
        accelerator, _ = start_processes(config, mixed_precision(config))
        loaded = load_model(config, accelerator.device)
        fill_adapters(loaded.wrapped)
        accelerator.prepare_model(loaded.policy)
        reference, _ = make_reference(config, loaded, accelerator.autocast)
        for name, rows in sets.items():
            write_rows(rows, place / "rows.jsonl")
            examples = list(load_examples(config, tokenizer, cache=False).train)
            assert len(examples) == len(rows), f"{name}: {len(rows) - len(examples)} pairs were left out"
            yield _compare(name, examples, config, loaded.policy, reference, sizes.repeats)


def _config(model: Path, rows: Path, pairs: int) -> Config:
    return Config.model_validate(
        {
            "model": {"name": str(model)},
            "lora": {"rank": 16, "alpha": 32},
            "loss": {"type": "dpo"},
            "data": [{"path": str(rows)}],
            "tokens": {"max_length": LONGEST},
            "train": {"batch": pairs, "learning_rate": LEARNING_RATE, "checkpointing": False},
        }
    )


def fill_adapters(model: torch.nn.Module) -> None:
    """Give every engine's adapters the same random numbers, with which the policy differs from its reference."""
    generator = torch.Generator().manual_seed(0)
    for _, tensor in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)


# --- the engines ------------------------------------------------------------------------------------------------------


def _compare(
    name: str, examples: list[Example], config: Config, policy: Policy, reference: Reference, repeats: int
) -> dict[str, Any]:
    device = next(policy.parameters()).device
    losses: dict[str, float] = {}
    tokens: dict[str, int] = {layout: layout_tokens(examples, layout) for layout in LAYOUTS}
    optimizer = make_optimizer(policy, config)
    steps = {}
    for layout, kind in LAYOUTS.items():
        objective = Objective(policy, reference, config.loss, kind, LONGEST * len(examples), 0, device)
        steps[layout] = _our_step(examples, layout, objective, optimizer)
    rows = [Row(TRL, note="" if find_spec("trl") else "not installed"), *map(Row, steps)]
    with tempfile.TemporaryDirectory() as folder:
        if not rows[0].note:
            steps[TRL], tokens[TRL] = _trl_step(config, len(examples), folder)
        subjects = {
            method: Local(lambda method=method: losses.__setitem__(method, steps[method]()), device.type)
            for method in steps
        }
        take_turns(subjects, [row for row in rows if not row.note], repeats)
    for row in rows:
        if row.method in LAYOUTS and row.ms:
            row.value_error = abs(losses[row.method] / losses["padded"] - 1)
            row.note = "" if row.value_error <= LOSS_ERROR[device.type] else f"wrong: loss off by {row.value_error:.1e}"
    records = [row.record() | {"tokens": tokens.get(row.method), "loss": losses.get(row.method)} for row in rows]
    return {"what": name, "pairs": len(examples), "rows": records}


def _our_step(
    examples: list[Example], layout: str, objective: Objective, optimizer: torch.optim.Optimizer
) -> Callable[[], float]:
    """Return a step of fastpref's trainer in a layout, without its loop. It returns the loss."""
    lay = trees if layout == TREES else nullcontext

    def step() -> float:
        objective.policy.train()
        with lay():
            metrics, work = objective.step(examples, lambda loss: loss.backward())
        assert work.microbatches == 1
        optimizer.step()
        optimizer.zero_grad()
        return metrics.result()["loss"]

    return step


def _trl_step(config: Config, pairs: int, folder: str) -> tuple[Callable[[], float], int]:
    """Return a step of TRL's trainer on the config's rows, without its loop, and the tokens of its padded batch."""
    job = Job(
        engine="trl", method="dpo", model=config.model.name, rows=config.data[0].path or "", passes=1, steps=1,
        batch=pairs, max_length=LONGEST, checkpointing=False,
    )  # fmt: skip
    trainer = trl_trainer(job, trl_model(job), folder)
    fill_adapters(trainer.model)
    for group in trainer.create_optimizer().param_groups:
        group["lr"] = LEARNING_RATE
    trainer.current_gradient_accumulation_steps = 1
    rows = list(trainer.train_dataset)

    def step() -> float:
        loss = trainer.training_step(trainer.model, trainer.data_collator(rows))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(loss)

    return step, trainer.data_collator(rows)["input_ids"].numel()


# --- the layout "trees" -----------------------------------------------------------------------------------------------


def layout_tokens(examples: Sequence[Example], layout: str) -> int:
    """Return how many tokens a micro-batch of these examples computes in a layout."""
    with trees() if layout == TREES else nullcontext():
        return computed_tokens(examples, LAYOUTS[layout])


@contextmanager
def trees() -> Iterator[None]:
    """Lay out each pair of sequences in the block as a forest of its own."""
    was = batch.lay_out, batch.forest_tokens
    batch.lay_out, batch.forest_tokens = lay_trees, tree_tokens
    try:
        yield
    finally:
        batch.lay_out, batch.forest_tokens = was


def lay_trees(sequences: Sequence[Tokens], prompts: Sequence[int]) -> Laid:
    nodes, ids, paths, start = [], [], [], 0
    for pair in _pairs(sequences):
        laid, before = lay_out(sequences[pair], prompts[pair]), len(nodes)
        for node in laid.forest.nodes:
            parent = None if node.parent is None else node.parent + before
            nodes.append(node._replace(start=node.start + start, parent=parent, end=node.end + start))
        paths += [tuple(slice(run.start + start, run.stop + start) for run in path) for path in laid.paths]
        ids.append(laid.ids)
        start += laid.forest.tokens
    return Laid(Forest(tuple(nodes)), np.concatenate(ids), tuple(paths))


def tree_tokens(sequences: Sequence[Tokens], prompts: Sequence[int]) -> int:
    return sum(forest_tokens(sequences[pair], prompts[pair]) for pair in _pairs(sequences))


def _pairs(sequences: Sequence[Tokens]) -> list[slice]:
    return [slice(at, at + 2) for at in range(0, len(sequences), 2)]
