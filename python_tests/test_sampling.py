"""Sampled verify mode has the base model's distribution (Leviathan et al. 2023, theorem A.1)."""

from __future__ import annotations

import math
import random

import pytest
import torch
from models import reference_base, write_base, write_module

from recycle_ext.decoding.decoder import Decoder
from recycle_ext.reference.ops import distribution
from recycle_ext.weights.pack import pack_model

PROMPT = [3, 1, 4]
VOCAB = 8
TOKENS = 3
BATCH, ROUNDS = 256, 60
ERROR_LEVEL = 1e-4  # the probability that a right sampler fails one of these tests, over all choices of seeds


def exact_distribution(base, temperature, top_k, top_p) -> torch.Tensor:
    """Probabilities of all sequences of TOKENS tokens, [VOCAB ** TOKENS], by the reference model in float64."""
    model = reference_base(base)
    prefixes, weights = [[]], [1.0]
    for _ in range(TOKENS):
        grown = [(p + [t], w) for p, w in zip(prefixes, weights, strict=True) for t in range(VOCAB)]
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([PROMPT + p for p in prefixes]))[:, -1])
        probs = torch.cat([distribution(row, temperature, top_k, top_p) for row in logits])
        prefixes = [p for p, _ in grown]
        weights = [w * float(q) for (_, w), q in zip(grown, probs, strict=True)]
    return torch.tensor(weights, dtype=torch.float64)


def sample(packed, mode, drafts, temperature, top_k, top_p, changing=False) -> torch.Tensor:
    """How often each sequence of TOKENS tokens came up, [VOCAB ** TOKENS].

    changing: each step has a random number of draft tokens, 0 to ``drafts``.
    """
    generator = random.Random(0)
    counts = torch.zeros(VOCAB**TOKENS, dtype=torch.int64)
    place = VOCAB ** torch.arange(TOKENS - 1, -1, -1)
    for round_ in range(ROUNDS):
        decoder = Decoder(
            packed,
            mode,
            drafts,
            batch=BATCH,
            capacity=32,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=range(round_ * BATCH, (round_ + 1) * BATCH),
        )
        rows = [[decoder.prefill(PROMPT, b)] for b in range(BATCH)]
        while min(map(len, rows)) < TOKENS:
            if changing:
                decoder.set_num_draft_tokens(generator.randint(0, drafts))
            step = decoder.step()
            for b in range(BATCH):
                rows[b] += step.sequence(b).tokens
        index = (torch.tensor([row[:TOKENS] for row in rows]) * place).sum(-1)
        counts += torch.bincount(index, minlength=len(counts))
    return counts


def p_value(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """The p-value of Pearson's chi-square test; cells with an expected count below 5 are pooled."""
    assert int(counts[probs == 0].sum()) == 0, "a token came up that the cuts exclude"
    expected = probs * counts.sum()
    small = expected < 5
    observed = torch.cat((counts[~small].double(), counts[small].sum()[None].double()))
    expected = torch.cat((expected[~small], expected[small].sum()[None]))
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi2 = float(((observed - expected).square() / expected).sum())
    k = len(expected) - 1
    # Wilson and Hilferty: the cube root of chi2 / k is normal, to three digits from k = 10 on.
    z = ((chi2 / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    base = write_base(folder / "base", vocab_size=VOCAB, hidden_size=32, intermediate_size=32, n_layers=1)
    module = write_module(folder / "module", base, like_base=True, draft_vocab_size=6)
    return base, pack_model(base, module, "f32")


@pytest.mark.parametrize(
    ("mode", "drafts", "temperature", "top_k", "top_p"),
    [
        ("standard", 1, 1.0, 0, 1.0),
        ("verify", 1, 1.0, 0, 1.0),
        ("verify", 2, 1.0, 0, 1.0),
        ("verify", 1, 0.8, 5, 1.0),
        ("verify", 3, 1.5, 0, 0.85),
    ],
)
def test_sampled_verify_has_the_base_distribution(tiny, mode, drafts, temperature, top_k, top_p):
    base, packed = tiny
    probs = exact_distribution(base, temperature, top_k, top_p)
    counts = sample(packed, mode, drafts, temperature, top_k, top_p)
    assert p_value(counts, probs) > ERROR_LEVEL


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.5, 0.85)])
def test_sampled_verify_with_changing_num_draft_tokens_has_the_base_distribution(tiny, temperature, top_p):
    base, packed = tiny
    probs = exact_distribution(base, temperature, 0, top_p)
    counts = sample(packed, "verify", 3, temperature, 0, top_p, changing=True)
    assert p_value(counts, probs) > ERROR_LEVEL


def test_alternate_mode_fails_the_same_test(tiny):
    """Alternate mode accepts every draft token, so its distribution is another one: the test must tell."""
    base, packed = tiny
    probs = exact_distribution(base, 1.0, 0, 1.0)
    counts = sample(packed, "alternate", 1, 1.0, 0, 1.0)
    allowed = probs > 0
    assert p_value(counts * allowed, probs) < 1e-10
