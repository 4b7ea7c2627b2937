"""The results as a bar chart."""

from __future__ import annotations

from recycle_ext.bench.contenders import OURS
from recycle_ext.errors import RecycleError

KINDS = (".png", ".svg", ".pdf")
_OUR_COLORS = {"standard": "#9ecae1", "verify": "#3182bd", "alternate": "#08519c"}
_PEER_COLORS = {
    "transformers": "#bdbdbd",
    "PyTorch eager": "#d9d9d9",
    "torch.compile": "#969696",
    "llama.cpp": "#fdae6b",
}


def check_plot(file: str) -> None:
    """Raises RecycleError if a plot could not be made, before anything is measured."""
    if not file.endswith(KINDS):
        raise RecycleError(f"--plot is {file}; it must end in {', '.join(KINDS)}")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise RecycleError("--plot needs matplotlib: `pip install matplotlib`") from None


def plot(report: dict, title: str, file: str) -> None:
    """Tokens a second by width, a bar for each system and mode, and what the bandwidth would allow it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = report["results"]
    widths = list(dict.fromkeys(result["width"] for result in results))
    labels = list(dict.fromkeys(_label(result, results) for result in results))
    bar = 0.8 / len(labels)
    figure, axes = pyplot.subplots(
        figsize=(max(6.0, 2 + 0.55 * len(results)), 4.5), layout="constrained"
    )
    floors = []
    for index, label in enumerate(labels):
        mine = [result for result in results if _label(result, results) == label]
        places = [
            widths.index(result["width"]) + (index - (len(labels) - 1) / 2) * bar for result in mine
        ]
        rates = [result["tokens_per_second"] for result in mine]
        bars = axes.bar(
            places, rates, bar * 0.92, label=label, color=_color(mine[0], index, results)
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
        # All bytes of a step at the speed the machine reads: the floor of the time, the ceiling here.
        for place, result in zip(places, mine, strict=True):
            floors.append((place, result["tokens_per_second"] / result["roofline_fraction"]))
    for number, (place, rate) in enumerate(floors):
        axes.plot(
            [place - bar * 0.46, place + bar * 0.46],
            [rate, rate],
            color="black",
            linewidth=1.2,
            label="at full memory bandwidth" if number == 0 else None,
        )
    axes.set_xticks(range(len(widths)), widths)
    axes.set_ylabel("tokens per second")
    axes.set_title(title, fontsize=8, wrap=True, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise RecycleError(f"--plot {file}: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def _label(result: dict, results: list[dict]) -> str:
    """System and mode, and what else tells the bars of a width apart."""
    label = f"{result['system']} {result['mode']}" if result["system"] == OURS else result["system"]
    for name in ("threads", "batch"):
        if len({other[name] for other in results}) > 1:
            label += f", {name} {result[name]}"
    return label


def _color(result: dict, index: int, results: list[dict]) -> str:
    """One for each system and mode, unless there are several bars of one."""
    if len({(other["threads"], other["batch"]) for other in results}) > 1:
        return f"C{index}"
    if result["system"] == OURS:
        return _OUR_COLORS[result["mode"]]
    return _PEER_COLORS[result["system"]]
