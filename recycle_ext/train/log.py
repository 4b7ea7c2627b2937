"""The record of a run: a JSON line in a file, a line on the screen, and a plot at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycle_ext.files import whole_file, write_whole, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Log:
    """Rows of JSON in ``log.jsonl``. A resumed run drops the rows after its first step and appends."""

    def __init__(self, folder: Path, step: int) -> None:
        self.file = folder / "log.jsonl"
        self.rows = [row for row in self._stored() if row["step"] <= step]
        if self.file.exists():
            write_whole(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def _stored(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        rows = []
        for line in self.file.read_text("utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break  # The run was interrupted while it wrote this line.
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
        return rows

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row.

        Keys: step, loss (nats, mean since the last row), tokens_per_second, learning_rate, and the task's figures.
        Raises WriteError where the file cannot be written.
        """
        self.rows.append(row)
        with writing(self.file), self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def figure(self) -> Figure:
        """The curves over the steps: losses on the left, shares of accepted draft tokens on the right.

        Raises ModuleNotFoundError without matplotlib.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        losses = [name for name in self.rows[-1] if "loss" in name]
        shares = [name for name in self.rows[-1] if name.startswith("acceptance")]
        steps = [row["step"] for row in self.rows]
        for axes, names, title in ((left, losses, "loss, nats a token"), (right, shares, "held-out acceptance")):
            for name in names:
                values = [row.get(name) for row in self.rows]
                axes.plot(steps, values, label=name.replace("_", " "), linewidth=1.5)
            axes.set(xlabel="step", title=title)
            axes.grid(alpha=0.3)
            if names:
                axes.legend(frameon=False)
        right.set_ylim(bottom=0)
        return figure

    def plot(self) -> Path | None:
        """Saves the figure as ``log.png`` beside the log and returns its path; None without matplotlib."""
        try:
            figure = self.figure()
        except ModuleNotFoundError:
            return None
        file = self.file.with_suffix(".png")
        with whole_file(file) as part:
            figure.savefig(part, format="png", dpi=120)
        return file


def screen_line(row: dict[str, Any]) -> str:
    """A row of the log as one line for the screen."""
    parts = [f"step {row['step']}: loss {row['loss']:.4f}"]
    parts += [f"{name.replace('_', ' ')} {value:.4f}" for name, value in row.items() if "held_out" in name]
    shares = [value for name, value in row.items() if name.startswith("acceptance_")]
    if shares:
        parts.append("acceptance " + " ".join(f"{share:.3f}" for share in shares))
    parts.append(f"{row['tokens_per_second']:.0f} tokens/s")
    return ", ".join(parts)
