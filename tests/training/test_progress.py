"""How a run is displayed: curves and verdicts on terminals of any width, plain lines elsewhere."""

import io
from typing import Any

import pytest
from rich.console import Console

from fastpref.health import RULES, Verdict
from fastpref.training.progress import Display, sparkline

WARNING = Verdict("both [log-probabilities] fall.", "Lower the rate.", (1, 9), {"x": 1.0}, rule="both_fall")
ALARM = Verdict("chosen and rejected are swapped.", "Look at them.", (1, 9), {"x": 1.0}, "alarm", "swapped")


def display(width: int = 80, steps: int = 20, terminal: bool = True, encoding: str = "utf-8", **of: Any) -> Display:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace", write_through=True)
    examples = of.pop("examples", "pairs")
    options: dict[str, Any] = {"color_system": None, "force_terminal": terminal, "width": width} | of
    console = Console(file=file, highlight=False, soft_wrap=True, **options)
    return Display(steps, console=console, examples=examples)


def said(shown: Display) -> str:
    buffer = shown.console.file.buffer  # type: ignore[attr-defined]
    return buffer.getvalue().decode(shown.console.encoding)


def metrics(step: int) -> dict[str, float]:
    return {
        "loss": 0.7 - 0.01 * step, "rewards/margins": 0.1 * step, "rewards/accuracies": min(1.0, 0.5 + 0.05 * step),
        "pairs_per_second": 12.34, "tokens_per_second": 700.0,
    }  # fmt: skip


def seen(shown: Display) -> str:
    """Return the live view alone, as it is drawn now."""
    with shown.console.capture() as captured:
        shown.console.print(shown._seen(), soft_wrap=False)
    return captured.get()


@pytest.mark.parametrize(
    ("values", "scale", "drawn"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], None, "▁▂▃▄▅▆▇█"),
        ([7, 0], None, "█▁"),
        ([5, 5, 5], None, "▄▄▄"),
        (list(range(800)), None, "▁▂▃▄▅▆▇█"),
        ([1], None, "▄"),
        ([0.5, 0.5, 1.0], (0.0, 1.0), "▅▅█"),
    ],
)
def test_a_sparkline_goes_from_the_least_to_the_greatest(values: list[float], scale: Any, drawn: str):
    """Without a scale the least and the greatest value are its ends."""
    assert sparkline(values, 8, scale) == drawn


@pytest.mark.parametrize("width", [100, 60, 40])
def test_the_live_view_fits_its_terminal(width: int):
    """In any width from 40 on, the view has a bar, the time left, three curves with values, speed and memory."""
    shown = display(width)
    for step in range(1, 16):
        shown.step(step, 0.5, metrics(step), 823_000_000)
    lines = seen(shown).splitlines()
    assert all(len(line) <= width for line in lines)
    assert "15/20" in lines[0]
    assert "left" in lines[0]
    assert [line.split()[:2] for line in lines[1:4]] == [["loss", "0.5500"], ["margin", "+1.500"], ["accuracy", "100%"]]
    assert all(line.rstrip()[-1] in "▁█" for line in lines[1:4])
    assert lines[4].strip() == "12.3 pairs/s  0.82 GB"


def test_a_terminal_without_unicode_has_numbers_only():
    shown = display(encoding="ascii")
    shown.step(1, 0.5, metrics(1), None)
    assert "▁" not in seen(shown)
    assert "0.6900" in seen(shown)


def test_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch):
    """With NO_COLOR (no-color.org), no colour is printed."""
    coloured = display(color_system="standard")
    coloured.verdict(ALARM)
    assert "\x1b[1;31m" in said(coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = display(color_system="standard")
    plain.verdict(ALARM)
    assert "\x1b[1;31m" not in said(plain)
    assert "31" not in said(plain)


def test_verdicts_are_wrapped_between_words_on_a_terminal():
    shown = display(30)
    shown.verdict(WARNING)
    lines = said(shown).splitlines()
    assert len(lines) > 1
    assert " ".join(line.strip() for line in lines) == "warning: both [log-probabilities] fall. Lower the rate."


def test_elsewhere_there_are_plain_lines():
    """Without a terminal there is neither bar nor escape code, a verdict is one line, and brackets are no markup."""
    shown = display(30, terminal=False)
    with shown:
        for step in range(1, 21):
            shown.step(step, 0.5, metrics(step), 823_000_000)
            if step == 10:
                shown.verdict(WARNING)
        shown.health([ALARM, WARNING])
    lines = said(shown).splitlines()
    assert "\x1b" not in said(shown)
    assert lines[0].startswith("step 1/20  loss 0.6900  accuracy 55%")
    assert "step 20/20  loss 0.5000  accuracy 100%  12.3 pairs/s  700 tok/s  0 s left" in lines
    assert "warning: both [log-probabilities] fall. Lower the rate." in lines
    assert lines[-3:] == [
        "health: 1 alarm, 1 warning",
        "  alarm: chosen and rejected are swapped. Look at them.",
        "  warning: both [log-probabilities] fall. Lower the rate.",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_speed_counts_what_a_step_has(terminal: bool):
    """For KTO, whose examples are single completions, the speed is in completions per second."""
    shown = display(terminal=terminal, examples="completions")
    shown.step(20, 0.5, metrics(20), None)
    assert "12.3 completions/s" in (seen(shown) if terminal else said(shown))


def test_a_healthy_run_is_said_to_be_one():
    shown = display(terminal=False)
    shown.health([])
    assert said(shown) == f"health: {len(RULES)} rules found nothing wrong\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_what_vanishes_with_the_bar_is_said_at_the_end(terminal: bool):
    """The last line has the time, the mean speeds and the peak memory of all steps, on a terminal and elsewhere."""
    shown = display(terminal=terminal)
    with shown:
        for step, seconds in ((1, 10.0), (2, 30.0)):
            speeds = {"pairs_per_second": 40 / seconds, "tokens_per_second": 4000 / seconds}
            shown.step(step, seconds, metrics(step) | speeds, memory=1_500_000_000)
    shown.ended()
    assert "2 steps in 40 s: 2 pairs/s, 200 tokens/s, 1.50 GB at most" in said(shown)


def test_a_run_without_a_step_has_no_speed():
    shown = display()
    shown.ended()
    assert said(shown) == ""
