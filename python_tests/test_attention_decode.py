"""torch.ops.recycle.attention_decode: RoPE, cache append and grouped-query attention."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_as_good_as

from recycle_ext import _C, reference_ops
from recycle_ext.config import rope_inv_freq


def inputs(lengths, rows, n_heads, n_kv_heads, head_dim, capacity, cache_dtype, norms=False):
    generator = torch.Generator().manual_seed(len(lengths) * 1000 + rows * 100 + n_heads)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    batch = len(lengths)
    return {
        "q": 3 * normal(batch, rows, n_heads, head_dim),
        "k": normal(batch, rows, n_kv_heads, head_dim),
        "v": normal(batch, rows, n_kv_heads, head_dim),
        "cache": normal(2, batch, n_kv_heads, capacity, head_dim).to(cache_dtype),
        "lengths": torch.tensor(lengths),
        "inv_freq": rope_inv_freq(head_dim, 10000.0, None),
        "q_norm": 1 + 0.2 * normal(head_dim) if norms else None,
        "k_norm": 1 + 0.2 * normal(head_dim) if norms else None,
        "eps": 1e-6,
    }


def cast(arguments, dtype, cache_dtype):
    return {
        name: value.clone().to(cache_dtype if name == "cache" else dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "rows", "n_heads", "n_kv_heads", "head_dim"),
    [
        ([0], 1, 4, 4, 16),
        ([5], 1, 9, 3, 64),
        ([63], 2, 9, 3, 64),  # the second row opens a new chunk of 64
        ([130, 0, 64], 3, 8, 2, 32),
        ([1], 4, 4, 1, 128),
        ([200, 7], 5, 6, 3, 48),
        ([33], 6, 2, 2, 80),
        ([64, 128], 7, 4, 2, 16),
        ([1100], 8, 4, 2, 256),  # more chunks than splits
    ],
)
def test_it_is_as_exact_as_pytorch(isa, lengths, rows, n_heads, n_kv_heads, head_dim, cache_dtype):
    capacity = max(lengths) + rows + 3
    given = inputs(lengths, rows, n_heads, n_kv_heads, head_dim, capacity, cache_dtype)
    # Only the angles of RoPE are float32 everywhere, as in training.
    exact_in = cast(given, torch.float64, torch.float64) | {"inv_freq": given["inv_freq"]}
    native_in = cast(given, torch.float32, cache_dtype)
    ours_in = cast(given, torch.float32, cache_dtype)
    exact = reference_ops.attention_decode(**exact_in)
    native = reference_ops.attention_decode(**native_in)
    ours = torch.ops.recycle.attention_decode(**ours_in)
    assert_as_good_as(ours, native, exact)
    assert_as_good_as(ours_in["cache"], native_in["cache"], exact_in["cache"])


def test_q_and_k_are_normed_first_where_the_model_does(isa):
    given = inputs([20, 3], 2, 4, 2, 32, 40, torch.float32, norms=True)
    exact = reference_ops.attention_decode(
        **cast(given, torch.float64, torch.float64) | {"inv_freq": given["inv_freq"]}
    )
    native = reference_ops.attention_decode(**cast(given, torch.float32, torch.float32))
    ours = torch.ops.recycle.attention_decode(**cast(given, torch.float32, torch.float32))
    assert_as_good_as(ours, native, exact)
    without = torch.ops.recycle.attention_decode(
        **cast(given, torch.float32, torch.float32) | {"q_norm": None, "k_norm": None}
    )
    assert not torch.allclose(ours, without, atol=1e-2)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_its_company(isa, cache_dtype):
    """One row at a time, all at once, in a batch, with other numbers of threads: the same bits."""
    rows, length = 8, 190
    given = inputs([length, 17], rows, 9, 3, 64, 210, cache_dtype)
    together = torch.ops.recycle.attention_decode(**cast(given, torch.float32, cache_dtype))
    for threads in (1, 2, 3):
        _C.set_n_threads(threads)
        alone = cast(given, torch.float32, cache_dtype)
        for b in (0, 1):
            cache = alone["cache"][:, b : b + 1].contiguous()
            for row in range(rows):
                one = {name: alone[name][b : b + 1, row : row + 1].contiguous() for name in "qkv"}
                out = torch.ops.recycle.attention_decode(
                    **one,
                    cache=cache,
                    lengths=alone["lengths"][b : b + 1] + row,
                    inv_freq=alone["inv_freq"],
                )
                assert torch.equal(out[0, 0], together[b, row])
