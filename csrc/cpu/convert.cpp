// The numbers are those of the package gguf, the quantizers' reference, and of torch's casts: each is one float32
// operation, in their order. Loops are over a block and free of branches, so that compilers vectorize them.
#include "convert.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "file_blocks.h"
#include "recycle/numbers.h"

namespace recycle {

namespace {

template <Format format>
void dequantize_block(const uint8_t* block, float* values) {
  constexpr Quantization q = quantization(format);
  uint16_t halves[2];
  std::memcpy(halves, block + scale_at(format), q.has_minimum() ? 4 : 2);
  const float scale = half_to_float(halves[0]);
  const float minimum = q.has_minimum() ? half_to_float(halves[1]) : 0;
  uint64_t words[q.block / 8];
  uint8_t quants[q.block];
  read_quants<format>(block, words);
  std::memcpy(quants, words, sizeof(quants));
  // As the lines of a block's header that group_scale() reads, of lane 0.
  std::byte header[kAlign + 16 * kPanelRows];
  if constexpr (q.is_block_256()) {
    uint8_t scales[16];
    const int count = read_group_scales<format>(block, scales);
    for (int i = 0; i < count; ++i) header[kAlign + i * kPanelRows] = std::byte{scales[i]};
  }
  for (int64_t group = 0; group < q.block / q.group; ++group) {
    float factor = scale, offset = minimum;
    if constexpr (q.is_block_256()) {
      const GroupScale integers = group_scale(format, header, 0, group);
      factor = scale * static_cast<float>(integers.scale);
      offset = minimum * -static_cast<float>(integers.minimum);
    }
    const uint8_t* from = quants + group * q.group;
    float* to = values + group * q.group;
    if constexpr (has_table(format)) {
      float table[16];
      for (int i = 0; i < 16; ++i) table[i] = factor * static_cast<float>(iq4_value(i));
      for (int64_t i = 0; i < q.group; ++i) to[i] = table[from[i]];
    } else {
      constexpr int zero_point = q.has_minimum() ? 0 : 1 << std::max(q.zero_point_bits, 0);
      for (int64_t i = 0; i < q.group; ++i) {
        const float product = factor * static_cast<float>(from[i] - zero_point);
        to[i] = q.has_minimum() ? product + offset : product;
      }
    }
  }
}

// 0 in the place of a NaN and an infinity: so NumPy converts these to a byte.
float finite(float value) {
  const int32_t bits = std::bit_cast<int32_t>(value);
  return std::bit_cast<float>(bits & -static_cast<int32_t>((bits & 0x7FFFFFFF) < 0x7F800000));
}

// The largest magnitude of 32 values; NaN where one is NaN. Bits of positive floats are in the order of the floats.
float max_magnitude(const float* values) {
  int32_t bits[32], max = 0;
  std::memcpy(bits, values, sizeof(bits));
  for (const int32_t each : bits) max = std::max(max, each & 0x7FFFFFFF);
  return std::bit_cast<float>(max);
}

// The smallest and the largest of 32 values; both NaN where one is NaN.
void min_and_max(const float* values, float* min, float* max) {
  int32_t keys[32], low = INT32_MAX, high = INT32_MIN;
  std::memcpy(keys, values, sizeof(keys));
  // Keys are in the order of the floats: of negative ones, the bits below the sign are inverted.
  const auto ordered = [](int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); };
  for (const int32_t key : keys) {
    low = std::min(low, ordered(key));
    high = std::max(high, ordered(key));
  }
  *min = std::bit_cast<float>(ordered(low));
  *max = std::bit_cast<float>(ordered(high));
  if (*max != *max) *min = *max;
  if (*min != *min) *max = *min;
}

float inverse(float scale) { return scale == 0 ? 0 : 1 / scale; }

void store_half(float value, uint8_t* to) {
  const uint16_t half = to_half(value);
  std::memcpy(to, &half, 2);
}

// 32 quants of 4 or 5 bits, as the block has them; at: where it has the lower bits, right after the fifth ones.
template <int bits>
void store_quants(const uint8_t* quants, uint8_t* at) {
  for (int i = 0; i < 16; ++i) at[i] = static_cast<uint8_t>((quants[i] & 15) | quants[16 + i] << 4);
  if constexpr (bits == 5) {
    uint32_t fifth = 0;
    for (int i = 0; i < 32; ++i) fifth |= static_cast<uint32_t>(quants[i] >> 4) << i;
    std::memcpy(at - 4, &fifth, 4);
  }
}

// quants[i] = the whole part of quotient(i), 32 times. are_finite: no quotient is a NaN or infinite.
template <class Quotient>
void store_whole_parts(bool are_finite, const Quotient& quotient, uint8_t* quants) {
  if (are_finite)
    for (int i = 0; i < 32; ++i) quants[i] = static_cast<uint8_t>(static_cast<int32_t>(quotient(i)));
  else
    for (int i = 0; i < 32; ++i) quants[i] = static_cast<uint8_t>(static_cast<int32_t>(finite(quotient(i))));
}

template <Format format>
void quantize_block(const float* values, uint8_t* block) {
  constexpr Quantization q = quantization(format);
  constexpr int bits = q.low_bits + q.high_bits;
  constexpr uint8_t max_quant = (1 << bits) - 1;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  uint8_t quants[32];
  if constexpr (format == Format::q8_0) {
    const float magnitude = max_magnitude(values), scale = magnitude / 127, inv_scale = inverse(scale);
    // Half away from zero is rounded by the addition of the float below 0.5: 0.5 itself would lift that float to 1.
    const auto rounded = [&](int i) {
      const float quotient = values[i] * inv_scale;
      const uint32_t sign = std::bit_cast<uint32_t>(quotient) & 0x80000000;
      return quotient + std::bit_cast<float>(sign | 0x3EFFFFFF);
    };
    store_whole_parts(magnitude < infinity && inv_scale < infinity, rounded, quants);
    store_half(scale, block);
    std::memcpy(block + 2, quants, 32);
    return;
  }
  float scale;
  if constexpr (q.has_minimum()) {
    float min, max;
    min_and_max(values, &min, &max);
    scale = (max - min) / max_quant;
    const float inv_scale = inverse(scale);
    const bool are_finite = scale < infinity && inv_scale < infinity;
    store_whole_parts(are_finite, [&](int i) { return (values[i] - min) * inv_scale + 0.5f; }, quants);
    store_half(min, block + 2);
  } else {
    // The value of the largest magnitude, the first of several, has the lowest quant.
    const uint32_t magnitude = std::bit_cast<uint32_t>(max_magnitude(values));
    int at = 0;
    while (at < 31 && (std::bit_cast<uint32_t>(values[at]) & 0x7FFFFFFF) != magnitude) ++at;
    constexpr int zero_point = 1 << q.zero_point_bits;
    scale = values[at] / -zero_point;
    const float inv_scale = inverse(scale);
    const bool are_finite = std::abs(scale) < infinity && std::abs(inv_scale) < infinity;
    store_whole_parts(are_finite, [&](int i) { return values[i] * inv_scale + (zero_point + 0.5f); }, quants);
  }
  for (uint8_t& quant : quants) quant = std::min(quant, max_quant);
  store_half(scale, block);
  store_quants<bits>(quants, block + (q.has_minimum() ? 4 : 2) + q.high_bits * 4);
}

}  // namespace

void dequantize(Format format, const std::byte* row, int64_t k, float* values) {
  with_format(format, [&]<Format f>() {
    if constexpr (is_quantized(f)) {
      constexpr Quantization q = quantization(f);
      for (int64_t block = 0; block < k / q.block; ++block)
        dequantize_block<f>(reinterpret_cast<const uint8_t*>(row) + block * q.file_bytes, values + block * q.block);
    } else if constexpr (f == Format::f32) {
      std::memcpy(values, row, k * 4);
    } else {
      for (int64_t i = 0; i < k; ++i) {
        uint16_t bits;
        std::memcpy(&bits, row + i * 2, 2);
        values[i] = f == Format::f16 ? half_to_float(bits) : bf16_to_float(bits);
      }
    }
  });
}

void quantize(Format format, const float* values, int64_t k, std::byte* row) {
  with_format(format, [&]<Format f>() {
    if constexpr (f == Format::f32) {
      std::memcpy(row, values, k * 4);
    } else if constexpr (!is_quantized(f)) {
      for (int64_t i = 0; i < k; ++i) {
        const uint16_t bits = f == Format::f16 ? to_half(values[i]) : to_bf16(values[i]);
        std::memcpy(row + i * 2, &bits, 2);
      }
    } else if constexpr (has_quantizer(f)) {
      for (int64_t block = 0; block < k / kBlock; ++block)
        quantize_block<f>(values + block * kBlock,
                          reinterpret_cast<uint8_t*>(row) + block * quantization(f).file_bytes);
    }
  });
}

}  // namespace recycle
