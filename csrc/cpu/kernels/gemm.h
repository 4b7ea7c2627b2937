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
// multiplied with them, and a block's sum is exact in 32 bits, however an instruction set comes to it. Rounding
// to 16 bits moves a result by ~2e-5 of its size, a sixtieth of what bfloat16 does.
// Rejected: four panels side by side, for more sums to work on (one thread of a Zen 4 then reads 25 GB/s of
// bf16, 22 of q8_0 and 17 of q4_0 from memory; one panel after the other 29, 28 and 25); widening quants to
// float32 (three times the instructions: it, not memory, was the bound); activations in 8 bits, as is
// common (half the instructions again, which memory then hides, and 250 times the error).
#pragma once

namespace recycle::RECYCLE_ISA {
namespace {

// How far ahead of the loads weights are asked for, in bytes: into the L2 cache, where there is more room for
// requests than on the way to the L1 cache, and from there into L1 shortly before use, so that a load is
// not what two rows of products wait for.
constexpr int64_t kAhead = 8192;
constexpr int64_t kSoon = 640;

inline void fetch(const std::byte* p) {
  __builtin_prefetch(p, 0, 2);
}

// ahead: what is read kAhead after `now`.
inline void fetch(const std::byte* ahead, const std::byte* now) {
  fetch(ahead);
  __builtin_prefetch(now + kSoon, 0, 3);
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
      fetch(ahead + i * bytes, weights);
      if constexpr (format == Format::f32) {
        fetch(ahead + i * bytes + 64, weights + 64);
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

// Integer sums of one block of one panel, for each row: of (quant - zero point) * activation, exact in 32 bits.
template <Format format, int R>
struct BlockSums {
  Ints sum[R][sum_parts(R)];

  BlockSums(const std::byte* quants, const std::byte* ahead, const int32_t* x,
            const int32_t* minus_sums, int64_t k) {
    for (int r = 0; r < R; ++r) {
      for (Ints& part : sum[r]) part = zero();
      if constexpr (format != Format::q4_1)
        sum[r][0] = shifted_left<zero_point_bits(format)>(minus_sums[r * (k / kBlock)]);
    }
#pragma GCC unroll 8
    for (int64_t line = 0; line < block_quant_bytes(format) / 64; ++line) {
      const Raw raw = load_raw(quants + line * 64);
      fetch(ahead + line * 64, quants + line * 64);
      if constexpr (format == Format::q8_0) {
        add_columns(bytes(raw), x + line * 2, k / 2);
      } else {
        add_columns(low_nibbles(raw), x + line * 4, k / 2);
        add_columns(high_nibbles(raw), x + line * 4 + 2, k / 2);
      }
    }
  }
  // Four columns of weights against four activations of each row, which has `ld` words of them.
  void add_columns(Quads weights, const int32_t* x, int64_t ld) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) dot(sum[r], weights, x + r * ld);
  }
  Lanes of_row(int r) const { return to_float(total(sum[r])); }
};

// The minima of q4_1 meet the sum of the block's activations, which is the same for all outputs:
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
      if (b % blocks_per_line(format) == 0) fetch(ahead + scales, panel + scales);
      const BlockSums<format, R> block(panel + quants, ahead + quants, x.quants + b * (kBlock / 2),
                                       x.minus_sums + b, k);
      const Lanes scale = load_f16(panel + scales);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        out[r] = fma(mul(scale, splat(x.scales[r * n_blocks + b])), block.of_row(r), out[r]);
      if constexpr (format == Format::q4_1) {
        const Lanes minimum = load_f16(panel + scales + 32);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) out[r] = fma(minimum, splat(x.sums[r * n_blocks + b]), out[r]);
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

void quantise(const float* x, int64_t n, int32_t* quants, float* scales, float* sums,
              int32_t* minus_sums) {
  for (int64_t b = 0; b < n / kBlock; ++b) {
    const Lanes low = load(x + b * kBlock);
    const Lanes high = load(x + b * kBlock + 16);
    const Lanes zeros = splat(0);
    const Lanes sizes = max(max(low, sub(zeros, low)), max(high, sub(zeros, high)));
    const float largest = max_of(sizes);
    const float total = sum(add(low, high));
    // Below, a block is nothing, and dividing by it would overflow.
    const bool counts = largest > 1e-30f;
    // The largest number whose upper and lower byte both fit a signed byte, the upper rounded.
    constexpr float kMost = 127 * 256;
    const Lanes up = splat(counts ? kMost / largest : 0.0f);
    const Lanes low_quants = round(mul(low, up));
    const Lanes high_quants = round(mul(high, up));
    store_quants(quants + b * 16, low_quants);
    store_quants(quants + b * 16 + 8, high_quants);
    // What is not finite must show in the result: integers can't hold it, the scale can.
    scales[b] = (counts ? largest / kMost : 0.0f) + total * 0.0f;
    // Of the rounded values: so their errors meet d q + m, the weight, and not d q alone.
    const float quants_sum = sum(add(low_quants, high_quants));
    sums[b] = scales[b] * quants_sum;
    minus_sums[b] = quants_sum == quants_sum ? -static_cast<int32_t>(quants_sum) : 0;
  }
}

}  // namespace
}  // namespace recycle::RECYCLE_ISA
