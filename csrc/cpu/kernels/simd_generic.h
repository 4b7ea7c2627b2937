// 16 float lanes in plain C++: the kernels on any processor, and the reading of the other simd_*.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "recycle/numbers.h"

namespace recycle::generic {
namespace {

struct Lanes {
  float v[16];
};
// 64 bytes of packed weights, one 32-bit lane an output.
struct Raw {
  uint32_t v[16];
};

// Rows that a product works on together.
constexpr int max_rows(bool) {
  return 4;
}
// Heads that attention works on together, and lanes of values (an even number) that it then sums up for each.
constexpr int heads_at_once() {
  return 4;
}
constexpr int lanes_for(int) {
  return 2;
}

// Blocks of 16 keys that scores are made for together, at most kMostKeyBlocks.
constexpr int key_blocks_at_once() {
  return 1;
}

template <class F>
inline Lanes each(F f) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = f(i);
  return out;
}

inline Lanes splat(float x) {
  return each([=](int) { return x; });
}
inline Lanes load(const float* p) {
  Lanes out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
inline void store(float* p, Lanes a) {
  std::memcpy(p, a.v, sizeof a.v);
}
// Two roundings here, one in the AVX2 and AVX-512 lanes: the only difference between them.
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Lanes add(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Lanes sub(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Lanes mul(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Lanes div(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Lanes max(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
// value where x >= limit, else 0
inline Lanes keep_above(Lanes value, Lanes x, float limit) {
  return each([&](int i) { return x.v[i] >= limit ? value.v[i] : 0.0f; });
}
// To the nearest integer, ties to even; |a| < 2^22.
inline Lanes round(Lanes a) {
  const float shift = 0x1.8p23f;
  return each([&](int i) { return (a.v[i] + shift) - shift; });
}
// 2^n for an integral n in [-126, 127]
inline Lanes power_of_2(Lanes n) {
  return each(
      [&](int i) { return std::bit_cast<float>((static_cast<int32_t>(n.v[i]) + 127) << 23); });
}
inline float sum(Lanes a) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
inline float max_of(Lanes a) {
  for (int i = 1; i < 16; ++i) a.v[0] = a.v[0] > a.v[i] ? a.v[0] : a.v[i];
  return a.v[0];
}

inline Lanes load_bf16(const std::byte* p) {
  uint16_t raw[16];
  std::memcpy(raw, p, sizeof raw);
  return each([&](int i) { return std::bit_cast<float>(static_cast<uint32_t>(raw[i]) << 16); });
}
inline Lanes load_f16(const std::byte* p) {
  uint16_t raw[16];
  std::memcpy(raw, p, sizeof raw);
  return each([&](int i) { return half_to_float(raw[i]); });
}
inline Lanes load_int8(const std::byte* p) {
  int8_t raw[16];
  std::memcpy(raw, p, sizeof raw);
  return each([&](int i) { return static_cast<float>(raw[i]); });
}
inline Raw load_raw(const std::byte* p) {
  Raw out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
inline Lanes bf16_even(const Raw& raw) {
  return each([&](int i) { return std::bit_cast<float>(raw.v[i] << 16); });
}
inline Lanes bf16_odd(const Raw& raw) {
  return each([&](int i) { return std::bit_cast<float>(raw.v[i] & 0xFFFF0000u); });
}

inline Lanes as_floats(const Raw& raw) {
  return each([&](int i) { return std::bit_cast<float>(raw.v[i]); });
}
// Byte b of each lane, signed.
template <int b>
inline Lanes byte_of(const Raw& raw) {
  return each([&](int i) { return static_cast<float>(static_cast<int8_t>(raw.v[i] >> 8 * b)); });
}
// Lane i of rows[j] and lane j of rows[i] change places.
inline void transpose(Raw (&rows)[16]) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < i; ++j) {
      const uint32_t word = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = word;
    }
}

struct Ints {
  int32_t v[16];
};
// Four weights a lane, none negative.
struct Quads {
  uint32_t v[16];
};

// Sums that dot() makes apart, for a product of this many rows; total() brings them together.
constexpr int sum_parts(int) {
  return 1;
}
inline Ints zero() {
  return {};
}
// x * 2^bits in all lanes.
template <int bits>
inline Ints shifted_left(int32_t x) {
  Ints out;
  for (int32_t& lane : out.v) lane = x * (1 << bits);
  return out;
}
inline Ints total(const Ints (&sums)[1]) {
  return sums[0];
}
inline Lanes to_float(Ints a) {
  return each([&](int i) { return static_cast<float>(a.v[i]); });
}
// The bytes of each lane; their lower and higher halves.
inline Quads bytes(const Raw& raw) {
  Quads out;
  std::memcpy(out.v, raw.v, sizeof out.v);
  return out;
}
inline Quads low_nibbles(const Raw& raw) {
  Quads out;
  for (int i = 0; i < 16; ++i) out.v[i] = raw.v[i] & 0x0F0F0F0F;
  return out;
}
inline Quads high_nibbles(const Raw& raw) {
  Quads out;
  for (int i = 0; i < 16; ++i) out.v[i] = raw.v[i] >> 4 & 0x0F0F0F0F;
  return out;
}
// Adds the four weights of each lane times the four 16-bit integers in two words, as store_quants() left
// them: here the first two in the first word.
inline void dot(Ints (&sums)[1], const Quads& weights, const int32_t* x) {
  for (int j = 0; j < 4; ++j) {
    const auto activation = static_cast<int16_t>(x[j / 2] >> (j % 2 * 16));
    for (int i = 0; i < 16; ++i)
      sums[0].v[i] += static_cast<int32_t>(weights.v[i] >> (8 * j) & 255) * activation;
  }
}
// 16 integral floats in 8 words.
inline void store_quants(int32_t* p, Lanes a) {
  for (int i = 0; i < 16; i += 2) {
    const auto low = static_cast<uint16_t>(static_cast<int16_t>(a.v[i]));
    const auto high = static_cast<uint16_t>(static_cast<int16_t>(a.v[i + 1]));
    *p++ = static_cast<int32_t>(low | static_cast<uint32_t>(high) << 16);
  }
}

}  // namespace
}  // namespace recycle::generic
