"""How a run is displayed: curves and verdicts on terminals of any width, plain lines elsewhere."""

import io
from typing import Any

import pytest
from rich.console import Console

from fastpref.health import Health, Verdict
from fastpref.training.live import sparkline
from fastpref.training.progress import Display

WARNING = Verdict("both [log-probabilities] fall.", "Lower the rate.", (1, 9), {"x": 1.0}, rule="both_fall")
ALARM = Verdict("chosen and rejected are swapped.", "Look at them.", (1, 9), {"x": 1.0}, "alarm", "swapped")


def display(width: int = 80, steps: int = 20, terminal: bool = True, encoding: str = "utf-8", **of: Any) -> Display:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace", write_through=True)
    examples, done = of.pop("examples", "pairs"), of.pop("done", 0)
    options: dict[str, Any] = {"color_system": None, "force_terminal": terminal, "width": width} | of
    console = Console(file=file, highlight=False, soft_wrap=True, **options)
    return Display(steps, done, console, examples=examples)


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
        shown.console.print(shown.view, soft_wrap=False)
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


@pytest.mark.parametrize("width", [120, 80, 60, 40])
@pytest.mark.parametrize("stopping", [False, True])
def test_the_live_view_fits_its_terminal(width: int, stopping: bool):
    """In any width from 40 on, the view has a bar of the whole width, the time left, the phase, curves and numbers."""
    shown = display(width)
    for step in range(1, 16):
        shown.step(step, 0.5, metrics(step) | {"learning_rate": 5e-6}, 823_000_000)
    shown.phase("step 16", part="micro-batch")
    shown.part(3, 8)
    if stopping:
        shown.view.stopping = True
    lines = seen(shown).splitlines()
    assert all(len(line) <= width for line in lines)
    assert lines[0].rstrip().endswith("15/20  0:02 left")
    assert len(lines[0].rstrip()) >= width - 2
    assert lines[1].startswith("step 16, micro-batch 3 of 8  0:00")
    curves = next(at for at, line in enumerate(lines) if line.startswith("loss"))
    assert (" ".join(lines[2:curves]).strip().startswith("stopping after this step")) == stopping
    rows = [line.split() for line in lines[curves : curves + 3]]
    assert [row[:2] for row in rows] == [["loss", "0.5500"], ["margin", "+1.500"], ["accuracy", "100%"]]
    assert all(row[2][-1] in "▁█" for row in rows)
    assert [row[3:] for row in rows] == (
        [["0.5500", "to", "0.6900"], ["+0.100", "to", "+1.500"], ["55%", "to", "100%"]] if width >= 76 else [[]] * 3
    )
    wanted = "12.3 pairs/s  peak memory 0.82 GB  learning rate 5e-06"
    assert lines[-1].strip() == wanted if width > len(wanted) else lines[-1].startswith("12.3 pairs/s  peak memory")


def test_the_time_left_is_known_after_the_first_step():
    """Before it nothing is guessed; a resumed run counts its own steps only, and begins its curves with the others."""
    shown = display(done=10)
    assert "10/20  -:-- left" in seen(shown)
    shown.past({"step": step} | metrics(step) for step in range(1, 11))
    shown.step(11, 60.0, metrics(11))
    assert "11/20  9:00 left" in seen(shown)
    assert "0.5900 to 0.6900" in seen(shown)


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


def test_notes_are_wrapped_between_words_and_what_will_be_copied_is_not():
    """Neither a path nor a command, which is indented, gets a line break on a terminal."""
    shown = display(30)
    shown.note("saved in the folder: runs/a-name-longer-than-the-line-is\n  fastpref train runs/x.toml --resume y")
    assert said(shown).splitlines() == [
        "saved in the folder:", "runs/a-name-longer-than-the-line-is", "  fastpref train runs/x.toml --resume y",
    ]  # fmt: skip


def test_a_long_run_has_fewer_lines(monkeypatch: pytest.MonkeyPatch):
    """A log of ten hours has some hundred lines, and its last step."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    shown = display(terminal=False, steps=36_000)
    for step in range(1, 36_001):
        clock[0] += 1
        shown.step(step, 1.0, metrics(1))
    lines = said(shown).splitlines()
    assert 300 < len(lines) < 1000
    assert lines[-1].startswith("step 36000/36000")


def test_elsewhere_there_are_plain_lines():
    """Without a terminal there is neither bar nor escape code, a verdict is one line, and brackets are no markup."""
    shown = display(30, terminal=False)
    with shown:
        for step in range(1, 21):
            shown.step(step, 0.5, metrics(step), 823_000_000)
            if step == 10:
                shown.verdict(WARNING)
        shown.health(Health((ALARM, WARNING), ("a",) * 9, ()))
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
    shown.health(Health((), ("a",) * 9, ("b",), (WARNING,)))
    assert said(shown) == (
        "health: 9 rules found nothing wrong; 1 of 10 could not be asked, for want of steps, evaluations or held-out "
        f"rows; 1 finding given before has passed ({WARNING.rule})\n"
    )


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
