"""torch.ops.recycle.prefill on a GPU: a prompt through PyTorch's matmuls, on the packed weights.

A prompt has many rows, so its matmuls are bound by arithmetic, which PyTorch's libraries do best. Each matrix is
unpacked right before its matmul and freed after it: the GPU never holds a second copy of the weights. All of the
prompt but its last token goes this way. The last token is a decode step (``finish_prefill``), whose kernels choose
the first token and make the first draft tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from recycle_ext.ops.functional import apply_rope, rms_norm, rope_tables
from recycle_ext.weights.plan import ModelView, Stack, read_plan

ROWS_PER_PASS = 2048  # rows of a prompt that pass through the layers together


def run_layers(stack: Stack, cache: Tensor, sequence: int, first: int, x: Tensor) -> Tensor:
    """Rows at positions first.. through the layers: x [rows, d] -> [rows, d], both float32.

    cache [layers, 2, batch, n_kv_heads, capacity, head_dim] gets their keys and values.
    """
    end = first + len(x)
    cos, sin = rope_tables(stack.inv_freq, torch.arange(first, end, device=x.device))
    mask = None
    if first > 0:
        mask = torch.ones(len(x), end, dtype=torch.bool, device=x.device).tril(first)
    for layer, held in zip(stack.layers, cache[:, :, sequence], strict=True):
        normed = rms_norm(x, layer.input_norm, stack.eps)
        heads = [
            _add_bias(matrix.linear(normed), bias).view(len(x), -1, stack.head_dim).transpose(0, 1)
            for matrix, bias in ((layer.q, layer.q_bias), (layer.k, layer.k_bias), (layer.v, layer.v_bias))
        ]
        q = apply_rope(rms_norm(heads[0], layer.q_norm, stack.eps), cos, sin)
        held[0, :, first:end] = apply_rope(rms_norm(heads[1], layer.k_norm, stack.eps), cos, sin)
        held[1, :, first:end] = heads[2]
        # Not cuDNN's, which makes a plan for each new length.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            attended = F.scaled_dot_product_attention(
                q[None].to(held.dtype),
                held[None, 0, :, :end],
                held[None, 1, :, :end],
                mask,
                is_causal=mask is None,
                enable_gqa=True,
            )
        x = x + layer.o.linear(attended[0].transpose(0, 1).reshape(len(x), -1).float())
        normed = rms_norm(x, layer.post_norm, stack.eps)
        x = x + layer.down.linear(F.silu(layer.gate.linear(normed)) * layer.up.linear(normed))
    return x


def _add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def fill_caches(
    model: ModelView, base_cache: Tensor, module_cache: Tensor | None, sequence: int, prompt: Tensor
) -> None:
    """Keys and values of all of a prompt [n] but its last token, from position 0; the module's too, if asked."""
    for first in range(0, len(prompt) - 1, ROWS_PER_PASS):
        last = min(first + ROWS_PER_PASS, len(prompt) - 1)
        x = model.embedding.rows(prompt[first:last])
        x = run_layers(model.stack, base_cache, sequence, first, x)
        if module_cache is None:
            continue
        module = model.module
        hidden = rms_norm(x, model.final_norm, model.stack.eps)
        embedding = model.embedding.rows(prompt[first + 1 : last + 1])
        if module.zero_first_embedding and first == 0:
            embedding[0] = 0
        eps = module.stack.eps
        pair = torch.cat((rms_norm(embedding, module.embed_norm, eps), rms_norm(hidden, module.hidden_norm, eps)), -1)
        x = _add_bias(module.input_proj.linear(pair), module.input_bias)
        run_layers(module.stack, module_cache, sequence, first, x)


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
