"""What a run tells while it goes: a line on the screen, a JSON line in a file, and a plot at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Log:
    """Lines of JSON in ``log.jsonl``. A resumed run goes on with the file, from its own step."""

    def __init__(self, folder: Path, step: int) -> None:
        self.file = folder / "log.jsonl"
        self.rows = [row for row in self._held() if row["step"] <= step]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in self.rows), "utf-8")

    def _held(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        rows = []
        for line in self.file.read_text("utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break  # cut off while it was written
        return rows

    def add(self, row: dict[str, Any]) -> None:
        """step, loss (mean since the last row), tokens_per_second, learning_rate, and the task's figures."""
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def plot(self) -> Path | None:
        """The curves, as ``log.png`` beside the file; None where there is no matplotlib."""
        try:
            import matplotlib
        except ModuleNotFoundError:
            return None
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
        steps = [row["step"] for row in self.rows]
        for axes, is_share, title in (
            (left, False, "loss, nats a token"),
            (right, True, "held-out acceptance"),
        ):
            for name in self.rows[-1]:
                if name.startswith("acceptance") == is_share and (is_share or "loss" in name):
                    values = [row.get(name) for row in self.rows]
                    axes.plot(steps, values, label=name.replace("_", " "), linewidth=1.5)
            axes.set(xlabel="step", title=title)
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(frameon=False)
        right.set_ylim(bottom=0)
        file = self.file.with_suffix(".png")
        figure.savefig(file, dpi=120)
        pyplot.close(figure)
        return file


def described(row: dict[str, Any]) -> str:
    """A row for people."""
    parts = [f"step {row['step']}: loss {row['loss']:.4f}"]
    parts += [
        f"{name.replace('_', ' ')} {value:.4f}" for name, value in row.items() if "held_out" in name
    ]
    if "acceptance_1" in row:
        shares = [v for k, v in row.items() if k.startswith("acceptance_")]
        parts.append("acceptance " + " ".join(f"{share:.3f}" for share in shares))
    parts.append(f"{row['tokens_per_second']:.0f} tokens/s")
    return ", ".join(parts)
