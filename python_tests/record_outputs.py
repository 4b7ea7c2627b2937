"""Records what the decode path computes, bit for bit, so that two builds can be compared.

    python python_tests/record_outputs.py record OUT.json        one digest a case
    python python_tests/record_outputs.py compare OLD.json NEW.json

A case is one combination of architecture, kind of module, mode, number of draft tokens, weight format, cache type,
thread count and instruction set. The digest is the SHA-256 of token ids, counts, pending tokens, draft probabilities
and both caches after each step; of ids and log-probabilities for ``recycle_head``; of the output and the cache for
``attention_decode``; and of the same state after emulated CUDA steps.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch
from cuda_emulation.library import Emulated, build_library
from formats import columns, random_matrix
from models import ARCHITECTURES, write_base, write_module

from recycle_ext import _C
from recycle_ext.checkpoint.config import DTYPES
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.decoding.kv_cache import CACHE_DTYPES, row_elements
from recycle_ext.weights.layout import FORMATS
from recycle_ext.weights.pack import pack_model

PROMPTS = [[5, 17, 3, 99, 42, 7], [7] * 70, [1]]
MODULES = {
    "all norms": {},
    "EAGLE-1": {"norms": False},
    "input bias, two layers": {"input_bias": True, "n_layers": 2},
    "MTP": {"zero_first_embedding": True},
    "draft vocabulary": {"draft_vocab_size": 37},
    "like base": {"like_base": True},
}
MODES = [("standard", 1), *itertools.product(("verify", "alternate"), (1, 2, 3, 4))]
SAMPLINGS = {"greedy": {}, "sampled": {"temperature": 1.5, "top_k": 50, "top_p": 0.95}}


class Digest:
    def __init__(self) -> None:
        self.sha = hashlib.sha256()

    def add(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            self.sha.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    def text(self) -> str:
        return self.sha.hexdigest()[:16]


def add_caches(digest: Digest, state: Decoder | Emulated) -> None:
    """The rows that are in use."""
    for b, (base, module) in enumerate(state.lengths.T.tolist()):
        digest.add(state.base_cache[:, :, b, :, :base])
        if state.module_cache.numel():
            digest.add(state.module_cache[:, :, b, :, :module])


def state_after(decoder, steps: int, changes=()) -> str:
    digest = Digest()
    for step in range(steps):
        if changes:
            decoder.set_num_draft_tokens(changes[step % len(changes)])
        record = decoder.step()
        digest.add(record.tokens, record.counts, decoder.pending, decoder.lengths)
        if decoder.draft_probs.numel():
            digest.add(decoder.draft_probs)
    add_caches(digest, decoder)
    return digest.text()


def emulated_state_after(library, decoder, steps: int) -> str:
    emulated, digest = Emulated(library, decoder), Digest()
    for _ in range(steps):
        digest.add(*emulated.step(), emulated.pending, emulated.lengths)
        if emulated.draft_probs.numel():
            digest.add(emulated.draft_probs)
    add_caches(digest, emulated)
    return digest.text()


def new_decoder(packed, mode, drafts, cache_dtype, sampling, prompts=PROMPTS):
    decoder = Decoder(
        packed, mode, drafts, len(prompts), capacity=150, cache_dtype=cache_dtype,
        seeds=[2**45 + 11 + i for i in range(len(prompts))], **sampling,
    )  # fmt: skip
    for sequence, prompt in enumerate(prompts):
        decoder.prefill(prompt, sequence)
    return decoder


def decode_cases(folder: Path):
    """Whole steps of every architecture, module, mode and sampling, and with a changing number of draft tokens."""
    bases, modules = {}, {}
    for architecture in ARCHITECTURES:
        bases[architecture] = write_base(folder / architecture, architecture, tied=architecture != "qwen3")
        for kind, options in MODULES.items():
            modules[architecture, kind] = write_module(folder / architecture / kind, bases[architecture], **options)
    for architecture, kind in modules:
        packed = pack_model(bases[architecture], modules[architecture, kind], "f32")
        for (mode, drafts), sampling in itertools.product(MODES, SAMPLINGS):
            decoder = new_decoder(packed, mode, drafts, torch.float32, SAMPLINGS[sampling])
            yield f"steps {architecture}/{kind}/{mode} {drafts}/{sampling}", state_after(decoder, 5)
    for kind, sampling in itertools.product(("MTP", "draft vocabulary", "like base"), SAMPLINGS):
        packed = pack_model(bases["llama"], modules["llama", kind], "f32")
        decoder = new_decoder(packed, "verify", 4, torch.float32, SAMPLINGS[sampling])
        yield f"changing drafts {kind}/{sampling}", state_after(decoder, 11, [3, 1, 0, 0, 4, 4, 2, 0, 1, 1, 3])


def format_cases(folder: Path):
    """Whole steps in every weight format and cache, with 1 to 4 threads; odd sizes and a prompt longer than all splits."""
    base = write_base(folder / "qwen2", "qwen2")
    module = write_module(folder / "qwen2" / "like base", base, like_base=True)
    pairs = [*((d, None) for d in DTYPES), *(("bf16", d) for d in DTYPES)]
    for (dtype, module_dtype), cache in itertools.product(pairs, CACHE_DTYPES):
        packed = pack_model(base, module, dtype, module_dtype)
        for mode, drafts, threads in (("standard", 1, 1), ("verify", 1, 3), ("verify", 3, 2), ("alternate", 2, 4)):
            _C.set_n_threads(threads)
            decoder = new_decoder(packed, mode, drafts, CACHE_DTYPES[cache], {})
            yield (
                f"formats {dtype} {module_dtype}/cache {cache}/{mode} {drafts}/threads {threads}",
                state_after(decoder, 6),
            )
            _C.set_n_threads(2)
    sizes = {
        "hidden_size": 160,
        "intermediate_size": 224,
        "vocab_size": 517,
        "n_heads": 9,
        "n_kv_heads": 3,
        "head_dim": 48,
    }
    base = write_base(folder / "odd", **sizes, n_layers=1, context=2048)
    module = write_module(folder / "odd-module", base)
    long = torch.randint(0, 517, (1100,), generator=torch.Generator().manual_seed(3)).tolist()
    for dtype, cache in itertools.product(DTYPES, CACHE_DTYPES):
        packed = pack_model(base, module, dtype)
        decoder = Decoder(packed, "verify", 2, 1, capacity=1200, cache_dtype=CACHE_DTYPES[cache])
        decoder.prefill(long)
        yield f"odd sizes, long prompt {dtype}/cache {cache}", state_after(decoder, 4)


def head_cases():
    """recycle_head: ids and log-probabilities."""
    for format, (rows, d, n), temperature in itertools.product(
        FORMATS, [(1, 64, 17), (3, 96, 63), (5, 160, 65), (33, 64, 300), (64, 576, 1000)], (0.0, 0.9)
    ):
        d = columns(format, d)
        generator = torch.Generator().manual_seed(rows + d + n)
        hidden = torch.randn(rows, d, generator=generator)
        norm = 1 + 0.1 * torch.randn(d, generator=generator)
        packed, _ = random_matrix(format, n, d, generator)
        digest = Digest()
        digest.add(*torch.ops.recycle.recycle_head(
            hidden, norm, 1e-5, packed, FORMATS[format], n, torch.arange(rows) + 7, temperature,
            0 if temperature == 0 else 40, 1.0 if temperature == 0 else 0.9, torch.arange(rows),
        ))  # fmt: skip
        yield f"head {format}/{rows}x{d}x{n}/T {temperature}", digest.text()


def attention_cases():
    """attention_decode of odd sizes, called step after step on one cache."""
    for (heads, kv, size), rows, cache_name in itertools.product(
        [(9, 3, 64), (2, 2, 80), (8, 1, 32), (7, 1, 128), (4, 4, 16), (2, 1, 256)], (1, 2, 5, 8), CACHE_DTYPES
    ):
        generator = torch.Generator().manual_seed(heads + size + rows)
        dtype = CACHE_DTYPES[cache_name]
        digest = Digest()
        cache = torch.zeros(2, 2, kv, 400, row_elements(dtype, size), dtype=dtype)
        inv_freq = 1 / 10000 ** (torch.arange(size // 2) / (size // 2))
        at = torch.zeros(2, dtype=torch.int64)
        for step in (70, 1, rows, rows, 193, rows):
            q, k, v = (torch.randn(2, step, h, size, generator=generator) for h in (heads, kv, kv))
            for first in range(0, step, 8):
                part = [x[:, first : first + 8].contiguous() for x in (q, k, v)]
                digest.add(torch.ops.recycle.attention_decode(*part, cache, at, inv_freq))
                at = at + part[0].shape[1]
        digest.add(cache)
        yield f"attention {heads}/{kv}/{size}/rows {rows}/cache {cache_name}", digest.text()


def cuda_cases(folder: Path):
    """Emulated CUDA steps."""
    library = build_library(folder)
    for architecture, kind, (mode, drafts), sampling in itertools.product(
        ARCHITECTURES, ("all norms", "draft vocabulary", "like base"), MODES, SAMPLINGS
    ):
        if architecture != "llama" and (drafts != 2 and mode != "standard"):
            continue
        base = write_base(folder / "cuda" / architecture, architecture)
        module = write_module(folder / "cuda" / architecture / kind, base, **MODULES[kind])
        decoder = new_decoder(
            pack_model(base, module, "f32"), mode, drafts, torch.float32, SAMPLINGS[sampling], PROMPTS[:2]
        )
        state = emulated_state_after(library, decoder, 4)
        yield f"cuda {architecture}/{kind}/{mode} {drafts}/{sampling}", state
    base = write_base(folder / "cuda-formats", vocab_size=300)
    module = write_module(folder / "cuda-formats-module", base, draft_vocab_size=60)
    for dtype, module_dtype, cache in itertools.product(DTYPES, (None, *DTYPES), ("f32", "bf16")):
        decoder = new_decoder(pack_model(base, module, dtype, module_dtype), "verify", 3, CACHE_DTYPES[cache], {})
        yield f"cuda formats {dtype} {module_dtype}/cache {cache}", emulated_state_after(library, decoder, 4)


def record() -> dict[str, str]:
    """Every case's digest, by its name."""
    found = {}
    _C.set_n_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        for isa in _C.runnable_isas():
            _C.force_isa(isa)
            for cases in (decode_cases(Path(folder)), format_cases(Path(folder)), head_cases(), attention_cases()):
                found |= {f"{isa}: {name}": digest for name, digest in cases}
        _C.force_isa(_C.runnable_isas()[0])
        found |= dict(cuda_cases(Path(folder)))
    return found


def compare(old: dict[str, str], new: dict[str, str]) -> int:
    """Prints the cases that differ; returns the exit status."""
    different = [name for name in old | new if old.get(name) != new.get(name)]
    print(f"{len(old)} cases before, {len(new)} after; {len(different)} differ", *different, sep="\n")
    return int(bool(different))


if __name__ == "__main__":
    command, *files = sys.argv[1:]
    if command == "record":
        Path(files[0]).write_text(json.dumps(record(), indent=1))
        sys.exit(0)
    sys.exit(compare(*(json.loads(Path(file).read_text()) for file in files)))
