"""The policy of ``drafts="auto"``: how many draft tokens (k) the next step has. No tensors, no clock.

With a_j the share of j-th draft tokens that are accepted where all before them are,

    expected tokens(k) = 1 + a_1 + a_1 a_2 + ... + a_1 a_2 .. a_k
    value(k)           = expected tokens(k) / cost(k)

cost(k) is a step's time relative to one without draft tokens. current_k changes when another k's value is higher by
HYSTERESIS. Trials, short runs of current_k + 1 or 0, keep acceptance and costs up to date. A trial starts when the
exploration budget, a share of the tokens written, pays its worst loss times the earlier trials of its k (backoff).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from math import inf
from operator import mul, truediv
from statistics import median

EXPLORATION = 0.02  # budget for each token written: bounds the loss where draft tokens are useless
HYSTERESIS = 0.02  # a smaller difference of values is noise
TRIAL_STEPS = 4  # the median of 4 times survives an outlier
MAX_BACKOFF = 4  # bounds the wait for a trial where a text turns predictable
MAX_TRIAL_COST = 1.5  # relative to current_k: one wrong time delays the next trial, but not for long
NUM_SAMPLES = 9  # times or ratios that a median is taken of: survives outliers, follows the machine
MEMORY = 24  # steps that acceptance is averaged over: follows the passages of a text
OLD_WEIGHT = 2  # steps that earlier acceptance counts for in a new text or trial: new steps decide
UNKNOWN_ACCEPTANCE = 0.4  # of a new model: between useless and good modules


class Acceptance:
    """Running share of j-th draft tokens that are accepted where all before them are, by j."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares, self.weights = list(shares), [OLD_WEIGHT] * len(shares)

    def observe(self, offered: int, accepted: Sequence[int]) -> None:
        """Adds a step of ``offered`` draft tokens; accepted: how many of them, by active sequence."""
        for j in range(offered):
            if reached := [count > j for count in accepted if count >= j]:
                self.weights[j] = min(self.weights[j] + 1, MEMORY)
                self.shares[j] += (sum(reached) / len(reached) - self.shares[j]) / self.weights[j]


class StepHistory:
    """What outlives a text: acceptance and costs with one model, batch, sampling and thread count."""

    def __init__(self, max_draft_tokens: int) -> None:
        self.acceptance = Acceptance([UNKNOWN_ACCEPTANCE] * max_draft_tokens)
        self._ratios = [deque[float](maxlen=NUM_SAMPLES) for _ in range(max_draft_tokens)]

    def add_times(self, *runs: tuple[int, float]) -> None:
        """Adds two successive runs (k, seconds of a step): drift of the machine cancels in the ratio."""
        (low, low_seconds), (high, high_seconds) = sorted(runs)
        self._ratios[high - 1].append(high_seconds / low_seconds * self.costs()[low])

    def costs(self) -> list[float]:
        """By k: median ratios, never below that of a smaller k; infinite where nothing is measured."""
        return list(accumulate([1.0, *(median(r) if r else inf for r in self._ratios)], max))


class DraftPolicy:
    """Chooses k for each step of one text or batch; reads and extends ``history``."""

    def __init__(self, history: StepHistory) -> None:
        self._history, self._acceptance = history, Acceptance(history.acceptance.shares)
        self._max_k, values = len(history.acceptance.shares), self._values()
        self._k = self._current_k = values.index(max(values))  # _k differs during a trial
        self._trials = [1, 1] + [0] * (self._max_k - 1)  # by k; 0: the first one is free
        if not values[1]:  # a new model starts with a trial: prefill has made the draft tokens
            self._k, self._trials[1] = 1, 2
        self._budget, self._made, self._previous_run = 0.0, self._max_k, None
        self._times = deque[float](maxlen=NUM_SAMPLES)  # of the steps since k changed

    def choose(self) -> int:
        """Returns the number of draft tokens of the next step."""
        return self._k

    def observe(self, k: int, accepted: Sequence[int], seconds: float) -> None:
        """Adds a step with k draft tokens; accepted: how many, by active sequence; seconds: wall time."""
        offered, self._made = min(k, self._made), k  # padding follows those of the step before
        for acceptance in (self._acceptance, self._history.acceptance):
            acceptance.observe(offered, [min(count, offered) for count in accepted])
        if k != self._k:
            return  # the step was started before k changed
        self._budget += EXPLORATION * (1 + sum(accepted) / len(accepted))
        self._times.append(seconds)
        if len(self._times) < TRIAL_STEPS:
            return
        run = (k, median(self._times))
        if len(self._times) == TRIAL_STEPS and self._previous_run:
            self._history.add_times(self._previous_run, run)
        if (next_k := self._next_k()) != k:
            self._k, self._previous_run = next_k, run
            self._times.clear()

    def _values(self) -> list[float]:
        tokens = accumulate(accumulate([1.0, *self._acceptance.shares], mul))
        return list(map(truediv, tokens, self._history.costs()))

    def _next_k(self) -> int:
        values, costs, now = self._values(), self._history.costs(), self._current_k
        if max(values) > (1 + HYSTERESIS) * values[now]:
            self._current_k = now = values.index(max(values))
        up = min(now + 1, self._max_k)
        trial = up if now == 0 or (up > now and self._trials[up] <= self._trials[0]) else 0
        cost, sure = min(costs[trial], MAX_TRIAL_COST * costs[now]), min(trial, now)
        loss = cost * values[now] - costs[sure] * values[sure]  # a step's, with no more accepted
        needed = (TRIAL_STEPS + 1) * loss * min(self._trials[trial], MAX_BACKOFF)
        if self._k != now or self._budget < needed:
            return now
        self._budget = 0.0
        self._trials[trial] += 1
        self._acceptance.weights[now:] = [OLD_WEIGHT] * (self._max_k - now)
        return trial
