"""The plain PyTorch peer: a forward pass over one token with a static cache, eager or compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recycle_ext.checkpoint.config import ModelConfig
from recycle_ext.ops.functional import apply_rope, rope_tables
from recycle_ext.reference.model import BaseModel


class StaticDecoder(nn.Module):
    """Greedy decoding of one sequence, written for torch.compile: no shape ever changes.

    The weights are a BaseModel's in bfloat16, random. Attention reads the whole cache [1, n_kv_heads, capacity, head_dim] of
    a layer behind a mask; a step writes the keys and values of its position. capacity: a multiple of 8, for the mask's
    alignment.
    """

    def __init__(self, config: ModelConfig, capacity: int, device: torch.device) -> None:
        super().__init__()
        self.config = config
        with torch.device(device):
            self.base = BaseModel(config).bfloat16()
            # One buffer per layer: torch.compile copies a tensor of which it writes a part.
            shape = (1, config.n_kv_heads, capacity, config.head_dim)
            for index in range(config.n_layers):
                for name in ("keys", "values"):
                    self.register_buffer(f"{name}{index}", torch.zeros(shape, dtype=torch.bfloat16))
            self.register_buffer("positions", torch.arange(capacity))
        self.base.inv_freq = config.inv_freq().to(device)

    @torch.no_grad()
    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        """token, position: [1] int64. Returns the next token [1] int64."""
        base = self.base
        cos, sin = rope_tables(base.inv_freq, position)
        mask = (self.positions <= position)[None, None, None]
        x = base.model.embed_tokens(token)[None]
        heads = (1, 1, -1, self.config.head_dim)
        for index, layer in enumerate(base.model.layers):
            keys, values = getattr(self, f"keys{index}"), getattr(self, f"values{index}")
            attention = layer.self_attn
            normed = layer.input_layernorm(x)
            q = apply_rope(attention.q_proj(normed).view(heads).transpose(1, 2), cos, sin)
            k = apply_rope(attention.k_proj(normed).view(heads).transpose(1, 2), cos, sin)
            v = attention.v_proj(normed).view(heads).transpose(1, 2)
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            out = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
            x = x + attention.o_proj(out.transpose(1, 2).reshape(1, 1, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return base.logits(base.model.norm(x))[0].argmax(-1)
