// Matrix times a few vectors, from packed panels (format.h).
//
//   x [rows, k], W [n, k] packed  ->  out [rows, kTileRows] float32, the first 16 * panels of each row
//
// One or two rows are bounded by memory: each weight is read once and unpacked once for all rows of a group.
// From about 8 rows on (prefill) the bound is multiplications.
// Panels are read from end to end, one after the other: one stream for each thread, prefetched across the ends
// of panels, matrices and phases. The running sums of R rows stay in registers. R decides which sums are
// computed together, never the order inside one sum.
//
// Float weights are widened to float32 and multiplied with float32 activations. Even and odd columns have sums
// of their own, because one chain of additions is slower than memory.
// Quantized weights stay integers. quantize() rounds the activations to 16 bits, with a scale for each block of
// 32. The sum of a block is exact in 32 bits, so every instruction set may compute it in its own way. Rounding
// to 16 bits moves a result by ~2e-5 of its size, a sixtieth of what bfloat16 does.
//
// Tried and rejected:
//   four panels side by side, for more independent sums: one thread of a Zen 4 then reads from memory 25 GB/s of
//     bf16, 22 of q8_0 and 17 of q4_0; one panel after the other 29, 28 and 25
//   quants widened to float32: three times the instructions, which then are the bound and not memory
//   activations in 8 bits: half the instructions, which memory hides anyway, and 250 times the error
#pragma once

#include "prefetch.h"

namespace recycle::RECYCLE_ISA {
namespace {

// Runs body(begin, end, ahead) over the steps of a panel, split where the prefetch address leaves the panel. body
// prefetches ahead + i while it reads panel + i: first inside this panel, then in the panel at `next`.
template <class Body>
inline void stream_panel(const std::byte* panel, int64_t bytes, const std::byte* next, int64_t steps,
                         int64_t step_bytes, Body body) {
  const int64_t first_part = steps - (kPrefetchL2Distance + step_bytes - 1) / step_bytes;
  const int64_t middle = first_part < 0 ? 0 : first_part;
  body(0, middle, panel + kPrefetchL2Distance);
  body(middle, steps, next + kPrefetchL2Distance - bytes);
}

// out[r] = sum over k of weights * x[r], for R rows and the 16 outputs of one panel of floats.
template <Format format, int R>
inline void accumulate_floats(const std::byte* panel, int64_t k, const float* x, const std::byte* next,
                              Lanes (&out)[R]) {
  Lanes even[R], odd[R];
  for (int r = 0; r < R; ++r) even[r] = odd[r] = splat(0);
  const auto add_columns = [&](Lanes first, Lanes second, const float* columns) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) even[r] = fma(first, splat(columns[r * k]), even[r]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) odd[r] = fma(second, splat(columns[r * k + 1]), odd[r]);
  };
  constexpr int64_t bytes = format == Format::f32 ? 128 : 64;  // of two columns
  const auto body = [&](int64_t begin, int64_t end, const std::byte* ahead) {
    for (int64_t i = begin; i < end; ++i) {
      const std::byte* weights = panel + i * bytes;
      prefetch(ahead + i * bytes, weights);
      if constexpr (format == Format::f32) {
        prefetch(ahead + i * bytes + 64, weights + 64);
        const float* floats = reinterpret_cast<const float*>(weights);
        add_columns(load(floats), load(floats + 16), x + i * 2);
      } else if constexpr (format == Format::f16) {
        add_columns(load_f16(weights), load_f16(weights + 32), x + i * 2);
      } else {
        const Raw raw = load_raw(weights);
        add_columns(bf16_even(raw), bf16_odd(raw), x + i * 2);
      }
    }
  };
  stream_panel(panel, panel_bytes(format, k), next, k / 2, bytes, body);
  for (int r = 0; r < R; ++r) out[r] = add(even[r], odd[r]);
}

// For each row the sums over one block of one panel of (quant - zero point) * activation, exact in 32 bits.
template <Format format, int R>
struct BlockSums {
  Ints sum[R][sum_parts(R)];

  BlockSums(const std::byte* quants, const std::byte* ahead, const int32_t* x, const int32_t* minus_sums, int64_t k) {
    for (int r = 0; r < R; ++r) {
      for (Ints& part : sum[r]) part = zero();
      if constexpr (format != Format::q4_1)
        sum[r][0] = shifted_left<zero_point_bits(format)>(minus_sums[r * (k / kBlock)]);
    }
    // Not unrolled: with 4 rows the sums of several lines do not fit the registers (1.4 times the time with AVX2).
    for (int64_t line = 0; line < block_quant_bytes(format) / 64; ++line) {
      const Raw raw = load_raw(quants + line * 64);
      prefetch(ahead + line * 64, quants + line * 64);
      if constexpr (format == Format::q8_0) {
        add_columns(bytes(raw), x + line * 2, k / 2);
      } else {
        add_columns(low_nibbles(raw), x + line * 4, k / 2);
        add_columns(high_nibbles(raw), x + line * 4 + 2, k / 2);
      }
    }
  }
  // Adds the products of four columns; a row of x has `ld` words.
  void add_columns(Quads weights, const int32_t* x, int64_t ld) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) dot(sum[r], weights, x + r * ld);
  }
};

// The same for quantized weights. With the scale d and the minimum m of a q4_1 block
// sum(x (d q + m)) = d sum(x q) + m sum(x), and sum(x) is the same for all outputs.
template <Format format, int R>
inline void accumulate_quantized(const std::byte* panel, int64_t k, const Activations& x, const std::byte* next,
                                 Lanes (&out)[R]) {
  const int64_t n_blocks = k / kBlock;
  for (int r = 0; r < R; ++r) out[r] = splat(0);
  const auto body = [&](int64_t begin, int64_t end, const std::byte* ahead) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t quants = quants_at(format, b);
      const int64_t scales = scales_at(format, b);
      if (b % blocks_per_line(format) == 0) prefetch(ahead + scales, panel + scales);
      const BlockSums<format, R> block(panel + quants, ahead + quants, x.quants + b * (kBlock / 2), x.minus_sums + b,
                                       k);
      const Lanes scale = load_f16(panel + scales);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Lanes sum = to_float(total(block.sum[r]));
        out[r] = fma(mul(scale, splat(x.scales[r * n_blocks + b])), sum, out[r]);
      }
      if constexpr (format == Format::q4_1) {
        const Lanes minimum = load_f16(panel + scales + 32);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) out[r] = fma(minimum, splat(x.sums[r * n_blocks + b]), out[r]);
      }
    }
  };
  stream_panel(panel, panel_bytes(format, k), next, n_blocks, block_scale_bytes(format) + block_quant_bytes(format),
               body);
}

template <Format format, int R>
void gemm_rows(const std::byte* panel, int64_t k, const Activations& x, const std::byte* next, float* out) {
  Lanes sums[R];
  if constexpr (is_quantized(format))
    accumulate_quantized<format>(panel, k, x, next, sums);
  else
    accumulate_floats<format>(panel, k, x.x, next, sums);
  for (int r = 0; r < R; ++r) store(out + r * kTileRows, sums[r]);
}

template <Format format>
using RowsFunction = void (*)(const std::byte*, int64_t, const Activations&, const std::byte*, float*);

// gemm_rows<format, rows>. Index: 0, 1, ...
template <Format format, int... Index>
inline RowsFunction<format> rows_function(int64_t rows, std::integer_sequence<int, Index...>) {
  static constexpr RowsFunction<format> functions[] = {gemm_rows<format, Index + 1>...};
  return functions[rows - 1];
}

template <Format format>
void gemm_format(const Matrix& matrix, int64_t panel, int64_t panels, const Activations& x, int64_t rows,
                 const std::byte* next, float* out) {
  constexpr int64_t max_height = max_rows(is_quantized(format));
  for (int64_t p = 0; p < panels; ++p) {
    const std::byte* weights = matrix.panel(panel + p);
    const std::byte* next_panel = p + 1 < panels ? matrix.panel(panel + p + 1) : next;
    // Groups of nearly equal height: 9 rows are 5 + 4, not 8 + 1. Each height is a kernel of its own (rows_function), so
    // a tail of 3 rows runs exactly 3, or 2 + 1 where max_rows is 2; no row is padded.
    int64_t groups = (rows + max_height - 1) / max_height;
    for (int64_t r = 0; r < rows; --groups) {
      const int64_t height = (rows - r + groups - 1) / groups;
      const auto function = rows_function<format>(height, std::make_integer_sequence<int, max_height>());
      function(weights, matrix.k, x.from_row(r, matrix.k), next_panel, out + r * kTileRows + p * kPanelRows);
      r += height;
    }
  }
}

void gemm(const Matrix& matrix, int64_t panel, int64_t panels, const Activations& x, int64_t rows,
          const std::byte* next, float* out) {
  switch (matrix.format) {
    case Format::f32:
      return gemm_format<Format::f32>(matrix, panel, panels, x, rows, next, out);
    case Format::f16:
      return gemm_format<Format::f16>(matrix, panel, panels, x, rows, next, out);
    case Format::bf16:
      return gemm_format<Format::bf16>(matrix, panel, panels, x, rows, next, out);
    case Format::q8_0:
      return gemm_format<Format::q8_0>(matrix, panel, panels, x, rows, next, out);
    case Format::q4_0:
      return gemm_format<Format::q4_0>(matrix, panel, panels, x, rows, next, out);
    case Format::q4_1:
      return gemm_format<Format::q4_1>(matrix, panel, panels, x, rows, next, out);
  }
}

void quantize(const float* x, int64_t n, int32_t* quants, float* scales, float* sums, int32_t* minus_sums) {
  for (int64_t b = 0; b < n / kBlock; ++b) {
    const Lanes low = load(x + b * kBlock);
    const Lanes high = load(x + b * kBlock + 16);
    const Lanes zeros = splat(0);
    const Lanes abs = max(max(low, sub(zeros, low)), max(high, sub(zeros, high)));
    const float max_abs = reduce_max(abs);
    const float total = reduce_add(add(low, high));
    // A smaller block counts as zeros: kMaxQuant / max_abs would overflow.
    const bool nonzero = max_abs > 1e-30f;
    // The largest quant whose upper byte (rounded) and lower byte both fit a signed byte.
    constexpr float kMaxQuant = 127 * 256;
    const Lanes inv_scale = splat(nonzero ? kMaxQuant / max_abs : 0.0f);
    const Lanes low_quants = round(mul(low, inv_scale));
    const Lanes high_quants = round(mul(high, inv_scale));
    store_quants(quants + b * 16, low_quants);
    store_quants(quants + b * 16 + 8, high_quants);
    // total * 0 is NaN for a nonfinite activation, which the integers can't hold and the result must show.
    scales[b] = (nonzero ? max_abs / kMaxQuant : 0.0f) + total * 0.0f;
    // The sum of the rounded values: a rounding error is then multiplied with the weight d q + m, not with d q.
    const float quants_sum = reduce_add(add(low_quants, high_quants));
    sums[b] = scales[b] * quants_sum;
    minus_sums[b] = quants_sum == quants_sum ? -static_cast<int32_t>(quants_sum) : 0;
  }
}

}  // namespace
}  // namespace recycle::RECYCLE_ISA
