// The layout of a weight matrix in memory.
//
// A matrix W [n, k] computes y = W x, one output a row. Rows are packed in panels of 16. The 16 rows of a panel
// lie side by side: one vector register holds one column of 16 (AVX-512) or 8 (AVX2) outputs, and a matmul is
// a running sum over k with the activation broadcast. This gives
//   - no horizontal sums, and an epilogue (RoPE, SwiGLU, residual, argmax) on whole vectors;
//   - one order of summation for an output, whatever the number of rows or threads (cpu/kernels/gemm.h; a GPU has
//     another fixed order, cuda/panel_sums.cuh). Lossless decoding rests on this.
// The last panel is completed with zero rows. Panels are 64-byte aligned and follow each other.
//
//   format  layout of a panel                                                     bytes a weight
//   f32     [k][16] float                                                         4
//   f16     [k][16] half                                                          2
//   bf16    [k/2][16][2] bfloat16: two k in one 32-bit lane, widened with one      2
//           shift or one mask (also the operand order of AVX512_BF16 and AMX)
//   q8_0    pairs of blocks of 32 k: [2][16] half scales, [2][8][16][4] bytes:     1.0625
//           four k in one lane, the operand order of VNNI dot products;
//           weight = scale * (byte - 128), because VNNI takes unsigned weights
//   q4_0    pairs of blocks of 32 k: [2][16] half scales, [2][4][16][4] bytes:     0.5625
//           low nibbles k..k+3, high nibbles k+4..k+7; weight = scale * (nibble - 8)
//   q4_1    blocks of 32 k: [16] half scales, [16] half minima, quants as q4_0;    0.625
//           weight = scale * nibble + minimum
// The quantized formats hold exactly the numbers of the GGUF blocks of the same name. A cache line of scales
// stands right before its quants (where k / 32 is odd, the last such line is half empty), so that a panel is
// read as one stream from end to end.
//
// Tried and rejected: dot products along k with contiguous rows (the horizontal sums cost as much as the
// multiplications at k = 576, and the order of summation depends on the vector width); all scales of a panel
// before all its quants (two streams for the prefetchers in place of one).
#pragma once

#include <cstddef>
#include <cstdint>

#include "recycle/numbers.h"

#ifdef __CUDACC__
#define RECYCLE_HOST_DEVICE __host__ __device__
#else
#define RECYCLE_HOST_DEVICE
#endif

namespace recycle {

enum class Format : int32_t { f32 = 0, f16 = 1, bf16 = 2, q8_0 = 3, q4_0 = 4, q4_1 = 5 };
inline constexpr int kFormats = 6;

inline constexpr int64_t kPanelRows = 16;
inline constexpr int64_t kBlock = 32;      // weights that share a scale
inline constexpr int64_t kAlign = 64;      // bytes; a cache line
inline constexpr int64_t kTilePanels = 4;  // panels of one gemm() call: its results stay in L1

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr int64_t n_panels(int64_t n) { return (n + kPanelRows - 1) / kPanelRows; }

constexpr bool is_quantized(Format format) { return format >= Format::q8_0; }

// k must be a multiple of this.
constexpr int64_t k_multiple(Format format) { return is_quantized(format) ? kBlock : kPanelRows; }

// q8_0 and q4_0: weight = scale * (quant - zero point), the zero point being 2 to this power.
constexpr int zero_point_bits(Format format) { return format == Format::q8_0 ? 7 : 3; }

// Quantized formats: bytes of a block's scales (and minima), bytes of its quants, and how many blocks share
// the cache line of scales before them.
constexpr int64_t block_scale_bytes(Format format) { return kPanelRows * (format == Format::q4_1 ? 4 : 2); }
constexpr int64_t block_quant_bytes(Format format) { return kPanelRows * kBlock / (format == Format::q8_0 ? 1 : 2); }
constexpr int64_t blocks_per_line(Format format) { return kAlign / block_scale_bytes(format); }

// Bytes from the start of a panel to a block's scales, and to its quants.
constexpr int64_t scales_at(Format format, int64_t block) {
  const int64_t blocks = blocks_per_line(format);
  return block / blocks * (kAlign + blocks * block_quant_bytes(format)) + block % blocks * block_scale_bytes(format);
}
constexpr int64_t quants_at(Format format, int64_t block) {
  const int64_t lines = block / blocks_per_line(format) + 1;
  return lines * kAlign + block * block_quant_bytes(format);
}

// Bytes from the start of a panel to a weight of its row `lane`: to its float, half or bfloat16, or to the byte
// that holds its quant. Weight i of a block, a block being k_multiple() weights in every format.
constexpr int64_t weight_at(Format format, int64_t lane, int64_t block, int64_t i) {
  switch (format) {
    case Format::f32:
      return ((block * kPanelRows + i) * kPanelRows + lane) * 4;
    case Format::f16:
      return ((block * kPanelRows + i) * kPanelRows + lane) * 2;
    case Format::bf16:
      return ((block * kPanelRows + i) / 2 * kPanelRows + lane) * 4 + i % 2 * 2;
    case Format::q8_0:
      return quants_at(format, block) + (i / 4 * kPanelRows + lane) * 4 + i % 4;
    case Format::q4_0:
    case Format::q4_1:
      return quants_at(format, block) + (i / 8 * kPanelRows + lane) * 4 + i % 4;
  }
  return 0;
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

constexpr int64_t matrix_bytes(Format format, int64_t n, int64_t k) { return n_panels(n) * panel_bytes(format, k); }

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

  constexpr const std::byte* panel(int64_t index) const { return data + index * panel_bytes(format, k); }
};

// Weight i of a block of the panel's row `lane` (see weight_at()), as float32.
RECYCLE_HOST_DEVICE inline float read_weight(Format format, const std::byte* panel, int64_t lane, int64_t block,
                                             int64_t i) {
  const std::byte* at = panel + weight_at(format, lane, block, i);
  const auto half = [](const std::byte* p) { return half_to_float(*reinterpret_cast<const uint16_t*>(p)); };
  if (format == Format::f32) return *reinterpret_cast<const float*>(at);
  if (format == Format::f16) return half(at);
  if (format == Format::bf16) return bf16_to_float(*reinterpret_cast<const uint16_t*>(at));
  const std::byte* scales = panel + scales_at(format, block) + lane * 2;
  const float scale = half(scales);
  const int byte = static_cast<int>(*at);
  if (format == Format::q8_0) return scale * static_cast<float>(byte - 128);
  const auto nibble = static_cast<float>(i % 8 < 4 ? byte & 15 : byte >> 4);
  return format == Format::q4_0 ? scale * (nibble - 8) : scale * nibble + half(scales + kPanelRows * 2);
}

RECYCLE_HOST_DEVICE inline float read_weight(const Matrix& matrix, int64_t row, int64_t k) {
  const int64_t size = k_multiple(matrix.format);
  return read_weight(matrix.format, matrix.panel(row / kPanelRows), row % kPanelRows, k / size, k % size);
}

// Packs rows [row_begin, row_begin + rows) of a matrix into `packed`. `rows_data` holds these rows one after
// the other, row_bytes() each. `row_begin` is a multiple of 16; the last panel is completed with zero rows.
void pack_rows(Format format, int64_t k, int64_t row_begin, int64_t rows, const std::byte* rows_data,
               std::byte* packed);

}  // namespace recycle
