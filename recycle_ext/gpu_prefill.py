"""torch.ops.recycle.prefill on a GPU: a prompt through PyTorch's matrix products, on the packed weights.

A prompt has many rows, so its products are bound by arithmetic, which PyTorch's libraries do best. Each matrix is
unpacked (csrc/include/recycle/format.h) right before its product and forgotten after it: the GPU never holds a
second copy of the weights. All of the prompt but its last token goes this way; the last one is a decode step
(``finish_prefill``), whose kernels choose the first token and make the first drafts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from recycle_ext.packing import FORMATS
from recycle_ext.reference import rope_tables, rotate
from recycle_ext.reference_ops import rms_norm

PANEL = 16  # rows of a matrix that are packed together
BLOCK = 32  # weights of a row that share a scale
LINE = 64  # bytes
ROWS = 2048  # of a prompt that pass through the layers together


@dataclass(frozen=True)
class Matrix:
    """A packed matrix [n, k] in the byte tensor of all weights."""

    weights: Tensor
    offset: int
    format: int
    n: int
    k: int

    @property
    def dtype(self) -> torch.dtype:
        """What products with it are made in: its own dtype, bfloat16 for quantised ones, float32 for float16."""
        wide = self.format in (FORMATS["f32"], FORMATS["f16"])
        return torch.float32 if wide else torch.bfloat16

    def panel_bytes(self) -> int:
        """Of 16 rows."""
        if self.format == FORMATS["f32"]:
            return self.k * PANEL * 4
        if self.format in (FORMATS["f16"], FORMATS["bf16"]):
            return self.k * PANEL * 2
        blocks, shared = self.k // BLOCK, self._blocks_a_line()
        return -(-blocks // shared) * LINE + blocks * self._quant_bytes()

    def _blocks_a_line(self) -> int:
        return 1 if self.format == FORMATS["q4_1"] else 2

    def _quant_bytes(self) -> int:
        return PANEL * BLOCK // (1 if self.format == FORMATS["q8_0"] else 2)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows [len(ids), k], float32."""
        unpacked = self._unpack(self.panels()[ids // PANEL])
        return unpacked[torch.arange(len(ids), device=ids.device), ids % PANEL].float()

    def all(self) -> Tensor:
        """[n, k] of ``dtype``."""
        return self._unpack(self.panels()).reshape(-1, self.k)[: self.n].to(self.dtype)

    def panels(self) -> Tensor:
        """uint8 [panels, panel_bytes]"""
        count, size = -(-self.n // PANEL), self.panel_bytes()
        return self.weights[self.offset : self.offset + count * size].view(count, size)

    def _unpack(self, panels: Tensor) -> Tensor:
        """uint8 [panels, bytes] -> [panels, 16, k]"""
        count, k = len(panels), self.k
        if self.format == FORMATS["f32"]:
            return panels.view(torch.float32).view(count, k, PANEL).transpose(1, 2)
        if self.format == FORMATS["f16"]:
            return panels.view(torch.float16).view(count, k, PANEL).transpose(1, 2)
        if self.format == FORMATS["bf16"]:
            pairs = panels.view(torch.bfloat16).view(count, k // 2, PANEL, 2)
            return pairs.transpose(1, 2).reshape(count, PANEL, k)
        # Blocks share a line of scales; the last line may be half in use.
        shared, quants = self._blocks_a_line(), self._quant_bytes()
        blocks = k // BLOCK
        whole = blocks // shared
        group = LINE + shared * quants
        parts = [self._unpack_blocks(panels[:, : whole * group].view(count, whole, group), shared)]
        if blocks % shared:
            rest = panels[:, whole * group :].reshape(count, 1, LINE + quants)
            parts.append(self._unpack_blocks(rest, 1))
        return torch.cat(parts, 2)

    def _unpack_blocks(self, groups: Tensor, blocks: int) -> Tensor:
        """uint8 [panels, groups, a line of scales and the quants of ``blocks`` blocks] -> [panels, 16, .]"""
        count, n_groups = groups.shape[:2]
        halves = groups[:, :, :LINE].contiguous().view(torch.float16).float()
        quants = groups[:, :, LINE:]
        if self.format == FORMATS["q8_0"]:
            values = quants.reshape(count, n_groups, blocks, 8, PANEL, 4).float() - 128
        else:
            four = quants.reshape(count, n_groups, blocks, 4, PANEL, 4)
            values = torch.stack((four & 15, four >> 4), 4).float()  # k and k + 4
            values = values.reshape(count, n_groups, blocks, 8, PANEL, 4)
            if self.format == FORMATS["q4_0"]:
                values -= 8
        shape = (count, n_groups, blocks, 1, PANEL, 1)
        values *= halves[:, :, : blocks * PANEL].reshape(shape)
        if self.format == FORMATS["q4_1"]:
            values += halves[:, :, PANEL:].reshape(shape)
        return values.permute(0, 4, 1, 2, 3, 5).reshape(count, PANEL, -1)

    def product(self, x: Tensor) -> Tensor:
        """x [rows, k] float32 -> x W^T [rows, n] float32."""
        return F.linear(x.to(self.dtype), self.all()).float()


@dataclass(frozen=True)
class Layer:
    """One transformer layer."""

    input_norm: Tensor | None
    q: Matrix
    k: Matrix
    v: Matrix
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Matrix
    post_norm: Tensor
    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True)
class Stack:
    """A pile of layers; those are read from the plan one by one."""

    hidden: int
    intermediate: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    eps: float
    inv_freq: Tensor


class Plan:
    """Reads the table that csrc/include/recycle/model.h describes, in its order."""

    def __init__(self, weights: Tensor, plan: Tensor) -> None:
        self.weights = weights
        self.numbers = iter(plan.tolist())
        for _ in range(3):  # magic, version, length
            next(self.numbers)
        has_module = next(self.numbers)
        self.base = self._stack()
        next(self.numbers)  # vocabulary
        self.embedding = self._matrix()
        self.final_norm = self._vector(self.base.hidden)
        self.head = self._matrix()
        self.base_layers = list(self._layers(self.base))
        self.module = None
        if not has_module:
            return
        self.module = self._stack()
        hidden = self.module.hidden
        self.input_proj = self._matrix()
        self.input_bias = self._vector(hidden)
        self.embed_norm = self._vector(hidden)
        self.hidden_norm = self._vector(hidden)
        self.output_norm = self._vector(hidden)
        size = next(self.numbers)
        self.module_head = self._matrix()
        offset = next(self.numbers)
        self.draft_vocab = (
            None if offset < 0 else self.weights[offset : offset + size * 8].view(torch.int64)
        )
        self.zero_first_embedding = bool(next(self.numbers))
        self.module_layers = list(self._layers(self.module))

    def _vector(self, size: int) -> Tensor | None:
        offset = next(self.numbers)
        return None if offset < 0 else self.weights[offset : offset + size * 4].view(torch.float32)

    def _matrix(self) -> Matrix:
        return Matrix(self.weights, *(next(self.numbers) for _ in range(4)))

    def _stack(self) -> Stack:
        sizes = [next(self.numbers) for _ in range(6)]
        (eps,) = struct.unpack("<f", struct.pack("<i", next(self.numbers)))
        return Stack(*sizes, eps, self._vector(sizes[5] // 2))

    def _layers(self, stack: Stack) -> Iterator[Layer]:
        q, kv = stack.n_heads * stack.head_dim, stack.n_kv_heads * stack.head_dim
        for _ in range(stack.n_layers):
            yield Layer(
                self._vector(stack.hidden),
                *(self._matrix() for _ in range(3)),
                *(self._vector(size) for size in (q, kv, kv)),
                *(self._vector(stack.head_dim) for _ in range(2)),
                self._matrix(),
                self._vector(stack.hidden),
                *(self._matrix() for _ in range(3)),
            )


def run_layers(
    stack: Stack, layers: list[Layer], cache: Tensor, sequence: int, first: int, x: Tensor
) -> Tensor:
    """Rows at positions first.. through the layers: x [rows, d] -> [rows, d], both float32.

    cache [layers, 2, batch, n_kv_heads, capacity, head_dim] gets their keys and values.
    """
    end = first + len(x)
    cos, sin = rope_tables(stack.inv_freq, torch.arange(first, end, device=x.device))
    mask = None
    if first > 0:
        mask = torch.ones(len(x), end, dtype=torch.bool, device=x.device).tril(first)
    for layer, held in zip(layers, cache[:, :, sequence], strict=True):
        normed = rms_norm(x, layer.input_norm, stack.eps)
        heads = [
            _plus(matrix.product(normed), bias).view(len(x), -1, stack.head_dim).transpose(0, 1)
            for matrix, bias in (
                (layer.q, layer.q_bias),
                (layer.k, layer.k_bias),
                (layer.v, layer.v_bias),
            )
        ]
        q = rotate(rms_norm(heads[0], layer.q_norm, stack.eps), cos, sin)
        held[0, :, first:end] = rotate(rms_norm(heads[1], layer.k_norm, stack.eps), cos, sin)
        held[1, :, first:end] = heads[2]
        # Not cuDNN's, which makes a plan for each new length.
        with sdpa_kernel(
            [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        ):
            attended = F.scaled_dot_product_attention(
                q[None].to(held.dtype),
                held[None, 0, :, :end],
                held[None, 1, :, :end],
                mask,
                is_causal=mask is None,
                enable_gqa=True,
            )
        x = x + layer.o.product(attended[0].transpose(0, 1).reshape(len(x), -1).float())
        normed = rms_norm(x, layer.post_norm, stack.eps)
        x = x + layer.down.product(F.silu(layer.gate.product(normed)) * layer.up.product(normed))
    return x


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def fill_caches(
    plan: Plan,
    base_cache: Tensor,
    module_cache: Tensor | None,
    sequence: int,
    prompt: Tensor,
) -> None:
    """Keys and values of all of a prompt [n] but its last token, from position 0; the module's too, if asked."""
    for first in range(0, len(prompt) - 1, ROWS):
        last = min(first + ROWS, len(prompt) - 1)
        x = plan.embedding.rows(prompt[first:last])
        x = run_layers(plan.base, plan.base_layers, base_cache, sequence, first, x)
        if module_cache is None:
            continue
        hidden = rms_norm(x, plan.final_norm, plan.base.eps)
        embedding = plan.embedding.rows(prompt[first + 1 : last + 1])
        if plan.zero_first_embedding and first == 0:
            embedding[0] = 0
        eps = plan.module.eps
        pair = torch.cat(
            (rms_norm(embedding, plan.embed_norm, eps), rms_norm(hidden, plan.hidden_norm, eps)), -1
        )
        x = _plus(plan.input_proj.product(pair), plan.input_bias)
        run_layers(plan.module, plan.module_layers, module_cache, sequence, first, x)


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
    """The op; csrc/bindings/ops.cpp has its schema. Waits for the GPU: a number that is none is an error at once."""
    drafts = pending.shape[1] - 1
    if not 0 <= sequence < len(pending):
        raise ValueError(f"prefill: sequence is {sequence}; it must be 0 to {len(pending) - 1}")
    if prompt.dim() != 1 or prompt.dtype != torch.int64 or not len(prompt):
        raise ValueError(
            f"prefill: prompt is {prompt.dtype} {list(prompt.shape)}; it must be int64 [1 or more tokens]"
        )
    capacity = base_cache.shape[4]
    if drafts:
        capacity = min(capacity, module_cache.shape[4])
    if len(prompt) + max(drafts - 1, 0) > capacity:
        raise ValueError(
            f"prefill: prompt has {len(prompt)} tokens, but the caches have room for {capacity} positions"
        )
    on_gpu = prompt.to(weights.device)
    parsed = Plan(weights, plan)
    if int(prompt.min()) < 0 or int(prompt.max()) >= parsed.embedding.n:
        raise ValueError(f"prefill: prompt has token ids outside of 0 to {parsed.embedding.n - 1}")
    fill_caches(parsed, base_cache, module_cache if drafts else None, sequence, on_gpu)
    pending[sequence] = 0
    pending[sequence, 0] = on_gpu[-1]
    lengths[0, sequence] = len(prompt) - 1
    lengths[1, sequence] = len(prompt) - 1 if drafts else 0
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
        raise RuntimeError(
            f"prefill: a logit is NaN or infinite (sequence {sequence}, position {len(prompt) - 1})"
        )
