"""The figures by category as two bar charts: acceptance, and speed relative to standard mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recycle_ext.measuring.plots import MODE_COLORS, grouped_bars, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MODES = ("verify", "alternate")
_POSITION_COLORS = ("#3182bd", "#6baed6", "#9ecae1", "#c6dbef")


def plot(report: dict, title: str, file: str) -> None:
    """Draws the summaries of the largest number of draft tokens. Raises RecycleError if ``file`` cannot be written."""
    save_figure(draw(report, title), file)


def draw(report: dict, title: str) -> Figure:
    """The figure: on the left the acceptance by category and position, on the right the speed-up of both modes."""
    k = max(report["settings"]["drafts"])
    chosen = [summary for summary in report["summaries"] if summary["drafts"] == k]
    categories = [summary["category"] for summary in chosen]
    figure, (left, right) = new_figure(2, max(8.0, 1.4 * len(chosen)), 4.2)
    shares = {f"draft token {j + 1}": [_percent(s["acceptance_by_position"][j]) for s in chosen] for j in range(k)}
    grouped_bars(left, categories, shares, _POSITION_COLORS, "%.0f")
    left.set_ylabel("acceptance, %" + (" of those offered" if k > 1 else ""))
    speeds = {mode: [summary[f"{mode}_speedup"] for summary in chosen] for mode in _MODES}
    grouped_bars(right, categories, speeds, [MODE_COLORS[mode] for mode in _MODES], "%.2f")
    right.axhline(1, color="black", linewidth=0.8)
    right.set_ylabel("tokens per second, standard = 1")
    for axes, series in ((left, shares), (right, speeds)):
        axes.tick_params("x", rotation=30)
        if len(series) > 1:
            axes.set_ylim(top=axes.get_ylim()[1] * 1.12)  # room for the legend
            axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=len(series))
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
