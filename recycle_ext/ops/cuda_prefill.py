"""torch.ops.recycle.prefill on a GPU: a prompt through PyTorch's matmuls, on the packed weights.

A prompt has many rows, so its matmuls are bound by arithmetic, which PyTorch's libraries do best. The rows pass through
one layer after the other; a layer's matrices are unpacked once, right before their matmuls, and freed after them: the GPU never holds
a second copy of the weights. All of the prompt but its last token goes this way. The last token is a decode step
(``finish_prefill``), whose kernels choose the first token and make the first draft tokens.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from recycle_ext.ops.functional import apply_rope, rms_norm, rope_tables
from recycle_ext.weights.layout import Matrix
from recycle_ext.weights.plan import Layer, ModelView, Stack, read_plan

ROWS_PER_PASS = 2048  # rows of a prompt that pass through a layer together


def _passes(rows: int) -> list[slice]:
    return [slice(first, min(first + ROWS_PER_PASS, rows)) for first in range(0, rows, ROWS_PER_PASS)]


def _linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, k] float32, unpacked matrix [n, k] -> x W^T (+ bias) [rows, n] float32."""
    out = F.linear(x.to(matrix.dtype), matrix).float()
    return out if bias is None else out + bias


def _attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last rows: q [heads, rows, size], keys and values [kv heads, positions, size].

    The bias is a description, not a tensor, so that no kernel needs the scores of all pairs in memory. Flash attention
    takes grouped queries as they are; in float32, which it lacks, the kernel that is left needs a key for each query.
    """
    if q.dtype == torch.float32:
        keys, values = (held.repeat_interleave(len(q) // len(held), 0) for held in (keys, values))
    bias = causal_lower_right(q.shape[1], keys.shape[1])
    # Not cuDNN's, which makes a plan for each new length.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q[None], keys[None], values[None], bias, enable_gqa=len(q) != len(keys))[
            0
        ]


def run_layers(stack: Stack, cache: Tensor, sequence: int, x: Tensor) -> None:
    """Rows at positions 0.. through the layers, in place: x [rows, d] float32.

    cache [layers, 2, batch, n_kv_heads, capacity, head_dim] gets their keys and values.
    """
    cos, sin = rope_tables(stack.inv_freq, torch.arange(len(x), device=x.device))
    for packed, held in zip(stack.layers, cache[:, :, sequence], strict=True):
        matrices = {name: value.unpacked() for name, value in vars(packed).items() if isinstance(value, Matrix)}
        layer = dataclasses.replace(packed, **matrices)
        for rows in _passes(len(x)):
            x[rows] = _run_layer(stack, layer, held, rows, x[rows], cos[rows], sin[rows])


def _run_layer(stack: Stack, layer: Layer, held: Tensor, rows: slice, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    normed = rms_norm(x, layer.input_norm, stack.eps)
    q, k, v = (
        _linear(normed, matrix, bias).view(len(x), -1, stack.head_dim).transpose(0, 1)
        for matrix, bias in ((layer.q, layer.q_bias), (layer.k, layer.k_bias), (layer.v, layer.v_bias))
    )
    q = apply_rope(rms_norm(q, layer.q_norm, stack.eps), cos, sin)
    held[0, :, rows] = apply_rope(rms_norm(k, layer.k_norm, stack.eps), cos, sin)
    held[1, :, rows] = v
    attended = _attend(q.to(held.dtype), held[0, :, : rows.stop], held[1, :, : rows.stop])
    x = x + _linear(attended.transpose(0, 1).reshape(len(x), -1).float(), layer.o)
    normed = rms_norm(x, layer.post_norm, stack.eps)
    return x + _linear(F.silu(_linear(normed, layer.gate)) * _linear(normed, layer.up), layer.down)


def fill_caches(
    model: ModelView, base_cache: Tensor, module_cache: Tensor | None, sequence: int, prompt: Tensor
) -> None:
    """Keys and values of all of a prompt [n] but its last token, from position 0; the module's too, if asked."""
    if len(prompt) < 2:
        return
    x = model.embedding.rows(prompt[:-1])
    run_layers(model.stack, base_cache, sequence, x)
    if module_cache is None:
        return
    module, eps = model.module, model.module.stack.eps
    input_proj = module.input_proj.unpacked()
    for rows in _passes(len(x)):
        hidden = rms_norm(x[rows], model.final_norm, model.stack.eps)
        embedding = model.embedding.rows(prompt[1:][rows])
        if module.zero_first_embedding and rows.start == 0:
            embedding[0] = 0
        pair = torch.cat((rms_norm(embedding, module.embed_norm, eps), rms_norm(hidden, module.hidden_norm, eps)), -1)
        x[rows] = _linear(pair, input_proj, module.input_bias)
    del input_proj
    run_layers(module.stack, module_cache, sequence, x)


@torch.no_grad()
def prefill(
    weights: Tensor,
    plan: Tensor,
    base_cache: Tensor,
    module_cache: Tensor,
    pending: Tensor,
    lengths: Tensor,
    draft_probs: Tensor,
    scratch: Tensor,
    decode_mode: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seeds: Tensor,
    sequence: int,
    prompt: Tensor,
) -> None:
    """The op; csrc/bindings/ops.cpp has its schema. Waits for the GPU, so a nonfinite logit raises at once."""
    num_draft_tokens = pending.shape[1] - 1
    if not 0 <= sequence < len(pending):
        raise ValueError(f"prefill: sequence is {sequence}; it must be 0 to {len(pending) - 1}")
    if prompt.dim() != 1 or prompt.dtype != torch.int64 or not len(prompt):
        raise ValueError(f"prefill: prompt is {prompt.dtype} {list(prompt.shape)}; it must be int64 [1 or more tokens]")
    capacity = base_cache.shape[4]
    if num_draft_tokens:
        capacity = min(capacity, module_cache.shape[4])
    if len(prompt) + max(num_draft_tokens - 1, 0) > capacity:
        raise ValueError(f"prefill: prompt has {len(prompt)} tokens, but the caches have room for {capacity} positions")
    on_gpu = prompt.to(weights.device)
    model = read_plan(weights, plan)
    if int(prompt.min()) < 0 or int(prompt.max()) >= model.embedding.n:
        raise ValueError(f"prefill: prompt has token ids outside of 0 to {model.embedding.n - 1}")
    fill_caches(model, base_cache, module_cache if num_draft_tokens else None, sequence, on_gpu)
    pending[sequence] = 0
    pending[sequence, 0] = on_gpu[-1]
    lengths[0, sequence] = len(prompt) - 1
    lengths[1, sequence] = len(prompt) - 1 if num_draft_tokens else 0
    _, counts = torch.ops.recycle.finish_prefill(
        weights,
        plan,
        base_cache,
        module_cache,
        pending,
        lengths,
        draft_probs,
        scratch,
        decode_mode,
        temperature,
        top_k,
        top_p,
        seeds,
        sequence,
    )
    if int(counts[sequence]) < 0:
        pending[sequence] = -1
        lengths[:, sequence] = 0
        raise RuntimeError(f"prefill: a logit is NaN or infinite (sequence {sequence}, position {len(prompt) - 1})")
