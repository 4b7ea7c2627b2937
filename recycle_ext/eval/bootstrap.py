"""Confidence intervals by the bootstrap: how far a figure moves when the examples are drawn anew."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0


def interval(
    values: np.ndarray, figure: Callable[[np.ndarray], np.ndarray] | None = None
) -> tuple[float, float] | None:
    """The 95% percentile interval (Efron and Tibshirani 1993, chapter 13) of a figure of means.

    values: [examples] or [examples, columns] float; what belongs to one example is in one row, so that columns are
    compared in pairs. figure: from the columns' means [resamples, columns] to [resamples]; None: the mean itself.
    The same values give the same interval. None for fewer than two examples, and where the figure of some
    resample is no number (a share of nothing).
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n < 2:
        return None
    generator = np.random.default_rng(SEED)
    means = np.stack([values[generator.integers(n, size=n)].mean(0) for _ in range(RESAMPLES)])
    with np.errstate(divide="ignore", invalid="ignore"):
        figures = means if figure is None else figure(means)
    if not np.isfinite(figures).all():
        return None
    low, high = np.quantile(figures, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def ratio(means: np.ndarray) -> np.ndarray:
    """A figure for ``interval``: the first column over the second."""
    return means[..., 0] / means[..., 1]
