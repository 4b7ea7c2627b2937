// Packing: from rows, as checkpoints hold them, to panels, as the kernels read them (format.h). Packing runs once,
// at load; one plain loop a format is fast enough, as memory bounds anything faster. unpack_row() goes the
// other way: it looks up an embedding in a matrix that is also the output head.
#include "pack.h"

#include <cstring>

#include "recycle/format.h"
#include "recycle/numbers.h"

namespace recycle {

namespace {

// body.template operator()<format>(): a format known at run time becomes a constant.
template <class Body>
void with_format(Format format, Body body) {
  switch (format) {
    case Format::f32:
      return body.template operator()<Format::f32>();
    case Format::f16:
      return body.template operator()<Format::f16>();
    case Format::bf16:
      return body.template operator()<Format::bf16>();
    case Format::q8_0:
      return body.template operator()<Format::q8_0>();
    case Format::q4_0:
      return body.template operator()<Format::q4_0>();
    case Format::q4_1:
      return body.template operator()<Format::q4_1>();
  }
}

// One row of plain elements, or of GGUF blocks, into row `lane` of its panel. A GGUF block is its scale, for
// q4_1 its minimum, and its quants: q8_0 has signed bytes, q4 has weights i and i + 16 in the low and the high
// nibble of byte i. A panel has weights i and i + 4 of each eight there.
template <Format format>
void pack_row(const std::byte* row, int64_t k, int64_t lane, std::byte* panel) {
  constexpr int64_t size = k_multiple(format);
  if constexpr (!is_quantized(format)) {
    constexpr int64_t bytes = row_bytes(format, 1);
    for (int64_t block = 0; block < k / size; ++block)
      for (int64_t i = 0; i < size; ++i)
        std::memcpy(panel + weight_at(format, lane, block, i), row + (block * size + i) * bytes, bytes);
    return;
  }
  constexpr int64_t halves = format == Format::q4_1 ? 2 : 1;
  for (int64_t block = 0; block < k / kBlock; ++block) {
    const std::byte* source = row + block * row_bytes(format, kBlock);
    for (int64_t half = 0; half < halves; ++half)
      std::memcpy(panel + scales_at(format, block) + (half * kPanelRows + lane) * 2, source + 2 * half, 2);
    const std::byte* quants = source + 2 * halves;
    const auto nibble = [quants](int64_t i) { return i < 16 ? quants[i] & std::byte{15} : quants[i - 16] >> 4; };
    if constexpr (format == Format::q8_0) {
      for (int64_t i = 0; i < kBlock; ++i)
        panel[weight_at(format, lane, block, i)] = quants[i] ^ std::byte{128};  // + 128
    } else {
      for (int64_t eight = 0; eight < kBlock; eight += 8)
        for (int64_t i = eight; i < eight + 4; ++i)
          panel[weight_at(format, lane, block, i)] = nibble(i) | nibble(i + 4) << 4;
    }
  }
}

}  // namespace

void pack_rows(Format format, int64_t k, int64_t row_begin, int64_t rows, const std::byte* rows_data,
               std::byte* packed) {
  const int64_t bytes = panel_bytes(format, k);
  for (int64_t row = 0; row < rows; ++row) {
    const std::byte* source = rows_data + row * row_bytes(format, k);
    const int64_t lane = (row_begin + row) % kPanelRows;
    std::byte* panel = packed + (row_begin + row) / kPanelRows * bytes;
    if (lane == 0 && rows - row < kPanelRows) std::memset(panel, 0, bytes);
    with_format(format, [&]<Format f>() { pack_row<f>(source, k, lane, panel); });
  }
}

void unpack_row(const Matrix& matrix, int64_t row, float* out) {
  const std::byte* panel = matrix.panel(row / kPanelRows);
  const int64_t lane = row % kPanelRows;
  with_format(matrix.format, [&]<Format f>() {
    constexpr int64_t size = k_multiple(f);
    for (int64_t block = 0; block < matrix.k / size; ++block)
      for (int64_t i = 0; i < size; ++i) out[block * size + i] = read_weight(f, panel, lane, block, i);
  });
}

}  // namespace recycle
