"""How many drafts the next step should have: what ``drafts="auto"`` goes by. Knows no tensors and no clock.

A step with k drafts gives 1 + a_1 + a_1 a_2 + .. + a_1 .. a_k tokens on average, a_j being the share of j-th drafts that
count where all before them did. It costs p_k standard steps (k = 0), so it is worth

    tokens(k) / p_k        in the tokens of a standard step's time; 1 for k = 0

and the k that is worth most is kept until another is worth MARGIN more. What isn't running isn't seen, though: more
drafts than now, or any at all while there are none. A probe runs such a k for a few steps. Its price in tokens, if
all that it tries fails, is saved up first, ALLOWANCE of each token written, and what has failed waits longer. So on
a text where drafts are useless probes take less than ALLOWANCE of the time, and the wait for the next one has a bound.
Probes of k = 0 keep the prices honest: everything is compared with it. Only a model's very first steps, and a
text's first try of one more draft where the last one pays, aren't saved for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

ALLOWANCE = 0.02  # of the tokens written, for probes
MARGIN = 0.02  # by which another k must be better
PROBE = 4  # steps of a probe, and the fewest between two changes
MOST_PATIENCE = 4  # savings before a probe, in its prices, after failures

PRIOR = 0.4  # acceptance where nothing is known, worth PRIOR_TRIES drafts
PRIOR_TRIES = 2.0
LEARNT_TRIES = 4.0  # what former texts are worth at most
DOUBT = 0.2  # what a probe believes at least of drafts not seen lately, worth DOUBT_TRIES
DOUBT_TRIES = 2.0
MEMORY = 24  # drafts that a text's acceptance is averaged over
LONG_MEMORY = 256  # the same for what the next text begins with

GUESSED_PRICE = 1.2  # of a step with one draft, before it was measured
SURE = 3  # comparisons that make a price one to rely on
UNSURE_PRICE = 1.5  # at most, until then: one wrong measurement must not put off the next for long


class Acceptance:
    """Running averages: the share of j-th drafts that counted where those before them did.

    most: drafts a step may have. memory: drafts after which one weighs 1/e of a new one. learnt: begin with
    the averages of another, which are worth a few drafts.
    """

    def __init__(self, most: int, memory: float, learnt: Acceptance | None = None) -> None:
        self._keep = 1 - 1 / memory
        self._tries = [PRIOR_TRIES] * most
        self._hits = [PRIOR_TRIES * PRIOR] * most
        if learnt is not None:
            self._tries = [min(tries, LEARNT_TRIES) for tries in learnt._tries]
            self._hits = [t * mean for t, mean in zip(self._tries, learnt.means, strict=True)]

    def observe(self, offered: int, accepted: Sequence[int]) -> None:
        """A step of len(accepted) sequences, each with ``offered`` drafts, of which so many counted."""
        for j in range(offered):
            reached = sum(count >= j for count in accepted)
            if not reached:
                return
            hits = sum(count > j for count in accepted)
            self._tries[j] = self._tries[j] * self._keep + reached / len(accepted)
            self._hits[j] = self._hits[j] * self._keep + hits / len(accepted)

    def doubt(self, first: int) -> None:
        """What was seen of drafts ``first`` and after (from 0) was of another passage and weighs little."""
        for j in range(first, len(self._tries)):
            mean = max(self._hits[j] / self._tries[j], DOUBT)
            self._tries[j], self._hits[j] = DOUBT_TRIES, DOUBT_TRIES * mean

    @property
    def means(self) -> list[float]:
        """One a draft."""
        return [hits / tries for hits, tries in zip(self._hits, self._tries, strict=True)]


class Experience:
    """What is known from all texts, so that the next one needn't begin at nothing.

    most: drafts a step may have. Prices are of steps with k drafts, in standard steps: unlike seconds they
    hardly change while the context grows or others use the machine. They come from steps right after each other.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.acceptance = Acceptance(most, LONG_MEMORY)
        self._samples = [deque([1.0], 1), *(deque(maxlen=9) for _ in range(most))]
        self.prices = self._prices()  # by k

    def is_priced(self, k: int) -> bool:
        """Whether such steps have been timed."""
        return bool(self._samples[k])

    def price_to_try(self, k: int) -> float:
        """Of a step with k drafts, for deciding whether to measure it again."""
        price = self.prices[k]
        return price if len(self._samples[k]) >= SURE else min(price, UNSURE_PRICE)

    def compare(self, k: int, seconds: float, other: int, other_seconds: float) -> None:
        """Steps with k and with ``other`` drafts took so long, one after the other: the larger is priced by it."""
        if k < other:
            k, seconds, other, other_seconds = other, other_seconds, k, seconds
        self._samples[k].append(seconds / other_seconds * self.prices[other])
        self.prices = self._prices()

    def _prices(self) -> list[float]:
        """A step that was never timed costs as much more as the last draft did; none costs less than a smaller one."""
        found = [1.0]
        for k, samples in enumerate(self._samples[1:], 1):
            if samples:
                found.append(max(median(samples), found[-1]))
            else:
                found.append(GUESSED_PRICE if k == 1 else 2 * found[-1] - found[-2])
        return found


class DraftPolicy:
    """Chooses k for each step of one text, or of one batch.

    experience: of this model with such steps; is used and added to.
    """

    def __init__(self, experience: Experience) -> None:
        self._experience = experience
        self._acceptance = Acceptance(experience.most, MEMORY, experience.acceptance)
        self._evaluate()
        # The very first text begins with a draft, which its prompt has left it, and compares that with none.
        self._home = self._best(0) if experience.is_priced(1) else 1
        self._now = self._home  # or the k that is probed
        self._steps = 0  # with this k, since the last change
        self._settled = 0  # steps at home since it last changed
        self._savings = 0.0  # tokens
        self._patience: dict[int, int] = {}  # by k, after failures
        self._probed: list[int] = []  # the last one last
        # Drafts that the module made in the step before; in a prompt's it makes what the first step asks for.
        self._drafted = experience.most
        self._timed = self._now
        self._times: deque[float] = deque(maxlen=9)
        # Another k, and the time of its steps right before these.
        self._before: tuple[int, float] | None = None

    def choose(self) -> int:
        """k of the next step, 0 to experience.most. Asking changes nothing."""
        return self._now

    def observe(self, k: int, accepted: Sequence[int], seconds: float) -> None:
        """A step had k drafts, of which ``accepted`` counted, one number a sequence, and took so long.

        If the step before had fewer, only so many are the module's, and the rest is padding.
        """
        offered = min(k, self._drafted)
        self._drafted = k
        for acceptance in (self._acceptance, self._experience.acceptance):
            acceptance.observe(offered, [min(count, offered) for count in accepted])
        self._time(k, seconds)
        self._evaluate()
        if k != self._now:
            return  # was started before the last change
        self._steps += 1
        if self._now != self._home:
            if self._steps >= PROBE + (self._now > self._home):  # padding shows nothing
                self._end_probe()
            return
        self._savings += ALLOWANCE * (1 + sum(accepted) / len(accepted))
        self._settled += 1
        if self._steps < PROBE:
            return
        best = self._best(0)
        if self._is_better(best):
            self._move(best)
        elif (target := self._due()) is not None:
            if target > self._home:
                self._acceptance.doubt(self._home)
                self._evaluate()
            self._run(target)

    # ---- what is known --------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Tokens that a step with k drafts gives on average, and what it is worth, by k."""
        total = share = 1.0
        self._tokens = [total]
        for mean in self._acceptance.means:
            share *= mean
            total += share
            self._tokens.append(total)
        self._worth = [t / price for t, price in zip(self._tokens, self._experience.prices, strict=True)]

    def _best(self, least: int) -> int:
        """Of the k that were timed, from ``least`` on."""
        timed = [k for k in range(least, len(self._worth)) if self._experience.is_priced(k)]
        return max(timed, key=self._worth.__getitem__)

    def _is_better(self, k: int) -> bool:
        return self._worth[k] > (1 + MARGIN) * self._worth[self._home]

    def _time(self, k: int, seconds: float) -> None:
        if k != self._timed:
            self._before = (self._timed, median(self._times)) if self._times else None
            self._timed = k
            self._times.clear()
        self._times.append(seconds)
        if self._before is not None and len(self._times) == PROBE:
            self._experience.compare(k, median(self._times), *self._before)

    # ---- what is done ---------------------------------------------------------------------------------

    def _due(self) -> int | None:
        """The k to probe now, if any."""
        if not self._experience.is_priced(self._home):
            return 0
        k = self._next_probe()
        first_try = 0 < self._home < k and k not in self._probed
        affordable = self._savings >= self._price_of_probe(k) * self._patience.get(k, 1)
        return k if first_try or affordable else None

    def _next_probe(self) -> int:
        """One more draft where that is promising, and none, taking turns; from none, the best there is."""
        if self._home == 0:
            return self._best(1)
        up = self._home + 1
        if up > self._experience.most or self._hope() <= self._worth[self._home]:
            return 0
        return min((up, 0), key=lambda k: self._probed.index(k) if k in self._probed else -1)

    def _hope(self) -> float:
        """What one more draft than now would be worth if it counted as often as the one before it."""
        means, now = self._acceptance.means, self._home
        share = self._tokens[now] - self._tokens[now - 1]
        tokens = self._tokens[now] + share * max(means[now - 1 : now + 1])
        return tokens / self._experience.prices[now + 1]

    def _price_of_probe(self, k: int) -> float:
        """Tokens lost to it if it tries more drafts and none of them counts, the way back included."""
        kept = self._tokens[min(k, self._home)]
        price = self._experience.price_to_try(k) if k else 1.0
        lost = price * self._worth[self._home] - kept
        steps = PROBE + (k > self._home)
        back = self._tokens[self._home] - kept  # drafts that weren't made
        return max(0.0, steps * lost) + back

    def _run(self, k: int) -> None:
        self._now, self._steps = k, 0

    def _move(self, k: int) -> None:
        if self._settled < MEMORY:
            self._fail(self._home)
        else:
            self._patience.clear()  # the text has changed
        self._home, self._settled, self._savings = k, 0, 0.0
        self._run(k)

    def _fail(self, k: int) -> None:
        self._patience[k] = min(2 * self._patience.get(k, 1), MOST_PATIENCE)

    def _end_probe(self) -> None:
        k = self._now
        self._probed = [*(p for p in self._probed if p != k), k]
        if self._is_better(k):
            return self._move(k)
        self._fail(k)
        self._savings = 0.0
        self._run(self._home)
