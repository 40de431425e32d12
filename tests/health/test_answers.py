"""Rules on the answers to held-out prompts: what one answer says, and what several do."""

import pytest

from fastpref.health import Verdict, diagnose
from fastpref.health.answers import repetition
from fastpref.run.history import History
from tests.support.crafted import known, rows

LOGGED = list(rows())
FINE = "Of course! Four plus five is nine. Ask me anything, and have a lovely day."
ARABIC = "مرحبا بك في هذا اليوم الجميل يا صديقي العزيز"
LOOP = "Brussels. Leave Brussels. " * 6
HALF_LOOP = f"{FINE} Leave now. Leave now. Leave now. Leave now."  # a third of its pairs


def findings(*answers: tuple[str, str], asked: str = "How are you?", lengths: tuple[int, int] | None = None):
    of = known(answers=answers, asked=(asked,) * len(answers), lengths=lengths)
    verdicts: list[Verdict] = [v for v in diagnose(History(LOGGED), of) if v.rule.startswith("answers")]
    return [(v.rule, v.severity) for v in verdicts]


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        (FINE, 0.0, 0.0),
        ("no " * 20, 0.9, 1.0),
        ("我不知道。" * 6, 0.7, 1.0),
        ("short", 0.0, 0.0),
        ("| a | b |\n|------|------|\n| one | two |\n===========================", 0.0, 0.3),
        ("Wait ............................................ what?", 0.0, 0.0),
        ("मैं कल अपने दोस्त के साथ बाजार गया और हमने ताजे फल और सब्जियां खरीदीं", 0.0, 0.1),
    ],
)
def test_repeated_words_are_counted_in_any_script(text: str, low: float, high: float):
    """A repetition is a pair of words that was there before; lines of signs and the marks of letters are none."""
    assert low <= repetition(text) <= high


def test_one_answer_that_repeats_itself_is_a_warning():
    """An alarm takes three answers, and of a single one most must be repeated."""
    assert 0.3 < repetition(HALF_LOOP) < 0.5
    assert findings((FINE, LOOP)) == [("answers_repeat", "warning")]
    assert findings((FINE, HALF_LOOP)) == []
    assert findings(*[(FINE, HALF_LOOP)] * 3) == [("answers_repeat", "alarm")]
    assert findings((FINE, LOOP), *[(FINE, FINE)] * 3) == []
    assert findings(*[(LOOP, LOOP)] * 3) == []


def test_a_length_that_is_learnt_is_no_fault():
    """Answers that become as long as the completions of the data are right."""
    assert findings((FINE * 3, "It is nine.")) == [("answers_length", "warning")]
    assert findings((FINE * 3, "It is nine."), lengths=(4, 60)) == []
    assert findings((FINE * 3, "It is nine."), lengths=(30, 60)) == [("answers_length", "warning")]
    assert findings(("Nine. Yes.", FINE * 2), lengths=(4, 90)) == []
    assert findings(("Nine. Yes.", FINE * 2), lengths=(4, 20)) == [("answers_length", "warning")]
    assert findings((FINE, ""), lengths=(0, 9)) == [("answers_length", "alarm")]


def test_the_language_of_the_prompt_may_be_answered_in():
    """An answer in a script of the prompt is right, even if the model did not use it before."""
    assert findings((ARABIC, FINE), asked="Say it in English.") == []
    assert findings((ARABIC, FINE), asked="قل لي شيئا") == [("answers_language", "warning")]
    assert findings((FINE, ARABIC)) == [("answers_language", "warning")]
