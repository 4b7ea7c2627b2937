// A thread's part of a cache line of a panel (format.h): the weights of 4 outputs, as they are loaded and as floats.
//
// A line of floats has 1 or 2 columns. Of quants, a line is one of their lower bits: 4, 8 or 16 columns, 4 columns (a
// quad) in each field of the bytes; the upper bits of these columns lie in a part of a line of upper bits.
#pragma once

#include "intrinsics.cuh"
#include "recycle/numbers.h"

namespace recycle::cuda {

inline constexpr int kOutputsPerThread = 4;
inline constexpr int kThreadsPerLine = kPanelRows / kOutputsPerThread;
inline constexpr int kMaxColumnsPerLine = 16;  // of quants with 2 lower bits

// Byte i of `bytes`, minus zero, as a float without the slow conversion: 0x4B000000 is 2^23 as a float, with zeros for
// low bits.
RECYCLE_DEVICE float byte_to_float(uint32_t bytes, int i, int zero) {
  return std::bit_cast<float>(byte_permute(bytes, 0x4B000000u, 0x7540 + i)) - (8388608.0f + static_cast<float>(zero));
}

// iq4_value(index) + 128 of four indices: a byte each.
RECYCLE_DEVICE uint32_t look_up_iq4(uint32_t indices) {
  const auto four_values = [](int first) {
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) bytes |= static_cast<uint32_t>(iq4_value(first + i) + 128) << (8 * i);
    return bytes;
  };
  const uint32_t selector = byte_permute(indices | indices >> 4, 0, 0x20);  // an index in each nibble
  const uint32_t below_8 = byte_permute(four_values(0), four_values(4), selector);
  const uint32_t from_8 = byte_permute(four_values(8), four_values(12), selector);
  return byte_permute(below_8, from_8, 0x3210 | (selector & 0x8888) >> 1);
}

template <Format format>
class PanelLine {
 public:
  static constexpr Quantization kQ = quantization(format);
  static constexpr int kColumns = is_quantized(format)    ? static_cast<int>(kBlock) / kQ.low_bits
                                  : format == Format::f32 ? 1
                                                          : 2;
  static constexpr bool kHasUpper = kQ.high_bits > 0;

  // The part with outputs 4 * group .. 4 * group + 3. line: the column / kColumns.
  RECYCLE_DEVICE void load(const std::byte* panel, uint32_t line, int group) {
    if constexpr (is_quantized(format)) {
      const std::byte* quants = panel + quants_at(format, line / kQ.low_bits) + group * 16;
      lower_ = load_weights(quants + line % kQ.low_bits * kAlign);
      if constexpr (kHasUpper) upper_ = load_weights(quants + (kQ.low_bits + upper_bit(line) / 8) * kAlign);
    } else if constexpr (format == Format::f16) {
      // Half a line is 16 outputs for one k.
      const uint2 first = load_weights_8(panel + line * kAlign + group * 8);
      const uint2 second = load_weights_8(panel + line * kAlign + kAlign / 2 + group * 8);
      lower_ = {first.x, first.y, second.x, second.y};
    } else {
      lower_ = load_weights(panel + line * kAlign + group * 16);
    }
  }

  // Floats: the weights of all columns.
  RECYCLE_DEVICE void widen(float (&weights)[kOutputsPerThread][kColumns]) const {
    const uint32_t words[4] = {lower_.x, lower_.y, lower_.z, lower_.w};
#pragma unroll
    for (int o = 0; o < kOutputsPerThread; ++o) {
      if constexpr (format == Format::f32) {
        weights[o][0] = std::bit_cast<float>(words[o]);
      } else if constexpr (format == Format::bf16) {
        weights[o][0] = std::bit_cast<float>(words[o] << 16);
        weights[o][1] = std::bit_cast<float>(words[o] & 0xFFFF0000u);
      } else {
        for (int i = 0; i < 2; ++i)
          weights[o][i] = from_half(static_cast<uint16_t>(words[i * 2 + o / 2] >> (o % 2 * 16)));
      }
    }
  }

  // Quants: quant - zero point of the columns 4 * quad .. 4 * quad + 3 of the line.
  RECYCLE_DEVICE void widen_quad(uint32_t line, int quad, float (&weights)[kOutputsPerThread][4]) const {
    const uint32_t lower[4] = {lower_.x, lower_.y, lower_.z, lower_.w};
    const uint32_t upper[4] = {upper_.x, upper_.y, upper_.z, upper_.w};
#pragma unroll
    for (int o = 0; o < kOutputsPerThread; ++o) {
      uint32_t quants = field<kQ.low_bits>(lower[o], quad * kQ.low_bits);
      if constexpr (kHasUpper)
        quants |= field<kQ.high_bits>(upper[o], upper_bit(line) % 8 + quad * kQ.high_bits) << kQ.low_bits;
      if constexpr (has_table(format)) quants = look_up_iq4(quants);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[o][i] = byte_to_float(quants, i, kQ.has_minimum() ? 0 : 1 << kQ.zero_point_bits);
    }
  }

  // Quants: weight = scale * (quant - zero point) + minimum, with the minimum 0 where there is a zero point.
  RECYCLE_DEVICE static void load_scales(const std::byte* panel, uint32_t line, int group,
                                         float (&scales)[kOutputsPerThread], float (&minima)[kOutputsPerThread]) {
    const std::byte* header = panel + scales_at(format, line / kQ.low_bits);
    const std::byte* halves = header + group * kOutputsPerThread * 2;
    widen_halves(load_weights_8(halves), scales);
    if constexpr (kQ.has_minimum()) widen_halves(load_weights_8(halves + kPanelRows * 2), minima);
    if constexpr (kQ.is_block_256()) {
      const uint32_t index = line % (256 / kColumns) / (kQ.group / kColumns);
      const GroupScales integers = load_group_scales(header + kAlign + group * kOutputsPerThread, index);
#pragma unroll
      for (int o = 0; o < kOutputsPerThread; ++o) {
        scales[o] *= byte_to_float(integers.scales, o, integers.zero);
        if constexpr (kQ.has_minimum()) minima[o] *= -byte_to_float(integers.minima, o, 0);
      }
    }
  }

 private:
  // group_scale() of format.h for 4 outputs, a byte each.
  struct GroupScales {
    uint32_t scales, minima;
    int zero;  // a scale is its byte minus this
  };
  RECYCLE_DEVICE static GroupScales load_group_scales(const std::byte* first_row, uint32_t index) {
    const auto row = [&](uint32_t at) { return load_weights_4(first_row + at * kPanelRows); };
    if constexpr (format == Format::q4_k || format == Format::q5_k) {
      return {row(index * 2), row(index * 2 + 1), 0};
    } else if constexpr (format == Format::q2_k) {
      const uint32_t both = row(index);
      return {field<4>(both, 0), field<4>(both, 4), 0};
    } else if constexpr (format == Format::q3_k) {
      const uint32_t lower = field<4>(row(index % 8), static_cast<int>(index / 8 * 4));
      const uint32_t upper = field<2>(row(8 + index % 4), static_cast<int>(index / 4 * 2));
      return {lower | upper << 4, 0, 32};
    } else {  // q6_k, iq4_xs: signed
      return {row(index) ^ 0x80808080u, 0, 128};
    }
  }

  // `bits` bits of each byte.
  template <int bits>
  RECYCLE_DEVICE static uint32_t field(uint32_t word, int first_bit) {
    return word >> first_bit & 0x01010101u * ((1u << bits) - 1);
  }

  // Where the upper bits of a line begin, in the bytes of the lines of upper bits.
  RECYCLE_DEVICE static int upper_bit(uint32_t line) {
    return static_cast<int>(line % kQ.low_bits) * (kColumns / 4) * kQ.high_bits;
  }

  RECYCLE_DEVICE static void widen_halves(uint2 raw, float (&values)[4]) {
    values[0] = from_half(static_cast<uint16_t>(raw.x));
    values[1] = from_half(static_cast<uint16_t>(raw.x >> 16));
    values[2] = from_half(static_cast<uint16_t>(raw.y));
    values[3] = from_half(static_cast<uint16_t>(raw.y >> 16));
  }

  uint4 lower_;
  uint4 upper_;  // only with kHasUpper
};

}  // namespace recycle::cuda
