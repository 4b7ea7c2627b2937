"""The base model and the recyclable module in plain PyTorch. Training uses them, and tests compare the kernels to them.

Shapes: B sequences, T tokens, d hidden_size. Weights have Hugging Face's names, so ``load_state_dict`` takes a
checkpoint's tensors as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recycle_ext.checkpoint.config import ModelConfig, ModuleConfig
from recycle_ext.ops.functional import apply_rope, rope_tables


class KvCache:
    """Keys and values of the tokens so far, [B, n_kv_heads, positions, head_dim] for each layer.

    capacity: positions allocated at the start; a full cache doubles it.
    """

    def __init__(self, capacity: int = 64) -> None:
        self.length = 0
        self._capacity = capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values [B, n_kv_heads, T, head_dim] to a layer; returns all of the layer, as ``held``.

        The first layer of a forward pass must be layer 0, which advances ``length``; the others write to the same positions.
        """
        if layer == 0:
            self.length += keys.shape[2]
        start = self.length - keys.shape[2]
        while self._capacity < self.length:
            self._capacity *= 2
        held = self._layers.get(layer)
        if held is None or held[0].shape[2] < self.length:
            shape = (*keys.shape[:2], self._capacity, keys.shape[3])
            grown = keys.new_empty(shape), values.new_empty(shape)
            if held is not None:
                for old, new in zip(held, grown, strict=True):
                    new[:, :, :start] = old[:, :, :start]
            held = self._layers[layer] = grown
        for stored, added in zip(held, (keys, values), strict=True):
            stored[:, :, start : self.length] = added
        return self.held(layer)

    def held(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [B, n_kv_heads, length, head_dim]."""
        keys, values = self._layers[layer]
        return keys[:, :, : self.length], values[:, :, : self.length]

    def mask(self, rows: int, device: torch.device) -> Tensor | None:
        """Attention mask of the ``rows`` newest positions, [rows, length] bool; None: plain causal attention.

        Row r sees all positions but the last rows - 1 - r.
        """
        if rows == self.length:
            return None
        ones = torch.ones(rows, self.length, dtype=torch.bool, device=device)
        return ones.tril(self.length - rows)

    def truncate(self, length: int) -> None:
        """Drops positions ``length`` and after."""
        self.length = min(self.length, length)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32 (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        exact = x.float() if x.dtype != torch.float64 else x
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with RoPE, and with Qwen3's norms of q and k where config.qk_norm is set."""

    def __init__(self, config: ModelConfig | ModuleConfig) -> None:
        super().__init__()
        d, size = config.hidden_size, config.head_dim
        self.head_dim = size
        self.q_proj = nn.Linear(d, config.n_heads * size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, config.n_kv_heads * size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, config.n_kv_heads * size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_heads * size, d, bias=False)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KvCache | None, layer: int) -> Tensor:
        """x [B, T, d], cos and sin [T, head_dim] -> [B, T, d]. layer: index of this layer in the cache."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = apply_rope(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
        k = apply_rope(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if q.shape[2] == 1:
            # One new token: the query heads of a group become rows of one attention, so that torch reads the group's
            # keys and values once, not once for each head (four times as fast in bfloat16 on a CPU).
            grouped = q.reshape(q.shape[0], k.shape[1], -1, self.head_dim)
            out = F.scaled_dot_product_attention(grouped, k, v)
            return self.o_proj(out.reshape(*x.shape[:2], -1))
        mask = None if cache is None else cache.mask(q.shape[2], q.device)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(*x.shape[:2], -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6)."""

    def __init__(self, config: ModelConfig | ModuleConfig) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig | ModuleConfig, input_norm: bool = True) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps) if input_norm else nn.Identity()
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KvCache | None, layer: int) -> Tensor:
        """As Attention.forward."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class LayerStack(nn.Module):
    """Embedding, layers and final norm; Hugging Face's names start with ``model.`` for these."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class BaseModel(nn.Module):
    """A Llama-family decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LayerStack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("inv_freq", config.inv_freq(), persistent=False)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Loads a checkpoint's tensors; a tied head may be absent."""
        if self.config.tie_word_embeddings and "lm_head.weight" not in state_dict:
            state_dict = state_dict | {"lm_head.weight": state_dict["model.embed_tokens.weight"]}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def forward(self, tokens: Tensor, cache: KvCache | None = None) -> Tensor:
        """tokens [B, T] int64 -> hidden states [B, T, d] after the final norm.

        With a cache, the tokens follow those in the cache, and their keys and values are appended.
        """
        first = cache.length if cache is not None else 0
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        cos, sin = rope_tables(self.inv_freq, positions)
        x = self.model.embed_tokens(tokens)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, cache, index)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., vocab_size]"""
        return self.lm_head(hidden)


class RecyclableModule(nn.Module):
    """The recyclable module of RecycleGPT (arXiv 2308.03421, section 3).

    From h_i and the embedding of x_{i+1} to a state that predicts x_{i+2} through the base's head.
    """

    def __init__(self, config: ModuleConfig) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.input_proj = nn.Linear(2 * d, d, bias=config.input_bias)
        self.embed_norm = RMSNorm(d, eps) if config.embed_norm else nn.Identity()
        self.hidden_norm = RMSNorm(d, eps) if config.hidden_norm else nn.Identity()
        self.output_norm = RMSNorm(d, eps) if config.output_norm else nn.Identity()
        self.layers = nn.ModuleList(
            Layer(config, input_norm=config.first_input_norm or index > 0) for index in range(config.n_layers)
        )
        self.register_buffer("inv_freq", config.inv_freq(), persistent=False)

    def forward(self, embedding: Tensor, hidden: Tensor, cache: KvCache | None = None) -> tuple[Tensor, Tensor]:
        """Rows i = first, first + 1, ..., where ``first`` is the cache's length (0 without a cache).

        embedding [B, T, d]: e(x_{i+1}). hidden [B, T, d]: h_i. Returns g_i, which replaces h_i for a further draft token,
        and n(g_i), which goes into the head; both [B, T, d].
        """
        first = cache.length if cache is not None else 0
        positions = torch.arange(first, first + hidden.shape[1], device=hidden.device)
        if self.config.zero_first_embedding and first == 0:
            embedding = torch.cat((torch.zeros_like(embedding[:, :1]), embedding[:, 1:]), dim=1)
        cos, sin = rope_tables(self.inv_freq, positions)
        x = self.input_proj(torch.cat((self.embed_norm(embedding), self.hidden_norm(hidden)), dim=-1))
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache, index)
        return x, self.output_norm(x)
