"""Runs the ops on memory that ends or begins at an inaccessible page, each case in a process of its own.

``python guarded_memory.py`` prints a JSON object: the name of each case, and how its process ended (0, an exit status,
or minus the number of a signal). A load outside a tensor is SIGSEGV there; a prefetch is not, as in any other program.
The cases are forked from one process without threads, so that torch is imported once.
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import resource
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from formats import columns, random_matrix
from models import write_base, write_module
from torch import Tensor

from recycle_ext import _C
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.decoding.kv_cache import CACHE_DTYPES
from recycle_ext.weights.layout import FORMATS
from recycle_ext.weights.pack import PackedModel, pack_model

SIDES = ("after", "before")  # where the inaccessible page lies
_NO_ROOM = -2  # in counts (csrc/include/recycle/decode_step.h)
_PROT_NONE = 0
_kept: list[mmap.mmap] = []  # the memory of all guarded tensors of this process


def guarded(tensor: Tensor, side: str, missing: int = 0) -> Tensor:
    """A copy whose bytes end (side "after") or begin ("before") at an inaccessible page.

    missing: bytes at that end of the copy that lie in the page, for tests of the tests.
    """
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    body = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, body + 2 * mmap.PAGESIZE)
    _kept.append(memory)
    start = mmap.PAGESIZE if side == "before" else mmap.PAGESIZE + body - size
    copy = torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=size)
    copy.copy_(tensor.contiguous().flatten().view(torch.uint8))
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + mmap.PAGESIZE + body):
        if libc.mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    if missing:
        shift = missing if side == "after" else -missing
        array = (ctypes.c_char * size).from_address(address + start + shift)
        copy = torch.frombuffer(array, dtype=torch.uint8)
    return copy.view(tensor.dtype).view(tensor.shape)


@functools.cache
def folder() -> Path:
    """Where the models of all cases lie, written before the first fork."""
    return Path(tempfile.mkdtemp())


@functools.cache
def models() -> dict[str, PackedModel]:
    """A model in each dtype. 96 inputs are three blocks of 32: an odd number, so a line of scales is half empty."""
    base = write_base(folder() / "base", "qwen3", vocab_size=103, hidden_size=96)
    module = write_module(folder() / "module", base, draft_vocab_size=37)
    return {dtype: pack_model(base, module, dtype) for dtype in ("f32", "bf16", "q8", "q4")}


def read_past_end(side: str) -> None:
    """Reads one byte beyond a guarded tensor: must die, or the other cases show nothing."""
    tensor = guarded(torch.zeros(100, dtype=torch.uint8), side)
    assert tensor.data_ptr() % 64 == (0 if side == "before" else -100 % 64)
    ctypes.string_at(tensor.data_ptr() + (100 if side == "after" else -1), 1)


def run_head(isa: str, format: str, side: str, missing: int = 0) -> None:
    """recycle_head with all its arguments guarded."""
    _C.force_isa(isa)
    for n_vocab, k in ((1, 32), (103, 96), (64, 160)):
        k = columns(format, k)
        matrix, _ = random_matrix(format, n_vocab, k, torch.Generator().manual_seed(k))
        for rows in range(1, 9):
            tensors = {
                "hidden": torch.randn(rows, k),
                "norm": torch.ones(k),
                "head": matrix,
                "positions": torch.arange(rows),
                "seeds": torch.arange(rows),
            }
            given = {name: guarded(tensor, side, missing if name == "head" else 0) for name, tensor in tensors.items()}
            for temperature in (0.0, 1.0):
                torch.ops.recycle.recycle_head(
                    given["hidden"],
                    given["norm"],
                    1e-5,
                    given["head"],
                    FORMATS[format],
                    n_vocab,
                    given["positions"],
                    temperature,
                    5,
                    0.9,
                    given["seeds"],
                )


def run_attention(isa: str, cache: str, side: str, missing: int = 0) -> None:
    """attention_decode with all its arguments guarded; the new rows fill the caches to their ends."""
    _C.force_isa(isa)
    for n_heads, n_kv_heads, head_dim in ((4, 4, 16), (6, 3, 48), (9, 3, 64), (2, 1, 80)):
        for rows in (1, 3, 8):
            for capacity in (rows, 63, 64, 65, 150):
                row_size = head_dim + 4 if cache == "q8" else head_dim
                held = torch.zeros(2, 2, n_kv_heads, capacity, row_size)
                given = {
                    "q": torch.randn(2, rows, n_heads, head_dim),
                    "k": torch.randn(2, rows, n_kv_heads, head_dim),
                    "v": torch.randn(2, rows, n_kv_heads, head_dim),
                    "cache": held.to(CACHE_DTYPES[cache]),
                    "lengths": torch.tensor([0, capacity - rows]),
                    "inv_freq": torch.ones(head_dim // 2),
                    "q_norm": torch.ones(head_dim),
                    "k_norm": torch.ones(head_dim),
                }
                torch.ops.recycle.attention_decode(
                    **{name: guarded(tensor, side, missing if name == "cache" else 0) for name, tensor in given.items()}
                )


def guarded_arguments(decoder: Decoder, side: str) -> list:
    """What decode_step takes, all tensors guarded."""
    return [guarded(value, side) if isinstance(value, Tensor) else value for value in decoder.arguments()]


def run_steps(isa: str, dtype: str, cache: str, side: str) -> None:
    """prefill, then decode_step until the caches of both sequences are full, with all arguments guarded."""
    _C.force_isa(isa)
    for mode, temperature in (("verify", 0.0), ("verify", 1.0), ("alternate", 0.0)):
        decoder = Decoder(
            models()[dtype], mode, 3, batch=2, capacity=80, temperature=temperature, cache_dtype=CACHE_DTYPES[cache]
        )
        arguments = guarded_arguments(decoder, side)
        for sequence, length in enumerate((5, 70)):
            prompt = torch.arange(length) % 103
            torch.ops.recycle.prefill(*arguments, sequence, guarded(prompt, side))
        steps = 0
        while (torch.ops.recycle.decode_step(*arguments)[1] != _NO_ROOM).any():
            steps += 1
        assert steps > 1


def run_damaged_plans(isa: str, side: str) -> None:
    """decode_step with each entry of the plan in turn replaced by numbers that a damaged file could hold.

    A vector of 96 floats ends with the weights if it begins at ``end - 384``.
    """
    _C.force_isa(isa)
    decoder = Decoder(models()["f32"], "verify", 2, batch=2, capacity=30)
    decoder.prefill([1, 2, 3], 0)
    decoder.prefill([4, 5], 1)
    arguments = guarded_arguments(decoder, side)
    state = [None if not isinstance(value, Tensor) else value.clone() for value in arguments]
    plan, end, accepted = arguments[1], arguments[0].numel(), 0
    for index, number in enumerate(plan.tolist()):
        for damaged in (number - 1, number + 1, number + 64, 0, end - 384, end - 64, end, end + 64):
            for value, before in zip(arguments, state, strict=True):
                if before is not None:
                    value.copy_(before)
            plan[index] = damaged
            try:
                torch.ops.recycle.decode_step(*arguments)
            except (ValueError, RuntimeError):
                continue
            accepted += 1
    assert accepted > len(plan)  # Offsets that are wrong but inside the weights reach the kernels.


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of each case; the controls, which must die, begin with "control"."""
    for side in SIDES:
        yield f"control-byte-{side}", functools.partial(read_past_end, side)
        for isa in _C.runnable_isas():
            yield (f"control-head-{isa}-{side}", functools.partial(run_head, isa, "q8_0", side, missing=64))
            yield (f"control-attention-{isa}-{side}", functools.partial(run_attention, isa, "bf16", side, missing=32))
            for format in FORMATS:
                yield f"head-{isa}-{format}-{side}", functools.partial(run_head, isa, format, side)
            for cache in CACHE_DTYPES:
                yield (f"attention-{isa}-{cache}-{side}", functools.partial(run_attention, isa, cache, side))
            for dtype, cache in zip(models(), ("f32", "bf16", "q8", "bf16"), strict=True):
                yield (f"steps-{isa}-{dtype}-{side}", functools.partial(run_steps, isa, dtype, cache, side))
            yield f"damaged-plans-{isa}-{side}", functools.partial(run_damaged_plans, isa, side)


def ending_of(case: Callable[[], None]) -> int:
    """Runs a case in a forked process; 0, its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            case()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Runs all cases."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _C.set_n_threads(1)  # a fork keeps no other thread
    models()
    print(json.dumps({name: ending_of(case) for name, case in cases()}))


if __name__ == "__main__":
    main()
