"""A config of ten steps with a constant learning rate, to compare with TRL's trainers step by step."""

from tests.support.paths import QUICKSTART_MODEL

STEPS, BATCH = 10, 6


def ten_steps(rate: float) -> str:
    """Return the config of a run of the quickstart's model on rows.jsonl, whose folder is out/."""
    return f"""
[model]
name = "{QUICKSTART_MODEL.as_posix()}"
[[data]]
path = "rows.jsonl"
[train]
learning_rate = {rate}
schedule = "constant"
warmup = 0
steps = {STEPS}
batch = {BATCH}
[output]
dir = "out"
"""
