// How a row lies in a file: plain floats, or the blocks of GGUF's quantized types. Both packing (pack.cpp) and
// dequantization (convert.cpp) read blocks through these functions.
//
// Quants are taken out eight bytes at a time, in 64-bit words: the file's formats pack them so that a shift and a mask
// serve eight columns. The words are little-endian, as the files are.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "recycle/format.h"

namespace recycle {

// body.template operator()<format>(): a format known at run time becomes a constant.
template <class Body>
void with_format(Format format, Body body) {
  const auto try_formats = [&]<int... f>(std::integer_sequence<int, f...>) {
    ((static_cast<int>(format) == f ? body.template operator()<static_cast<Format>(f)>() : void()), ...);
  };
  try_formats(std::make_integer_sequence<int, kFormats>());
}

// The same byte in each of the eight.
constexpr uint64_t in_each_byte(uint64_t byte) { return byte * 0x0101010101010101u; }

// Bits [from, from + count) of each of eight bytes.
template <int count>
constexpr uint64_t field(uint64_t bytes, int from) {
  return bytes >> from & in_each_byte((1 << count) - 1);
}

// The eight bits of `byte`, one in each byte.
constexpr uint64_t spread(uint8_t byte) {
  // Bit i stays in byte i alone; the addition carries it to the top of the byte.
  return field<1>((in_each_byte(byte) & 0x8040201008040201u) + 0x00406070787C7E7Fu, 7);
}

// The quants of a block in the order of its columns, unsigned.
template <Format format>
void read_quants(const uint8_t* block, uint64_t* quants) {
  constexpr Quantization q = quantization(format);
  const auto word = [&](int64_t at, int64_t index) {
    uint64_t bytes;
    std::memcpy(&bytes, block + at + index * 8, 8);
    return bytes;
  };
  // `part`: 32 columns, four words of quants. i: one of these.
  const auto for_all = [&](const auto& quant) {
    for (int part = 0; part < q.block / kBlock; ++part)
      for (int i = 0; i < 4; ++i) quants[part * 4 + i] = quant(part, i);
  };
  if constexpr (format == Format::q8_0) {
    for_all([&](int, int i) { return word(2, i) ^ in_each_byte(128); });  // + 128
  } else if constexpr (!q.is_block_256()) {
    constexpr int at = (q.has_minimum() ? 4 : 2) + q.high_bits * 4;
    for_all([&](int, int i) {
      const uint64_t low = field<4>(word(at, i % 2), i / 2 * 4);
      return q.high_bits == 0 ? low : low | spread(block[at - 4 + i]) << 4;
    });
  } else if constexpr (format == Format::iq4_xs) {
    for_all([&](int part, int i) { return field<4>(word(8 + part * 16, i % 2), i / 2 * 4); });
  } else if constexpr (format == Format::q4_k) {
    for_all([&](int part, int i) { return field<4>(word(16 + part / 2 * 32, i), part % 2 * 4); });
  } else if constexpr (format == Format::q5_k) {
    for_all([&](int part, int i) {
      return field<4>(word(48 + part / 2 * 32, i), part % 2 * 4) | field<1>(word(16, i), part) << 4;
    });
  } else if constexpr (format == Format::q6_k) {
    for_all([&](int part, int i) {
      const int half = part / 4, quarter = part % 4;
      return field<4>(word(half * 64 + quarter % 2 * 32, i), quarter / 2 * 4) |
             field<2>(word(128 + half * 32, i), quarter * 2) << 4;
    });
  } else if constexpr (format == Format::q2_k) {
    for_all([&](int part, int i) { return field<2>(word(16 + part / 4 * 32, i), part % 4 * 2); });
  } else {
    static_assert(format == Format::q3_k);
    for_all([&](int part, int i) {
      return field<2>(word(32 + part / 4 * 32, i), part % 4 * 2) | field<1>(word(0, i), part) << 2;
    });
  }
}

// The half scale of a block, and its half minimum: bytes from the start of the block.
constexpr int scale_at(Format format) {
  return format == Format::q2_k ? 80 : format == Format::q3_k ? 108 : format == Format::q6_k ? 208 : 0;
}

// The integer scales of a block of 256, as group_scale() reads them; returns how many bytes.
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

}  // namespace recycle
