"""The figures by category as two bar charts: acceptance, and speed beside standard mode."""

from __future__ import annotations

from collections.abc import Sequence

from recycle_ext.errors import RecycleError

_COLORS = {"verify": "#3182bd", "alternate": "#08519c"}  # as in bench/plot.py
_POSITIONS = ("#3182bd", "#6baed6", "#9ecae1", "#c6dbef")


def plot(report: dict, title: str, file: str) -> None:
    """Draws what ``summaries`` gave for the largest number of drafts. Raises RecycleError if it can't be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    k = max(report["settings"]["drafts"])
    chosen = [summary for summary in report["summaries"] if summary["drafts"] == k]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(max(8.0, 1.4 * len(chosen)), 4.2), layout="constrained"
    )
    _bars(
        left,
        chosen,
        {
            f"draft {j + 1}" if k > 1 else "": [
                100 * (s["acceptance_by_position"][j] or 0) for s in chosen
            ]
            for j in range(k)
        },
        _POSITIONS,
        "%.0f",
    )
    left.set_ylabel("drafts accepted, %" + (", of those offered" if k > 1 else ""))
    _bars(
        right,
        chosen,
        {mode: [s[f"{mode}_speedup"] or 0 for s in chosen] for mode in _COLORS},
        list(_COLORS.values()),
        "%.2f",
    )
    right.axhline(1, color="black", linewidth=0.8)
    right.set_ylabel("tokens a second, standard = 1")
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise RecycleError(f"--plot {file}: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def _bars(
    axes, chosen: Sequence[dict], series: dict[str, list[float]], colors: Sequence[str], form: str
) -> None:
    """Groups of bars, one a category."""
    width = 0.8 / len(series)
    for index, ((label, heights), color) in enumerate(zip(series.items(), colors, strict=False)):
        places = [i + (index - (len(series) - 1) / 2) * width for i in range(len(chosen))]
        drawn = axes.bar(places, heights, width * 0.92, label=label, color=color)
        axes.bar_label(drawn, fmt=form, fontsize=7)
    axes.set_xticks(range(len(chosen)), [s["category"] for s in chosen], rotation=30, ha="right")
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.set_ylim(top=axes.get_ylim()[1] * 1.12)
        axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=len(series))
