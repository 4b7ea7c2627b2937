"""The policy of ``drafts="auto"``: how many draft tokens (k) the next step has. No tensors, no clock.

With a_j the share of j-th draft tokens that are accepted where all before them are,

    expected tokens(k) = 1 + a_1 + a_1 a_2 + ... + a_1 a_2 .. a_k
    value(k)           = expected tokens(k) / cost(k)

cost(k) is the time of a step relative to one without draft tokens: the k of the highest value is the fastest. The policy
stays at current_k until the value of another k is higher by HYSTERESIS. Trials, which are short runs of current_k + 1
or 0, keep acceptance and costs up to date. A trial waits until the exploration budget, a share of the tokens written,
is what the trial can lose times the number of trials of this k so far (backoff; the first trial of 2 and more is free).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from math import inf
from operator import mul
from statistics import median

EXPLORATION = 0.02  # budget for each token written: bounds the loss where draft tokens are useless
HYSTERESIS = 0.02  # a smaller difference of values is noise
TRIAL_STEPS = 4  # the median of 4 times survives an outlier
MAX_BACKOFF = 4  # bounds the wait for a trial where a text turns predictable
MAX_TRIAL_COST = (
    1.5  # relative to current_k: one wrong time does not put off the next trial for long
)
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
    """What outlives a text: acceptance and costs with one model, batch, kind of sampling and thread count."""

    def __init__(self, max_draft_tokens: int) -> None:
        self.acceptance = Acceptance([UNKNOWN_ACCEPTANCE] * max_draft_tokens)
        self._ratios = [deque[float](maxlen=NUM_SAMPLES) for _ in range(max_draft_tokens)]

    def observe(self, k: int, seconds: float, other_k: int, other_seconds: float) -> None:
        """Adds the times of two runs in succession: drift of machine and context cancels in their ratio."""
        low, high = sorted([(k, seconds), (other_k, other_seconds)])
        self._ratios[high[0] - 1].append(high[1] / low[1] * self.costs()[low[0]])

    def costs(self) -> list[float]:
        """By k: median ratios, never below that of a smaller k; infinite where nothing is measured."""
        return list(accumulate([1.0, *(median(r) if r else inf for r in self._ratios)], max))


class DraftPolicy:
    """Chooses k for each step of one text or batch; reads and extends ``history``."""

    def __init__(self, history: StepHistory) -> None:
        self._history, self._acceptance = history, Acceptance(history.acceptance.shares)
        values, max_k = self._values(), len(history.acceptance.shares)
        self._k = self._current_k = values.index(max(values))
        self._trials = [1, 1, *[0] * (max_k - 1), inf]  # by k; max_k + 1 is never tried
        if not values[1]:
            self._k, self._trials[1] = 1, 2  # a new model starts with a trial
        self._budget, self._made = 0.0, max_k
        self._times, self._before = deque[float](maxlen=NUM_SAMPLES), None

    def choose(self) -> int:
        """Draft tokens of the next step."""
        return self._k

    def observe(self, k: int, accepted: Sequence[int], seconds: float) -> None:
        """Adds a step with k draft tokens; accepted: how many, by active sequence; seconds: wall time."""
        offered, self._made = (
            min(k, self._made),
            k,
        )  # the step before made them; the rest is padding
        for acceptance in (self._acceptance, self._history.acceptance):
            acceptance.observe(offered, [min(count, offered) for count in accepted])
        if k != self._k:
            return  # started before k changed
        self._budget += EXPLORATION * (1 + sum(accepted) / len(accepted))
        self._times.append(seconds)
        if len(self._times) == TRIAL_STEPS and self._before:
            self._history.observe(k, median(self._times), *self._before)
        if len(self._times) >= TRIAL_STEPS and (next_k := self._next_k()) != k:
            self._before, self._k = (k, median(self._times)), next_k
            self._times.clear()

    def _values(self) -> list[float]:
        tokens = accumulate(accumulate([1.0, *self._acceptance.shares], mul))
        return [t / cost for t, cost in zip(tokens, self._history.costs(), strict=True)]

    def _next_k(self) -> int:
        now, values, costs, trials = (
            self._current_k,
            self._values(),
            self._history.costs(),
            self._trials,
        )
        if max(values) > (1 + HYSTERESIS) * values[now]:
            self._current_k = now = values.index(max(values))
        if self._k != now:
            return now
        k = now + 1 if now == 0 or trials[now + 1] <= trials[0] else 0
        cost = min(costs[k], MAX_TRIAL_COST * costs[now])
        least = min(
            k, now
        )  # these draft tokens are accepted as before; in the worst case no others
        loss = (TRIAL_STEPS + 1) * (cost * values[now] - costs[least] * values[least])
        if self._budget < min(trials[k], MAX_BACKOFF) * loss:
            return now
        self._budget, trials[k] = 0.0, trials[k] + 1
        self._acceptance.weights[now:] = [OLD_WEIGHT] * (len(costs) - 1 - now)
        return k
