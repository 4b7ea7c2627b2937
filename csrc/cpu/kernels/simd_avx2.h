// AVX2: the integers of quantized weights. simd_generic.h says what each function means.
#pragma once

#include "simd_256.h"

namespace recycle::avx2 {
namespace {

// Rows that gemm() works on together. 16 registers, two for 16 lanes: 2 rows * even and odd sums, or 4 rows * one
// integer sum, are 8; the weights need the rest. With 3 and 6 rows GCC spills sums, at half the speed.
constexpr int max_rows(bool quantized) { return quantized ? 4 : 2; }

struct Ints {
  __m256i lo, hi;
};
// 16-bit integers: the first and third weight of each lane (even), and the second and fourth (odd).
struct Quads {
  __m256i even_lo, even_hi, odd_lo, odd_hi;
};

// One row leaves registers for two independent sums, which shortens the chain of additions. Two rows are slower with them
// (q4_0 from L3, Zen 3: by some 7%).
constexpr int sum_parts(int rows) { return rows == 1 ? 2 : 1; }
inline Ints zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
template <int bits>
inline Ints shifted_left(int32_t x) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_set1_epi32(x), bits);
  return {shifted, shifted};
}
inline Ints total(const Ints (&sums)[1]) { return sums[0]; }
inline Ints total(const Ints (&sums)[2]) {
  return {_mm256_add_epi32(sums[0].lo, sums[1].lo), _mm256_add_epi32(sums[0].hi, sums[1].hi)};
}
inline Lanes to_float(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
// Bits [first, first + count) of each 16-bit half.
template <int first, int count>
inline __m256i bits_of(__m256i words) {
  if constexpr (first > 0) words = _mm256_srli_epi16(words, first);
  if constexpr (first + count < 16) words = _mm256_and_si256(words, _mm256_set1_epi16((1 << count) - 1));
  return words;
}
template <int first, int count>
inline Quads field(Raw raw) {
  return {bits_of<first, count>(raw.lo), bits_of<first, count>(raw.hi), bits_of<first + 8, count>(raw.lo),
          bits_of<first + 8, count>(raw.hi)};
}
// Joined as bytes, then widened: two operations fewer than the other way.
template <int low_bits, int high_bits, int i>
inline Quads joined(Raw low, Raw high) {
  const auto bytes = [](__m256i lower, __m256i upper) {
    const auto mask = [](int bits, int to) { return _mm256_set1_epi8(static_cast<char>(((1 << bits) - 1) << to)); };
    constexpr int shift = i * high_bits - low_bits;  // to the right
    if constexpr (i > 0) lower = _mm256_srli_epi16(lower, i * low_bits);
    if constexpr (shift > 0) upper = _mm256_srli_epi16(upper, shift);
    if constexpr (shift < 0) upper = _mm256_slli_epi16(upper, -shift);
    return _mm256_or_si256(_mm256_and_si256(lower, mask(low_bits, 0)),
                           _mm256_and_si256(upper, mask(high_bits, low_bits)));
  };
  return field<0, 8>(Raw{bytes(low.lo, high.lo), bytes(low.hi, high.hi)});
}
template <int first>
inline Quads look_up(const uint8_t (&table)[16], Raw raw) {
  const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  const auto find = [&](__m256i words) {
    return _mm256_shuffle_epi8(values, _mm256_and_si256(_mm256_srli_epi16(words, first), _mm256_set1_epi8(15)));
  };
  return field<0, 8>(Raw{find(raw.lo), find(raw.hi)});
}
inline Ints dot(Ints a, __m256i lo, __m256i hi, int32_t pair) {
  const __m256i x = _mm256_set1_epi32(pair);
  return {_mm256_add_epi32(a.lo, _mm256_madd_epi16(lo, x)), _mm256_add_epi32(a.hi, _mm256_madd_epi16(hi, x))};
}
// The first word holds the first and third activation, the second word the second and fourth.
template <int parts>
inline void dot(Ints (&sums)[parts], Quads weights, const int32_t* x) {
  sums[0] = dot(sums[0], weights.even_lo, weights.even_hi, x[0]);
  sums[parts - 1] = dot(sums[parts - 1], weights.odd_lo, weights.odd_hi, x[1]);
}
inline void store_quants(int32_t* p, Lanes a) {
  const __m256i halves =
      _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)), 0xD8);
  const __m256i ordered = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(halves, 0xD8), 0xD8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), ordered);
}

}  // namespace
}  // namespace recycle::avx2
