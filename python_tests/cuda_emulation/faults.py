"""Faults for race.py to find: each is one change of a copy of csrc/cuda, and names the tool that must report it.

A fault whose text is no longer in the source fails the test that plants it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from cuda_emulation.builds import BOUNDS, CHECKS, CUDA, RACES, Variant, compile_object, link
from cuda_emulation.cases import MIXED, SAMPLED, Case, attention, step


@dataclass(frozen=True)
class Fault:
    """file: of csrc/cuda. text: in that file once. unit: the .cu file to compile again. report: what the tool must say."""

    name: str
    file: str
    text: str
    replacement: str
    unit: str
    tool: Variant
    case: Case
    report: tuple[str, ...]


_STEP = step("bf16", "verify", 2, [130, 62])
_MIXED = step(MIXED, "standard", 0, [200])
_ATTENTION = attention(3, [200], torch.float32)
_SAMPLED = step("bf16", "standard", 0, [5], **SAMPLED)
_RACE = "ThreadSanitizer: data race"

FAULTS = [
    Fault(
        "missing __syncthreads between scores and softmax",
        "attention.cu",
        "    compute_scores(begin, count);\n    __syncthreads();\n",
        "    compute_scores(begin, count);\n",
        "attention.cu",
        RACES,
        _ATTENTION,
        (_RACE, "compute_scores", "online_softmax_update"),
    ),
    Fault(
        "missing __syncthreads before the histogram is read",
        "sampling.cu",
        "        if (parts[part] != 0) atomicAdd(&shared.bins[part][bin], parts[part]);\n    }\n    __syncthreads();\n",
        "        if (parts[part] != 0) atomicAdd(&shared.bins[part][bin], parts[part]);\n    }\n",
        "sampling.cu",
        RACES,
        _SAMPLED,
        (_RACE, "radix_select"),
    ),
    Fault(
        "missing __syncthreads between the sums of a panel and the epilogue",
        "gemv.cuh",
        "        sum_tile(tile);\n        __syncthreads();\n",
        "        sum_tile(tile);\n",
        "linear.cu",
        RACES,
        _MIXED,
        (_RACE, "sum_tile", "LinearParams"),
    ),
    Fault(
        "missing __syncwarp after the last read of the running maximum",
        "attention.cu",
        "      __syncwarp();",
        "",
        "attention.cu",
        RACES,
        _ATTENTION,
        (_RACE, "online_softmax_update"),
    ),
    Fault(
        "missing wait for the previous kernel",
        "attention.cu",
        "  launch_dependents();\n  grid_dependency_wait();\n",
        "  launch_dependents();\n",
        "attention.cu",
        RACES,
        _STEP,
        (_RACE, "attention_kernel", "begin_kernel"),
    ),
    Fault(
        "missing fence before a block counts itself",
        "intrinsics.cuh",
        "    __threadfence();\n    const bool is_last",
        "    const bool is_last",
        "attention.cu",
        RACES,
        _ATTENTION,
        (_RACE, "store_split", "combine_splits"),
    ),
    Fault(
        "missing fence after the last block has counted",
        "intrinsics.cuh",
        "    __threadfence();\n    if (is_last)",
        "    if (is_last)",
        "attention.cu",
        RACES,
        _ATTENTION,
        (_RACE, "is_last_block"),
    ),
    Fault(
        "buffer reused one kernel too early: gate and up write to the rows that other blocks still read",
        "step.cu",
        "{x, nullptr, rows.n_rows(), layer.post_norm, stack.eps}, scratch_.activation);",
        "{x, nullptr, rows.n_rows(), layer.post_norm, stack.eps}, x);",
        "step.cu",
        RACES,
        _STEP,
        (_RACE, "gate_up.cu", "GateUpParams"),
    ),
    Fault(
        "full-mask shuffle in a divergent branch",
        "attention.cu",
        "      const float sum = warp_sum(first_weight + second_weight);",
        "      const float sum = lane < 16 ? warp_sum(first_weight + second_weight) : first_weight;",
        "attention.cu",
        CHECKS,
        _ATTENTION,
        ("a shuffle with a full mask", "AttentionKernelParams"),
    ),
    Fault(
        "full-mask shuffle in both branches",
        "attention.cu",
        "    scale = 1 / sqrtf(warp_sum(sum) /",
        "    sum = lane < 8 ? warp_sum(sum) : warp_sum(sum) + 0;\n    scale = 1 / sqrtf(sum /",
        "attention.cu",
        CHECKS,
        _ATTENTION,
        (
            "a shuffle with a full mask, which other threads of the warp call from another place",
            "AttentionKernelParams",
        ),
    ),
    Fault(
        "counters not reset at the beginning of a step",
        "select.cu",
        "buffers.blocks_done[i] = 0;",
        "(void)i;",
        "select.cu",
        CHECKS,
        _STEP,
        ("an atomic operation on memory that nothing has written", "is_last_block"),
    ),
    Fault(
        "index one too far: pending tokens",
        "select.cu",
        "for (int j = 0; j <= params.last_row; ++j) are_tokens",
        "for (int j = 0; j <= params.last_row + 1; ++j) are_tokens",
        "select.cu",
        BOUNDS,
        _STEP,
        ("AddressSanitizer: heap-buffer-overflow", "begin_kernel"),
    ),
    Fault(
        "index one too far: a buffer inside of scratch",
        "attention.cu",
        "for (int s = 0; s < splits; ++s) max = ",
        "for (int s = 0; s <= kSplits; ++s) max = ",
        "attention.cu",
        BOUNDS,
        _ATTENTION,
        ("AddressSanitizer: use-after-poison", "combine_splits"),
    ),
    Fault(
        "misaligned vectors in shared memory",
        "gemv.cuh",
        "x_staged_(squares_ + round_up(kGemvWarps * R + R, 4))",
        "x_staged_(squares_ + round_up(kGemvWarps * R + R, 4) - 1)",
        "linear.cu",
        BOUNDS,
        _STEP,
        ("misaligned address", "struct float2", "panel_sums.cuh"),
    ),
    Fault(
        "uninitialised shared value: the sum of the weights",
        "attention.cu",
        "      sum_[threadIdx.x] = 0;\n",
        "",
        "attention.cu",
        CHECKS,
        _ATTENTION,
        ("a read of shared memory that nothing has written", "online_softmax_update"),
    ),
]


def plant(fault: Fault, parts: dict[str, Path], folder: Path) -> Path:
    """The program with the fault, in `folder`; parts: the objects without it. Only fault.unit is compiled again."""
    cuda = folder / "cuda"
    shutil.copytree(CUDA, cuda)
    text = (cuda / fault.file).read_text("utf-8")
    count = text.count(fault.text)
    assert count == 1, f"{fault.name}: {count} places in {fault.file} have the text that the fault replaces"
    (cuda / fault.file).write_text(text.replace(fault.text, fault.replacement), "utf-8")
    changed = compile_object(fault.tool, cuda / fault.unit, folder / "changed.o", cuda)
    # First, so that the linker takes its inline functions.
    return link(fault.tool, {fault.unit: changed} | {n: p for n, p in parts.items() if n != fault.unit}, folder / "run")
