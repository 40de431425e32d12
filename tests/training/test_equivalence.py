"""Loss, gradients and metrics of a step do not depend on the layout of its examples or their micro-batches."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastpref.data.batch import Layout, PreferenceBatch, collate
from fastpref.data.example import Example
from fastpref.losses import KTO, ListLogps, PairLogps, RowLogps, kto_kl, kto_loss, list_loss, pair_loss
from fastpref.losses.token_loss import scores_prompts
from fastpref.model.load import Loaded, load_model
from fastpref.step.metrics import Metrics
from fastpref.step.objective import Objective
from fastpref.step.reference import make_reference
from tests.support.tiny import (
    config_for,
    examples,
    save_model,
    sharing_examples,
    sharing_lists,
    unlabelled,
    with_extras,
)  # fmt: skip

CPU = torch.device("cpu")
KINDS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt-oss", "mixtral")
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
    "pl": ['loss={type="pl", beta=0.4}'],
    "lipo": ['loss={type="lipo", beta=0.4}'],
    "sft": ["loss.type=sft"],
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


class Step:
    """A model that differs from its reference, and a method that runs a step on it."""

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

    def run(
        self, layout: Layout, budget: int, rows: list[Example] | None = None, *, turns: bool = False
    ) -> tuple[Metrics, dict[str, torch.Tensor], int]:
        objective = Objective(self.loaded.policy, self.reference, self.options, layout, budget, 0, CPU)
        self.loaded.policy.zero_grad()
        self.loaded.policy.train()
        rows = self.rows(turns=turns) if rows is None else rows
        metrics, work = objective.step(rows, lambda loss: loss.backward())
        return metrics, self.gradients(), work.microbatches

    def rows(self, *, turns: bool = False) -> list[Example]:
        """Return examples of the kind that the loss takes."""
        if self.options.listwise:
            return sharing_lists(7, turns=turns)
        if self.options.supervised:
            return unlabelled(sharing_examples(7, single=True, turns=turns))
        return sharing_examples(7, single=isinstance(self.options, KTO), turns=turns)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {n: p.grad.clone() for n, p in self.loaded.policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_give_the_log_probabilities_of_plain_sequences(models: dict[str, Path], kind: str):
    """In every layout, token log-probabilities are those of prompt and completion alone in a row."""
    loaded = load_model(config_for(models[kind]), CPU)
    assert (loaded.layout, loaded.why_padded) == ("tree", None)
    rows = sharing_examples(7)
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


WHOLE = 10_000  # tokens: all examples of a step are one micro-batch
CASES: list[tuple[Layout, int]] = [("tree", WHOLE), ("packed", WHOLE), ("tree", 130), ("packed", 1), ("padded", 120)]
EQUIVALENCES = [
    *(("llama", loss, adapted) for loss in LOSSES for adapted in ("lora", "full", "lora-turns")),
    *(("gemma2", loss, "lora") for loss in ("dpo", "ipo", "kto", "orpo", "simpo", "cpo", "pl", "lipo", "sft")),
    *(("gemma2", loss, "full") for loss in ("dpo", "kto", "orpo")),
    *((kind, loss, "full") for kind in ("qwen2", "gemma3", "gpt-oss", "mixtral") for loss in ("dpo", "kto", "orpo")),
    *(("qwen3", loss, "lora") for loss in ("dpo", "kto", "orpo")),
]


@pytest.mark.parametrize(("kind", "loss", "how"), EQUIVALENCES, ids="-".join)
def test_tree_packed_padded_and_any_microbatches_agree(models: dict[str, Path], kind: str, loss: str, how: str):
    """Loss, metrics and gradients are equal in float32: tree ≡ packed ≡ padded, and one micro-batch ≡ many, also if
    completions contain turns of others. The rows share beginnings in many ways, longer than windows."""
    step, turns = Step(models[kind], LOSSES[loss], lora=how != "full"), how.endswith("turns")
    expected, gradients, parts = step.run("padded", WHOLE, turns=turns)
    assert parts == 1
    assert gradients
    scale = max(g.abs().max() for g in gradients.values())
    for layout, budget in CASES:
        metrics, others, parts = step.run(layout, budget, turns=turns)
        assert (parts == 1) == (budget == WHOLE)
        assert metrics.result() == pytest.approx(expected.result(), rel=2e-4, abs=2e-5)
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=float(scale) * 2e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_and_margins_agree_in_every_layout(models: dict[str, Path], loss: str):
    """With weights of examples and, where the loss takes them, margins of some of them, loss, metrics and gradients are
    equal in every layout and for any micro-batches; rewards do not depend on them."""
    step = Step(models["llama"], LOSSES[loss], lora=True)
    rows = with_extras(step.rows(), weights=not step.options.no_weights, margins=not step.options.no_margins)
    expected, gradients, _ = step.run("padded", WHOLE, rows)
    scale = float(max(g.abs().max() for g in gradients.values()))
    if rows != step.rows():
        plain = step.run("padded", WHOLE)[0].result()
        assert plain["loss"] != pytest.approx(expected.result()["loss"], rel=1e-3)
        name = "nll_loss" if loss == "sft" else "rewards/margins"
        assert plain[name] == pytest.approx(expected.result()[name])
    for layout, budget in CASES[:4]:
        metrics, others, _ = step.run(layout, budget, rows)
        assert metrics.result() == pytest.approx(expected.result(), rel=2e-4, abs=2e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=scale * 2e-5)


def naive_loss(step: Step, policy: nn.Module, reference: nn.Module, rows: Sequence[Example]) -> torch.Tensor:
    """Compute the loss from whole sequences, each alone in a row, with sums and lengths over scored tokens."""

    def token_logps(model: nn.Module, ids: list[int]) -> torch.Tensor:
        logps = model(input_ids=torch.tensor([ids])).logits.float().log_softmax(-1)[0, :-1]
        return logps.gather(1, torch.tensor(ids)[1:, None])[:, 0]

    def completion(model: nn.Module, row: Example, completion: Example, which: int) -> torch.Tensor:
        ids = completion.completions[which]
        mask = torch.ones(len(ids), dtype=torch.bool)
        for start, stop in completion.context(which):
            mask[start:stop] = False
        return token_logps(model, row.prompt + ids)[len(row.prompt) - 1 :][mask]

    def sums(model: nn.Module, which: int) -> torch.Tensor:
        return torch.stack([completion(model, row, row, which).sum() for row in rows])

    options = step.options
    if options.listwise:
        return list_loss(list_logps(policy, reference, rows, completion), options).loss
    if options.supervised:
        return -sums(policy, 0).sum() / sum(row.scored(0) for row in rows)
    with torch.no_grad():
        ref_chosen = sums(reference, 0)
    if isinstance(options, KTO):
        with torch.no_grad():
            mates = [*rows[1:], rows[0]]
            kl = kto_kl(
                *(torch.stack([completion(m, a, b, 0).sum() for a, b in zip(rows, mates)]) for m in (policy, reference))
            )
        logps = RowLogps(sums(policy, 0), ref_chosen, torch.tensor([bool(row.label) for row in rows]))
        return kto_loss(logps, options, kl).loss
    with torch.no_grad():
        ref_rejected = sums(reference, 1)
    lengths = [torch.tensor([float(row.scored(which)) for row in rows]) for which in (0, 1)]
    pairs = PairLogps(sums(policy, 0), sums(policy, 1), *lengths, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if scores_prompts(options):
        prompts = torch.stack([token_logps(policy, row.prompt).sum() for row in rows])
        prompt_lengths = torch.tensor([len(row.prompt) - 1.0 for row in rows])
        pairs = replace(pairs, nll=pairs.chosen + prompts, nll_lengths=lengths[0] + prompt_lengths)
    return pair_loss(pairs, options).loss


def list_logps(policy: nn.Module, reference: nn.Module, rows: Sequence[Example], completion: Callable) -> ListLogps:
    """Compute the sums of each completion of the lists, NaN where one is absent."""
    most = max(len(row.completions) for row in rows)

    def sums(model: nn.Module) -> torch.Tensor:
        absent = torch.tensor(float("nan"))
        return torch.stack([
            torch.stack([
                completion(model, row, row, k).sum() if k < len(row.completions) else absent for k in range(most)
            ])
            for row in rows
        ])  # fmt: skip

    scores = torch.tensor([[*row.scores, *[float("nan")] * (most - len(row.scores))] for row in rows])
    with torch.no_grad():
        ref_logps = sums(reference)
    return ListLogps(sums(policy), ref_logps, scores)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "orpo", "orpo-all", "simpo", "cpo", "pl", "lipo", "sft"])
def test_only_what_is_scored_counts(models: dict[str, Path], loss: str, lora: bool):
    """If completions contain turns of others, loss and gradients are those of each sequence alone with its mask, in
    every layout and for any micro-batches."""
    step = Step(models["llama"], LOSSES[loss], lora=lora)
    # Without adapters, the reference is the model itself, because no copy of its original weights exists here.
    reference = load_model(config_for(models["llama"]), CPU).model if lora else step.loaded.model
    rows = step.rows(turns=True)
    assert any(row.contexts for row in rows)
    step.loaded.policy.zero_grad()
    expected = naive_loss(step, step.loaded.model, reference, rows)
    expected.backward()
    gradients = step.gradients()
    scale = float(max(g.abs().max() for g in gradients.values()))
    cases: list[tuple[Layout, int]] = [("tree", WHOLE), ("packed", WHOLE), ("padded", WHOLE), ("tree", 60)]
    for layout, budget in cases:
        metrics, others, _ = step.run(layout, budget, turns=True)
        assert metrics.result()["loss"] == pytest.approx(float(expected.detach()), rel=2e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=scale * 5e-5)


@pytest.mark.parametrize("loss", ["kto", "dpo", "ipo", "orpo", "pl", "lipo", "sft"])
def test_an_evaluation_does_not_depend_on_the_order_of_its_rows(models: dict[str, Path], loss: str):
    """An evaluation depends neither on the order of its rows nor on the number taken at a time: it is one mean over
    all examples, and KTO's mismatched completions and its KL are those of the whole evaluation."""
    step = Step(models["llama"], LOSSES[loss], lora=True)

    def reference(batch: PreferenceBatch) -> torch.Tensor:  # lower than the policy's, so that the KL is not 0
        return step.loaded.policy(batch).logp.detach() - 0.05 * (batch.of_tokens(batch.targets) % 7)

    own = reference if step.options.uses_reference else None
    objective = Objective(step.loaded.policy, own, step.options, "tree", 150, 0, CPU)
    single = loss in ("kto", "sft")
    rows = sharing_lists(9) if step.options.listwise else examples(9, single=single, turns=True)
    rows = unlabelled(rows) if loss == "sft" else rows
    rows += [replace(row, prompt=rows[0].prompt) for row in rows[:4]]
    whole = objective.evaluate(rows, 5).result()
    assert loss != "kto" or whole["kl"] > 0
    for size, order in ((5, rows[::-1]), (2, rows[6:] + rows[:6]), (13, rows[1::2] + rows[::2]), (1, rows)):
        assert objective.evaluate(order, size).result() == pytest.approx(whole, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_checkpointed_activations_change_nothing(models: dict[str, Path], kind: str):
    """Under gradient checkpointing, the layout still reaches the attention: loss and gradients are the same."""
    plain = Step(models[kind], ["loss.type=dpo"], lora=True).run("tree", WHOLE)
    twice = Step(models[kind], ["loss.type=dpo", "train.checkpointing=true"], lora=True).run("tree", WHOLE)
    assert twice[0].result() == pytest.approx(plain[0].result(), rel=1e-5)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(twice[1][name], gradient, rtol=1e-4, atol=1e-7)
