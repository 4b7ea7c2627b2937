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
//   activations in 8 bits: half the products, and 250 times the error (docs/formats.md has what this does to a model)
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

// What a dot product takes of iq4_nl and iq4_xs in place of a quant.
struct UnsignedIq4Values {
  uint8_t at[16];
  constexpr UnsignedIq4Values() : at() {
    for (int i = 0; i < 16; ++i) at[i] = static_cast<uint8_t>(iq4_value(i) + 128);
  }
};
constexpr UnsignedIq4Values kUnsignedIq4Values;

// For each row the sums over one group of columns of one panel of (quant - zero point) * activation, exact in 32 bits.
// quants: of the 32 columns that the group is a part of; ahead: what to prefetch meanwhile. x and minus_sums: of the
// first row, from these 32 columns and from the group on.
template <Format format, int R>
struct GroupSums {
  static constexpr Quantization kQ = quantization(format);
  static constexpr int64_t kLines = kQ.low_bits * kQ.group / kBlock;  // of the quants' lower bits
  static constexpr int kQuads = 8 / kQ.low_bits;                      // fields of a line: each four columns

  Ints sum[R][sum_parts(R)];

  GroupSums(const std::byte* quants, const std::byte* ahead, int64_t part, const int32_t* x, const int32_t* minus_sums,
            int64_t k) {
    for (int r = 0; r < R; ++r) {
      for (Ints& part_sum : sum[r]) part_sum = zero();
      if constexpr (!kQ.has_minimum()) sum[r][0] = shifted_left<kQ.zero_point_bits>(minus_sums[r * (k / kQ.group)]);
    }
    // Not unrolled: with 4 rows the sums of several lines do not fit the registers (1.4 times the time with AVX2).
    for (int64_t i = 0; i < kLines; ++i) {
      const int64_t line = part * kLines + i;
      const Raw low = load_raw(quants + line * kAlign);
      prefetch(ahead + line * kAlign, quants + line * kAlign);
      Raw high;
      if constexpr (kQ.high_bits > 0) {
        const int64_t bit = line * kQuads * kQ.high_bits;
        const int64_t at = (kQ.low_bits + bit / 8) * kAlign;
        if (bit % 8 == 0) prefetch(ahead + at, quants + at);
        high = shifted_right(load_raw(quants + at), bit % 8);
      }
      add_fields(low, high, x + line * kQuads * 2, k / 2, std::make_integer_sequence<int, kQuads>());
    }
  }

 private:
  template <int... i>
  void add_fields(Raw low, Raw high, const int32_t* x, int64_t ld, std::integer_sequence<int, i...>) {
    (add_columns(quads<i>(low, high), x + i * 2, ld), ...);
  }
  template <int i>
  static Quads quads(Raw low, [[maybe_unused]] Raw high) {
    if constexpr (has_table(format))
      return look_up<i * 4>(kUnsignedIq4Values.at, low);
    else if constexpr (kQ.high_bits > 0)
      return joined<kQ.low_bits, kQ.high_bits, i>(low, high);
    else
      return field<i * kQ.low_bits, kQ.low_bits>(low);
  }
  // Adds the products of four columns; a row of x has `ld` words.
  void add_columns(Quads weights, const int32_t* x, int64_t ld) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) dot(sum[r], weights, x + r * ld);
  }
};

// A block of 256's scale of a group, an integer; and its minimum, negative.
template <Format format>
inline Lanes group_scale(const std::byte* header, int64_t group) {
  const std::byte* first = header + kAlign;
  if constexpr (format == Format::q4_k || format == Format::q5_k) return load_int8(first + group * 2 * kPanelRows);
  if constexpr (format == Format::q2_k) return load_bits(first + group * kPanelRows, 0, 4);
  if constexpr (format == Format::q3_k) {
    const Lanes low = load_bits(first + group % 8 * kPanelRows, static_cast<int>(group / 8 * 4), 4);
    const Lanes high = load_bits(first + (8 + group % 4) * kPanelRows, static_cast<int>(group / 4 * 2), 2);
    return fma(high, splat(16), sub(low, splat(32)));
  }
  return load_int8(first + group * kPanelRows);  // q6_k, iq4_xs
}
template <Format format>
inline Lanes minus_group_minimum(const std::byte* header, int64_t group) {
  const std::byte* first = header + kAlign;
  const Lanes minimum = format == Format::q2_k ? load_bits(first + group * kPanelRows, 4, 4)
                                               : load_int8(first + (group * 2 + 1) * kPanelRows);
  return sub(splat(0), minimum);
}

// The same for quantized weights. With the scale d and the minimum m of a group
// sum(x (d q + m)) = d sum(x q) + m sum(x), and sum(x) is the same for all outputs.
template <Format format, int R>
inline void accumulate_quantized(const std::byte* panel, int64_t k, const Activations& x, const std::byte* next,
                                 Lanes (&out)[R]) {
  constexpr Quantization q = quantization(format);
  constexpr int64_t kGroups = kBlock / q.group;  // of 32 columns
  const float* sums = q.group == kBlock ? x.sums : x.half_sums;
  const int32_t* minus_sums = q.group == kBlock ? x.minus_sums : x.minus_half_sums;
  for (int r = 0; r < R; ++r) out[r] = splat(0);
  // The sums of a group of columns, times its scale. block: the column / 32.
  const auto add_group = [&](const std::byte* ahead, int64_t block, int64_t part, Lanes scale, Lanes minimum) {
    const int64_t quants = quants_at(format, block);
    const int64_t group = block * kGroups + part;
    const GroupSums<format, R> products(panel + quants, ahead + quants, part, x.quants + block * (kBlock / 2),
                                        minus_sums + group, k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Lanes sum = to_float(total(products.sum[r]));
      out[r] = fma(mul(scale, splat(x.scales[r * (k / kBlock) + block])), sum, out[r]);
    }
    if constexpr (q.has_minimum()) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) out[r] = fma(minimum, splat(sums[r * (k / q.group) + group]), out[r]);
    }
  };
  if constexpr (q.is_block_256()) {
    const auto body = [&](int64_t begin, int64_t end, const std::byte* ahead) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * q.block_bytes();
        const std::byte* header = panel + at;
        for (int64_t line = 0; line < q.header_bytes; line += kAlign) prefetch(ahead + at + line, header + line);
        const Lanes scale = load_f16(header);
        for (int64_t group = 0; group < 256 / q.group; ++group) {
          Lanes minimum = scale;
          if constexpr (q.has_minimum())
            minimum = mul(load_f16(header + kPanelRows * 2), minus_group_minimum<format>(header, group));
          add_group(ahead, i * 8 + group / kGroups, group % kGroups, mul(scale, group_scale<format>(header, group)),
                    minimum);
        }
      }
    };
    stream_panel(panel, panel_bytes(format, k), next, k / 256, q.block_bytes(), body);
  } else {
    const auto body = [&](int64_t begin, int64_t end, const std::byte* ahead) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t at = scales_at(format, block);
        if (block % q.blocks_per_line() == 0) prefetch(ahead + at, panel + at);
        const Lanes scale = load_f16(panel + at);
        add_group(ahead, block, 0, scale, q.has_minimum() ? load_f16(panel + at + kPanelRows * 2) : scale);
      }
    };
    stream_panel(panel, panel_bytes(format, k), next, k / kBlock, q.scale_bytes() + q.quant_bytes(), body);
  }
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
  const auto try_formats = [&]<int... f>(std::integer_sequence<int, f...>) {
    ((static_cast<int>(matrix.format) == f
          ? gemm_format<static_cast<Format>(f)>(matrix, panel, panels, x, rows, next, out)
          : void()),
     ...);
  };
  try_formats(std::make_integer_sequence<int, kFormats>());
}

void quantize(const float* x, int64_t n, const QuantizedRows& to) {
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
    store_quants(to.quants + b * 16, low_quants);
    store_quants(to.quants + b * 16 + 8, high_quants);
    // total * 0 is NaN for a nonfinite activation, which the integers can't hold and the result must show.
    const float scale = (nonzero ? max_abs / kMaxQuant : 0.0f) + total * 0.0f;
    to.scales[b] = scale;
    // The sums of the rounded values: a rounding error is then multiplied with the weight d q + m, not with d q.
    const float low_sum = reduce_add(low_quants);
    const float high_sum = reduce_add(high_quants);
    to.sums[b] = scale * (low_sum + high_sum);
    to.half_sums[b * 2] = scale * low_sum;
    to.half_sums[b * 2 + 1] = scale * high_sum;
    const auto negated = [](float sum) { return sum == sum ? -static_cast<int32_t>(sum) : 0; };
    to.minus_sums[b] = negated(low_sum + high_sum);
    to.minus_half_sums[b * 2] = negated(low_sum);
    to.minus_half_sums[b * 2 + 1] = negated(high_sum);
  }
}

}  // namespace
}  // namespace recycle::RECYCLE_ISA
