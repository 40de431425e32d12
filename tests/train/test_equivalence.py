"""One step is one step: however its examples are laid out and cut, loss, gradients and metrics are the same."""

from pathlib import Path

import pytest
import torch
from tiny import config_for, examples, save_model

from fastpref.data.batch import Layout, collate
from fastpref.losses import KTO
from fastpref.model.load import Loaded, load_model
from fastpref.model.reference import make_reference
from fastpref.train.metrics import Metrics
from fastpref.train.step import Objective

CPU = torch.device("cpu")
KINDS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
LOSSES = {
    "dpo": ["loss.type=dpo"],
    "dpo-mixed": ['loss={type="dpo", variants=["sigmoid", "sft"], weights=[1, 0.5], label_smoothing=0.1}'],
    "dpo-ld-wpo": ['loss={type="dpo", length_alpha=0.3, weighting=true}'],
    "dpo-aot": ['loss={type="dpo", variants=["aot", "aot_unpaired"]}'],
    "ipo": ["loss.type=ipo"],
    "kto": ["loss.type=kto"],
    "kto-no-kl": ['loss={type="kto", kl="none", desirable_weight=0.5}'],
    "orpo": ["loss.type=orpo"],
    "orpo-all": ['loss={type="orpo", nll_on="all"}'],
    "simpo": ['loss={type="simpo", sft_weight=0.2}'],
    "cpo": ["loss.type=cpo"],
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


class Step:
    """A model away from its reference, and the outcome of steps on it."""

    def __init__(self, folder: Path, overrides: list[str], *, lora: bool):
        config = config_for(folder, *overrides, *(["lora={rank=3}"] if lora else []))
        torch.manual_seed(1)
        self.loaded: Loaded = load_model(config, CPU)
        self.options = config.loss
        self.reference = make_reference(config, self.loaded)[0] if config.loss.uses_reference else None
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in self.loaded.policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))

    def run(self, layout: Layout, budget: int, count: int = 7) -> tuple[Metrics, dict[str, torch.Tensor], int]:
        objective = Objective(self.loaded.policy, self.reference, self.options, layout, budget, 0, CPU)
        self.loaded.policy.zero_grad()
        self.loaded.policy.train()
        rows = examples(count, single=isinstance(self.options, KTO))
        metrics, work = objective.step(rows, lambda loss: loss.backward())
        gradients = {n: p.grad.clone() for n, p in self.loaded.policy.named_parameters() if p.grad is not None}
        return metrics, gradients, work.microbatches


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_give_the_log_probabilities_of_plain_sequences(models: dict[str, Path], kind: str):
    """In every layout a completion's token log-probabilities are those of prompt and completion alone in a row."""
    loaded = load_model(config_for(models[kind]), CPU)
    assert (loaded.layout, loaded.why_padded) == ("tree", None)
    rows = examples(5)
    with torch.no_grad():
        truth = []
        for k in range(2):
            for row in rows:
                ids = torch.tensor([row.prompt + row.completions[k]])
                logps = loaded.model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
                truth.append(logps.gather(1, ids[0, 1:, None])[len(row.prompt) - 1 :, 0])
        for layout in ("tree", "packed", "padded"):
            batch = collate(rows, layout)
            found = loaded.policy(batch).logp
            for sequence, expected in enumerate(truth):
                torch.testing.assert_close(found[batch.segments == sequence], expected, rtol=1e-5, atol=3e-5)


EQUIVALENCES = [
    *(("llama", loss, lora) for loss in LOSSES for lora in (True, False)),
    *(("gemma2", loss, True) for loss in ("dpo", "ipo", "kto", "orpo", "simpo", "cpo")),
    *(("gemma2", loss, False) for loss in ("dpo", "kto", "orpo")),
    *((kind, loss, kind == "qwen3") for kind in ("qwen2", "qwen3", "gemma3") for loss in ("dpo", "kto", "orpo")),
]


@pytest.mark.parametrize(
    ("kind", "loss", "lora"), EQUIVALENCES, ids=[f"{k}-{x}-{'lora' if a else 'full'}" for k, x, a in EQUIVALENCES]
)
def test_tree_packed_padded_and_any_microbatches_agree(models: dict[str, Path], kind: str, loss: str, lora: bool):
    """tree ≡ packed ≡ padded, and one micro-batch ≡ many: loss, every metric and every gradient, in float32."""
    step = Step(models[kind], LOSSES[loss], lora=lora)
    expected, gradients, parts = step.run("padded", 10_000)
    assert parts == 1
    assert gradients
    scale = max(g.abs().max() for g in gradients.values())
    cases: list[tuple[Layout, int]] = [
        ("tree", 10_000),
        ("packed", 10_000),
        ("tree", 60),
        ("packed", 1),
        ("padded", 120),
    ]
    for layout, budget in cases:
        found, others, parts = step.run(layout, budget)
        assert (parts == 1) == (budget == 10_000)
        assert found.result() == pytest.approx(expected.result(), rel=2e-4, abs=2e-5)
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=float(scale) * 2e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_checkpointed_activations_change_nothing(models: dict[str, Path], kind: str):
    """With activations computed twice, the layout still reaches the attention: same loss, same gradients."""
    plain = Step(models[kind], ["loss.type=dpo"], lora=True).run("tree", 10_000)
    twice = Step(models[kind], ["loss.type=dpo", "train.checkpointing=true"], lora=True).run("tree", 10_000)
    assert twice[0].result() == pytest.approx(plain[0].result(), rel=1e-5)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(twice[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_an_evaluation_is_one_mean_over_all_examples(models: dict[str, Path]):
    """Held-out metrics do not depend on how many examples are taken at a time (without terms of a whole step)."""
    step = Step(models["llama"], ["loss.type=orpo"], lora=False)
    objective = Objective(step.loaded.policy, None, step.options, "tree", 100, 0, CPU)
    rows = examples(9)
    whole = objective.evaluate(rows, 9).result()
    for size in (1, 2, 4):
        assert objective.evaluate(rows, size).result() == pytest.approx(whole, rel=1e-5)
