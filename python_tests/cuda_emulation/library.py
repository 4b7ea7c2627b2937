"""The CUDA kernels as a C++ library for the CPU (emulation.h), and a decoder's state that it steps."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from cuda_emulation.builds import VALUES, link, objects
from cuda_emulation.cases import CACHE_TYPES

from recycle_ext.decoding.decoder import MODES, Decoder
from recycle_ext.weights.layout import FORMATS


def build_library(folder: Path) -> ctypes.CDLL:
    """Links the kernels to a shared library in `folder`, and loads it."""
    parts = objects((VALUES,), "entry.cpp")[VALUES.name]
    library = ctypes.CDLL(str(link(VALUES, parts, folder / "emulation.so", shared=True)))
    library.emulated_scratch_bytes.restype = ctypes.c_int64
    library.emulated_decode_step.restype = ctypes.c_char_p
    return library


def lm_head(library: ctypes.CDLL, x: torch.Tensor, packed: torch.Tensor, format: str, n: int) -> torch.Tensor:
    """x [rows, k] float32, a packed matrix [n, k] -> logits [rows, n] float32."""
    rows, k = x.shape
    logits = torch.full((rows, n), float("nan"))
    sizes = (ctypes.c_int64(FORMATS[format]), ctypes.c_int64(n), ctypes.c_int64(k))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (packed, x.contiguous(), logits)]
    library.emulated_lm_head(pointers[0], *sizes, pointers[1], ctypes.c_int64(rows), pointers[2])
    return logits


class State(ctypes.Structure):
    """EmulatedState of entry.cpp: the same fields in the same order."""

    _fields_ = (
        ("plan", ctypes.c_void_p),
        ("plan_length", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("weights_bytes", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("num_draft_tokens", ctypes.c_int64),
        ("mode", ctypes.c_int64),
        ("cache_type", ctypes.c_int64),
        ("base_cache", ctypes.c_void_p),
        ("base_capacity", ctypes.c_int64),
        ("module_cache", ctypes.c_void_p),
        ("module_capacity", ctypes.c_int64),
        ("pending", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("draft_probs", ctypes.c_void_p),
        ("temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("top_k", ctypes.c_int64),
        ("seeds", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


class Emulated:
    """A copy of a decoder's state, which the emulated kernels step.

    The attributes are those of Decoder: pending, lengths, base_cache, module_cache, draft_probs.
    """

    def __init__(self, library: ctypes.CDLL, decoder: Decoder) -> None:
        self.library = library
        self.model = decoder.model
        self.base_cache = decoder.base_cache.clone()
        self.module_cache = decoder.module_cache.clone()
        self.lengths = decoder.lengths.clone()
        temperature, top_k, top_p, self.seeds = decoder._sampling
        model = decoder.model
        self.state = State(
            plan=model.plan.data_ptr(),
            plan_length=model.plan.numel(),
            weights=model.weights.data_ptr(),
            weights_bytes=model.weights.numel(),
            batch=decoder.batch,
            cache_type=CACHE_TYPES[self.base_cache.dtype],
            base_cache=self.base_cache.data_ptr(),
            base_capacity=self.base_cache.shape[4],
            module_cache=self.module_cache.data_ptr(),
            module_capacity=self.module_cache.shape[4] if len(self.module_cache) else 0,
            lengths=self.lengths.data_ptr(),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seeds=self.seeds.data_ptr(),
        )
        self.copy_pending(decoder)

    def copy_pending(self, decoder: Decoder) -> None:
        """Copies the decoder's pending tokens, and their number, which may have changed."""
        self.pending, self.draft_probs = decoder.pending.clone(), decoder.draft_probs.clone()
        self.state.num_draft_tokens = decoder.num_draft_tokens
        self.state.mode = MODES[decoder.mode if decoder.num_draft_tokens else "standard"]
        self.state.pending = self.pending.data_ptr()
        self.state.draft_probs = self.draft_probs.data_ptr()
        size = self.library.emulated_scratch_bytes(ctypes.byref(self.state))
        # NaN everywhere: a kernel that reads scratch before another kernel writes it gives NaN.
        self.scratch = torch.full((size,), 255, dtype=torch.uint8)
        self.state.scratch = self.scratch.data_ptr()

    def step(self, first_of: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
        """One step; returns tokens [batch, num_draft_tokens + 1] and counts [batch], both int64.

        first_of: the sequence whose prefill ends with this step (finish_prefill); -1: none.
        """
        tokens, counts = torch.empty_like(self.pending), torch.empty_like(self.lengths[0])
        wrong = self.library.emulated_decode_step(
            ctypes.byref(self.state),
            ctypes.c_int64(first_of),
            ctypes.c_void_p(tokens.data_ptr()),
            ctypes.c_void_p(counts.data_ptr()),
        )
        assert wrong is None, wrong
        return tokens, counts
