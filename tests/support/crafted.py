"""Folders of runs of every method, healthy or with one fault."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fastpref.config.losses import CPO, DPO, IPO, KTO, ORPO, PL, SFT, LiPO, LossOptions, SimPO
from fastpref.health import Known
from fastpref.health.bands import first_loss
from fastpref.run.history import FACTS, METRICS

METHODS: dict[str, LossOptions] = {
    o.type: o for o in (DPO(), IPO(), KTO(), ORPO(), SimPO(), CPO(), PL(), LiPO(), SFT())
}
STEPS, BATCH = 100, 16
EVIL = '<script>alert("1")</script><img src=x onerror=alert(2)>'
Row = dict[str, Any]
Shape = Callable[[float], float]  # takes the completed share of the run


def known(method: str = "dpo", **more: Any) -> Known:
    about: dict[str, Any] = {"steps": STEPS, "batch": BATCH, "learning_rate": 1e-4, "rows": 1000, "heldout": 100}
    return Known(METHODS[method], **(about | more))


def shapes(method: str) -> dict[str, Shape]:
    """Return a healthy run's shapes: margins and chosen rewards rise, rejected ones fall, accuracy nears 0.75."""
    loss = METHODS[method]
    first = first_loss(loss)
    start = 1.6 if first is None else first
    # Without a reference, rewards start at the model's own log-probabilities of the completions.
    base = {"orpo": -0.2, "simpo": -3.0, "cpo": -9.0}.get(method, 0.0)
    scale = {"orpo": 0.05, "simpo": 0.8}.get(method, 0.8)
    curves: dict[str, Shape] = {
        "loss": lambda t: start * (1 - 0.3 * t),
        "rewards/chosen": lambda t: base + 0.5 * scale * t,
        "rewards/rejected": lambda t: base - 0.5 * scale * t,
        "rewards/margins": lambda t: scale * t,
        "rewards/accuracies": lambda t: 0.5 + 0.25 * min(1.0, 2 * t),
        "rewards/length_correlation": lambda t: 0.1 * t,
        "logps/chosen": lambda t: -90 + 4 * t,
        "logps/rejected": lambda t: -95 - 4 * t,
        "logps/accuracies": lambda t: 0.55 + 0.05 * t,
        "mean_token_accuracy": lambda t: 0.5 + 0.02 * t,
        "entropy": lambda t: 1.5,
        "grad_norm": lambda t: 1.2,
        "learning_rate": lambda t: 1e-4 * (1 - t),
    }
    if loss.supervised:
        nll = {"loss": lambda t: 1.6 * (1 - 0.3 * t), "nll_loss": lambda t: 1.6 * (1 - 0.3 * t)}
        curves = {name: shape for name, shape in curves.items() if not name.startswith(("rewards/", "logps/"))} | nll
        curves["perplexity"] = lambda t: math.exp(1.6 * (1 - 0.3 * t))
        curves["entropy"] = lambda t: 1.4 * (1 - 0.3 * t)
    if method == "orpo":
        curves |= {"log_odds_chosen": lambda t: -0.1 + t, "log_odds_ratio": lambda t: -0.7 + 0.4 * t}
    if method in ("orpo", "cpo"):
        curves["nll_loss"] = lambda t: 1.4 - 0.3 * t
    if loss.listwise:
        curves["rewards/kendall_tau"] = lambda t: 0.4 * t
    if method == "kto":
        curves["kl"] = lambda t: 0.5 * t
    return curves


NOISE = {
    "loss": 0.02, "rewards/chosen": 0.05, "rewards/rejected": 0.05, "rewards/margins": 0.05, "rewards/accuracies": 0.1,
    "logps/chosen": 8.0, "logps/rejected": 8.0, "grad_norm": 0.3, "rewards/length_correlation": 0.15,
}  # fmt: skip


def rows(
    method: str = "dpo",
    training: dict[str, Shape] | None = None,
    heldout: dict[str, Shape] | None = None,
    *,
    both: dict[str, Shape] | None = None,
    evaluations: tuple[int, ...] = (0, 50, 100),
    steps: int = STEPS,
    seed: int = 0,
    noise: float = 1.0,
) -> Iterator[Row]:
    """Return the rows of a healthy run with some of its shapes replaced: in training rows, held-out rows, or both."""
    random = Random(seed)
    plain = shapes(method) | (both or {})
    trained, held = plain | (training or {}), plain | (heldout or {})
    for step in range(steps + 1):
        t = step / steps
        if step:
            row: Row = {"step": step}
            for name, shape in trained.items():
                spread = noise * NOISE.get(name, 0.0) * (abs(plain["loss"](0)) if name == "loss" else 1)
                spread *= 0.05 if method == "orpo" and name.startswith("rewards/") and "acc" not in name else 1
                row[name] = shape((step - 1) / steps) + (random.gauss(0, spread) if step > 1 else 0.0)
            if "rewards/accuracies" in row:
                row["rewards/accuracies"] = min(1.0, max(0.0, row["rewards/accuracies"]))
            yield row
        if step in evaluations:
            unlogged = ("grad_norm", "learning_rate")
            yield {"step": step} | {f"eval/{n}": shape(t) for n, shape in held.items() if n not in unlogged}


def facts(steps: int = 100, **more: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "steps": steps,
        "plan": "DPO: 100 steps of 16 pairs",
        "seconds": 3723.0,
        "memory": 3_200_000_000,
        "ended": "finished",
        "rows": {"train": {"rows": 1000, "kept": 990, "equal": 10}, "heldout": {"rows": 80, "kept": 80},
                 "duplicates": 3},
        "environment": {"torch": "2.13.0", "device": EVIL},
        "samples": [{"asked": EVIL, "before": EVIL, "after": EVIL}],
        "heldout": {
            "step": steps,
            "paired": True,
            "chosen": random.normal(0.4, 1, 80).tolist(),
            "rejected": random.normal(-0.4, 1, 80).tolist(),
        },
    } | more  # fmt: skip


def write_run(
    folder: Path, method: str = "dpo", steps: int = 100, about: dict[str, Any] | None = None, **of: Any
) -> Path:
    """Write a run's folder, without the model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(
        f'[model]\nname = "m"\n[lora]\n[loss]\ntype = "{method}"\n[[data]]\npath = "d"\n', encoding="utf-8"
    )
    logged = (json.dumps(row) + "\n" for row in rows(method, steps=steps, **of))
    (folder / METRICS).write_text("".join(logged), encoding="utf-8")
    (folder / FACTS).write_text(json.dumps(facts(steps) if about is None else about), encoding="utf-8")
    return folder
