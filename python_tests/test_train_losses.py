"""The loss through the head, made block by block, against autograd over all logits in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recycle_ext.train import losses
from recycle_ext.train.losses import head_loss, regression_loss

ROWS, SIZE, VOCAB = 37, 24, 301


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    guess, wanted = torch.randn(2, ROWS, SIZE, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCAB, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, VOCAB, (ROWS,), generator=generator)
    labels[::5] = -1
    weight = torch.rand(ROWS, generator=generator)
    return guess.to(dtype), wanted.to(dtype), head.to(dtype), labels, weight


def plain(guess, head, wanted, labels, weight, soft, hard):
    """The formula, all at once."""
    log_probs = (guess @ head.T).log_softmax(-1)
    target = soft * (wanted @ head.detach().T).softmax(-1)  # the target is given
    known = (labels >= 0)[:, None].double()
    target = target + hard * known * F.one_hot(labels.clamp(min=0), VOCAB)
    return (-(target * log_probs).sum(-1) * weight).sum()


@pytest.mark.parametrize(("soft", "hard"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.3, 1.2)])
@pytest.mark.parametrize("rows_a_block", [1, 8, 100])
def test_loss_and_gradients_are_autograds(monkeypatch, soft, hard, rows_a_block):
    monkeypatch.setattr(losses, "_CPU_LOGITS", rows_a_block * VOCAB)
    guess, wanted, head, labels, weight = inputs()
    ours = [guess.clone().requires_grad_(), head.clone().requires_grad_()]
    theirs = [guess.clone().requires_grad_(), head.clone().requires_grad_()]
    loss = head_loss(*ours, wanted=wanted, labels=labels, weight=weight, soft=soft, hard=hard)
    exact = plain(*theirs, wanted, labels, weight, soft, hard)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    (3 * loss).backward()
    (3 * exact).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_in_bfloat16_it_is_as_exact_as_torchs_own_cross_entropy():
    guess, wanted, head, labels, weight = inputs()
    exact_guess = guess.bfloat16().double().requires_grad_()
    head, wanted = head.bfloat16(), wanted.bfloat16()
    exact = plain(exact_guess, head.double(), wanted.double(), labels, weight.double(), 1.0, 0.0)
    exact.backward()
    gradients = {}
    for name in ("ours", "native"):
        rows = guess.bfloat16().requires_grad_()
        if name == "ours":
            head_loss(rows, head, wanted=wanted, weight=weight, soft=1.0).backward()
        else:
            probs = (wanted @ head.T).softmax(-1)
            each = F.cross_entropy(rows @ head.T, probs, reduction="none")
            (each * weight.bfloat16()).sum().backward()
        gradients[name] = (rows.grad.double() - exact_guess.grad).norm() / exact_guess.grad.norm()
    assert gradients["ours"] <= 1.5 * gradients["native"]


def test_a_head_that_is_not_trained_gets_no_gradient():
    guess, wanted, head, _, weight = inputs(torch.float32)
    guess.requires_grad_()
    head_loss(guess, head, wanted=wanted, weight=weight, soft=1.0).backward()
    assert guess.grad is not None
    assert head.grad is None


def test_regression_is_the_weighted_mean_of_smooth_l1():
    guess, wanted, _, _, weight = inputs(torch.float32)
    each = [F.smooth_l1_loss(g, h).item() for g, h in zip(guess, wanted, strict=True)]
    expected = sum(e * w for e, w in zip(each, weight.tolist(), strict=True))
    assert regression_loss(guess, wanted, weight).item() == pytest.approx(expected, rel=1e-5)
