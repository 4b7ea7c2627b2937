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
//   quantized: whole numbers (quants), and what turns them into weights           0.3 to 1.06
//           quants       32 columns are low_bits cache lines, then high_bits lines. A lane of a line, one output, has
//                        four bytes: a field of low_bits bits of each byte is that part of four columns in a row, the
//                        operand order of VNNI dot products. So the fields of a line are columns k .. k + 3,
//                        k + 4 .. k + 7, ..., from the lowest bits up. The lines of upper bits are alike.
//           block of 32  [16] half scales; with a minimum, [16] half minima after them. A cache line of these stands
//                        right before its quants: those of one block, or of two where there are no minima (where
//                        k / 32 is odd, the last such line is half empty). weight = scale * (quant - zero point), or
//                        scale * quant + minimum
//           block of 256 a line with [16] half scales d and [16] half scales m of the minima (or 32 unused bytes), then
//                        a small integer scale s (and minimum t) for each group of 32 or 16 columns, then the quants.
//                        weight = d s (quant - zero point), or d s quant - m t
//           quantization() lists the formats, group_scale() says how the integers are stored.
// The quantized formats hold exactly the numbers of the GGUF blocks of the same name, in at most 1.03 times their bytes.
// A panel is read as one stream from end to end.
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

enum class Format : int32_t {
  f32,
  f16,
  bf16,
  q8_0,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  iq4_nl,
  q2_k,
  q3_k,
  q4_k,
  q5_k,
  q6_k,
  iq4_xs
};
inline constexpr int kFormats = 15;

inline constexpr int64_t kPanelRows = 16;
inline constexpr int64_t kBlock = 32;      // columns whose quants stand together, and whose activations share a scale
inline constexpr int64_t kAlign = 64;      // bytes; a cache line
inline constexpr int64_t kTilePanels = 4;  // panels of one gemm() call: its results stay in L1

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr int64_t n_panels(int64_t n) { return (n + kPanelRows - 1) / kPanelRows; }

// What a quantized format is made of. All zero: a float format.
struct Quantization {
  int64_t block;         // columns that share a half scale: 32 or 256
  int64_t group;         // columns that share all of their scale: 32 or 16
  int low_bits;          // of a quant, in cache lines of their own: 8, 4 or 2
  int high_bits;         // its upper bits, likewise: 0, 1 or 2
  int zero_point_bits;   // the zero point is 2 to this power; -1: a minimum in its place
  int64_t header_bytes;  // of a block of 256 columns of a panel: its scales
  int64_t file_bytes;    // of a block of one row in a GGUF file

  constexpr bool has_minimum() const { return zero_point_bits < 0; }
  constexpr bool is_block_256() const { return block == 256; }
  constexpr int64_t quant_bytes() const { return (low_bits + high_bits) * kAlign; }  // of 32 columns of a panel
  // Blocks of 32 columns that share a cache line of scales.
  constexpr int64_t blocks_per_line() const { return has_minimum() ? 1 : 2; }
  constexpr int64_t scale_bytes() const { return kAlign / blocks_per_line(); }  // of a block of 32 columns
  // Bytes of 256 columns of a panel.
  constexpr int64_t block_bytes() const { return header_bytes + 256 / kBlock * quant_bytes(); }
};

constexpr Quantization quantization(Format format) {
  switch (format) {
    case Format::f32:
    case Format::f16:
    case Format::bf16:
      return {};
    case Format::q8_0:
      return {32, 32, 8, 0, 7, 0, 34};
    case Format::q4_0:
      return {32, 32, 4, 0, 3, 0, 18};
    case Format::q4_1:
      return {32, 32, 4, 0, -1, 0, 20};
    case Format::q5_0:
      return {32, 32, 4, 1, 4, 0, 22};
    case Format::q5_1:
      return {32, 32, 4, 1, -1, 0, 24};
    case Format::iq4_nl:  // quants are indices: iq4_value(quant) + 128 is what a dot product takes
      return {32, 32, 4, 0, 7, 0, 18};
    case Format::q2_k:
      return {256, 16, 2, 0, -1, 320, 84};
    case Format::q3_k:
      return {256, 16, 2, 1, 2, 256, 110};
    case Format::q4_k:
      return {256, 32, 4, 0, -1, 320, 144};
    case Format::q5_k:
      return {256, 32, 4, 1, -1, 320, 176};
    case Format::q6_k:
      return {256, 16, 4, 2, 5, 320, 210};
    case Format::iq4_xs:
      return {256, 32, 4, 0, 7, 192, 136};
  }
  return {};
}

constexpr bool is_quantized(Format format) { return format >= Format::q8_0; }

// iq4_nl and iq4_xs: a quant is an index into this table, whose steps are finer near zero.
constexpr bool has_table(Format format) { return format == Format::iq4_nl || format == Format::iq4_xs; }
RECYCLE_HOST_DEVICE constexpr int iq4_value(int quant) {
  constexpr int8_t values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  return values[quant];
}

// k must be a multiple of this.
constexpr int64_t k_multiple(Format format) { return is_quantized(format) ? quantization(format).block : kPanelRows; }

// Bytes of a float, half or bfloat16.
constexpr int64_t float_bytes(Format format) { return format == Format::f32 ? 4 : 2; }

// Quantized formats: bytes from the start of a panel to the half scales of 32 columns, and to their quants.
// block: the column / 32.
constexpr int64_t scales_at(Format format, int64_t block) {
  const Quantization q = quantization(format);
  if (q.is_block_256()) return block / 8 * q.block_bytes();
  const int64_t blocks = q.blocks_per_line();
  return block / blocks * (kAlign + blocks * q.quant_bytes()) + block % blocks * q.scale_bytes();
}
constexpr int64_t quants_at(Format format, int64_t block) {
  const Quantization q = quantization(format);
  if (q.is_block_256()) return scales_at(format, block) + q.header_bytes + block % 8 * q.quant_bytes();
  return (block / q.blocks_per_line() + 1) * kAlign + block * q.quant_bytes();
}

// Float formats: bytes from the start of a panel to column k of its row `lane`.
constexpr int64_t float_at(Format format, int64_t lane, int64_t k) {
  if (format == Format::bf16) return (k / 2 * kPanelRows + lane) * 4 + k % 2 * 2;
  return (k * kPanelRows + lane) * float_bytes(format);
}

constexpr int64_t panel_bytes(Format format, int64_t k) {
  if (!is_quantized(format)) return k * kPanelRows * float_bytes(format);
  const Quantization q = quantization(format);
  return quants_at(format, k / kBlock - 1) + q.quant_bytes();
}

constexpr int64_t matrix_bytes(Format format, int64_t n, int64_t k) { return n_panels(n) * panel_bytes(format, k); }

// Bytes of one row before packing: plain elements, or GGUF blocks.
constexpr int64_t row_bytes(Format format, int64_t k) {
  if (!is_quantized(format)) return k * float_bytes(format);
  const Quantization q = quantization(format);
  return k / q.block * q.file_bytes;
}

struct Matrix {
  const std::byte* data = nullptr;  // packed panels
  Format format = Format::f32;
  int64_t n = 0;  // outputs
  int64_t k = 0;  // inputs

  constexpr const std::byte* panel(int64_t index) const { return data + index * panel_bytes(format, k); }
};

// The integer scale, and minimum, of a group of columns in a block of 256.
struct GroupScale {
  int scale, minimum;
};
// header: of the block; group: the column of the block / quantization().group.
RECYCLE_HOST_DEVICE constexpr GroupScale group_scale(Format format, const std::byte* header, int64_t lane,
                                                     int64_t group) {
  const auto at = [&](int64_t row) { return static_cast<int>(header[kAlign + row * kPanelRows + lane]); };
  switch (format) {
    case Format::q4_k:
    case Format::q5_k:
      return {at(group * 2), at(group * 2 + 1)};
    case Format::q2_k:
      return {at(group) & 15, at(group) >> 4};
    case Format::
        q3_k:  // 6 bits: the lower 4 of groups g and g + 8 share a byte, the upper 2 of g, g + 4, g + 8, g + 12
      return {(at(group % 8) >> (group / 8 * 4) & 15) + (at(8 + group % 4) >> (group / 4 * 2) & 3) * 16 - 32, 0};
    default:  // q6_k, iq4_xs
      return {static_cast<int8_t>(at(group)), 0};
  }
}

// The quant of column i of the 32 columns whose quants are at `quants`.
RECYCLE_HOST_DEVICE constexpr int read_quant(Format format, const std::byte* quants, int64_t lane, int64_t i) {
  const Quantization q = quantization(format);
  const auto field = [&](const std::byte* lines, int bits) {
    const int64_t bit = i / 4 * bits;
    return static_cast<int>(lines[bit / 8 * kAlign + lane * 4 + i % 4]) >> (bit % 8) & ((1 << bits) - 1);
  };
  const int low = field(quants, q.low_bits);
  return q.high_bits == 0 ? low : low | field(quants + q.low_bits * kAlign, q.high_bits) << q.low_bits;
}

// Column k of the panel's row `lane`, as float32.
RECYCLE_HOST_DEVICE inline float read_weight(Format format, const std::byte* panel, int64_t lane, int64_t k) {
  const auto half = [](const std::byte* p) { return half_to_float(*reinterpret_cast<const uint16_t*>(p)); };
  if (!is_quantized(format)) {
    const std::byte* at = panel + float_at(format, lane, k);
    if (format == Format::f32) return *reinterpret_cast<const float*>(at);
    return format == Format::f16 ? half(at) : bf16_to_float(*reinterpret_cast<const uint16_t*>(at));
  }
  const Quantization q = quantization(format);
  const int64_t block = k / kBlock;
  const std::byte* header = panel + scales_at(format, block);
  int quant = read_quant(format, panel + quants_at(format, block), lane, k % kBlock);
  if (has_table(format))
    quant = iq4_value(quant);
  else if (!q.has_minimum())
    quant -= 1 << q.zero_point_bits;
  float scale = half(header + lane * 2);
  float minimum = q.has_minimum() ? half(header + kPanelRows * 2 + lane * 2) : 0;
  if (q.is_block_256()) {
    // Divisions by constants: on a GPU a 64-bit division by a variable is a function call.
    const GroupScale group = group_scale(format, header, lane, q.group == 16 ? k % 256 / 16 : k % 256 / 32);
    scale *= static_cast<float>(group.scale);
    minimum *= -static_cast<float>(group.minimum);
  }
  const float product = scale * static_cast<float>(quant);
  return q.has_minimum() ? product + minimum : product;
}

RECYCLE_HOST_DEVICE inline float read_weight(const Matrix& matrix, int64_t row, int64_t k) {
  return read_weight(matrix.format, matrix.panel(row / kPanelRows), row % kPanelRows, k);
}

// Packs rows [row_begin, row_begin + rows) of a matrix into `packed`. `rows_data` holds these rows one after
// the other, row_bytes() each. `row_begin` is a multiple of 16; the last panel is completed with zero rows.
void pack_rows(Format format, int64_t k, int64_t row_begin, int64_t rows, const std::byte* rows_data,
               std::byte* packed);

}  // namespace recycle
