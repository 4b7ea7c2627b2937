// Packing: from rows, as checkpoints hold them, to panels, as the kernels read them (format.h). Runs once
// at load; a plain loop a format is fast enough (memory-bound beyond that). unpack_row() goes the other
// way, for looking up an embedding in a matrix that is also the output head.
#include "pack.h"

#include <cstring>

#include "recycle/format.h"
#include "recycle/numbers.h"

namespace recycle {

namespace {

template <class T>
T read(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

// One row into lane `lane` of its panel.
template <class T>
void pack_plain(const std::byte* row, int64_t k, int64_t lane, std::byte* panel) {
  for (int64_t i = 0; i < k; ++i)
    std::memcpy(panel + (i * kPanelRows + lane) * sizeof(T), row + i * sizeof(T), sizeof(T));
}

void pack_bf16(const std::byte* row, int64_t k, int64_t lane, std::byte* panel) {
  for (int64_t i = 0; i < k; i += 2)
    std::memcpy(panel + (i / 2 * kPanelRows + lane) * 4, row + i * 2, 4);
}

void pack_q8_0(const std::byte* row, int64_t k, int64_t lane, std::byte* panel) {
  for (int64_t block = 0; block < k / kBlock; ++block) {
    const std::byte* source = row + block * 34;
    std::memcpy(panel + scales_at(Format::q8_0, block) + lane * 2, source, 2);
    std::byte* quants = panel + quants_at(Format::q8_0, block);
    for (int64_t i = 0; i < kBlock; ++i)
      quants[(i / 4 * kPanelRows + lane) * 4 + i % 4] = source[2 + i] ^ std::byte{128};  // + 128
  }
}

// GGUF keeps weight i and i + 16 of a block in the low and high nibble of byte i; a panel keeps i and i + 4
// of a group of 8.
void pack_q4(Format format, const std::byte* row, int64_t k, int64_t lane, std::byte* panel) {
  const int64_t halves = format == Format::q4_1 ? 2 : 1;
  for (int64_t block = 0; block < k / kBlock; ++block) {
    const std::byte* source = row + block * (16 + 2 * halves);
    for (int64_t half = 0; half < halves; ++half)
      std::memcpy(panel + scales_at(format, block) + (half * kPanelRows + lane) * 2,
                  source + 2 * half, 2);
    const std::byte* nibbles = source + 2 * halves;
    const auto nibble = [nibbles](int64_t i) {
      return static_cast<unsigned>(i < 16 ? nibbles[i] & std::byte{15} : nibbles[i - 16] >> 4);
    };
    std::byte* quants = panel + quants_at(format, block);
    for (int64_t group = 0; group < kBlock; group += 8)
      for (int64_t byte = 0; byte < 4; ++byte)
        quants[(group / 8 * kPanelRows + lane) * 4 + byte] =
            static_cast<std::byte>(nibble(group + byte) | nibble(group + 4 + byte) << 4);
  }
}

}  // namespace

void pack_rows(Format format, int64_t k, int64_t row_begin, int64_t rows,
               const std::byte* rows_data, std::byte* packed) {
  const int64_t bytes = panel_bytes(format, k);
  for (int64_t row = 0; row < rows; ++row) {
    const std::byte* source = rows_data + row * row_bytes(format, k);
    const int64_t lane = (row_begin + row) % kPanelRows;
    std::byte* panel = packed + (row_begin + row) / kPanelRows * bytes;
    if (lane == 0 && rows - row < kPanelRows) std::memset(panel, 0, bytes);
    switch (format) {
      case Format::f32:
        pack_plain<uint32_t>(source, k, lane, panel);
        break;
      case Format::f16:
        pack_plain<uint16_t>(source, k, lane, panel);
        break;
      case Format::bf16:
        pack_bf16(source, k, lane, panel);
        break;
      case Format::q8_0:
        pack_q8_0(source, k, lane, panel);
        break;
      case Format::q4_0:
      case Format::q4_1:
        pack_q4(format, source, k, lane, panel);
        break;
    }
  }
}

void unpack_row(const Matrix& matrix, int64_t row, float* out) {
  const std::byte* panel = matrix.panel(row / kPanelRows);
  const int64_t lane = row % kPanelRows;
  const int64_t k = matrix.k;
  const Format format = matrix.format;
  const auto half = [](const std::byte* at) { return half_to_float(read<uint16_t>(at)); };
  if (is_quantised(format)) {
    for (int64_t block = 0; block < k / kBlock; ++block) {
      const std::byte* scales = panel + scales_at(format, block) + lane * 2;
      const std::byte* quants = panel + quants_at(format, block) + lane * 4;
      const float scale = half(scales);
      float* to = out + block * kBlock;
      for (int64_t i = 0; i < kBlock; ++i) {
        if (format == Format::q8_0) {
          const std::byte quant = quants[i / 4 * kPanelRows * 4 + i % 4];
          to[i] = scale * static_cast<float>(static_cast<int>(quant) - 128);
          continue;
        }
        const auto byte = static_cast<unsigned>(quants[i / 8 * kPanelRows * 4 + i % 4]);
        const auto nibble = static_cast<float>(i % 8 < 4 ? byte & 15 : byte >> 4);
        to[i] = format == Format::q4_0 ? scale * (nibble - 8)
                                       : scale * nibble + half(scales + kPanelRows * 2);
      }
    }
    return;
  }
  for (int64_t i = 0; i < k; ++i) {
    const int64_t at = i * kPanelRows + lane;
    if (format == Format::f32) {
      out[i] = read<float>(panel + at * 4);
    } else if (format == Format::f16) {
      out[i] = half(panel + at * 2);
    } else {
      const auto bits = read<uint16_t>(panel + ((i / 2 * kPanelRows + lane) * 2 + i % 2) * 2);
      out[i] = bf16_to_float(bits);
    }
  }
}

}  // namespace recycle
