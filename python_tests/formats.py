"""Random matrices in every weight format, and their exact values by gguf, the library that defines the formats."""

from __future__ import annotations

import dataclasses
import itertools

import gguf
import numpy as np
import torch
from torch import Tensor

from recycle_ext.checkpoint.tensor_source import BLOCKS, FLOAT_DTYPES
from recycle_ext.weights.layout import CONVERTED_TO, FORMATS, QUANTIZATIONS, Matrix, matrix_bytes, pack_rows
from recycle_ext.weights.pack import PackedModel
from recycle_ext.weights.plan import read_plan

# Where a GGUF block has its half scale, and its half minimum with the minimum's size relative to the scale: the weights
# of random bytes then have a mean near 0.
_HALVES = {
    "q2_k": {80: 1, 82: 1.5},
    "q3_k": {108: 1},
    "q4_k": {0: 1, 2: 7.5},
    "q5_k": {0: 1, 2: 15.5},
    "q6_k": {208: 1},
    "q4_1": {0: 1, 2: -7.5},
    "q5_1": {0: 1, 2: -15.5},
}


def columns(format: str, k: int) -> int:
    """The next length of a row that the format can have."""
    multiple = QUANTIZATIONS[format].block if format in QUANTIZATIONS else 16
    return -(-k // multiple) * multiple


def dequantized(rows: Tensor, format: str) -> Tensor:
    """The exact values of rows: floats [n, k], or GGUF blocks uint8 [n, bytes] -> float64 [n, k]."""
    if rows.is_floating_point():
        return rows.double()
    kind = gguf.GGMLQuantizationType(BLOCKS[format][0])
    return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), kind)).double()


def converted_rows(values: Tensor, format: str) -> Tensor:
    """float32 [n, k] -> rows of a format of CONVERTED_TO, by torch's casts and gguf's quantizers."""
    if format in FLOAT_DTYPES:
        return values.to(FLOAT_DTYPES[format])
    return torch.from_numpy(gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType(BLOCKS[format][0])))


def random_rows(format: str, n: int, k: int, generator: torch.Generator) -> Tensor:
    """Rows as a checkpoint holds them, of weights around 1 / sqrt(k): floats [n, k], or uint8 [n, bytes]."""
    if format not in BLOCKS:
        return converted_rows(torch.randn(n, k, generator=generator) / k**0.5, format)
    _, block, size = BLOCKS[format]
    rows = torch.randint(0, 256, (n, k // block, size), generator=generator).to(torch.uint8).numpy()
    spread = torch.rand(n, k // block, generator=generator).numpy() + 0.5

    def put_halves(scale: float) -> None:
        for at, relative in _HALVES.get(format, {0: 1}).items():
            halves = (spread * scale * relative).astype(np.float16)
            rows[:, :, at : at + 2] = halves[:, :, None].view(np.uint8)

    put_halves(2**-4)
    deviation = dequantized(torch.from_numpy(rows.reshape(n, -1)), format).std().item()
    put_halves(2**-4 / deviation / k**0.5)
    return torch.from_numpy(rows.reshape(n, -1))


def packed(rows: Tensor, format: str, k: int) -> Tensor:
    """The rows as the ops take a matrix, uint8 [bytes]."""
    n = len(rows)
    matrix = torch.zeros(matrix_bytes(format, n, k), dtype=torch.uint8)
    pack_rows(rows, format, n, k, 0, matrix)
    return matrix


def random_matrix(format: str, n: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A packed matrix [n, k], and its exact values float64."""
    rows = random_rows(format, n, k, generator)
    return packed(rows, format, k), dequantized(rows, format)


def converted_matrix(values: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """The same for float values [n, k]; format: of CONVERTED_TO."""
    assert format in CONVERTED_TO
    rows = converted_rows(values, format)
    return packed(rows, format, values.shape[1]), dequantized(rows, format)


def in_formats(packed: PackedModel, formats: list[str], generator: torch.Generator) -> PackedModel:
    """The model, in f32 and with a head of its own, with other random matrices: of these formats in turn.

    A matrix whose rows fit none of them is q8_0, or bf16.
    """
    view = read_plan(packed.weights, packed.plan)
    stacks = [view.stack] + ([view.module.stack] if view.module else [])
    found = [value for stack in stacks for layer in stack.layers for value in vars(layer).values()]
    found += [view.embedding, view.head] + ([view.module.input_proj, view.module.head] if view.module else [])
    plan, parts = packed.plan.tolist(), [packed.weights]
    size, cycle = len(packed.weights), itertools.cycle(formats)
    for matrix in (value for value in found if isinstance(value, Matrix)):
        fitting = (name for name in itertools.islice(cycle, len(formats)) if columns(name, matrix.k) == matrix.k)
        chosen = next(fitting, "bf16" if matrix.k % 32 else "q8_0")
        entry = [matrix.offset, FORMATS[matrix.format], matrix.n, matrix.k]
        at = next(i for i in range(len(plan)) if plan[i : i + 4] == entry)
        replacement, _ = random_matrix(chosen, matrix.n, matrix.k, generator)
        plan[at : at + 2] = [size, FORMATS[chosen]]
        parts += [replacement, torch.zeros(-len(replacement) % 64, dtype=torch.uint8)]
        size += len(replacement) + -len(replacement) % 64
    return dataclasses.replace(packed, plan=torch.tensor(plan), weights=torch.cat(parts), shared={})
