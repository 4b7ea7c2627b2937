"""Confidence intervals of a figure by the bootstrap over examples, with scipy.stats.bootstrap."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0
_BATCH = 1000  # resamples in memory at once

Statistic = Callable[..., np.ndarray]


def interval(*columns: np.ndarray, statistic: Statistic = lambda *means: means[0]) -> tuple[float, float] | None:
    """The percentile interval (Efron and Tibshirani 1993, chapter 13) of a statistic of the columns' means.

    columns: [examples] float each; the values of one example stand at one index in all columns, and resampling keeps them
    together. statistic: from the means of the columns, arrays of one shape, to an array of that shape; default: the
    mean of the one column. The same values give the same interval. None for fewer than two examples, and where
    the statistic of a resample is not finite (a share of nothing).
    """
    data = tuple(np.asarray(column, dtype=np.float64) for column in columns)
    if len(data[0]) < 2:
        return None
    from scipy import stats  # the import takes most of a second

    def of_resamples(*samples: np.ndarray, axis: int) -> np.ndarray:
        return statistic(*(sample.mean(axis) for sample in samples))

    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        # scipy warns of resamples that are not finite; the return value None says the same.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            data,
            of_resamples,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=_BATCH,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(SEED),
        )
    if not np.isfinite(result.bootstrap_distribution).all():
        return None
    low, high = result.confidence_interval
    return float(low), float(high)


def ratio(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A statistic for ``interval``: the first mean over the second."""
    return first / second
