"""Whole runs on rows of several completions with scores, with weights in some rows, by the losses of lists."""

import json
import math
from pathlib import Path

import pytest

import fastpref
from fastpref.commands.evaluate import evaluate
from fastpref.preview.preview import preview
from fastpref.run.trained import find_trained
from tests.support.paths import QUICKSTART_MODEL
from tests.support.runs import rows

CONFIG = f"""
[model]
name = "{QUICKSTART_MODEL.as_posix()}"
[[data]]
path = "lists.jsonl"
[[eval.data]]
path = "heldout.jsonl"
[lora]
rank = 4
[eval]
every = 4
sample_tokens = 3
[train]
learning_rate = 3e-3
steps = 12
batch = 6
tokens_per_microbatch = 200
[output]
dir = "run"
"""


ANSWERS = {"I do not know.": 1.0, "Gladly: it is {}.": 3.0, "It is {}.": 2.0, "No, no, no.": 0.0}


def write_lists(path: Path, first: int, count: int) -> None:
    """Write sums as lists of two to four answers, which have their scores for their form."""
    lines = []
    for n in range(first, first + count):
        answers = list(ANSWERS.items())[: 2 + n % 3]
        completions, scores = [text.format(n + 1) for text, _ in answers], [score for _, score in answers]
        row = {"prompt": f"What is {n} plus one?", "responses": completions, "scores": scores}
        lines.append(json.dumps(row | {"weight": 2.0 if n % 4 == 0 else 1.0}))
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("loss", ["pl", "lipo"])
def test_a_run_on_lists(loss: str, elsewhere: Path):
    """A run ranks its lists better than at first, logs Kendall's τ, and is previewed and evaluated like any other."""
    write_lists(Path("lists.jsonl"), 0, 30)
    write_lists(Path("heldout.jsonl"), 40, 9)
    Path("cfg.toml").write_text(CONFIG)
    preview(fastpref.load_config("cfg.toml", [f"loss.type={loss}"]))
    preview(fastpref.load_config("cfg.toml", [f"loss.type={loss}", "train.layout=padded"]))
    result = fastpref.train("cfg.toml", [f"loss.type={loss}"])
    logged = rows(result.output_dir)
    assert all(math.isfinite(value) for row in logged for value in row.values())
    assert all("rewards/kendall_tau" in row or "eval/rewards/kendall_tau" in row for row in logged)
    first, last = logged[0], result.eval_metrics
    assert last["eval/loss"] < first["eval/loss"]
    assert last["eval/rewards/kendall_tau"] > 0.3
    metrics = evaluate(find_trained(str(result.output_dir)))
    assert {f"eval/{name}": metrics[name] for name in ("loss", "rewards/kendall_tau", "logps/chosen")} == pytest.approx(
        {name: last[name] for name in ("eval/loss", "eval/rewards/kendall_tau", "eval/logps/chosen")}, rel=1e-3
    )
    alone = evaluate(
        find_trained(str(QUICKSTART_MODEL), overrides=[f"loss.type={loss}"]), data="heldout.jsonl"
    )  # fmt: skip
    assert "logps/chosen" in alone
    assert not any(name.startswith(("rewards/", "loss")) for name in alone)
    assert json.loads((result.output_dir / "run.json").read_text())["rows"]["weighted"] == 8
