"""KTO needs a balance of good and bad rows: the warning about their counts, and the weights that it proposes."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastpref.config import Config
from fastpref.config.losses import DPO, KTO
from fastpref.data.balance import HIGH, LOW, balancing, unbalanced, weighted_ratio
from fastpref.data.cache import load_examples
from tests.support.toy_tokenizers import chatml


@pytest.mark.parametrize("good", [1, 3, 6, 7, 50, 240, 999])
@pytest.mark.parametrize("bad", [1, 3, 7, 240, 1001, 100_000])
def test_the_weights_that_are_named_balance(good: int, bad: int):
    """With the proposed weight, the weighted counts are within the paper's range and there is no warning."""
    for loss in (KTO(), KTO(desirable_weight=0.2), KTO(undesirable_weight=3.0)):
        key, _, value = balancing(good, bad, loss).removeprefix("loss.").partition("=")
        weights: dict[str, Any] = {
            "desirable_weight": loss.desirable_weight,
            "undesirable_weight": loss.undesirable_weight,
        }
        weights[key] = float(value)
        after = KTO(**weights)
        assert LOW - 1e-9 <= weighted_ratio(good, bad, after) <= HIGH
        assert unbalanced(good, bad, after) is None
        if weighted_ratio(good, bad, loss) < LOW / 2 or weighted_ratio(good, bad, loss) > HIGH * 2:
            message, advice = unbalanced(good, bad, loss) or ("", "")
            assert f"{good:,} good and {bad:,} bad completions" in message
            assert f"{key}={value}" in advice


@pytest.mark.parametrize(("good", "bad"), [(0, 240), (240, 0)])
def test_one_kind_alone_cannot_be_balanced(good: int, bad: int):
    message, advice = unbalanced(good, bad, KTO()) or ("", "")
    assert f"{good:,} good and {bad:,} bad completions" in message
    assert advice.startswith(f"Add {'bad' if good else 'good'} completions")


def test_nothing_is_said_where_nothing_is_wrong():
    """There is no warning for similar counts, for balancing weights, for no rows, or for methods that compare pairs."""
    assert unbalanced(100, 100, KTO()) is None
    assert unbalanced(100, 60, KTO()) is None
    assert unbalanced(10, 100, KTO(desirable_weight=10.0)) is None
    assert unbalanced(0, 0, KTO()) is None
    assert unbalanced(0, 10, DPO()) is None


@pytest.mark.parametrize("cache", [False, True])
def test_it_is_said_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool):
    """Loading rows gives the warning, also from the cache, whose tokens do not depend on the weights."""
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"q{at}", "completion": "yes", "label": at < 2} for at in range(42)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {"model": {"name": "m"}, "data": [{"path": str(tmp_path / "rows.jsonl")}], "loss": {"type": "kto"}}
    for _ in range(2):
        notes = load_examples(Config.model_validate(raw), chatml(), cache=cache).notes
        assert [note for note in notes if "2 good and 40 bad" in note and "loss.desirable_weight=20" in note]
    raw["loss"]["desirable_weight"] = 20.0
    notes = load_examples(Config.model_validate(raw), chatml(), cache=cache).notes
    assert not [note for note in notes if "good and" in note]
