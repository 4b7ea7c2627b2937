"""The ops of torch.ops.recycle in plain PyTorch, one sequence at a time, in the float dtype of their inputs.

Tests compare the kernels to these functions, which are also the shortest description of the ops.
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
    """RoPE, append to the cache and attention. -> the shape and dtype of q

    q [B, rows, n_heads, head_dim], k and v [B, rows, n_kv_heads, head_dim]: new rows of sequence b, at positions
    lengths[b] and after. lengths [B] int64. cache [2, B, n_kv_heads, capacity, head_dim]: keys and values, written to; an
    int8 cache has rows of head_dim + 4 (to_rows). q_norm, k_norm [head_dim]: RMSNorm weights of Qwen3.
    """
    out = torch.empty_like(q)
    rows = q.shape[1]
    for b, length in enumerate(lengths.tolist()):
        positions = torch.arange(length, length + rows, device=q.device)
        cos, sin = rope_tables(inv_freq, positions)
        queries = apply_rope(rms_norm(q[b], q_norm, eps).transpose(0, 1), cos, sin)
        keys = apply_rope(rms_norm(k[b], k_norm, eps).transpose(0, 1), cos, sin)
        cache[0, b, :, length : length + rows] = to_rows(keys, cache.dtype)
        cache[1, b, :, length : length + rows] = to_rows(v[b].transpose(0, 1), cache.dtype)
        seen = from_rows(cache[:, b, :, : length + rows], q.dtype)
        mask = torch.arange(length + rows, device=q.device)[None, :] <= positions[:, None]
        attended = F.scaled_dot_product_attention(queries[None], seen[0][None], seen[1][None], mask, enable_gqa=True)
        out[b] = attended[0].transpose(0, 1)
    return out


_SCALE_BYTES = 4  # an int8 row's float32 scale, after its values


def to_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., head_dim] as rows of a cache of ``dtype``.

    int8 rows are [..., head_dim + 4]: values scaled so that the largest magnitude is 127, then the scale.
    """
    if dtype != torch.int8:
        return x.to(dtype)
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    quants = (x.float() / scale.clamp_min(1e-30)).round().to(torch.int8)
    return torch.cat((quants, scale.contiguous().view(torch.int8)), -1)


def from_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of to_rows. -> [..., head_dim] of ``dtype``"""
    if rows.dtype != torch.int8:
        return rows.to(dtype)
    scale = rows[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return (rows[..., :-_SCALE_BYTES].float() * scale).to(dtype)


class Stream(IntEnum):
    """The use of a random number (csrc/include/recycle/random.h)."""

    SAMPLE = 0
    ACCEPT = 1
    DRAFT = 2
    RESAMPLE = 3


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 (Salmon et al., SC 2011): four 32-bit numbers from a counter and a key."""
    low = 0xFFFFFFFF
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(second >> 32) ^ counter[1] ^ key[0], second & low, (first >> 32) ^ counter[3] ^ key[1], first & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter


def uniform(seed: int, position: int, stream: Stream) -> float:
    """A number in [0, 1) with 24 random bits, a function of its arguments alone."""
    low = 0xFFFFFFFF
    counter = [position & low, position >> 32, int(stream), 0]
    return (philox(counter, [seed & low, seed >> 32])[0] >> 8) / 2**24


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """logits [n] -> probabilities [n] after temperature, top-k (0: all) and top-p (nucleus sampling), in that order."""
    if top_k:
        threshold = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    # Within the range where 1 / temperature is a normal float32; below it a distribution is as good as greedy.
    temperature = min(max(temperature, 2.0**-126), 2.0**126)
    probs = ((logits - logits.max()) / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probs[order[before >= top_p]] = 0
        probs /= probs.sum()
    return probs


def sample(probs: Tensor, u: float) -> int:
    """The token whose interval of the cumulative distribution contains ``u`` in [0, 1). probs [n], of any sum."""
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
    """RMSNorm (weight [d]; None: none), head and token choice for each row.

    hidden [rows, d], head [n_vocab, d], positions and seeds [rows] int64. temperature 0: argmax. -> tokens [rows] int64
    and their log-probabilities [rows] before temperature, top-k and top-p.
    """
    logits = rms_norm(hidden, norm, eps) @ head.T
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        tokens = torch.tensor(
            [
                sample(distribution(row, temperature, top_k, top_p), uniform(seed, p, Stream.SAMPLE))
                for row, p, seed in zip(logits, positions.tolist(), seeds.tolist(), strict=True)
            ],
            device=hidden.device,
        )
    return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


class ReferenceDecoder:
    """prefill and decode_step for one sequence, as docs/design.md defines decoding.

    mode: "standard", "verify" or "alternate". drafts: draft tokens a step. draft_vocab: [n] int64 ascending; None: all.
    Between steps, ``pending`` has one certain token and then the draft tokens; ``draft_probs`` has the distribution that
    each draft token was sampled from (None in greedy decoding).
    """

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
        self.num_draft_tokens = 0 if mode == "standard" else drafts
        self.sampling = temperature, top_k, top_p
        self.seed = seed
        self.base_cache, self.module_cache = KvCache(), KvCache()
        self.pending: list[int] = []
        self.draft_probs: list[Tensor | None] = []

    def set_num_draft_tokens(self, count: int) -> None:
        """Sets the draft tokens of the following steps, as Decoder.set_num_draft_tokens; verify mode alone."""
        vocab_size = self.base.config.vocab_size
        padding = 0 if self.draft_vocab is None else int(self.draft_vocab[0])
        one_hot = F.one_hot(self._row([padding])[0, 0], vocab_size).to(self.base.lm_head.weight.dtype)
        missing = max(count - self.num_draft_tokens, 0)
        self.pending = self.pending[: count + 1] + [padding] * missing
        self.draft_probs = self.draft_probs[:count] + [one_hot] * missing
        self.num_draft_tokens = count

    def _row(self, ids: list[int]) -> Tensor:
        """Token ids [1, n], on the model's device."""
        return torch.tensor([ids], device=self.base.lm_head.weight.device)

    def _token(self, logits: Tensor, position: int, stream: Stream) -> tuple[int, Tensor | None]:
        """The argmax, or a sample and the distribution [n_vocab] that it is from."""
        if self.sampling[0] == 0:
            return int(logits.argmax()), None
        probs = distribution(logits, *self.sampling)
        return sample(probs, uniform(self.seed, position, stream)), probs

    @torch.no_grad()
    def prefill(self, prompt: list[int]) -> int:
        """Reads the prompt; returns the first new token."""
        hidden = self.base(self._row(prompt), self.base_cache)[0]
        token, _ = self._token(self.base.logits(hidden[-1]), len(prompt), Stream.SAMPLE)
        self._draft(hidden, [*prompt[1:], token])
        return token

    @torch.no_grad()
    def step(self) -> list[int]:
        """One decode step; returns the new tokens: the accepted draft tokens, then one of the base's own."""
        n = self.base_cache.length
        hidden = self.base(self._row(self.pending), self.base_cache)[0]
        accepted, token = self._verify(self.base.logits(hidden), n)
        new_tokens = [*self.pending[1 : 1 + accepted], token]
        self.base_cache.truncate(n + accepted + 1)
        self._draft(hidden[: accepted + 1], new_tokens)
        return new_tokens

    def _verify(self, logits: Tensor, n: int) -> tuple[int, int]:
        """The number of accepted draft tokens, and the base's own token after them.

        Sampled verify mode accepts a draft token with probability min(1, p / q), and else samples the residual
        max(p - q, 0) (Leviathan et al. 2023, algorithm 1).
        """
        drafted = self.num_draft_tokens
        if self.mode == "verify":
            for j in range(drafted):
                position, draft = n + j + 1, self.pending[j + 1]
                if self.sampling[0] == 0:
                    if (token := int(logits[j].argmax())) != draft:
                        return j, token
                    continue
                p, q = distribution(logits[j], *self.sampling), self.draft_probs[j]
                if uniform(self.seed, position, Stream.ACCEPT) * float(q[draft]) >= float(p[draft]):
                    residual = (p - q).clamp_min(0)
                    return j, sample(residual, uniform(self.seed, position, Stream.RESAMPLE))
        return drafted, self._token(logits[-1], n + drafted + 1, Stream.SAMPLE)[0]

    def _draft(self, hidden: Tensor, following: list[int]) -> None:
        """The module over confirmed rows, then over its own outputs; sets ``pending`` and ``draft_probs``.

        hidden [rows, d]: the base's states. following: the token after each row.
        """
        self.pending, self.draft_probs = [following[-1]], []
        if self.num_draft_tokens == 0:
            return
        confirmed = self.module_cache.length + len(following)
        # The module did not see tokens of steps without drafts, but random numbers go by positions in the text.
        skipped = self.base_cache.length - confirmed
        for _ in range(self.num_draft_tokens):
            embedding = self.base.model.embed_tokens(self._row(following))
            g, out = self.module(embedding, hidden[None], self.module_cache)
            logits = self.base.lm_head.weight @ out[0, -1]
            if self.draft_vocab is not None:
                allowed = torch.full_like(logits, -torch.inf)
                allowed[self.draft_vocab] = logits[self.draft_vocab]
                logits = allowed
            position = skipped + self.module_cache.length + 1
            token, probs = self._token(logits, position, Stream.DRAFT)
            self.pending.append(token)
            self.draft_probs.append(probs)
            hidden, following = g[0, -1:], [token]
        self.module_cache.truncate(confirmed)
