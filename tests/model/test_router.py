"""The router loss of a mixture of experts is the model's own, and only training steps add it to their loss."""

from pathlib import Path

import pytest
import torch

from fastpref.data.batch import collate
from fastpref.model.load import load_model
from fastpref.step.objective import Objective
from tests.support.tiny import config_for, examples, save_model

CPU = torch.device("cpu")
KINDS = ("mixtral", "qwen3-moe")


@pytest.mark.parametrize("layout", ["padded", "tree"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_models_own(kind: str, layout, tmp_path: Path):
    """On padded rows it is what transformers computes without padding; in trees each token counts once."""
    loaded = load_model(config_for(save_model(kind, tmp_path)), CPU)
    policy, batch = loaded.policy.train(), collate(examples(4), layout)
    loss = policy(batch).router_loss
    assert loss is not None
    assert policy.router is not None
    assert policy.router.coefficient == 0.5
    if layout == "padded":
        options = {"attention_mask": batch.attention_mask, "output_router_logits": True, "labels": batch.input_ids}
        torch.testing.assert_close(loss, loaded.model(input_ids=batch.input_ids, **options).aux_loss)
    else:
        assert 1 < float(loss) < 4  # 2 if the active experts are balanced


def test_it_is_in_training_alone(tmp_path: Path):
    """Evaluations, references and models without routers have no router loss."""
    loaded = load_model(config_for(save_model("mixtral", tmp_path / "m")), CPU)
    batch = collate(examples(3), "tree")
    assert loaded.policy.eval()(batch).router_loss is None
    with torch.no_grad():
        assert loaded.policy.train()(batch).router_loss is None
    plain = load_model(config_for(save_model("llama", tmp_path / "l")), CPU)
    assert plain.policy.router is None
    assert plain.policy.train()(batch).router_loss is None


@pytest.mark.parametrize("method", ["simpo", "kto"])
@pytest.mark.parametrize("budget", [10_000, 60])
def test_a_step_adds_it_by_share_of_tokens(method: str, budget: int, tmp_path: Path):
    """A step's loss is the plain loss plus coefficient · Σ share · router loss, and `aux_loss` is logged."""
    config = config_for(save_model("qwen3-moe", tmp_path), f'loss={{type="{method}"}}', "train.batch=4")
    loaded = load_model(config, CPU)
    rows = examples(4, single=method == "kto")
    reference = (lambda batch: torch.zeros(len(batch.segments)) - 2) if method == "kto" else None
    steps = {}
    for coefficient in (0.0, 0.5):
        objective = Objective(
            loaded.policy.train(), reference, config.loss, "tree", budget, 0, CPU, router_coefficient=coefficient
        )
        loaded.policy.zero_grad()
        metrics, work = objective.step(rows, lambda loss: loss.backward())
        grads = {n: p.grad.clone() for n, p in loaded.policy.named_parameters() if p.grad is not None}
        steps[coefficient] = (metrics.result(), grads, work)
    (plain, plain_grads, _), (with_router, grads, work) = steps[0.0], steps[0.5]
    assert (work.microbatches > 1) == (budget == 60)
    assert "aux_loss" not in plain
    assert with_router["loss"] == pytest.approx(plain["loss"] + 0.5 * with_router["aux_loss"], rel=1e-5)
    gates = [name for name in grads if "gate.weight" in name]
    assert gates
    assert all(not torch.allclose(grads[name], plain_grads[name], atol=1e-6) for name in gates)
