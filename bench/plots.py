"""Plots of a result, each as PNG and SVG."""

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from bench.engines import ENGINES
from bench.measure import BARE
from bench.objectives import name_of
from bench.results import OURS, ratios, spread, title

# One colour a method, in every plot: Okabe and Ito's, which colour-blind readers can distinguish.
COLOURS = {
    "fastpref": "#0072B2",
    "TRL": "#E69F00",
    "TRL 1.16, chunked": "#E69F00",
    "Liger": "#CC79A7",
    "TRL with Liger": "#CC79A7",
    "TRL, patched": "#009E73",
    "cut-cross-entropy": "#D55E00",
    "Unsloth": "#56B4E9",
    "torch, chunked": "#B8A800",
    "all logits": "#000000",
}
_OTHER = "#999999"


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write every plot that the result has numbers for. Returns the PNG files."""
    frozen = [record for record in result["head"] if (record["objective"], record["passes"]) == ("tokens", "frozen")]
    losses = [record for record in result["head"] if record["objective"] != "tokens"]
    plots = []
    for what in ("time", "memory"):
        if frozen:
            plots.append(_save(_bars(frozen, "model", what, title("tokens", "frozen")), folder / f"head-{what}"))
        if losses:
            name = f"Losses with their head, forward and backward, frozen head ({losses[0]['model']})"
            plots.append(_save(_bars(losses, "objective", what, name), folder / f"losses-{what}"))
    if result["scaling"]:
        plots.append(_save(_growth(result["scaling"]), folder / "growth"))
    if result["steps"]:
        plots.append(_save(_steps(result["steps"]), folder / "steps"))
    return plots


def _save(figure: Any, path: Path) -> Path:
    for kind in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{kind}"), dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path.with_suffix(".png")


def _bars(records: list[dict[str, Any]], by: str, what: str, heading: str) -> Any:
    """Draw a group of bars per record, with a bar per method whose results are right."""
    methods = list(dict.fromkeys(row["method"] for record in records for row in record["rows"] if row["ms"]))
    methods = [method for method in methods if method != BARE]
    figure, axes = plt.subplots(figsize=(1.9 * len(records) + 2.5, 4.5))
    width = 0.82 / len(methods)
    for place, method in enumerate(methods):
        xs, ys, errors = [], [], []
        for at, record in enumerate(records):
            row = next(row for row in record["rows"] if row["method"] == method)
            if not row["ms"] or row["note"]:
                continue
            values = ratios(record, method)
            xs.append(at + (place - (len(methods) - 1) / 2) * width)
            ys.append(median(values) if what == "time" else row["bytes"] / 2**20)
            errors.append(spread(values) if what == "time" else 0)
        style: dict[str, Any] = {"label": method, "color": COLOURS.get(method, _OTHER), "zorder": 2}
        spreads = errors if what == "time" else None
        axes.bar(xs, ys, width * 0.92, yerr=spreads, error_kw={"linewidth": 0.8}, **style)
    if what == "time":
        axes.axhline(1, color="black", linewidth=1, linestyle="--", label="bare matrix products", zorder=3)
        axes.set_ylabel("time, × bare matrix products")
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel("memory over the inputs, MiB (log scale)")
    names = [
        name_of(record[by]) if by == "objective" else f"{record[by]}\n{record['vocab']:,} × {record['hidden']:,}"
        for record in records
    ]
    axes.set_xticks(range(len(records)), names, fontsize=9)
    _finish(axes, heading)
    return figure


def _growth(sweeps: list[dict[str, Any]]) -> Any:
    figure, grid = plt.subplots(2, len(sweeps), figsize=(3.4 * len(sweeps), 6), squeeze=False)
    for column, sweep in enumerate(sweeps):
        sizes = [point["size"] for point in sweep["points"]]
        for line, (what, unit, scale) in enumerate((("ms", "ms", 1.0), ("bytes", "MiB", 2**20))):
            axes = grid[line][column]
            values = [point[what] / scale for point in sweep["points"]]
            axes.loglog(sizes, values, "o-", color=COLOURS[OURS], label=f"size^{sweep['growth'][what]:.2f}")
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8, rotation=30)
            axes.minorticks_off()
            ticks = sorted({min(values), max(values)}) if max(values) / min(values) > 1.3 else [values[0]]
            axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
            if max(values) / min(values) < 2:
                axes.set_ylim(min(values) / 2, max(values) * 2)
            axes.set_xlabel(f"{sweep['name']}, {sweep['unit']}")
            if column == 0:
                axes.set_ylabel(f"{'time' if what == 'ms' else 'memory over the inputs'}, {unit}")
            axes.grid(alpha=0.3)
            axes.legend(loc="upper left", frameon=False)
    figure.suptitle("fastpref's head, forward and backward, frozen: growth of time and memory (log scales)")
    figure.tight_layout()
    return figure


def _steps(steps: list[dict[str, Any]]) -> Any:
    results = [result for step in steps for result in step["engines"]]
    engines = list(dict.fromkeys(result["engine"] for result in results if "note" not in result))
    figure, grid = plt.subplots(1, 2, figsize=(max(10, 1.6 * len(steps) + 6), 4.8))
    for axes, what, label in (
        (grid[0], "pairs_per_second", "pairs/s, × TRL"),
        (grid[1], "peak", "memory over the model, × TRL"),
    ):
        width = 0.82 / len(engines)
        for place, engine in enumerate(engines):
            xs, ys = [], []
            for at, step in enumerate(steps):
                results = {e["engine"]: e for e in step["engines"] if "note" not in e}
                if engine in results:
                    xs.append(at + (place - (len(engines) - 1) / 2) * width)
                    ys.append(results[engine][what] / results["trl"][what])
            name = ENGINES[engine]
            bars = axes.bar(xs, ys, width * 0.92, label=name, color=COLOURS[name], zorder=2)
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axes.set_xticks(range(len(steps)), [_lines(step) for step in steps], fontsize=8)
        axes.set_ylabel(label)
        axes.margins(y=0.1)
        _finish(axes, "Speed of whole steps" if what == "pairs_per_second" else "Peak memory of whole steps")
    figure.tight_layout()
    return figure


def _lines(step: dict[str, Any]) -> str:
    first, second, *rest = step["what"].split(", ")
    return f"{name_of(step['method'])}\n{first}\n{second}\n{', '.join(rest)}"


def _finish(axes: Any, heading: str) -> None:
    """Add a title, a grid, and a legend under the plot, where it covers nothing."""
    axes.set_title(heading, fontsize=11)
    axes.grid(axis="y", alpha=0.3, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=4, frameon=False, fontsize=9)
