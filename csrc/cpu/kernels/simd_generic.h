// 16 float lanes in plain C++, for any processor. These functions also say what those of the other simd_*.h mean.
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
// A cache line of packed weights: one 32-bit lane for each output.
struct Raw {
  uint32_t v[16];
};

// Rows that gemm() works on together: 4 rows * even and odd sums * 16 floats are 512 bytes, which stay in L1.
constexpr int max_rows(bool) { return 4; }
// Attention's tile: heads whose sums it keeps together, and for each head vectors of 16 elements of values (an even
// number). 4 heads * 2 vectors are 512 bytes of sums, which stay in L1.
constexpr int max_heads() { return 4; }
constexpr int value_vectors(int) { return 2; }

// Blocks of 16 keys whose scores are computed together, at most kMaxKeyBlocks.
constexpr int key_blocks() { return 1; }

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
inline void store(float* p, Lanes a) { std::memcpy(p, a.v, sizeof a.v); }
// Two roundings here, one in the AVX2 and AVX-512 lanes: the only difference of results.
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
  return each([&](int i) { return std::bit_cast<float>((static_cast<int32_t>(n.v[i]) + 127) << 23); });
}
inline float reduce_add(Lanes a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return a.v[0];
}
inline float reduce_max(Lanes a) {
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
// Bits [first, first + count) of 16 bytes.
inline Lanes load_bits(const std::byte* p, int first, int count) {
  return each([&](int i) { return static_cast<float>(static_cast<int>(p[i]) >> first & ((1 << count) - 1)); });
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
// Swaps lane i of rows[j] and lane j of rows[i].
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
// Four unsigned weights in each lane.
struct Quads {
  uint32_t v[16];
};

// Independent sums that dot() keeps for each of this many rows; total() adds them.
constexpr int sum_parts(int) { return 1; }
inline Ints zero() { return {}; }
// x * 2^bits in all lanes.
template <int bits>
inline Ints shifted_left(int32_t x) {
  Ints out;
  for (int32_t& lane : out.v) lane = x * (1 << bits);
  return out;
}
inline Ints total(const Ints (&sums)[1]) { return sums[0]; }
inline Lanes to_float(Ints a) {
  return each([&](int i) { return static_cast<float>(a.v[i]); });
}
// Bits [first, first + count) of each byte.
template <int first, int count>
inline Quads field(const Raw& raw) {
  Quads out;
  for (int i = 0; i < 16; ++i) out.v[i] = raw.v[i] >> first & 0x01010101u * ((1u << count) - 1);
  return out;
}
// Field i of low_bits bits of each byte of `low`, and above these bits field i of high_bits bits of `high`.
template <int low_bits, int high_bits, int i>
inline Quads joined(const Raw& low, const Raw& high) {
  const Quads lower = field<i * low_bits, low_bits>(low), upper = field<i * high_bits, high_bits>(high);
  Quads out;
  for (int lane = 0; lane < 16; ++lane) out.v[lane] = lower.v[lane] | upper.v[lane] << low_bits;
  return out;
}
// Bits [count, 8) of each byte as its lowest bits; what is above these is undefined.
inline Raw shifted_right(const Raw& raw, int count) {
  Raw out;
  for (int i = 0; i < 16; ++i) out.v[i] = raw.v[i] >> count;
  return out;
}
// The entries of the table that bits [first, first + 4) of each byte name.
template <int first>
inline Quads look_up(const uint8_t (&table)[16], const Raw& raw) {
  Quads out = {};
  for (int i = 0; i < 16; ++i)
    for (int byte = 0; byte < 32; byte += 8)
      out.v[i] |= static_cast<uint32_t>(table[raw.v[i] >> (byte + first) & 15]) << byte;
  return out;
}
// Adds to each lane its four weights times the four 16-bit activations in two words, in the order of store_quants():
// here the first two activations are in the first word.
inline void dot(Ints (&sums)[1], const Quads& weights, const int32_t* x) {
  for (int j = 0; j < 4; ++j) {
    const auto activation = static_cast<int16_t>(x[j / 2] >> (j % 2 * 16));
    for (int i = 0; i < 16; ++i) sums[0].v[i] += static_cast<int32_t>(weights.v[i] >> (8 * j) & 255) * activation;
  }
}
// Stores 16 integral floats as 16-bit integers in 8 words.
inline void store_quants(int32_t* p, Lanes a) {
  for (int i = 0; i < 16; i += 2) {
    const auto low = static_cast<uint16_t>(static_cast<int16_t>(a.v[i]));
    const auto high = static_cast<uint16_t>(static_cast<int16_t>(a.v[i + 1]));
    *p++ = static_cast<int32_t>(low | static_cast<uint32_t>(high) << 16);
  }
}

}  // namespace
}  // namespace recycle::generic
