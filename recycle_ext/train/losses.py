"""What a guess is trained on, computed with the output head it goes through.

For rows of states g (the module's n(g), or the base's own h), head W [V, d] and a target distribution t
over the V tokens, the loss is the cross-entropy to t,

    L = mean over rows of  -sum_v t_v log softmax(W g)_v
    t = soft * softmax(W h) + hard * onehot(label)

with h the base's state at the position guessed: soft = 1 is distillation (Hinton et al. 2015, section 2, at temperature 1),
hard = 1 the ordinary next-token loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits that exist at a time: on a CPU as many as its second-level cache holds, so that the passes of the
# softmax don't go through memory (they took more time than the products); a GPU wants larger products.
_CPU_LOGITS, _GPU_LOGITS = 1 << 20, 1 << 26


class _HeadLoss(torch.autograd.Function):
    """See head_loss. The gradient is made with the loss, block of rows by block, so that logits for all rows
    never exist: dL/dg = (softmax(W g) - t) W, and dL/dW = (softmax(W g) - t)^T g.
    """

    @staticmethod
    def forward(
        ctx,
        guess: Tensor,
        head: Tensor,
        wanted: Tensor | None,
        labels: Tensor | None,
        weight: Tensor,
        soft: float,
        hard: float,
    ) -> Tensor:
        rows, size = guess.shape[0], head.shape[0]
        block = max(1, (_GPU_LOGITS if guess.is_cuda else _CPU_LOGITS) // size)
        matrix = head.to(torch.bfloat16) if guess.dtype == torch.bfloat16 else head
        grad_guess = torch.empty_like(guess)
        needs_head = ctx.needs_input_grad[1]
        grad_head = torch.zeros_like(head) if needs_head else None
        total = guess.new_zeros((), dtype=torch.float32)
        wide = torch.float64 if guess.dtype == torch.float64 else torch.float32
        products = guess.new_empty(block, size, dtype=matrix.dtype)
        log_probs, target = (guess.new_empty(block, size, dtype=wide) for _ in range(2))
        for start in range(0, rows, block):
            some = slice(start, min(start + block, rows))
            n = some.stop - some.start
            torch.mm(guess[some], matrix.T, out=products[:n])
            torch.log_softmax(products[:n], -1, dtype=wide, out=log_probs[:n])
            if soft:
                torch.mm(wanted[some], matrix.T, out=products[:n])
                torch.softmax(products[:n], -1, dtype=wide, out=target[:n])
                target[:n].mul_(soft)
            else:
                target[:n].zero_()
            share = weight[some, None].to(wide)
            if hard:
                known = labels[some, None] >= 0
                target[:n].scatter_add_(-1, labels[some, None].clamp(min=0), known.to(wide) * hard)
            total -= torch.linalg.vecdot(log_probs[:n], target[:n]).mul_(share[:, 0]).sum()
            # softmax times the mass of the target, which is less than one where a label is unknown
            mass = target[:n].sum(-1, keepdim=True)
            error = log_probs[:n].exp_().mul_(mass).sub_(target[:n]).mul_(share)
            products[:n].copy_(error)
            torch.mm(products[:n], matrix, out=grad_guess[some])
            if needs_head:
                grad_head.add_(products[:n].T @ guess[some])
        ctx.save_for_backward(grad_guess, grad_head)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_guess, grad_head = ctx.saved_tensors
        scaled = None if grad_head is None else grad_head * grad.to(grad_head.dtype)
        return grad_guess * grad.to(grad_guess.dtype), scaled, None, None, None, None, None


def head_loss(
    guess: Tensor,
    head: Tensor,
    *,
    wanted: Tensor | None = None,
    labels: Tensor | None = None,
    weight: Tensor,
    soft: float = 0.0,
    hard: float = 0.0,
) -> Tensor:
    """The loss above, nats a row.

    guess [rows, d], the states that go into the head [V, d]; wanted [rows, d], the base's (where soft
    is not 0); labels [rows] int64, indices into the head's rows, -1 for a token it lacks (where hard is
    not 0). weight [rows] float: of each row in the sum; 1 / rows is the mean. -> [] float32
    """
    return _HeadLoss.apply(guess, head, wanted, labels, weight, soft, hard)


def regression_loss(guess: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Smooth L1 between the states that go into the head and the base's, [rows, d] both, mean over d
    (EAGLE, Li et al. 2024, section 3.2), weighted as in head_loss. -> [] float32
    """
    apart = F.smooth_l1_loss(guess.float(), hidden.float(), reduction="none").mean(-1)
    return (apart * weight).sum()
