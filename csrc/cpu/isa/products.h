// Matrix times a few vectors, from packed panels (format.h).
//
//   x [rows, k], W [n, k] packed  ->  out [rows, 16 panels] float32
//
// Bounded by memory for one or two rows: each weight is read once and unpacked once for all rows of a
// group. Above ~8 rows (prefill) bounded by multiplications.
// A panel is read from end to end, one after the other: a single stream a thread, which is asked for ahead of
// its use across the ends of panels, matrices and phases. The running sums of R rows stay in registers; R
// changes which sums are computed together, never the order inside one.
//
// Float weights are widened to float32 and multiplied with the float32 activations; even and odd columns are
// summed apart, because one chain of additions is slower than memory. Quantised weights stay
// integers: the activations, rounded to 16 bits with a scale for each block of 32 (quantise() below), are
// multiplied with them in pairs, and a block's sum is exact in 32 bits. Rounding to 16 bits moves a result
// by ~2e-5 of its size, a sixtieth of what bfloat16 does.
// Rejected: four panels side by side, for more sums to work on (one thread of a Zen 4 then reads 25 GB/s of
// bf16, 22 of q8_0 and 17 of q4_0 from memory; one panel after the other 29, 28 and 25); widening quants to
// float32 (three times the instructions: it, not memory, was the bound); activations in 8 bits, as is
// common (half the instructions again, which memory then hides, and 250 times the error).
#pragma once

namespace recycle::RECYCLE_ISA {
namespace {

// How far ahead of the loads weights are asked for, in bytes. 1024 is as good, 512 and 4096 are slower.
constexpr int64_t kAhead = 2048;

// Into the L2 cache: there is more room for requests than on the way to the L1 cache (a tenth faster for
// weights, a third for the key/value cache).
inline void fetch(const std::byte* p) {
  __builtin_prefetch(p, 0, 2);
}

// Calls body(begin, end, ahead) for the steps of a panel of `bytes`, `step_bytes` each, in one or two parts: what
// stands at ahead + i is read kAhead bytes after panel + i, be it in this panel or in the next one.
template <class Body>
inline void walk(const std::byte* panel, int64_t bytes, const std::byte* next, int64_t steps,
                 int64_t step_bytes, Body body) {
  const int64_t here = steps - (kAhead + step_bytes - 1) / step_bytes;
  const int64_t middle = here < 0 ? 0 : here;
  body(0, middle, panel + kAhead);
  body(middle, steps, next + kAhead - bytes);
}

// out[r] = sum over k of weights * x[r], for R rows and the 16 outputs of one panel.
template <Format format, int R>
inline void accumulate_plain(const std::byte* panel, int64_t k, const float* x,
                             const std::byte* next, Lanes (&out)[R]) {
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
      fetch(ahead + i * bytes);
      if constexpr (format == Format::f32) {
        fetch(ahead + i * bytes + 64);
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
  walk(panel, panel_bytes(format, k), next, k / 2, bytes, body);
  for (int r = 0; r < R; ++r) out[r] = add(even[r], odd[r]);
}

// Integer sums of one block of one panel, for each row. A sum of one or two rows is made in two halves, which
// needn't wait for each other; integers add up to the same in any order.
template <Format format, int R>
struct BlockSums {
  static constexpr int kParts = R <= 2 ? 2 : 1;
  Ints sum[kParts][R];

  BlockSums(const std::byte* quants, const std::byte* ahead, const int32_t* pairs, int64_t ld) {
    for (auto& part : sum)
      for (Ints& ints : part) ints = zero();
#pragma GCC unroll 8
    for (int64_t line = 0; line < block_quant_bytes(format) / 64; ++line) {
      const Raw raw = load_raw(quants + line * 64);
      fetch(ahead + line * 64);
      if constexpr (format == Format::q8_0) {
        const int32_t* x = pairs + line * 2;
        add_columns(0, even_bytes(raw), x, ld);
        add_columns(1, odd_bytes(raw), x + 1, ld);
      } else {
        const int32_t* x = pairs + line * 4;
        add_columns(0, nibbles<0>(raw), x, ld);
        add_columns(1, nibbles<2>(raw), x + 1, ld);
        add_columns(0, nibbles<1>(raw), x + 2, ld);
        add_columns(1, nibbles<3>(raw), x + 3, ld);
      }
    }
  }
  // Two columns of weights against a pair of activations of each row; a row has `ld` pairs.
  void add_columns(int part, Pairs weights, const int32_t* pairs, int64_t ld) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      sum[part % kParts][r] = dot(sum[part % kParts][r], weights, pairs[r * ld]);
  }
  Lanes of_row(int r) const {
    return to_float(kParts == 2 ? add(sum[0][r], sum[kParts - 1][r]) : sum[0][r]);
  }
};

// The offset of 4-bit weights meets the sum of the block's activations, which is the same for all outputs:
// sum(x (d q + m)) = d sum(x q) + m sum(x).
template <Format format, int R>
inline void accumulate_quantised(const std::byte* panel, int64_t k, const Activations& x,
                                 const std::byte* next, Lanes (&out)[R]) {
  const int64_t n_blocks = k / kBlock;
  for (int r = 0; r < R; ++r) out[r] = splat(0);
  const auto body = [&](int64_t begin, int64_t end, const std::byte* ahead) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t quants = quants_at(format, b);
      const int64_t scales = scales_at(format, b);
      if (b % blocks_a_line(format) == 0) fetch(ahead + scales);
      const BlockSums<format, R> block(panel + quants, ahead + quants, x.pairs + b * (kBlock / 2),
                                       k / 2);
      const Lanes scale = load_f16(panel + scales);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        out[r] = fma(mul(scale, splat(x.scales[r * n_blocks + b])), block.of_row(r), out[r]);
      if constexpr (format != Format::q8_0) {
        const Lanes offset =
            format == Format::q4_1 ? load_f16(panel + scales + 32) : mul(scale, splat(-8));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) out[r] = fma(offset, splat(x.sums[r * n_blocks + b]), out[r]);
      }
    }
  };
  walk(panel, panel_bytes(format, k), next, n_blocks,
       block_scale_bytes(format) + block_quant_bytes(format), body);
}

template <Format format, int R>
void product_rows(const std::byte* panel, int64_t k, const Activations& x, const std::byte* next,
                  float* out) {
  Lanes sums[R];
  if constexpr (is_quantised(format))
    accumulate_quantised<format>(panel, k, x, next, sums);
  else
    accumulate_plain<format>(panel, k, x.x, next, sums);
  for (int r = 0; r < R; ++r) store(out + r * kTileRows, sums[r]);
}

template <Format format>
using RowsFunction = void (*)(const std::byte*, int64_t, const Activations&, const std::byte*,
                              float*);

// product_rows for this many rows. Less: 0, 1, ...
template <Format format, int... Less>
inline RowsFunction<format> rows_function(int64_t rows, std::integer_sequence<int, Less...>) {
  static constexpr RowsFunction<format> functions[] = {product_rows<format, Less + 1>...};
  return functions[rows - 1];
}

template <Format format>
void product_of(const Matrix& matrix, int64_t panel, int64_t panels, const Activations& x,
                int64_t rows, const std::byte* next, float* out) {
  constexpr int64_t most = max_rows(is_quantised(format));
  for (int64_t p = 0; p < panels; ++p) {
    const std::byte* weights = matrix.panel(panel + p);
    const std::byte* after = p + 1 < panels ? matrix.panel(panel + p + 1) : next;
    // Groups of nearly equal height: 8 rows are 4 + 4, not 6 + 2.
    int64_t groups = (rows + most - 1) / most;
    for (int64_t r = 0; r < rows; --groups) {
      const int64_t height = (rows - r + groups - 1) / groups;
      const auto function = rows_function<format>(height, std::make_integer_sequence<int, most>());
      function(weights, matrix.k, x.from_row(r, matrix.k), after,
               out + r * kTileRows + p * kPanelRows);
      r += height;
    }
  }
}

void product(const Matrix& matrix, int64_t panel, int64_t panels, const Activations& x,
             int64_t rows, const std::byte* next, float* out) {
  switch (matrix.format) {
    case Format::f32:
      return product_of<Format::f32>(matrix, panel, panels, x, rows, next, out);
    case Format::f16:
      return product_of<Format::f16>(matrix, panel, panels, x, rows, next, out);
    case Format::bf16:
      return product_of<Format::bf16>(matrix, panel, panels, x, rows, next, out);
    case Format::q8_0:
      return product_of<Format::q8_0>(matrix, panel, panels, x, rows, next, out);
    case Format::q4_0:
      return product_of<Format::q4_0>(matrix, panel, panels, x, rows, next, out);
    case Format::q4_1:
      return product_of<Format::q4_1>(matrix, panel, panels, x, rows, next, out);
  }
}

void quantise(const float* x, int64_t n, int32_t* pairs, float* scales, float* sums) {
  for (int64_t b = 0; b < n / kBlock; ++b) {
    const Lanes low = load(x + b * kBlock);
    const Lanes high = load(x + b * kBlock + 16);
    const Lanes zeros = splat(0);
    const Lanes sizes = max(max(low, sub(zeros, low)), max(high, sub(zeros, high)));
    const float largest = max_of(sizes);
    const float total = sum(add(low, high));
    // Below, a block is nothing, and dividing by it would overflow.
    const bool counts = largest > 1e-30f;
    const Lanes up = splat(counts ? 32767 / largest : 0.0f);
    const Lanes low_quants = round(mul(low, up));
    const Lanes high_quants = round(mul(high, up));
    store_pairs(pairs + b * 16, low_quants);
    store_pairs(pairs + b * 16 + 8, high_quants);
    // What is not finite must show in the result: integers can't hold it, the scale can.
    scales[b] = (counts ? largest / 32767 : 0.0f) + total * 0.0f;
    // Of the rounded values: so their errors meet d q + m, the weight, and not d q alone.
    sums[b] = scales[b] * sum(add(low_quants, high_quants));
  }
}

}  // namespace
}  // namespace recycle::RECYCLE_ISA
