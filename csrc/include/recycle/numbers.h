// bfloat16 and half to and from float32, for CPU and GPU code.
#pragma once

#include <bit>
#include <cstdint>

namespace recycle {

constexpr float bf16_to_float(uint16_t value) { return std::bit_cast<float>(static_cast<uint32_t>(value) << 16); }

// Rounds to nearest even; a NaN stays a NaN.
constexpr uint16_t to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// The case is chosen by masks, not branches, so that a loop over these functions is vectorized.
constexpr uint32_t mask_if(bool condition) { return condition ? 0xFFFFFFFFu : 0; }

constexpr float half_to_float(uint16_t half) {
  const uint32_t bits = half & 0x7FFF, sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t normal = (bits << 13) + ((bits < 0x7C00 ? 112u : 224u) << 23);  // of an infinity or a NaN: + 112 more
  const uint32_t subnormal = std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-24f);
  const uint32_t is_normal = mask_if(bits >= 0x400);
  return std::bit_cast<float>(sign | (normal & is_normal) | (subnormal & ~is_normal));
}

// Rounds to nearest even; a NaN stays a NaN.
constexpr uint16_t to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value) & 0x7FFFFFFF;
  const uint32_t sign = std::bit_cast<uint32_t>(value) >> 16 & 0x8000;
  const uint32_t normal = (bits - (112u << 23) + 0xFFF + (bits >> 13 & 1)) >> 13;
  // The sum with 0.5 rounds to multiples of 2^-24, the step of subnormal halves.
  const uint32_t small = bits & mask_if(bits < 0x38800000);
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(small) + 0.5f) - 0x3F000000;
  const uint32_t nonfinite = 0x7C00 | ((0x200 | (bits >> 13 & 0x3FF)) & mask_if(bits > 0x7F800000));
  const uint32_t is_large = mask_if(bits >= 0x477FF000), is_small = mask_if(bits < 0x38800000);
  return static_cast<uint16_t>(sign | (nonfinite & is_large) | (subnormal & is_small) |
                               (normal & ~is_large & ~is_small));
}

}  // namespace recycle
