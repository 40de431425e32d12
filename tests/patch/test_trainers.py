"""A patched TRL run is the unpatched one: every logged number of every step, and the weights at its end."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from trl_runs import Run, Trained, residuals, train, unpatched

import fastpref

DPO_LOSSES = [
    ["sigmoid"], ["hinge"], ["ipo"], ["exo_pair"], ["nca_pair"], ["robust"], ["bco_pair"], ["sppo_hard"], ["aot"],
    ["aot_unpaired"], ["apo_zero"], ["apo_down"], ["discopop"], ["sft"], ["sigmoid_norm"],
]  # fmt: skip
KTO_LOSSES = ["kto", "apo_zero_unpaired"]
CPO_LOSSES = ["sigmoid", "hinge", "ipo", "simpo"]
TPO_LOSSES = ["sigmoid", "hinge", "ipo", "tpo-l"]
SMOOTH = {"label_smoothing": 0.1}
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}

# Every trainer, loss, reference, kind of training, padding side, accumulation and evaluation; pairs of them mostly.
COVER = [
    Run("DPO", ["sigmoid"], accumulation=2, evaluate=True),
    Run("DPO", ["hinge", "nca_pair", "sft"], lora=False),
    Run("DPO", ["ipo"], precomputed=True, left=True),
    Run("DPO", ["robust", "exo_pair", "bco_pair"], left=True, settings=SMOOTH),
    Run("DPO", ["sppo_hard", "aot", "apo_zero"], lora=False, precomputed=True, evaluate=True),
    Run("DPO", ["aot_unpaired", "apo_down", "discopop", "sigmoid_norm"], settings=CHECKPOINTED),
    Run("DPO", ["sigmoid"], lora=False, left=True, settings={"use_weighting": True, "ld_alpha": 0.5}),
    Run("DPO", ["sigmoid"], settings={"f_divergence_type": "js_divergence"}, kind="gemma2"),
    Run("DPO", ["sigmoid"], kind="mixtral", lora=False),
    Run("DPO", ["sigmoid"], kind="qwen2"),
    Run("DPO", ["sigmoid"], kind="gpt2", lora=False),
    Run("KTO", "kto", accumulation=2, evaluate=True),
    Run("KTO", "kto", lora=False, left=True),
    Run("KTO", "kto", precomputed=True, settings=CHECKPOINTED),
    Run("KTO", "kto", kind="mixtral", lora=False, precomputed=True, evaluate=True),
    Run("KTO", "apo_zero_unpaired", left=True),
    Run("KTO", "apo_zero_unpaired", lora=False, precomputed=True, evaluate=True),
    Run("ORPO", accumulation=2, evaluate=True),
    Run("ORPO", lora=False, settings=CHECKPOINTED),
    Run("ORPO", lora=False, left=True),
    Run("ORPO", kind="gemma2"),
    Run("ORPO", kind="mistral"),
    Run("ORPO", kind="gpt2", lora=False),
    Run("ORPO", kind="qwen3-moe", lora=False),
    Run("ORPO", lora_head=True),
    Run("CPO", "simpo", evaluate=True, settings={"cpo_alpha": 0.0}),
    Run("CPO", "simpo", lora=False, settings={"cpo_alpha": 0.5, "simpo_gamma": 0.3}, kind="qwen2"),
    Run("CPO", "sigmoid", lora=False, accumulation=2, kind="mixtral"),
    Run("CPO", "hinge", left=True),
    Run("CPO", "ipo", settings=CHECKPOINTED),
    Run("TPO", "sigmoid", evaluate=True),
    Run("TPO", "tpo-l", lora=False),
]
PADDED = [
    Run("DPO", ["sigmoid"], accumulation=2, evaluate=True),
    Run("KTO", "kto", lora=False, left=True),
    Run("ORPO", accumulation=2, evaluate=True),
    Run("CPO", "simpo", evaluate=True, settings={"cpo_alpha": 0.0}),
    Run("TPO", "sigmoid", evaluate=True),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


def patched(run: Run, root: Path, **options: Any) -> tuple[Trained, fastpref.Patch]:
    with fastpref.patch(trl, **options) as patch:
        return train(run, root), patch


def expect_same(run: Run, root: Path, **options: Any) -> list[float]:
    theirs = unpatched(run, root)
    ours, patch = patched(run, root, **options)
    apart = residuals(ours, theirs)
    for name, weight in theirs.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=1e-3, atol=2e-5, msg=name)
    first, last = (entry["loss"] for entry in [e for e in theirs.logs if "loss" in e][:: 5 - 1])
    assert abs(first - last) > 1e-3 * abs(first)  # it has moved
    assert patch.tally.passes > 0
    return apart


@pytest.mark.parametrize("run", COVER, ids=str)
def test_a_patched_run_is_trls(run: Run, root: Path) -> None:
    """With trees: losses, metrics and weights of five steps are TRL's, and fewer tokens are computed."""
    expect_same(run, root)


@pytest.mark.parametrize("run", PADDED, ids=str)
def test_the_head_alone_is_trls(run: Run, root: Path) -> None:
    """Without prefix sharing rows stay as they are, and every number is TRL's."""
    expect_same(run, root, prefix_sharing=False)
