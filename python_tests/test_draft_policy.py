"""The policy of drafts="auto" on simulated texts and machines, of which cost, acceptance and noise are known."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest

from recycle_ext.decoding.draft_policy import Acceptance, DraftPolicy, StepHistory

MAX_K = 4
USELESS = (0.03, 0.0, 0.0, 0.0)
FAIR = (0.43, 0.35, 0.3, 0.3)
GOOD = (0.85, 0.8, 0.75, 0.7)
SEEDS = range(5)


class Machine:
    """The cost of steps, and the measured cost. A draft token costs ``cost_per_draft`` of a step without."""

    def __init__(self, cost_per_draft: float, seed: int, noise: float = 0.02, noisy: bool = False) -> None:
        self.chance = random.Random(seed)
        self.cost_per_draft, self.noise, self.noisy = cost_per_draft, noise, noisy
        self.slowdown = 1.0  # by other processes

    def cost(self, k: int) -> float:
        return 1 + self.cost_per_draft * k

    def measured(self, k: int) -> float:
        if self.noisy and self.chance.random() < 0.02:
            self.slowdown = self.chance.choice([1.0, 1.0, 1.2, 1.4])
        spike = 1 + 2 * self.chance.random() if self.noisy and self.chance.random() < 0.05 else 1
        return self.cost(k) * self.slowdown * spike * (1 + self.noise * abs(self.chance.gauss(0, 1)))


def write(
    policy: DraftPolicy, machine: Machine, n_tokens: int, acceptance: Callable[[int], Sequence[float]], batch: int = 1
) -> tuple[float, list[tuple[int, int]]]:
    """Writes a text; returns its speed relative to no draft tokens, and (tokens before, k) of each step."""
    tokens, seconds, made, steps = 0, 0.0, MAX_K, []
    while tokens < n_tokens:
        k, rates = policy.choose(), acceptance(tokens)
        accepted = []
        for _ in range(batch):
            count = 0
            while count < min(k, made) and machine.chance.random() < rates[count]:
                count += 1
            accepted.append(count)
        policy.observe(k, accepted, machine.measured(k))
        steps.append((tokens, k))
        tokens += batch + sum(accepted)
        seconds += machine.cost(k)
        made = k
    return tokens / batch / seconds, steps


def always(rates: Sequence[float]) -> Callable[[int], Sequence[float]]:
    return lambda _: rates


def best_fixed(cost: float, rates: Sequence[float]) -> float:
    """The speed with the best constant k."""
    found, total, share = [1.0], 1.0, 1.0
    for k, rate in enumerate(rates, 1):
        share *= rate
        total += share
        found.append(total / (1 + cost * k))
    return max(found)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def speeds(cost, rates, n_tokens, texts=1, seeds=SEEDS, **machine) -> list[float]:
    """Speeds of the last of ``texts`` texts, by seed."""
    found = []
    for seed in seeds:
        history, here = StepHistory(MAX_K), Machine(cost, seed, **machine)
        for _ in range(texts):
            speed, _ = write(DraftPolicy(history), here, n_tokens, always(rates))
        found.append(speed)
    return found


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("n_tokens", [128, 500])
@pytest.mark.parametrize("cost", [0.12, 0.2, 0.8])
@pytest.mark.parametrize("rates", [(0.0,) * MAX_K, USELESS])
def test_useless_module_costs_less_than_three_percent(rates, cost, n_tokens, texts):
    assert min(speeds(cost, rates, n_tokens, texts)) > 0.97


@pytest.mark.parametrize("n_tokens", [32, 64])
def test_short_text_costs_four_draft_tokens_at_most_and_the_second_text_less(n_tokens):
    first, then = (speeds(0.18, (0.0,) * MAX_K, n_tokens, texts) for texts in (1, 2))
    assert min(first) > n_tokens / (n_tokens + 4 * 0.18) - 0.01
    assert min(then) > 0.97


@pytest.mark.parametrize("rates", [FAIR, (0.6, 0.5, 0.4, 0.3), GOOD, (1.0,) * MAX_K])
@pytest.mark.parametrize("cost", [0.12, 0.18])
def test_good_module_is_nearly_as_fast_as_the_best_k(rates, cost):
    assert mean(speeds(cost, rates, 1500, texts=2, seeds=range(20))) > 0.97 * best_fixed(cost, rates)


@pytest.mark.parametrize("noise", [0.05, 0.15])
def test_noisy_machine_is_nearly_as_fast_as_the_best_k(noise):
    assert mean(speeds(0.18, USELESS, 1000, noise=noise, noisy=True)) > 0.98
    assert mean(speeds(0.18, FAIR, 1000, noise=noise, noisy=True)) > 0.95 * best_fixed(0.18, FAIR)


@pytest.mark.parametrize("wrong", [0, 1])
def test_wrong_first_cost_is_corrected(wrong):
    """The first steps of one kind take three times as long as later ones."""
    for rates, least in ((USELESS, 0.97), (FAIR, 1.1)):
        policy, machine, first = DraftPolicy(StepHistory(MAX_K)), Machine(0.18, 3), range(8)
        for _ in first:
            k = policy.choose()
            policy.observe(k, [0], machine.measured(k) * (3 if k == wrong else 1))
        assert write(policy, machine, 2000, always(rates))[0] > least


@pytest.mark.parametrize("block", [50, 200, 1000])
def test_changing_text_is_faster_than_without_draft_tokens(block):
    changing = lambda at: FAIR if at // block % 2 == 0 else USELESS  # noqa: E731
    found = [write(DraftPolicy(StepHistory(MAX_K)), Machine(0.18, seed), 4000, changing)[0] for seed in SEEDS]
    assert min(found) > 0.99
    assert mean(found) > 1


def test_text_turned_predictable_gets_draft_tokens_again():
    turns = 1000
    for seed in SEEDS:
        policy, machine = DraftPolicy(StepHistory(MAX_K)), Machine(0.18, seed)
        _, steps = write(policy, machine, 2000, lambda at: USELESS if at < turns else GOOD)
        before = [k for at, k in steps if turns - 200 <= at < turns]
        after = [k for at, k in steps if at >= turns + 300]
        assert mean(before) < 0.1
        assert mean(after) > 2


def test_constant_text_changes_k_rarely():
    for rates in (FAIR, (0.2, 0.1, 0.0, 0.0), GOOD):
        _, steps = write(DraftPolicy(StepHistory(MAX_K)), Machine(0.18, 1), 3000, always(rates))
        changes = sum(k != other for (_, k), (_, other) in itertools.pairwise(steps))
        assert 0 < changes < len(steps) / 10


def test_batch_is_nearly_as_fast_as_the_best_k():
    fair, useless = (
        write(DraftPolicy(StepHistory(MAX_K)), Machine(0.18, 1), 8000, always(rates), batch=4)[0]
        for rates in (FAIR, USELESS)
    )
    assert fair > 0.97 * best_fixed(0.18, FAIR)
    assert useless > 0.97


def test_same_observations_give_the_same_choices():
    texts = [write(DraftPolicy(StepHistory(MAX_K)), Machine(0.18, 5, noisy=True), 500, always(FAIR)) for _ in range(2)]
    assert texts[0] == texts[1]


def test_costs_from_successive_runs_are_medians_and_never_decrease():
    history = StepHistory(MAX_K)
    assert history.costs() == [1.0] + [math.inf] * MAX_K
    history.add_times((1, 1.3), (0, 1.0))
    assert history.costs()[1] == pytest.approx(1.3)
    assert history.costs()[2] == math.inf  # never timed: no value, so it is reached by a trial only
    history.add_times((1, 13.0), (2, 15.0))
    assert history.costs()[2] == pytest.approx(1.5)
    for _ in range(9):
        history.add_times((0, 5.0), (1, 4.0))
    assert history.costs()[1] == 1


def test_acceptance_of_a_position_counts_sequences_that_reached_the_position():
    acceptance = Acceptance([0.4] * 3)
    for _ in range(300):
        acceptance.observe(2, [2, 1, 0, 0])
    first, second, third = acceptance.shares
    assert first == pytest.approx(0.5, abs=0.01)
    assert second == pytest.approx(0.5, abs=0.01)
    assert third == pytest.approx(0.4)  # as it began


def test_padding_after_a_step_without_draft_tokens_leaves_acceptance_unchanged():
    history = StepHistory(MAX_K)
    history.add_times((1, 5.0), (0, 1.0))  # too slow: the policy begins without draft tokens
    policy = DraftPolicy(history)
    assert policy.choose() == 0
    policy.observe(0, [0], 1.0)
    before = list(history.acceptance.shares)
    policy.observe(1, [0], 1.2)
    assert history.acceptance.shares == before
    policy.observe(1, [0], 1.2)
    assert history.acceptance.shares[0] < before[0]
