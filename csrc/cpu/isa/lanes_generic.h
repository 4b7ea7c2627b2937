// 16 float lanes in plain C++: the kernels on any processor, and the reading of the other lanes_*.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../pack.h"

namespace recycle::generic {
namespace {

struct Lanes {
  float v[16];
};
// 64 bytes of packed weights, one 32-bit lane an output.
struct Raw {
  uint32_t v[16];
};

constexpr int max_rows() {
  return 4;
}
constexpr int panels_for(int) {
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
// The signed byte j of each lane.
template <int j>
inline Lanes q8(const Raw& raw) {
  return each([&](int i) {
    return static_cast<float>(static_cast<int32_t>(raw.v[i] << (24 - 8 * j)) >> 24);
  });
}
// Nibble j of the group of 8: the low ones of the four bytes, then the high ones.
template <int j>
inline Lanes q4(const Raw& raw) {
  return each([&](int i) {
    return static_cast<float>(static_cast<int32_t>(raw.v[i] >> (j % 4 * 8 + j / 4 * 4) & 15));
  });
}

}  // namespace
}  // namespace recycle::generic
