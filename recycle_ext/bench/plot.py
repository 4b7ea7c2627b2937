"""The results as a bar chart: tokens per second by dtype, and the limit that the memory bandwidth sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from recycle_ext.bench.runners import OURS
from recycle_ext.measuring.plots import MODE_COLORS, grouped_bars, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PEER_COLORS = {
    "transformers": "#bdbdbd",
    "PyTorch eager": "#d9d9d9",
    "torch.compile": "#969696",
    "llama.cpp": "#fdae6b",
}


def plot(results: Sequence[dict], title: str, file: str, group: str = "dtype") -> None:
    """Draws the results of a report into ``file``. group: the key whose values the groups of bars are."""
    save_figure(draw(results, title, group), file)


def draw(results: Sequence[dict], title: str, group: str = "dtype") -> Figure:
    """The figure: a group of bars per dtype, a bar per system and mode, a line above each bar at its limit."""
    groups = list(dict.fromkeys(result[group] for result in results))
    labels = list(dict.fromkeys(_label(result, results) for result in results))
    table = {(_label(result, results), result[group]): result for result in results}
    figure, (axes,) = new_figure(1, max(6.0, 2 + 0.55 * len(results)), 4.5)
    series, colors = {}, []
    for index, label in enumerate(labels):
        row = [table.get((label, name)) for name in groups]
        series[label] = [result and result["tokens_per_second"] for result in row]
        colors.append(_color(next(filter(None, row)), index, results))
    bars = grouped_bars(axes, groups, series, colors, "%.0f")
    line_label = "at full memory bandwidth"
    for label, drawn in zip(labels, bars, strict=True):
        row = [table[label, name] for name in groups if (label, name) in table]
        for bar, result in zip(drawn, row, strict=True):
            # The time of reading all bytes of a step is the step's minimum, so this rate is the maximum.
            limit = result["tokens_per_second"] / result["roofline_fraction"]
            left, right = bar.get_x(), bar.get_x() + bar.get_width()
            axes.plot([left, right], [limit] * 2, color="black", linewidth=1.2, label=line_label)
            line_label = None  # one entry in the legend
    axes.set_ylabel("tokens per second")
    axes.set_title(title, fontsize=8, wrap=True, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _label(result: dict, results: Sequence[dict]) -> str:
    """System and mode, and whatever else tells the bars of a group apart."""
    label = f"{result['system']} {result['mode']}" if result["system"] == OURS else result["system"]
    for name in ("threads", "batch"):
        if len({other[name] for other in results}) > 1:
            label += f", {name} {result[name]}"
    return label


def _color(result: dict, index: int, results: Sequence[dict]) -> str:
    """A color per system and mode; the bar's own where there are several bars of one system and mode."""
    if len({(other["threads"], other["batch"]) for other in results}) > 1:
        return f"C{index}"
    if result["system"] == OURS:
        return MODE_COLORS[result["mode"]]
    return _PEER_COLORS[result["system"]]
