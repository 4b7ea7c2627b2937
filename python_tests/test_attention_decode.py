"""torch.ops.recycle.attention_decode: RoPE, cache append and grouped-query attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_good_as

from recycle_ext import _C
from recycle_ext.checkpoint.config import rope_inv_freq
from recycle_ext.ops.functional import apply_rope, rope_tables
from recycle_ext.reference import ops as reference_ops
from recycle_ext.reference.ops import from_rows, to_rows


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
        ([63], 2, 9, 3, 64),  # the second row is the first of a new chunk of 64
        ([130, 0, 64], 3, 8, 2, 32),
        ([1], 4, 4, 1, 128),
        ([200, 7], 5, 6, 3, 48),
        ([33], 6, 2, 2, 80),
        ([64, 128], 7, 4, 2, 16),
        ([1100], 8, 4, 2, 256),  # more chunks than splits
    ],
)
def test_attention_output_and_cache_are_as_exact_as_pytorch(
    isa, lengths, rows, n_heads, n_kv_heads, head_dim, cache_dtype
):
    capacity = max(lengths) + rows + 3
    given = inputs(lengths, rows, n_heads, n_kv_heads, head_dim, capacity, cache_dtype)
    # The angles of RoPE are float32 in every precision, as in training.
    exact_in = cast(given, torch.float64, torch.float64) | {"inv_freq": given["inv_freq"]}
    native_in = cast(given, torch.float32, cache_dtype)
    ours_in = cast(given, torch.float32, cache_dtype)
    exact = reference_ops.attention_decode(**exact_in)
    native = reference_ops.attention_decode(**native_in)
    ours = torch.ops.recycle.attention_decode(**ours_in)
    assert_as_good_as(ours, native, exact)
    assert_as_good_as(ours_in["cache"], native_in["cache"], exact_in["cache"])


@pytest.mark.parametrize(
    ("lengths", "rows", "n_heads", "n_kv_heads", "head_dim"),
    [([0], 1, 4, 4, 16), ([63], 2, 9, 3, 64), ([130, 0], 3, 8, 2, 80), ([1100], 8, 4, 1, 128)],
)
def test_int8_cache_rounds_rows_once_and_reads_them_exactly(isa, lengths, rows, n_heads, n_kv_heads, head_dim):
    capacity = max(lengths) + rows
    given = inputs(lengths, rows, n_heads, n_kv_heads, head_dim, capacity, torch.float32)
    exact_in = cast(given, torch.float64, torch.float64) | {"inv_freq": given["inv_freq"]}
    ours_in = cast(given, torch.float32, torch.float32)
    ours_in["cache"] = to_rows(ours_in["cache"], torch.int8)
    ours = torch.ops.recycle.attention_decode(**ours_in)
    # Written rows are k and v to half a step of 1/127 of the row's largest value; older rows are unchanged.
    reference_ops.attention_decode(**exact_in)
    written = from_rows(ours_in["cache"], torch.float64)
    largest = exact_in["cache"].abs().amax(-1, keepdim=True)
    assert ((written - exact_in["cache"]).abs() <= largest / 127 * 0.5001).all()
    # Attention to the rounded rows is as exact as PyTorch's attention to them.
    read = exact_in | {"cache": written.clone()}
    exact = attend_only(read, torch.float64)
    native = attend_only(read, torch.float32)
    assert_as_good_as(ours, native, exact)


def attend_only(arguments, dtype):
    """Attention to a cache that already holds the new rows, in plain PyTorch: [batch, rows, n_heads, head_dim]."""
    out = torch.empty_like(arguments["q"], dtype=dtype)
    rows = out.shape[1]
    for b, length in enumerate(arguments["lengths"].tolist()):
        positions = torch.arange(length, length + rows)
        cos, sin = rope_tables(arguments["inv_freq"], positions)
        q = apply_rope(arguments["q"][b].to(dtype).transpose(0, 1), cos.to(dtype), sin.to(dtype))
        seen = arguments["cache"][:, b, :, : length + rows].to(dtype)
        mask = torch.arange(length + rows)[None, :] <= positions[:, None]
        attended = F.scaled_dot_product_attention(q[None], seen[0][None], seen[1][None], mask, enable_gqa=True)
        out[b] = attended[0].transpose(0, 1)
    return out


def test_nonfinite_value_in_int8_cache_shows_in_output(isa):
    given = cast(inputs([3], 1, 2, 1, 16, 8, torch.float32), torch.float32, torch.float32)
    given["cache"] = to_rows(given["cache"], torch.int8)
    given["v"][0, 0, 0, 5] = torch.nan
    assert torch.ops.recycle.attention_decode(**given).isnan().all()


def test_q_and_k_norms_are_applied_before_rope(isa):
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


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_row_in_any_batch_and_thread_count_has_the_same_bits(isa, cache_dtype):
    """Rows one at a time and all at once, sequences alone and in a batch, one thread and several."""
    rows, length = 8, 190
    given = inputs([length, 17], rows, 9, 3, 64, 210, torch.float32)
    given["cache"] = to_rows(given["cache"], cache_dtype)
    together = torch.ops.recycle.attention_decode(**cast(given, torch.float32, cache_dtype))
    for threads in (1, 2, 3):
        _C.set_n_threads(threads)
        alone = cast(given, torch.float32, cache_dtype)
        for b in (0, 1):
            cache = alone["cache"][:, b : b + 1].contiguous()
            for row in range(rows):
                one = {name: alone[name][b : b + 1, row : row + 1].contiguous() for name in "qkv"}
                out = torch.ops.recycle.attention_decode(
                    **one, cache=cache, lengths=alone["lengths"][b : b + 1] + row, inv_freq=alone["inv_freq"]
                )
                assert torch.equal(out[0, 0], together[b, row])
