"""A patched TRL run equals the unpatched one: every logged number of every step, and the final weights."""

import logging
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl

import fastpref
from fastpref.patch.states import States
from tests.support.trl_runs import Run, Trained, fit, make_trainer, residuals, train, unpatched

DPO_LOSSES = [
    ["sigmoid"], ["hinge"], ["ipo"], ["exo_pair"], ["nca_pair"], ["robust"], ["bco_pair"], ["sppo_hard"], ["aot"],
    ["aot_unpaired"], ["apo_zero"], ["apo_down"], ["discopop"], ["sft"], ["sigmoid_norm"],
]  # fmt: skip
KTO_LOSSES = ["kto", "apo_zero_unpaired"]
CPO_LOSSES = ["sigmoid", "hinge", "ipo", "simpo"]
TPO_LOSSES = ["sigmoid", "hinge", "ipo", "tpo-l"]
SMOOTH = {"label_smoothing": 0.1}
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}

# Every trainer, loss, reference, kind of training, padding side, accumulation and evaluation, and most pairs of them.
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
    Run("DPO", ["sigmoid"], alike=True, left=True),
    Run("DPO", ["sigmoid"], alike=True, lora=False, settings={"use_weighting": True}),
    Run("KTO", "kto", accumulation=2, evaluate=True),
    Run("KTO", "kto", alike=True),
    Run("KTO", "kto", lora=False, left=True),
    Run("KTO", "kto", precomputed=True, settings=CHECKPOINTED),
    Run("KTO", "kto", kind="mixtral", lora=False, precomputed=True, evaluate=True),
    Run("KTO", "apo_zero_unpaired", left=True),
    Run("KTO", "apo_zero_unpaired", lora=False, precomputed=True, evaluate=True),
    Run("KTO", "kto", lora=False, kind="llama-dynamic"),  # the keys of a shorter call have other angles
    Run("KTO", "kto", lora=False, kind="phi3-longrope"),
    Run("DPO", ["sigmoid"], lora=False, kind="phi3-longrope"),
    Run("ORPO", accumulation=2, evaluate=True),
    Run("ORPO", lora=False, settings=CHECKPOINTED),
    Run("ORPO", lora=False, left=True),
    Run("ORPO", alike=True),
    Run("ORPO", kind="gemma2"),
    Run("ORPO", kind="mistral"),
    Run("ORPO", kind="gpt2", lora=False),
    Run("ORPO", kind="qwen3-moe", lora=False),
    Run("ORPO", kind="doge-moe", lora=False),  # its routers have two halves, and its loss is its own code
    Run("ORPO", kind="dbrx", lora=False),  # stores its number of experts elsewhere
    Run("ORPO", lora_head=True),
    Run("CPO", "simpo", evaluate=True, settings={"cpo_alpha": 0.0}),
    Run("CPO", "simpo", alike=True, settings={"cpo_alpha": 0.0}),
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
    Run("CPO", "simpo", alike=True, settings={"cpo_alpha": 0.0}),
    Run("TPO", "sigmoid", evaluate=True),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


def patched(run: Run, root: Path, **options: Any) -> tuple[Trained, fastpref.Patch]:
    with fastpref.patch(trl, **options) as patch:
        return train(run, root), patch


def expect_same(run: Run, root: Path, **options: Any) -> list[float]:
    run = fit(run)
    theirs = unpatched(run, root)
    ours, patch = patched(run, root, **options)
    apart = residuals(ours, theirs)
    for name, weight in theirs.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=1e-3, atol=2e-5, msg=name)
    first, last = (entry["loss"] for entry in [e for e in theirs.logs if "loss" in e][:: 5 - 1])
    assert abs(first - last) > 1e-3 * abs(first)  # the loss has changed
    assert patch.tally.passes > 0
    return apart


@pytest.mark.parametrize("run", COVER, ids=str)
def test_a_patched_run_is_trls(run: Run, root: Path) -> None:
    """With trees, losses, metrics and weights of five steps are TRL's."""
    expect_same(run, root)


@pytest.mark.parametrize("run", [run for run in COVER if run.alike and run.trainer in ("DPO", "CPO")], ids=str)
def test_labels_that_rows_share_reach_the_head_once(run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head computes fewer rows than TRL scores where rows have the same completion."""
    computed, scored = [], []
    score = States.score_labels

    def counting(self: States, where: Any, targets: Any, *args: Any) -> Any:
        scored.append(len(targets))
        computed.append(len(targets) if self.shared is None else len(self.shared.targets))
        return score(self, where, targets, *args)

    monkeypatch.setattr(States, "score_labels", counting)
    _, patch = patched(fit(run), root)
    assert sum(scored) == patch.tally.scored
    assert sum(computed) < 0.8 * sum(scored)


@pytest.mark.parametrize("kind", ["falcon-h1", "bloom"])
def test_models_that_are_wrong_in_trees_keep_their_rows(kind: str, root: Path) -> None:
    """A state-space branch next to attention, or an attention of its own, keeps rows padded, with TRL's numbers."""
    run = fit(Run("DPO", ["sigmoid"], lora=False, kind=kind))
    theirs = unpatched(run, root)
    ours, patch = patched(run, root)
    residuals(ours, theirs)
    assert any("rows stay padded" in note for note in patch.notes)


@pytest.mark.parametrize("run", PADDED, ids=str)
def test_the_head_alone_is_trls(run: Run, root: Path) -> None:
    """Without prefix sharing, rows stay as they are, and every number is TRL's."""
    expect_same(run, root, prefix_sharing=False)


def test_what_is_left_is_rounding(root: Path) -> None:
    """Differences from TRL have no bias: their mean is within four standard errors of zero."""
    runs = [run for run in COVER if run.kind == "llama" and run.lora and not run.lora_head][:8:2]
    apart = [x for run in runs for x in expect_same(run, root) if x]
    error = statistics.stdev(apart) / len(apart) ** 0.5
    assert len(apart) > 100
    assert abs(statistics.mean(apart)) < 4 * error


def test_evaluation_with_compute_metrics_gets_the_logits(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`compute_metrics` gets TRL's logits and labels, the loss is TRL's, and one log message says so.

    Before TRL 0.29 it also gets means that are logged, and the patch stays active.
    """

    def evaluate() -> tuple[dict[str, float], list[Any]]:
        seen: list[Any] = []
        trainer = make_trainer(replace(COVER[0], accumulation=1), root)
        trainer.compute_metrics = lambda found: seen.append(found) or {"places": float(found.predictions.size)}
        return trainer.evaluate(), seen

    theirs, their_seen = evaluate()
    with caplog.at_level(logging.WARNING, "fastpref.patch"), fastpref.patch(trl):
        ours, our_seen = evaluate()
    for a, b in zip(our_seen, their_seen, strict=True):
        torch.testing.assert_close(torch.tensor(a.predictions), torch.tensor(b.predictions), rtol=1e-4, atol=1e-4)
    kept = [name for name in theirs if "time" not in name and "per_second" not in name]
    assert {name: ours[name] for name in kept} == pytest.approx({name: theirs[name] for name in kept}, rel=1e-4)
    messages = [record.getMessage() for record in caplog.records if "compute_metrics" in record.getMessage()]
    assert len(messages) == int("_compute_loss" in vars(trl.DPOTrainer))


@pytest.mark.parametrize("trainer", ["DPO", "KTO"])
def test_an_adapter_on_the_head_is_trained(trainer: str, root: Path) -> None:
    """LoRA on lm_head, which TRL 1.15 refuses, gives the loss and gradients of the model's own logits."""
    run = Run(trainer, lora_head=True, precomputed=True)
    with fastpref.patch(trl) as patch:
        instance = make_trainer(run, root)
        with torch.no_grad():
            for name, parameter in instance.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        batch = next(iter(instance.get_train_dataloader()))
        if "input_ids" not in batch:
            pytest.skip(f"TRL {trl.__version__}'s {trainer} batches have other names; it takes such adapters itself")
        loss = instance.compute_loss(instance.model, batch)
        ours = gradients(loss, instance.model)
    assert any("lm_head" in name for name in ours)
    ids, mask = batch["input_ids"], batch["completion_mask"]
    logits = instance.model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    logp = (logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]).sum(1)
    if trainer == "DPO":
        ratios = logp - torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        chosen, rejected = ratios.chunk(2)
        expected = -torch.nn.functional.logsigmoid(instance.beta * (chosen - rejected)).mean()
    else:
        with torch.no_grad():
            ids, mask = batch["KL_input_ids"], batch["KL_completion_mask"]
            logits = instance.model(input_ids=ids, attention_mask=batch["KL_attention_mask"]).logits
            kl_logp = (logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]).sum(1)
            kl = (kl_logp - batch["ref_KL_logps"]).mean().clamp(min=0)
        sign = torch.where(batch["label"], 1.0, -1.0)
        expected = (1 - torch.sigmoid(instance.beta * sign * (logp - batch["ref_logps"] - kl))).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(expected, instance.model).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    if f"{trainer}Trainer.__init__" in patch.patched:  # without the patch, TRL would ignore the adapter
        with pytest.raises(RuntimeError, match="lm_head has an adapter"):
            instance.compute_loss(instance.model, batch)


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
