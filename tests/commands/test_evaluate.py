"""`fastpref eval`: the metrics of a run's own evaluation, and KL by its definition."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig

from fastpref.commands.evaluate import evaluate, interval
from fastpref.data.cache import load_examples
from fastpref.errors import UserError
from fastpref.run.trained import find_trained, load_trained, trained_tokenizer
from tests.support.command_line import run_command
from tests.support.paths import QUICKSTART_HELDOUT, QUICKSTART_MODEL
from tests.support.runs import last_evaluation
from tests.support.tiny import save_model

CPU = torch.device("cpu")
DATA, MODEL = str(QUICKSTART_HELDOUT), QUICKSTART_MODEL


def test_a_run_is_evaluated_as_it_evaluated_itself(finished_run: Path):
    """Every metric equals that of the last evaluation in metrics.jsonl."""
    own, metrics = last_evaluation(finished_run), evaluate(find_trained(str(finished_run)))
    assert {name: metrics[name] for name in own} == pytest.approx(own, rel=1e-4, abs=1e-5)


def test_kl_is_the_mean_over_the_completions_tokens(finished_run: Path):
    """KL is the mean over completion tokens of Σ p (log p − log q) of the next token, from logits of transformers and
    PEFT, one completion after the other."""
    metrics = evaluate(find_trained(str(finished_run)))
    trained = find_trained(str(finished_run))
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, finished_run / "final").eval()
    total, right, tokens = 0.0, 0.0, 0
    heldout = load_examples(trained.config, trained_tokenizer(trained)).heldout
    for example in heldout:
        averages = []
        for completion in example.completions:
            ids = torch.tensor([[*example.prompt, *completion]])
            places = slice(len(example.prompt) - 1, ids.shape[1] - 1)
            with torch.no_grad():
                logp = model(input_ids=ids).logits[0, places].float().log_softmax(-1)
                with model.disable_adapter():
                    reference = model(input_ids=ids).logits[0, places].float().log_softmax(-1)
            total += float((logp.exp() * (logp - reference)).sum())
            tokens += len(completion)
            averages.append(float(logp.gather(1, torch.tensor(completion)[:, None]).mean()))
        right += averages[0] > averages[1]
    assert metrics["reference/kl"] == pytest.approx(total / tokens, rel=1e-3)
    assert metrics["logps/accuracies"] == pytest.approx(right / len(heldout))
    assert metrics["examples"] == len(heldout)


def test_a_model_alone(finished_run: Path):
    """Without a reference there are neither rewards nor KL; with the model itself as reference, the KL is 0."""
    metrics = evaluate(find_trained(str(MODEL)), data=DATA)
    assert {"logps/accuracies", "logps/chosen", "entropy"} <= metrics.keys()
    assert not {"reference/kl", "loss", "rewards/accuracies"} & metrics.keys()
    same = evaluate(find_trained(str(MODEL)), data=DATA, reference=find_trained(str(MODEL)))
    assert same["reference/kl"] == pytest.approx(0, abs=1e-6)
    assert same["rewards/margins"] == pytest.approx(0, abs=1e-6)
    adapter = evaluate(find_trained(str(finished_run / "final")), data=DATA)
    assert adapter["reference/kl"] > 0
    assert adapter["logps/chosen"] != pytest.approx(metrics["logps/chosen"], abs=1e-4)


def test_a_reference_of_another_family(finished_run: Path, tmp_path: Path):
    """If the reference needs another layout than the model, both are computed on padded rows, with the same results."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=949, hidden_size=32, num_hidden_layers=2))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path)
    own = evaluate(find_trained(str(finished_run)))
    metrics = evaluate(find_trained(str(finished_run)), reference=find_trained(str(tmp_path)))
    theirs = evaluate(find_trained(str(tmp_path)), data=DATA)
    rows_alone = evaluate(find_trained(str(finished_run)), data=DATA, reference=find_trained(str(tmp_path)))
    assert metrics["logps/chosen"] == pytest.approx(own["logps/chosen"], rel=1e-5)
    expected = 0.1 * (rows_alone["logps/chosen"] - theirs["logps/chosen"])
    assert rows_alone["rewards/chosen"] == pytest.approx(expected, rel=1e-4)


def test_a_reference_with_other_tokens_is_refused(finished_run: Path, tmp_path: Path):
    """A reference with another vocabulary is refused, because its log-probabilities would be those of other text."""
    save_model("llama", tmp_path)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"97 tokens and .* 949; only models with the same tokens"):
        evaluate(find_trained(str(finished_run)), reference=find_trained(str(tmp_path)))


def test_a_whole_model_is_compared_with_the_one_it_began_with(whole_run: Path):
    """For a run without adapters the base is the reference, and the metrics are those of its own evaluation."""
    metrics = evaluate(find_trained(str(whole_run)))
    assert metrics["rewards/margins"] == pytest.approx(
        last_evaluation(whole_run)["rewards/margins"], rel=1e-3, abs=1e-5
    )
    assert metrics["reference/kl"] > 0


def test_single_completions(finished_run: Path):
    """With KTO, pairs become single completions with KTO's own metrics, and the KL to the reference is the same."""
    paired = evaluate(find_trained(str(finished_run)))
    metrics = evaluate(find_trained(str(finished_run), ['loss={type="kto"}']))
    assert {"kl", "loss", "rewards/margins"} <= metrics.keys()
    assert "logps/accuracies" not in metrics
    assert metrics["examples"] == 2 * paired["examples"]
    assert metrics["reference/kl"] == pytest.approx(paired["reference/kl"], rel=1e-4)


@pytest.mark.parametrize("of", ["run", "checkpoint", "config"])
def test_what_a_name_stands_for(finished_run: Path, of: str):
    """A run means its final/; a checkpoint has its run's config; a config means the model before training."""
    named = {"run": finished_run, "checkpoint": finished_run / "checkpoints" / "step-4",
             "config": finished_run / "config.toml"}  # fmt: skip
    trained = find_trained(str(named[of]))
    assert trained.is_adapter == (of != "config")
    assert trained.of_run
    before: Any = load_trained(trained, CPU, base=True)
    after: Any = load_trained(trained, CPU)
    assert isinstance(after.wrapped, PeftModel) == (of != "config")
    assert not isinstance(before.wrapped, PeftModel)
    embeddings = [loaded.model.get_input_embeddings().weight for loaded in (before, after)]
    assert torch.equal(*embeddings)


def test_what_is_refused(finished_run: Path, tmp_path: Path):
    """A model without data, and a name that does not exist, are refused."""
    with pytest.raises(UserError, match="--data FILE"):
        evaluate(find_trained(str(MODEL)))
    with pytest.raises(UserError, match="neither a run"):
        find_trained(str(tmp_path))
    with pytest.raises(UserError, match=r"no tokenizer there|no model there"):
        evaluate(find_trained("no/such"), data=DATA)


@pytest.mark.parametrize(
    ("name", "module", "advice"),
    [
        ("eval", "fastpref.commands.evaluate.evaluate", "train.tokens_per_microbatch"),
        ("chat", "fastpref.commands.chat.chat", "--max-tokens"),
        ("merge", "fastpref.merge.merge", "--no-verify"),
    ],
)
def test_running_out_of_memory_is_one_message(
    name: str, module: str, advice: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Out of memory gives one message with a remedy, without a traceback."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(module, full)
    output = ("--output", str(tmp_path / "merged")) if name == "merge" else ()
    result = run_command(name, finished_run, *output)
    assert result.status == 2
    assert result.err.startswith("fastpref: out of memory while ")
    assert advice in result.err


def test_what_was_decided_at_load_is_told(finished_run: Path, tmp_path: Path):
    """Notes on loading, such as on renamed tensors, are on stderr, and stdout has only the JSON."""
    adapter = tmp_path / "adapter"
    shutil.copytree(finished_run / "final", adapter)
    path = adapter / "adapter_model.safetensors"
    weights = {name.replace("model.layers", "model._orig_mod.layers"): w for name, w in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    result = run_command("eval", adapter, "--data", DATA, "--json")
    assert result.json["reference/kl"] > 0
    assert "_orig_mod.` and are read with" in result.err


def test_wilsons_interval():
    """The interval for 9 of 10 is that of a calculation by hand, and the one for 10 of 10 has a width too."""
    assert interval(0.9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-3)
    low, high = interval(1.0, 10)
    assert (round(low, 3), high) == (0.722, pytest.approx(1.0))
