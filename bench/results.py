"""Write results as JSON and Markdown, and compare two results."""

from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from bench.engines import ELSEWHERE, ENGINES
from bench.losses import losses_table
from bench.measure import BARE, Case, Row
from bench.objectives import name_of

OURS = "fastpref"
TRL, TREES = "TRL 1.16", "trees"  # rows of the profile prefixes, the bases of its ratios
FIRST_LOSS = 0.002  # the largest relative difference of first losses that are the same
RESIDENT = "resident"  # the row of the profile streaming that is the base of its ratios


def head_record(case: Case, rows: list[Row]) -> dict[str, Any]:
    """Return a case of the head benchmarks and the results of its methods as JSON values."""
    shape = case.shape
    return {
        "model": shape.model, "hidden": shape.hidden, "vocab": shape.vocab, "softcap": shape.softcap,
        "positions": shape.positions, "scored": shape.scored, "objective": case.objective.name,
        "passes": case.passes, "dtype": str(case.dtype).removeprefix("torch."),
        "rows": [row.record() for row in rows],
    }  # fmt: skip


def key(record: dict[str, Any]) -> str:
    return f"{record['model']} {record['objective']} {record['passes']} {record['dtype']}"


def ratios(record: dict[str, Any], method: str, base: str = BARE) -> list[float]:
    """Return a method's time over the base's in each turn, in which other load slows both."""
    rows = {row["method"]: row["ms"] for row in record["rows"]}
    return [ours / theirs for ours, theirs in zip(rows.get(method, []), rows[base], strict=False)]


def spread(values: list[float]) -> float:
    """Return the distance of p20 or p80 from the median, whichever is larger."""
    low, high = np.quantile(values, [0.2, 0.8])
    return float(max(median(values) - low, high - median(values)))


def with_spread(values: list[float]) -> str:
    return f"{median(values):.2f} ± {spread(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def speedups(result: dict[str, Any], base: dict[str, Any]) -> list[float]:
    """Return the speed of an engine's steps over the base's in each turn."""
    return [ours / theirs for ours, theirs in zip(result["speeds"], base["speeds"], strict=True)]


def first_loss(result: dict[str, Any], base: dict[str, Any]) -> str:
    """Return an engine's first loss, marked if it is not the base's, with which the engine did other work."""
    return f"{result['loss']:.4f}" + ("" if same_loss(result, base) else " (not TRL's)")


def same_loss(result: dict[str, Any], base: dict[str, Any]) -> bool:
    """Return whether first losses are equal to the rounding of bfloat16, in which other layouts round differently."""
    return abs(result["loss"] - base["loss"]) <= FIRST_LOSS * abs(base["loss"])


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"# Benchmarks: `{result['command']}`",
        "",
        f"{result['date']}, {machine['device'] if machine['device'] != 'cpu' else machine['processor']}, "
        f"{machine['threads']} threads, Python {machine['python']}, {versions}; commit {machine['commit']}. "
        f"{result['seconds'] / 60:.1f} minutes.",
        "",
        result["rule"],
    ]
    kinds = list(dict.fromkeys((record["objective"], record["passes"]) for record in result["head"]))
    for objective, passes in kinds:
        records = [r for r in result["head"] if (r["objective"], r["passes"]) == (objective, passes)]
        lines += ["", f"## {title(objective, passes)}", "", *_head_table(records)]
    if result.get("losses"):
        lines += ["", "## Losses without their head", "", *losses_table(result["losses"])]
    if result["scaling"]:
        lines += ["", "## Growth of fastpref's head", "", *_scaling_table(result["scaling"])]
    if result["steps"]:
        lines += ["", "## Whole training steps", "", *_steps_table(result["steps"])]
    if result.get("prefixes"):
        lines += ["", "## Steps on pairs that share their beginnings", "", *_prefixes_table(result["prefixes"])]
    if result.get("streaming"):
        lines += ["", "## Steps with a streamed base", "", *_streaming_table(result["streaming"])]
    return "\n".join(lines) + "\n"


def title(objective: str, passes: str) -> str:
    what = "Token log-probabilities" if objective == "tokens" else f"{name_of(objective)} loss"
    how = {
        "forward": "forward only",
        "frozen": "forward and backward, frozen head",
        "trained": "forward and backward, trained head",
    }
    return f"{what}, {how[passes]}"


def _head_table(records: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| head (V × H) | method | ms p50 (p20 to p80) | × bare | extra MiB | loss error | gradient error |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        name = f"{record['model']} ({record['vocab']:,} × {record['hidden']:,})"
        for row in record["rows"]:
            if not row["ms"]:
                lines.append(f"| {name} | {row['method']} | {row['note']} | | | | |")
                continue
            wrong = bool(row["note"])
            values = ratios(record, row["method"])
            ratio = row["note"] if wrong else f"{median(values):.2f} ± {spread(values):.2f}"
            lines.append(
                f"| {name} | {row['method']} | {row['p50']:.1f} ({row['p20']:.1f} to {row['p80']:.1f}) | {ratio} | "
                f"{row['bytes'] / 2**20:.1f} | {_error(row['value_error'])} | {_error(row['grad_error'])} |"
            )
    summary = ["", "| head | fastest other | fastpref is | leanest other | fastpref takes |", "|---|---|---:|---|---:|"]
    for record in records:
        best = against(record)
        if best is not None:
            fastest, speedup, leanest, memory = best
            summary.append(
                f"| {record['model']} | {fastest} | {speedup:.2f} × as fast | {leanest} | {memory:.2f} × its memory |"
            )
    return lines + summary


def against(record: dict[str, Any]) -> tuple[str, float, str, float] | None:
    """Return the fastest other correct method and the speedup over it, the leanest one and the share of its memory."""
    others = [row for row in record["rows"] if row["method"] not in (OURS, BARE) and row["ms"] and not row["note"]]
    ours = next((row for row in record["rows"] if row["method"] == OURS and row["ms"] and not row["note"]), None)
    if not others or ours is None:
        return None
    fastest = min(others, key=lambda row: row["p50"])
    leanest = min(others, key=lambda row: row["bytes"])
    return fastest["method"], fastest["p50"] / ours["p50"], leanest["method"], ours["bytes"] / leanest["bytes"]


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def _scaling_table(sweeps: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Time and memory grow as size to the power given here: 1 is linear, 0 is not at all.",
        "",
        "| what grows | sizes | time | memory |",
        "|---|---|---:|---:|",
    ]
    for sweep in sweeps:
        sizes = ", ".join(f"{point['size']:,}" for point in sweep["points"])
        growth = sweep["growth"]
        lines.append(f"| {sweep['name']} | {sizes} {sweep['unit']} | {growth['ms']:.2f} | {growth['bytes']:.2f} |")
    return lines


def _steps_table(steps: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model, rows | method | trainer | pairs/s | × TRL | tokens/s | memory over the model | × TRL | first loss |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for step in steps:
        base = next(result for result in step["engines"] if result["engine"] == "trl")
        for one in step["engines"]:
            name = ENGINES[one["engine"]]
            if "note" in one:
                lines.append(f"| {step['what']} | {step['method']} | {name} | {one['note']} | | | | | |")
                continue
            energy = f", {one['joules_a_pair']:.1f} J a pair" if one.get("joules_a_pair") else ""
            lines.append(
                f"| {step['what']} | {step['method']} | {name} | {one['pairs_per_second']:.3f}{energy} | "
                f"{with_spread(speedups(one, base))} | {one['tokens_per_second']:.0f} | "
                f"{one['peak'] / 1e6:,.0f} MB | {one['peak'] / base['peak']:.2f} | {first_loss(one, base)} |"
            )
    return [*lines, "", *(f"- {engine}: {why}" for engine, why in ELSEWHERE.items())]


def _prefixes_table(records: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| pairs | layout | tokens | pairs/s | × TRL | × trees | MiB | × TRL | loss |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        memory = {row["method"]: row["bytes"] for row in record["rows"]}
        for row in record["rows"]:
            if not row["ms"] or row["note"]:
                lines.append(f"| {record['what']} | {row['method']} | {row['note']} | | | | | | |")
                continue
            speed = 1000 * record["pairs"] / row["p50"]
            times = [_speedup(record, row["method"], base) for base in (TRL, TREES)]
            share = f"{row['bytes'] / memory[TRL]:.2f}" if memory[TRL] else ""
            lines.append(
                f"| {record['what']} | {row['method']} | {row['tokens']:,} | {speed:.2f} | {times[0]} | {times[1]} | "
                f"{row['bytes'] / 2**20:,.0f} | {share} | {row['loss']:.4f} |"
            )
    return lines


def _streaming_table(records: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"| weights | engine | tokens | tokens/s | × {RESIDENT} | MiB held | MiB at most | × {RESIDENT} | copies | "
        "MiB copied | loss |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        most = {row["method"]: row["held"] + (row["bytes"] or 0) for row in record["rows"]}
        for row in record["rows"]:
            if not row["ms"] or row["note"]:
                lines.append(f"| {record['what']} | {row['method']} | {row['note']} | | | | | | | | |")
                continue
            held, peak = row["held"] / 2**20, most[row["method"]] / 2**20
            lines.append(
                f"| {record['what']} | {row['method']} | {record['tokens']:,} | "
                f"{1000 * record['tokens'] / row['p50']:,.0f} | {_speedup(record, row['method'], RESIDENT)} | "
                f"{held:,.1f} | {peak:,.1f} | {most[row['method']] / most[RESIDENT]:.2f} | {row['copies']} | "
                f"{row['copied'] / 2**20:,.1f} | {row['loss']:.4f} |"
            )
    return lines


def _speedup(record: dict[str, Any], method: str, base: str) -> str:
    """Return in words how many times as fast as the base a method is."""
    values = ratios(record, base, method)
    return f"{median(values):.2f} ± {spread(values):.2f}" if values else ""


# --- two results ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The difference of one number in two results."""

    what: str
    unit: str
    before: float
    after: float
    spread: float  # the sum of both runs' spreads

    @property
    def factor(self) -> float:
        return self.after / self.before if self.before else float("inf")

    @property
    def within_spread(self) -> bool:
        return abs(self.after - self.before) <= self.spread

    def regressed(self, threshold: float) -> bool:
        """Return whether the number grew by more than a share, and by more than the spread of the runs."""
        return self.factor > 1 + threshold and not self.within_spread


def changes(before: dict[str, Any], after: dict[str, Any], method: str = OURS) -> list[Difference]:
    """Compare times over the bare products', and memory, of every case that both results contain."""
    result = []
    theirs = {key(record): record for record in before["head"]}
    for record in after["head"]:
        old = theirs.get(key(record))
        if old is None or any(old[size] != record[size] for size in ("hidden", "vocab", "scored")):
            continue
        a, b = ratios(old, method), ratios(record, method)
        if a and b:
            result.append(Difference(key(record), "× bare", median(a), median(b), spread(a) + spread(b)))
        was, now = (next((r["bytes"] for r in x["rows"] if r["method"] == method), None) for x in (old, record))
        if was and now:
            result.append(Difference(key(record), "MiB", was / 2**20, now / 2**20, 0.01))
    return result
