// Packing: from rows, as files hold them, to panels, as the kernels read them (format.h). Packing runs once, at load, and
// must keep up with the page cache. So it takes bits apart and puts them together again in 64-bit words, and goes
// through the 16 rows of a panel block by block: the part of the panel that it writes stays in the L1 cache.
//
// unpack_row() goes the other way: it looks up an embedding in a matrix that is also the output head.
#include "pack.h"

#include <algorithm>
#include <cstring>

#include "file_blocks.h"
#include "recycle/format.h"

namespace recycle {

namespace {

// 32 quants into their lane of the cache lines of `bits` bits, which begin at `lines`; shift: the first of these bits.
template <int bits, int shift>
void store_field(const uint64_t* quants, int64_t lane, std::byte* lines) {
  constexpr int n_lines = bits == 8 ? 4 : bits;  // of 8 bits: pairs of lines
  constexpr int words = 4 / n_lines;             // of eight quants, in a line
  for (int line = 0; line < n_lines; ++line) {
    uint64_t packed = 0;
    for (int i = 0; i < words; ++i) {
      const uint64_t field = quants[line * words + i] >> shift & in_each_byte((1 << bits) - 1);
      packed |= (bits == 8 ? field : field | field >> (32 - bits)) << (2 * bits * i);
    }
    const uint32_t halves[2] = {static_cast<uint32_t>(packed), static_cast<uint32_t>(packed >> 32)};
    std::byte* to = lines + (bits == 8 ? 2 : 1) * line * kAlign + lane * 4;
    std::memcpy(to, &halves[0], 4);
    if constexpr (bits == 8) std::memcpy(to + kAlign, &halves[1], 4);
  }
}

// One block of a row, columns block * quantization().block and on, into row `lane` of its panel.
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
  uint64_t quants[q.block / 8];
  read_quants<format>(bytes, quants);
  for (int64_t part = 0; part < q.block / kBlock; ++part) {
    std::byte* lines = panel + quants_at(format, block * (q.block / kBlock) + part);
    store_field<q.low_bits, 0>(quants + part * 4, lane, lines);
    if constexpr (q.high_bits > 0)
      store_field<q.high_bits, q.low_bits>(quants + part * 4, lane, lines + q.low_bits * kAlign);
  }
}

// The unused bytes beside a line of scales become zeros: equal weights have equal bytes.
template <Format format>
void clear_unused(int64_t k, std::byte* panel) {
  constexpr Quantization q = quantization(format);
  if constexpr (q.is_block_256()) {
    for (int64_t block = 0; !q.has_minimum() && block < k / 256; ++block)
      std::memset(panel + block * q.block_bytes() + kAlign / 2, 0, kAlign / 2);
  } else if (k / kBlock % q.blocks_per_line() != 0) {
    std::memset(panel + scales_at(format, k / kBlock), 0, kAlign / 2);
  }
}

// Rows of `words` words into the first lanes of [words][16] words. A cache line of a row at a time: where rows are a
// multiple of 4096 bytes apart, the L1 cache cannot hold a line of each until its next part is wanted.
template <class Word>
void transpose(const std::byte* rows_data, int64_t stride, int64_t rows, int64_t words, std::byte* panel) {
  constexpr int64_t line = kAlign / sizeof(Word);
  for (int64_t begin = 0; begin < words; begin += line)
    for (int64_t lane = 0; lane < rows; ++lane) {
      const std::byte* row = rows_data + lane * stride;
      for (int64_t i = begin; i < std::min(begin + line, words); ++i)
        std::memcpy(panel + (i * kPanelRows + lane) * sizeof(Word), row + i * sizeof(Word), sizeof(Word));
    }
}

// `rows` rows into the first lanes of a panel.
template <Format format>
void pack_panel(const std::byte* rows_data, int64_t rows, int64_t k, std::byte* panel) {
  const int64_t stride = row_bytes(format, k);
  if constexpr (is_quantized(format)) {
    constexpr Quantization q = quantization(format);
    for (int64_t block = 0; block < k / q.block; ++block)
      for (int64_t lane = 0; lane < rows; ++lane)
        pack_block<format>(rows_data + lane * stride + block * q.file_bytes, lane, block, panel);
    clear_unused<format>(k, panel);
  } else if constexpr (format == Format::f16) {
    transpose<uint16_t>(rows_data, stride, rows, k, panel);
  } else {  // a word of bf16 has two columns
    transpose<uint32_t>(rows_data, stride, rows, stride / 4, panel);
  }
}

}  // namespace

void pack_rows(Format format, int64_t k, int64_t row_begin, int64_t rows, const std::byte* rows_data,
               std::byte* packed) {
  const int64_t bytes = panel_bytes(format, k);
  for (int64_t row = 0; row < rows; row += kPanelRows) {
    std::byte* panel = packed + (row_begin + row) / kPanelRows * bytes;
    const int64_t count = std::min(kPanelRows, rows - row);
    if (count < kPanelRows) std::memset(panel, 0, bytes);
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
