"""Rules that find faults of the training rows: what was cut or dropped, repetitions, unbalanced labels, text."""

from fastpref.config.losses import KTO
from fastpref.data.balance import unbalanced
from fastpref.health.rule import UNASKED, Known, Unasked, Verdict, percent, preferences, rule
from fastpref.run.history import History


@rule("no_end", explains=("truncation",))
def _no_end(h: History, known: Known) -> Verdict | Unasked | None:
    if not known.rows:
        return UNASKED
    if known.ends:
        return None
    return Verdict(
        "every training completion was cut, so the model sees no end and will not learn to stop.",
        "Raise tokens.max_length.",
        (0, h.step),
        {"rows": known.rows},
        "alarm",
    )


@rule("prompts_lost", explains=("truncation",))
def _prompts_lost(h: History, known: Known) -> Verdict | Unasked | None:
    if not known.rows:
        return UNASKED
    share = known.lost / known.rows
    if share <= 0.05:
        return None
    return Verdict(
        f"{percent(share)} of the training rows ({known.lost:,} of {known.rows:,}) have less than a quarter of their "
        "prompt left. The model learns to answer what it does not see.",
        'Raise tokens.max_length or tokens.max_prompt_length, or leave out such rows with tokens.overlong="drop".',
        (0, h.step),
        {"rows with little of their prompt": known.lost, "rows": known.rows},
        "alarm" if share > 0.5 else "warning",
    )


@rule("truncation")
def _truncation(h: History, known: Known) -> Verdict | Unasked | None:
    if not known.rows:
        return UNASKED
    share = known.cut / known.rows
    if share <= 0.05:
        return None
    return Verdict(
        f"{percent(share)} of the training rows were cut ({known.cut:,} of {known.rows:,}). The model does not see "
        "them whole.",
        'Raise tokens.max_length or tokens.max_prompt_length, or leave out such rows with tokens.overlong="drop".',
        (0, h.step),
        {"rows cut": known.cut, "rows": known.rows},
    )


@rule("rows_dropped")
def _rows_dropped(h: History, known: Known) -> Verdict | Unasked | None:
    if not known.rows:
        return UNASKED
    dropped = sum(known.dropped.values())
    share = dropped / (known.rows + dropped)
    if share <= 0.2:
        return None
    reasons = ", ".join(f"{count:,} {words}" for words, count in known.dropped.items())
    return Verdict(
        f"{percent(share)} of the training rows were dropped ({reasons}). The model does not see them.",
        "Read the reasons with `fastpref preview`; rows that are too long need a larger tokens.max_length.",
        (0, h.step),
        {"rows dropped": dropped, "rows used": known.rows},
    )


@rule("no_question", of=preferences)
def _no_question(h: History, known: Known) -> Verdict | Unasked | None:
    if not known.rows:
        return UNASKED
    share = known.questionless / known.rows
    if share <= 0.05:
        return None
    return Verdict(
        f"in {percent(share)} of the training rows ({known.questionless:,} of {known.rows:,}) the prompt's last turn "
        "is empty. The model learns to answer nothing in particular.",
        "Look at them with `fastpref preview`: does data.format name the column of the question?",
        (0, h.step),
        {"rows without a question": known.questionless, "rows": known.rows},
        "alarm" if share > 0.5 else "warning",
    )


@rule("rows_repeat")
def _rows_repeat(h: History, known: Known) -> Verdict | Unasked | None:
    if not known.rows:
        return UNASKED
    share = known.repeated / known.rows
    if share <= 0.1:
        return None
    return Verdict(
        f"{percent(share)} of the training rows repeat another row exactly ({known.repeated:,} of {known.rows:,}).",
        'Leave them out with tokens.duplicates="drop", or weigh a source with data.weight on purpose.',
        (0, h.step),
        {"rows that repeat": known.repeated, "rows": known.rows},
    )


@rule("batch_large")
def _batch_large(h: History, known: Known) -> Verdict | Unasked | None:
    if not known.rows or known.batch is None:
        return UNASKED
    if known.batch <= known.rows:
        return None
    return Verdict(
        f"a batch has {known.batch:,} {known.loss.unit}s, and there are {known.rows:,}, so every step sees all of "
        "them, and some more than once.",
        f"Use train.batch={min(16, max(1, known.rows // 10))}.",
        (0, h.step),
        {"batch": known.batch, "rows": known.rows},
    )


@rule("template_foreign")
def _template_foreign(h: History, known: Known) -> Verdict | Unasked | None:
    if not known.rows:
        return UNASKED
    if known.template <= 0.5:
        return None
    return Verdict(
        f"{percent(known.template)} of the training rows do not follow the chat template as a chat with the model "
        "does: their turns begin or end otherwise.",
        "Compare the text in `fastpref preview` with the model's card; see data.format and tokens.chat_template.",
        (0, h.step),
        {"share of rows": known.template},
    )


@rule("labels_unbalanced", of=lambda known: isinstance(known.loss, KTO))
def _labels_unbalanced(h: History, known: Known) -> Verdict | Unasked | None:
    """Find good and bad rows of KTO whose weights do not balance."""
    if known.labels is None:
        return UNASKED
    good, bad = known.labels
    fault = unbalanced(good, bad, known.loss)
    if fault is None:
        return None
    message, advice = fault
    severity = "warning" if good and bad else "alarm"
    return Verdict(f"{message}.", advice, (0, h.step), {"good": good, "bad": bad}, severity)
