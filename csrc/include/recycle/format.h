// How a weight matrix lies in memory.
//
// A matrix W [n, k] computes y = W x, one output per row. Rows are packed in panels of 16: the 16
// rows of a panel sit side by side, so that one vector register holds one column of 16 (AVX-512) or
// 8 (AVX2) outputs, and a product is a running sum over k with the activation broadcast. That gives
//   - no horizontal sums, and an epilogue (RoPE, SwiGLU, residual, argmax) on whole vectors;
//   - one order of summation for an output, whatever the instruction set, the number of rows or of
//     threads: k ascending (inside a block of 32 first, for quantised formats). Lossless decoding
//     rests on this.
// The last panel is filled up with zero rows. Panels are 64-byte aligned and follow each other.
//
//   format  layout of a panel                                                        bytes a weight
//   f32     [k][16] float                                                            4
//   f16     [k][16] half                                                             2
//   bf16    [k/2][16][2] bfloat16: two k in one 32-bit lane, widened with one         2
//           shift or one mask (also the operand order of AVX512_BF16 and AMX)
//   q8_0    blocks of 32 k in twos: [2][16] half scales, then [2][8][16][4] bytes:    1.0625
//           four k in one lane, the operand order of VNNI dot products;
//           weight = scale * (byte - 128): those products want their weights unsigned
//   q4_0    blocks of 32 k in twos: [2][16] half scales, then [2][4][16][4] bytes,    0.5625
//           low nibbles k..k+3, high nibbles k+4..k+7; weight = scale * (nibble - 8)
//   q4_1    blocks of 32 k: [16] half scales, [16] half minima, then quants as q4_0;  0.625
//           weight = scale * nibble + minimum
// The quantised formats hold exactly the numbers of the GGUF blocks of the same name. A cache line of scales
// stands right before the quants it belongs to (where k / 32 is odd the last line is half empty), so that
// a panel is read as one stream from end to end.
//
// Tried and rejected: dot products along k (rows contiguous): the horizontal sums cost as much as the
// products at k = 576, and the order of summation then depends on the vector width. All scales of a panel
// before all its quants: twice the streams for the prefetchers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace recycle {

enum class Format : int32_t { f32 = 0, f16 = 1, bf16 = 2, q8_0 = 3, q4_0 = 4, q4_1 = 5 };
inline constexpr int kFormats = 6;

inline constexpr int64_t kPanelRows = 16;
inline constexpr int64_t kBlock = 32;      // weights that share a scale
inline constexpr int64_t kAlign = 64;      // bytes; a cache line
inline constexpr int64_t kTilePanels = 4;  // panels a kernel call takes at most

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

constexpr int64_t n_panels(int64_t n) {
  return (n + kPanelRows - 1) / kPanelRows;
}

constexpr bool is_quantised(Format format) {
  return format >= Format::q8_0;
}

// k must be a multiple of this.
constexpr int64_t k_multiple(Format format) {
  return is_quantised(format) ? kBlock : kPanelRows;
}

// A quant stands for the number quant - zero_point: 2 to the power of this, or the minima say it.
constexpr int zero_point_bits(Format format) {
  return format == Format::q8_0 ? 7 : 3;
}

// Quantised formats: bytes of a block's scales (and minima), of its quants, and how many blocks share the
// cache line of scales that stands before them.
constexpr int64_t block_scale_bytes(Format format) {
  return kPanelRows * (format == Format::q4_1 ? 4 : 2);
}
constexpr int64_t block_quant_bytes(Format format) {
  return kPanelRows * kBlock / (format == Format::q8_0 ? 1 : 2);
}
constexpr int64_t blocks_a_line(Format format) {
  return kAlign / block_scale_bytes(format);
}

// Where a block's scales stand in its panel, and its quants.
constexpr int64_t scales_at(Format format, int64_t block) {
  const int64_t blocks = blocks_a_line(format);
  return block / blocks * (kAlign + blocks * block_quant_bytes(format)) +
         block % blocks * block_scale_bytes(format);
}
constexpr int64_t quants_at(Format format, int64_t block) {
  const int64_t lines = block / blocks_a_line(format) + 1;
  return lines * kAlign + block * block_quant_bytes(format);
}

constexpr int64_t panel_bytes(Format format, int64_t k) {
  switch (format) {
    case Format::f32:
      return k * kPanelRows * 4;
    case Format::f16:
    case Format::bf16:
      return k * kPanelRows * 2;
    case Format::q8_0:
    case Format::q4_0:
    case Format::q4_1:
      return quants_at(format, k / kBlock - 1) + block_quant_bytes(format);
  }
  return 0;
}

constexpr int64_t matrix_bytes(Format format, int64_t n, int64_t k) {
  return n_panels(n) * panel_bytes(format, k);
}

// Bytes of one row before packing: plain elements, or GGUF blocks.
constexpr int64_t row_bytes(Format format, int64_t k) {
  switch (format) {
    case Format::f32:
      return k * 4;
    case Format::f16:
    case Format::bf16:
      return k * 2;
    case Format::q8_0:
      return k / kBlock * 34;
    case Format::q4_0:
      return k / kBlock * 18;
    case Format::q4_1:
      return k / kBlock * 20;
  }
  return 0;
}

struct Matrix {
  const std::byte* data = nullptr;  // packed panels
  Format format = Format::f32;
  int64_t n = 0;  // outputs
  int64_t k = 0;  // inputs

  constexpr const std::byte* panel(int64_t index) const {
    return data + index * panel_bytes(format, k);
  }
};

// Packs rows [row_begin, row_begin + rows) of a matrix into `packed`. `rows_data` holds them row by
// row, row_bytes() each. `row_begin` is a multiple of 16; the last panel is completed with zeros.
void pack_rows(Format format, int64_t k, int64_t row_begin, int64_t rows,
               const std::byte* rows_data, std::byte* packed);

}  // namespace recycle
