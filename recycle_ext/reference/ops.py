"""The ops of torch.ops.recycle in plain PyTorch, one sequence at a time: what the kernels are tested
against, and the shortest description of what they do. In whatever float dtype they are given.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from recycle_ext.ops.functional import apply_rope, rms_norm, rope_tables
from recycle_ext.reference.model import BaseModel, KvCache, RecyclableModule


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    lengths: Tensor,
    inv_freq: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """RoPE, append to the cache and attention.

    q [B, rows, n_heads, head_dim], k and v [B, rows, n_kv_heads, head_dim]: new rows of each sequence at
    positions lengths[b]..; cache [2, B, n_kv_heads, capacity, head_dim] is written to; in int8
    it has head_dim + 4 (kv_cache.py). -> as q.
    """
    out = torch.empty_like(q)
    rows = q.shape[1]
    for b, length in enumerate(lengths.tolist()):
        positions = torch.arange(length, length + rows)
        cos, sin = rope_tables(inv_freq, positions)
        queries = apply_rope(rms_norm(q[b], q_norm, eps).transpose(0, 1), cos, sin)
        keys = apply_rope(rms_norm(k[b], k_norm, eps).transpose(0, 1), cos, sin)
        cache[0, b, :, length : length + rows] = to_rows(keys, cache.dtype)
        cache[1, b, :, length : length + rows] = to_rows(v[b].transpose(0, 1), cache.dtype)
        seen = from_rows(cache[:, b, :, : length + rows], q.dtype)
        mask = torch.arange(length + rows)[None, :] <= positions[:, None]
        attended = F.scaled_dot_product_attention(
            queries[None], seen[0][None], seen[1][None], mask, enable_gqa=True
        )
        out[b] = attended[0].transpose(0, 1)
    return out


_SCALE_BYTES = 4


def to_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., head_dim] as rows of a cache. In int8 the largest value of a row becomes 127."""
    if dtype != torch.int8:
        return x.to(dtype)
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    quants = (x.float() / scale.clamp_min(1e-30)).round().to(torch.int8)
    return torch.cat((quants, scale.contiguous().view(torch.int8)), -1)


def from_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse, [..., head_dim] of ``dtype``."""
    if rows.dtype != torch.int8:
        return rows.to(dtype)
    scale = rows[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return (rows[..., :-_SCALE_BYTES].float() * scale).to(dtype)


class Stream(IntEnum):
    """What a random draw is for (csrc/include/recycle/random.h)."""

    SAMPLE = 0
    ACCEPT = 1
    DRAFT = 2
    RESAMPLE = 3


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 (Salmon et al., SC 2011): four 32-bit numbers from a counter and a key."""
    low = 0xFFFFFFFF
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & low,
            (first >> 32) ^ counter[3] ^ key[1],
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter


def uniform(seed: int, position: int, stream: Stream) -> float:
    """In [0, 1), 24 random bits; a function of its arguments alone."""
    low = 0xFFFFFFFF
    counter = [position & low, position >> 32, int(stream), 0]
    return (philox(counter, [seed & low, seed >> 32])[0] >> 8) / 2**24


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """logits [n] -> probabilities [n] after temperature, top-k and top-p, in that order."""
    if top_k:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probs[order[before >= top_p]] = 0
        probs /= probs.sum()
    return probs


def draw(probs: Tensor, u: float) -> int:
    """The token at ``u`` of the cumulative distribution."""
    cumulative = probs.double().cumsum(0)
    return int((cumulative <= u * float(cumulative[-1])).sum())


def recycle_head(
    hidden: Tensor,
    norm: Tensor | None,
    eps: float,
    head: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    seeds: Tensor,
) -> tuple[Tensor, Tensor]:
    """hidden [rows, d], head [n_vocab, d] -> tokens [rows] and log softmax(logits)[token] [rows]."""
    logits = rms_norm(hidden, norm, eps) @ head.T
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        tokens = torch.tensor(
            [
                draw(distribution(row, temperature, top_k, top_p), uniform(seed, at, Stream.SAMPLE))
                for row, at, seed in zip(logits, positions.tolist(), seeds.tolist(), strict=True)
            ]
        )
    return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


class ReferenceDecoder:
    """prefill and decode_step for one sequence; the design's section on decoding, line by line."""

    def __init__(
        self,
        base: BaseModel,
        module: RecyclableModule | None = None,
        draft_vocab: Tensor | None = None,
        mode: str = "standard",
        drafts: int = 1,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.base, self.module, self.draft_vocab = base, module, draft_vocab
        self.mode = mode
        self.k = 0 if mode == "standard" else drafts
        self.sampling = temperature, top_k, top_p
        self.seed = seed
        self.base_cache, self.module_cache = KvCache(), KvCache()
        self.pending: list[int] = []
        self.draft_probs: list[Tensor] = []

    def set_num_draft_tokens(self, drafts: int) -> None:
        """Verify mode only; as Decoder.set_num_draft_tokens. 0: the module is left out, and knows nothing of those steps."""
        vocab_size = self.base.config.vocab_size
        padding = 0 if self.draft_vocab is None else int(self.draft_vocab[0])
        sure = F.one_hot(torch.tensor(padding), vocab_size).to(self.base.lm_head.weight.dtype)
        missing = max(drafts - self.k, 0)
        self.pending = self.pending[: drafts + 1] + [padding] * missing
        self.draft_probs = self.draft_probs[:drafts] + [sure] * missing
        self.k = drafts

    def _pick(self, logits: Tensor, position: int, stream: Stream) -> tuple[int, Tensor | None]:
        if self.sampling[0] == 0:
            return int(logits.argmax()), None
        probs = distribution(logits, *self.sampling)
        return draw(probs, uniform(self.seed, position, stream)), probs

    @torch.no_grad()
    def prefill(self, prompt: list[int]) -> int:
        """Reads the prompt; returns the first new token."""
        hidden = self.base(torch.tensor([prompt]), self.base_cache)[0]
        token, _ = self._pick(self.base.logits(hidden[-1]), len(prompt), Stream.SAMPLE)
        self._draft(hidden, [*prompt[1:], token])
        return token

    @torch.no_grad()
    def step(self) -> list[int]:
        """One decode step; returns the tokens the sequence grew by."""
        n = self.base_cache.length
        hidden = self.base(torch.tensor([self.pending]), self.base_cache)[0]
        accepted, token = self._choose(self.base.logits(hidden), n)
        grown = [*self.pending[1 : 1 + accepted], token]
        self.base_cache.truncate(n + accepted + 1)
        self._draft(hidden[: accepted + 1], grown)
        return grown

    def _choose(self, logits: Tensor, n: int) -> tuple[int, int]:
        """How many drafts count, and the base's own token after them."""
        if self.mode != "verify":
            return self.k, self._pick(logits[-1], n + self.k + 1, Stream.SAMPLE)[0]
        for j in range(self.k):
            position, draft = n + j + 1, self.pending[j + 1]
            if self.sampling[0] == 0:
                if (token := int(logits[j].argmax())) != draft:
                    return j, token
                continue
            p, q = distribution(logits[j], *self.sampling), self.draft_probs[j]
            if uniform(self.seed, position, Stream.ACCEPT) * float(q[draft]) >= float(p[draft]):
                residual = (p - q).clamp_min(0)
                return j, draw(residual, uniform(self.seed, position, Stream.RESAMPLE))
        return self.k, self._pick(logits[self.k], n + self.k + 1, Stream.SAMPLE)[0]

    def _draft(self, hidden: Tensor, following: list[int]) -> None:
        """The module over confirmed rows and the tokens after them; its guesses become the drafts."""
        self.pending, self.draft_probs = [following[-1]], []
        if self.k == 0:
            return
        confirmed = self.module_cache.length + len(following)
        skipped = self.base_cache.length - confirmed  # of the text, which draws go by
        for _ in range(self.k):
            embedding = self.base.model.embed_tokens(torch.tensor([following]))
            g, out = self.module(embedding, hidden[None], self.module_cache)
            logits = self.base.lm_head.weight @ out[0, -1]
            if self.draft_vocab is not None:
                kept = torch.full_like(logits, -torch.inf)
                kept[self.draft_vocab] = logits[self.draft_vocab]
                logits = kept
            position = skipped + self.module_cache.length + 1
            draft, probs = self._pick(logits, position, Stream.DRAFT)
            self.pending.append(draft)
            self.draft_probs.append(probs)
            hidden, following = g[0, -1:], [draft]
        self.module_cache.truncate(confirmed)
