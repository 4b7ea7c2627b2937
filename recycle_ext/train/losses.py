"""The losses of draft tokens, computed with the output head that the drafter's states go through.

For states g (the module's n(g), or the base's own h), the head W [V, d] and a target distribution t over the V
tokens, the loss is the cross-entropy to t:

    L = sum over rows of  -weight * sum_v t_v log softmax(W g)_v
    t = soft * softmax(W h) + hard * onehot(label)

h is the base's state at the draft token's position. soft = 1 is distillation (Hinton et al. 2015, section 2, at
temperature 1), hard = 1 is the ordinary next-token loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Max logits in memory at a time. On a CPU they fit its second-level cache: from memory, the passes of the softmax
# took more time than the matmuls. A GPU needs larger matmuls to be busy.
_CPU_LOGITS, _GPU_LOGITS = 1 << 20, 1 << 26


class _HeadLoss(torch.autograd.Function):
    """The loss of head_loss and its gradients, computed together, block of rows by block.

    Logits for all rows never exist: dL/dg = (softmax(W g) - t) W and dL/dW = (softmax(W g) - t)^T g need those of one
    block at a time.
    """

    @staticmethod
    def forward(
        ctx,
        states: Tensor,
        head: Tensor,
        target_states: Tensor | None,
        labels: Tensor | None,
        weight: Tensor,
        soft: float,
        hard: float,
    ) -> Tensor:
        rows, vocab = states.shape[0], head.shape[0]
        block = max(1, (_GPU_LOGITS if states.is_cuda else _CPU_LOGITS) // vocab)
        matrix = head.to(torch.bfloat16) if states.dtype == torch.bfloat16 else head
        grad_states = torch.empty_like(states)
        needs_head = ctx.needs_input_grad[1]
        grad_head = torch.zeros_like(head) if needs_head else None
        total = states.new_zeros((), dtype=torch.float32)
        sum_dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
        logits = states.new_empty(block, vocab, dtype=matrix.dtype)
        log_probs, target = (states.new_empty(block, vocab, dtype=sum_dtype) for _ in range(2))
        for start in range(0, rows, block):
            part = slice(start, min(start + block, rows))
            n = part.stop - part.start
            torch.mm(states[part], matrix.T, out=logits[:n])
            torch.log_softmax(logits[:n], -1, dtype=sum_dtype, out=log_probs[:n])
            if soft:
                torch.mm(target_states[part], matrix.T, out=logits[:n])
                torch.softmax(logits[:n], -1, dtype=sum_dtype, out=target[:n])
                target[:n].mul_(soft)
            else:
                target[:n].zero_()
            row_weight = weight[part, None].to(sum_dtype)
            if hard:
                is_known = (labels[part, None] >= 0).to(sum_dtype)
                target[:n].scatter_add_(-1, labels[part, None].clamp(min=0), is_known * hard)
            total -= torch.linalg.vecdot(log_probs[:n], target[:n]).mul_(row_weight[:, 0]).sum()
            # The target's sum is less than soft + hard in rows without a label.
            mass = target[:n].sum(-1, keepdim=True)
            error = log_probs[:n].exp_().mul_(mass).sub_(target[:n]).mul_(row_weight)
            logits[:n].copy_(error)
            torch.mm(logits[:n], matrix, out=grad_states[part])
            if needs_head:
                grad_head.add_(logits[:n].T @ states[part])
        ctx.save_for_backward(grad_states, grad_head)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_head = ctx.saved_tensors
        scaled = None if grad_head is None else grad_head * grad.to(grad_head.dtype)
        return grad_states * grad.to(grad_states.dtype), scaled, None, None, None, None, None


def head_loss(
    states: Tensor,
    head: Tensor,
    *,
    target_states: Tensor | None = None,
    labels: Tensor | None = None,
    weight: Tensor,
    soft: float = 0.0,
    hard: float = 0.0,
) -> Tensor:
    """The cross-entropy of this file's docstring, in nats. -> [] float32

    states [rows, d]: what goes into the head [V, d]. target_states [rows, d]: the base's, needed where soft is not 0.
    labels [rows] int64: rows of the head, -1 for a token that the head lacks; needed where hard is not 0.
    weight [rows] float: 1 / rows gives the mean.
    """
    # Autocast would round each block's loss to bfloat16.
    with torch.autocast(states.device.type, enabled=False):
        return _HeadLoss.apply(states, head, target_states, labels, weight, soft, hard)


def regression_loss(states: Tensor, target_states: Tensor, weight: Tensor) -> Tensor:
    """Smooth L1 between the drafter's and the base's states, both [rows, d] (EAGLE, Li et al. 2024, section 3.2).

    -> [] float32: the mean over d, summed over rows with ``weight`` [rows].
    """
    distance = F.smooth_l1_loss(states.float(), target_states.float(), reduction="none").mean(-1)
    return (distance * weight).sum()
