"""Bar charts, as bench and eval draw them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_ext.errors import RecycleError
from recycle_ext.files import check_output, has_keys, whole_file
from recycle_ext.measuring.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_CREATOR = "recycle_ext"  # in the metadata of every plot
MODE_COLORS = {"standard": "#9ecae1", "verify": "#3182bd", "alternate": "#08519c"}


def check_outputs(json_file: str | None, plot_file: str | None, report_keys: set[str]) -> None:
    """Checks --json and --plot before anything is measured; None: the option is not given.

    report_keys: of the command's reports, by which an earlier one is known. Raises RecycleError for a file that cannot
    be written, or would replace another than such a report or plot.
    """
    if json_file is not None:
        check_output("--json", json_file, lambda content: has_keys(content, report_keys))
    if plot_file is not None:
        check_plot(plot_file)
        if json_file is not None and Path(json_file).absolute() == Path(plot_file).absolute():
            raise RecycleError(f"--json and --plot are both {plot_file}; give two names")


def check_plot(file: str) -> None:
    """Raises RecycleError if a plot could not be drawn or would replace another file, before anything is measured."""
    if not file.endswith(FORMATS):
        raise RecycleError(f"--plot is {file}; it must end in {', '.join(FORMATS)}")
    require("matplotlib", "--plot")
    check_output("--plot", file, lambda content: _CREATOR.encode() in content)


def new_figure(columns: int, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    """A figure of ``width`` by ``height`` inches with that many axes in a row; it needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def grouped_bars(
    axes: Axes,
    groups: Sequence[str],
    series: dict[str, Sequence[float | None]],
    colors: Sequence[str],
    number_format: str,
) -> list[BarContainer]:
    """A group of bars per name in ``groups``, in each group a bar per series.

    series: a value per group; None: no bar there. number_format: of the labels on the bars, as "%.0f".
    Returns the bars of each series.
    """
    width = 0.8 / len(series)
    drawn = []
    for index, ((label, values), color) in enumerate(zip(series.items(), colors, strict=False)):
        offset = (index - (len(series) - 1) / 2) * width
        shown = [(group + offset, value) for group, value in enumerate(values) if value is not None]
        places, heights = [place for place, _ in shown], [height for _, height in shown]
        bars = axes.bar(places, heights, width * 0.92, label=label, color=color)
        axes.bar_label(bars, fmt=number_format, fontsize=7)
        drawn.append(bars)
    axes.set_xticks(range(len(groups)), groups)
    return drawn


def save_figure(figure: Figure, file: str | Path) -> None:
    """Writes the figure and closes it. Raises WriteError if the file cannot be written."""
    from matplotlib import pyplot

    try:
        with whole_file(file) as part:
            figure.savefig(part, format=Path(file).suffix[1:], dpi=150, metadata={"Creator": _CREATOR})
    finally:
        pyplot.close(figure)
