"""Times as run.json holds them, and as people read them."""

from datetime import datetime
from typing import Any


def now() -> str:
    """Return the time here, with the difference to UTC, as run.json holds it."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def duration(seconds: float) -> str:
    """Return a duration such as 1 h 2 min, 3 min 4 s or 5 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def moment(text: Any) -> datetime | None:
    """Return the time that run.json holds as text, or None."""
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None


def day_and_time(at: datetime) -> str:
    """Return a time such as 26 November 2026, 20:42 UTC+01:00."""
    return f"{at.day} {_MONTHS[at.month - 1]} {at.year}, {at:%H:%M} {at.tzname() or ''}".rstrip()


_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
