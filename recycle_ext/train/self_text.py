"""Text that the base model writes: the training text when no other is given.

A module predicts what the base says next, so the base's own text has the right examples. Each sequence starts with a
prompt, goes on at temperature 1 for some tokens (so that sequences differ), then at its assigned temperature, often 0,
as the module will be used. After an end token a new prompt follows in the same sequence.

This loop is not decoding.Decoder's, because training needs the hidden states and a temperature for each sequence, and
the Decoder gives neither.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor

from recycle_ext.reference.model import BaseModel, Layer
from recycle_ext.text.tokenizer import Tokenizer

VARIED_TOKENS = 12  # after each prompt, sampled at temperature 1
TEMPERATURES = (0.0, 0.0, 0.7, 1.0)  # of the sequences, in turn
TOP_K = 64  # tokens that sampling chooses from

# Shares of the prompts, for a base with a chat template: a request, and an open user turn that the base fills in.
_REQUESTS, _OPEN_TURNS = 0.5, 0.15


class Prompts:
    """Endless random prompts from the lists in ``prompts.txt``.

    Plain openings; for a base with a chat template also requests in that template.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        text = resources.files("recycle_ext.train").joinpath("prompts.txt").read_text("utf-8")
        self.lists: dict[str, list[str]] = {}
        for line in text.splitlines():
            if line.startswith("["):
                self.lists[line.strip("[]")] = current = []
            elif line and not line.startswith("#"):
                current.append(line.replace("\\n", "\n"))
        self._tokenizer = tokenizer
        self._random = random.Random(seed)

    def next(self) -> list[int]:
        """Token ids of the next prompt."""
        kind = self._random.random()
        if self._tokenizer.chat_template is None or kind > _REQUESTS + _OPEN_TURNS:
            return self._tokenizer.encode(self._filled("openings"))
        request = self._filled("requests")
        chat = self._tokenizer.apply_chat_template([{"role": "user", "content": request}])
        # A template may change the request; then there is no place where the turn opens.
        start = chat.rfind(request)
        if kind < _OPEN_TURNS and start >= 0:
            chat = chat[:start]
        return self._tokenizer.encode(chat, add_bos=False)

    def _filled(self, name: str) -> str:
        """A random line of a list, each {name} in it replaced by a random line of that list or a number."""

        def choose(match: re.Match) -> str:
            if match[1] == "number":
                return str(self._random.randint(2, 99))
            return self._random.choice(self.lists[match[1]])

        names = "|".join([*self.lists, "number"])
        return re.sub(rf"{{({names})}}", choose, self._random.choice(self.lists[name]))


class _BatchedBase:
    """The base model over one new token of each of ``batch`` sequences, with a cache of ``length`` positions.

    The same function as ``BaseModel`` with a cache, but faster: matmuls with the same input are fused, and
    torch.ops.recycle.attention_decode does RoPE, the cache append and attention.
    """

    def __init__(self, base: BaseModel, batch: int, length: int) -> None:
        config = base.config
        weight = base.model.norm.weight
        self.base = base
        self.layers = [self._fused(layer) for layer in base.model.layers]
        shape = (2, batch, config.n_kv_heads, length, config.head_dim)
        self.caches = [torch.zeros(shape, dtype=torch.bfloat16, device=weight.device) for _ in self.layers]
        self.inv_freq = base.inv_freq.float()
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=weight.device)

    @staticmethod
    def _fused(layer: Layer) -> tuple[Tensor, Tensor | None, Tensor]:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = None
        if attention.q_proj.bias is not None:
            bias = torch.cat([part.bias for part in projections])
        qkv = torch.cat([part.weight for part in projections])
        return qkv, bias, torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [batch] int64 -> hidden states [batch, d] after the final norm, in the base's dtype."""
        config = self.base.config
        x = F.embedding(tokens, self.base.model.embed_tokens.weight)
        parts = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        for layer, cache, (qkv, bias, gate_up) in zip(self.base.model.layers, self.caches, self.layers, strict=True):
            attention = layer.self_attn
            heads = F.linear(layer.input_layernorm(x), qkv, bias).float()
            q, k, v = heads.view(len(x), 1, -1, config.head_dim).split(parts, 2)
            norms = (getattr(attention.q_norm, "weight", None), getattr(attention.k_norm, "weight", None))
            attended = torch.ops.recycle.attention_decode(
                q.contiguous(),
                k.contiguous(),
                v.contiguous(),
                cache,
                self.lengths,
                self.inv_freq,
                *(None if norm is None else norm.float() for norm in norms),
                config.rms_norm_eps,
            )
            x = x + attention.o_proj(attended.view(len(x), -1).to(x.dtype))
            gate, up = F.linear(layer.post_attention_layernorm(x), gate_up).chunk(2, -1)
            x = x + layer.mlp.down_proj(F.silu(gate) * up)
        self.lengths += 1
        return self.base.model.norm(x)


@torch.no_grad()
def write_text(
    base: BaseModel,
    prompts: Prompts,
    ends: set[int],
    batch: int,
    length: int,
    seed: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> tuple[Tensor, Tensor]:
    """Lets the base write ``batch`` sequences of ``length`` tokens.

    ends: tokens after which a new prompt follows. progress: called with the number of tokens written since its last call.
    Returns tokens [batch, length] int64 and hidden states [batch, length, d] in the base's dtype, both on the CPU; row i
    of the states is the state after token i.
    """
    weight = base.lm_head.weight
    generator = torch.Generator().manual_seed(seed)
    batched = _BatchedBase(base, batch, length)
    tokens = torch.empty(batch, length, dtype=torch.int64)
    hidden = torch.empty(batch, length, base.config.hidden_size, dtype=weight.dtype)
    # One tensor for all steps: allocating one of this size takes longer than the matmul that fills it.
    logits = torch.empty(batch, len(weight), dtype=weight.dtype, device=weight.device)
    top_k = min(TOP_K, len(weight))
    unread = [prompts.next() for _ in range(batch)]
    n_varied = [VARIED_TOKENS] * batch
    assigned = [TEMPERATURES[i % len(TEMPERATURES)] for i in range(batch)]
    sampled = [0] * batch
    for position in range(length):
        temperature = torch.tensor([1.0 if n > 0 else t for n, t in zip(n_varied, assigned, strict=True)])
        for row in range(batch):
            if unread[row]:
                tokens[row, position] = unread[row].pop(0)
                continue
            tokens[row, position] = sampled[row]
            n_varied[row] -= 1
            if sampled[row] in ends:
                unread[row] = prompts.next()
                n_varied[row] = VARIED_TOKENS
        state = batched(tokens[:, position].to(weight.device))
        hidden[:, position] = state.to("cpu")
        torch.mm(state, weight.T, out=logits)
        values, ids = (part.to("cpu") for part in logits.topk(top_k))
        # The argmax of logits + T * Gumbel noise is a sample of softmax(logits / T) (Gumbel-max trick).
        noise = torch.rand(batch, top_k, generator=generator).clamp_min_(1e-20).log_().neg_().log_()
        best = (values.float() - noise * temperature[:, None]).argmax(-1, keepdim=True)
        sampled = ids.gather(1, best)[:, 0].tolist()
        progress(batch)
    return tokens, hidden
