"""The loss through the head, computed block by block, against autograd over all logits in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recycle_ext.train import losses
from recycle_ext.train.losses import head_loss, regression_loss

ROWS, SIZE, VOCAB = 37, 24, 301


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    states, target_states = torch.randn(2, ROWS, SIZE, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCAB, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, VOCAB, (ROWS,), generator=generator)
    labels[::5] = -1
    weight = torch.rand(ROWS, generator=generator)
    return states.to(dtype), target_states.to(dtype), head.to(dtype), labels, weight


def loss_over_all_logits(states, head, target_states, labels, weight, soft, hard):
    """The formula of losses.py."""
    log_probs = (states @ head.T).log_softmax(-1)
    target = soft * (target_states @ head.detach().T).softmax(-1)  # no gradient through the target
    known = (labels >= 0)[:, None].double()
    target = target + hard * known * F.one_hot(labels.clamp(min=0), VOCAB)
    return (-(target * log_probs).sum(-1) * weight).sum()


@pytest.mark.parametrize(("soft", "hard"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.3, 1.2)])
@pytest.mark.parametrize("rows_per_block", [1, 8, 100])
def test_head_loss_and_gradients_equal_autograds(monkeypatch, soft, hard, rows_per_block):
    monkeypatch.setattr(losses, "_CPU_LOGITS", rows_per_block * VOCAB)
    states, target_states, head, labels, weight = inputs()
    ours = [states.clone().requires_grad_(), head.clone().requires_grad_()]
    theirs = [states.clone().requires_grad_(), head.clone().requires_grad_()]
    loss = head_loss(*ours, target_states=target_states, labels=labels, weight=weight, soft=soft, hard=hard)
    exact = loss_over_all_logits(*theirs, target_states, labels, weight, soft, hard)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    (3 * loss).backward()
    (3 * exact).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_head_loss_in_bfloat16_is_as_exact_as_torchs_cross_entropy():
    states, target_states, head, labels, weight = inputs()
    exact_states = states.bfloat16().double().requires_grad_()
    head, target_states = head.bfloat16(), target_states.bfloat16()
    exact = loss_over_all_logits(exact_states, head.double(), target_states.double(), labels, weight.double(), 1.0, 0.0)
    exact.backward()
    errors = {}
    for name in ("ours", "native"):
        rows = states.bfloat16().requires_grad_()
        if name == "ours":
            head_loss(rows, head, target_states=target_states, weight=weight, soft=1.0).backward()
        else:
            probs = (target_states @ head.T).softmax(-1)
            each = F.cross_entropy(rows @ head.T, probs, reduction="none")
            (each * weight.bfloat16()).sum().backward()
        errors[name] = (rows.grad.double() - exact_states.grad).norm() / exact_states.grad.norm()
    assert errors["ours"] <= 1.5 * errors["native"]


def test_head_loss_under_autocast_equals_the_loss_without():
    states, target_states, head, labels, weight = inputs(torch.float32)
    terms = {"target_states": target_states, "labels": labels, "weight": weight}
    given = {"soft": 0.5, "hard": 0.5, **terms}
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head_loss(states, head, **given)
    assert torch.equal(rounded, head_loss(states, head, **given))


def test_head_without_gradient_gets_none():
    states, target_states, head, _, weight = inputs(torch.float32)
    states.requires_grad_()
    head_loss(states, head, target_states=target_states, weight=weight, soft=1.0).backward()
    assert states.grad is not None
    assert head.grad is None


def test_regression_loss_equals_weighted_mean_of_smooth_l1():
    states, target_states, _, _, weight = inputs(torch.float32)
    each = [F.smooth_l1_loss(g, h).item() for g, h in zip(states, target_states, strict=True)]
    expected = sum(e * w for e, w in zip(each, weight.tolist(), strict=True))
    assert regression_loss(states, target_states, weight).item() == pytest.approx(expected, rel=1e-5)
