// Packing: from rows, as checkpoints hold them, to panels, as the kernels read them (format.h). Packing runs once,
// at load, bounded by the instructions that take the bits of a GGUF block apart and put them together again.
// unpack_row() goes the other way: it looks up an embedding in a matrix that is also the output head.
#include "pack.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "recycle/format.h"
#include "recycle/numbers.h"

namespace recycle {

namespace {

// body.template operator()<format>(): a format known at run time becomes a constant.
template <class Body>
void with_format(Format format, Body body) {
  const auto try_formats = [&]<int... f>(std::integer_sequence<int, f...>) {
    ((static_cast<int>(format) == f ? body.template operator()<static_cast<Format>(f)>() : void()), ...);
  };
  try_formats(std::make_integer_sequence<int, kFormats>());
}

// The quants of a GGUF block in the order of its columns, unsigned. `first` is where the block has them; `low` columns
// are in the lower halves of as many bytes, and the next `low` columns in the upper halves.
void read_nibbles(const uint8_t* first, int64_t low, uint8_t* quants) {
  for (int64_t i = 0; i < low; ++i) quants[i] = first[i] & 15;
  for (int64_t i = 0; i < low; ++i) quants[low + i] = first[i] >> 4;
}

// The fifth bit of 32 quants: bit i of a word.
void add_fifth_bits(const uint8_t* word, uint8_t* quants) {
  uint32_t bits;
  std::memcpy(&bits, word, 4);
  for (int i = 0; i < 32; ++i) quants[i] |= static_cast<uint8_t>((bits >> i & 1) << 4);
}

// The K-quants: bits [from, from + count) of 32 bytes belong to 32 columns; they become bits `to`.. of the quants.
template <int count, int to>
void add_bits(const uint8_t* bytes, int from, uint8_t* quants) {
  for (int i = 0; i < 32; ++i) quants[i] |= static_cast<uint8_t>((bytes[i] >> from & ((1 << count) - 1)) << to);
}

template <Format format>
void read_quants(const uint8_t* block, uint8_t* quants) {
  if constexpr (format == Format::q8_0) {
    for (int i = 0; i < 32; ++i) quants[i] = block[2 + i] ^ 128;  // + 128
  } else if constexpr (format == Format::q4_0 || format == Format::iq4_nl) {
    read_nibbles(block + 2, 16, quants);
  } else if constexpr (format == Format::q4_1) {
    read_nibbles(block + 4, 16, quants);
  } else if constexpr (format == Format::q5_0 || format == Format::q5_1) {
    constexpr int at = format == Format::q5_0 ? 2 : 4;
    read_nibbles(block + at + 4, 16, quants);
    add_fifth_bits(block + at, quants);
  } else if constexpr (format == Format::iq4_xs) {
    for (int part = 0; part < 8; ++part) read_nibbles(block + 8 + part * 16, 16, quants + part * 32);
  } else if constexpr (format == Format::q4_k || format == Format::q5_k) {
    constexpr int at = format == Format::q4_k ? 16 : 48;
    for (int part = 0; part < 4; ++part) read_nibbles(block + at + part * 32, 32, quants + part * 64);
    if constexpr (format == Format::q5_k)
      for (int part = 0; part < 8; ++part) add_bits<1, 4>(block + 16, part, quants + part * 32);
  } else if constexpr (format == Format::q6_k) {
    for (int part = 0; part < 8; ++part) {
      const int half = part / 4, quarter = part % 4;
      uint8_t* to = quants + part * 32;
      std::memset(to, 0, 32);
      add_bits<4, 0>(block + half * 64 + quarter % 2 * 32, quarter / 2 * 4, to);
      add_bits<2, 4>(block + 128 + half * 32, quarter * 2, to);
    }
  } else {  // q2_k, q3_k
    constexpr int at = format == Format::q2_k ? 16 : 32;
    for (int part = 0; part < 8; ++part) {
      uint8_t* to = quants + part * 32;
      std::memset(to, 0, 32);
      add_bits<2, 0>(block + at + part / 4 * 32, part % 4 * 2, to);
      if constexpr (format == Format::q3_k) add_bits<1, 2>(block, part, to);
    }
  }
}

// The half scale of a GGUF block, and its half minimum: bytes from the start of the block.
constexpr int scale_at(Format format) {
  return format == Format::q2_k ? 80 : format == Format::q3_k ? 108 : format == Format::q6_k ? 208 : 0;
}

// The integer scales of a GGUF block of 256, as group_scale() reads them; returns how many bytes.
template <Format format>
int read_group_scales(const uint8_t* block, uint8_t* scales) {
  if constexpr (format == Format::q4_k || format == Format::q5_k) {
    // 6 bits each: of groups 0 to 3 in the lower bits of bytes 0 to 3 (scales) and 4 to 7 (minima); of groups 4 to 7 the
    // lower 4 in bytes 8 to 11, the upper 2 in the upper bits of bytes 0 to 7.
    const uint8_t* packed = block + 4;
    for (int i = 0; i < 4; ++i) {
      scales[2 * i] = packed[i] & 63;
      scales[2 * i + 1] = packed[i + 4] & 63;
      scales[8 + 2 * i] = static_cast<uint8_t>((packed[i + 8] & 15) | packed[i] >> 6 << 4);
      scales[8 + 2 * i + 1] = static_cast<uint8_t>(packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4);
    }
    return 16;
  } else if constexpr (format == Format::iq4_xs) {
    uint16_t high;
    std::memcpy(&high, block + 2, 2);
    for (int i = 0; i < 8; ++i)
      scales[i] = static_cast<uint8_t>((block[4 + i / 2] >> (i % 2 * 4) & 15) + (high >> (i * 2) & 3) * 16 - 32);
    return 8;
  } else {
    constexpr int at = format == Format::q2_k ? 0 : format == Format::q3_k ? 96 : 192;
    constexpr int count = format == Format::q3_k ? 12 : 16;
    std::memcpy(scales, block + at, count);
    return count;
  }
}

// 32 quants into their lane of the cache lines of `bits` bits, which begin at `lines`; shift: the first of these bits.
template <int bits, int shift>
void store_field(const uint8_t* quants, int64_t lane, std::byte* lines) {
  constexpr uint32_t mask = 0x01010101u * ((1u << bits) - 1);
  uint32_t words[8];
  std::memcpy(words, quants, 32);
  for (int line = 0; line < bits; ++line) {
    uint32_t packed = 0;
    for (int i = 0; i < 8 / bits; ++i) packed |= (words[line * (8 / bits) + i] >> shift & mask) << (i * bits);
    std::memcpy(lines + line * kAlign + lane * 4, &packed, 4);
  }
}

// One GGUF block of a row, columns block * quantization().block and on, into row `lane` of its panel.
template <Format format>
void pack_block(const std::byte* source, int64_t lane, int64_t block, std::byte* panel) {
  constexpr Quantization q = quantization(format);
  const auto* bytes = reinterpret_cast<const uint8_t*>(source);
  std::byte* header = panel + scales_at(format, block * (q.block / kBlock));
  for (int half = 0; half < (q.has_minimum() ? 2 : 1); ++half)
    std::memcpy(header + (half * kPanelRows + lane) * 2, bytes + scale_at(format) + 2 * half, 2);
  if constexpr (q.is_block_256()) {
    uint8_t scales[16];
    const int count = read_group_scales<format>(bytes, scales);
    for (int i = 0; i < count; ++i) header[kAlign + i * kPanelRows + lane] = std::byte{scales[i]};
  }
  uint8_t quants[256];
  read_quants<format>(bytes, quants);
  for (int64_t part = 0; part < q.block / kBlock; ++part) {
    std::byte* lines = panel + quants_at(format, block * (q.block / kBlock) + part);
    store_field<q.low_bits, 0>(quants + part * kBlock, lane, lines);
    if constexpr (q.high_bits > 0)
      store_field<q.high_bits, q.low_bits>(quants + part * kBlock, lane, lines + q.low_bits * kAlign);
  }
}

// `rows` rows into the first lanes of a panel, block by block, so that the part of the panel stays in the L1 cache.
template <Format format>
void pack_panel(const std::byte* rows_data, int64_t rows, int64_t k, std::byte* panel) {
  const int64_t stride = row_bytes(format, k);
  if constexpr (is_quantized(format)) {
    constexpr Quantization q = quantization(format);
    for (int64_t block = 0; block < k / q.block; ++block)
      for (int64_t lane = 0; lane < rows; ++lane)
        pack_block<format>(rows_data + lane * stride + block * q.file_bytes, lane, block, panel);
  } else {
    constexpr int64_t bytes = float_bytes(format);
    for (int64_t begin = 0; begin < k; begin += kPanelRows)
      for (int64_t lane = 0; lane < rows; ++lane)
        for (int64_t i = begin; i < begin + kPanelRows; ++i)
          std::memcpy(panel + float_at(format, lane, i), rows_data + lane * stride + i * bytes, bytes);
  }
}

}  // namespace

void pack_rows(Format format, int64_t k, int64_t row_begin, int64_t rows, const std::byte* rows_data,
               std::byte* packed) {
  const int64_t bytes = panel_bytes(format, k);
  for (int64_t row = 0; row < rows; row += kPanelRows) {
    std::byte* panel = packed + (row_begin + row) / kPanelRows * bytes;
    const int64_t count = std::min(kPanelRows, rows - row);
    // The unused bytes beside a line of scales are zeros too: equal weights have equal bytes.
    if (count < kPanelRows || is_quantized(format)) std::memset(panel, 0, bytes);
    with_format(format, [&]<Format f>() { pack_panel<f>(rows_data + row * row_bytes(f, k), count, k, panel); });
  }
}

void unpack_row(const Matrix& matrix, int64_t row, float* out) {
  const std::byte* panel = matrix.panel(row / kPanelRows);
  with_format(matrix.format, [&]<Format f>() {
    for (int64_t k = 0; k < matrix.k; ++k) out[k] = read_weight(f, panel, row % kPanelRows, k);
  });
}

}  // namespace recycle
