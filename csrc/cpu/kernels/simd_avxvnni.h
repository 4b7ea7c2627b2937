// AVX2 with dot products of bytes, which Intel's client processors have since 2021: the integers of quantized weights.
// simd_generic.h says what each function means. Its speed is unmeasured.
#pragma once

#include "simd_256.h"

namespace recycle::avxvnni {
namespace {

// Rows that gemm() works on together. 16 registers: 2 rows * even and odd sums of floats are 8; 3 rows * two integer sums
// are 12. The weights need the rest.
constexpr int max_rows(bool quantized) { return quantized ? 3 : 2; }

struct Ints {
  __m256i lo, hi;
};
struct Quads {
  __m256i lo, hi;
};

// An activation is 256 * upper byte + lower byte, both signed. The first sum is over the lower bytes, the second over the
// upper ones.
constexpr int sum_parts(int) { return 2; }
inline Ints zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
template <int bits>
inline Ints shifted_left(int32_t x) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_set1_epi32(x), bits);
  return {shifted, shifted};
}
inline Ints total(const Ints (&sums)[2]) {
  return {_mm256_add_epi32(sums[0].lo, _mm256_slli_epi32(sums[1].lo, 8)),
          _mm256_add_epi32(sums[0].hi, _mm256_slli_epi32(sums[1].hi, 8))};
}
inline Lanes to_float(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
// Bits [first, first + count) of each byte, moved to bits [to, to + count).
template <int first, int count, int to = 0>
inline __m256i bits_of(__m256i words) {
  if constexpr (first > to) words = _mm256_srli_epi16(words, first - to);
  if constexpr (first < to) words = _mm256_slli_epi16(words, to - first);
  if constexpr (count < 8)
    words = _mm256_and_si256(words, _mm256_set1_epi8(static_cast<char>(((1 << count) - 1) << to)));
  return words;
}
template <int first, int count>
inline Quads field(Raw raw) {
  return {bits_of<first, count>(raw.lo), bits_of<first, count>(raw.hi)};
}
template <int low_bits, int high_bits, int i>
inline Quads joined(Raw low, Raw high) {
  const auto bytes = [](__m256i lower, __m256i upper) {
    return _mm256_or_si256(bits_of<i * low_bits, low_bits>(lower), bits_of<i * high_bits, high_bits, low_bits>(upper));
  };
  return {bytes(low.lo, high.lo), bytes(low.hi, high.hi)};
}
template <int first>
inline Quads look_up(const uint8_t (&table)[16], Raw raw) {
  const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(values, bits_of<first, 4>(raw.lo)),
          _mm256_shuffle_epi8(values, bits_of<first, 4>(raw.hi))};
}
inline void dot(Ints (&sums)[2], Quads weights, const int32_t* x) {
  for (int byte = 0; byte < 2; ++byte) {
    const __m256i four = _mm256_set1_epi32(x[byte]);
    sums[byte] = {_mm256_dpbusd_avx_epi32(sums[byte].lo, weights.lo, four),
                  _mm256_dpbusd_avx_epi32(sums[byte].hi, weights.hi, four)};
  }
}
// Four lower bytes, then four upper bytes, and so on.
inline void store_quants(int32_t* p, Lanes a) {
  const __m256i whole =
      _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)), 0xD8);
  const __m256i upper = _mm256_srai_epi16(_mm256_add_epi16(whole, _mm256_set1_epi16(128)), 8);
  const __m256i lower = _mm256_sub_epi16(whole, _mm256_slli_epi16(upper, 8));
  // Each half has eight lower bytes and eight upper ones: words 0, 2, 1, 3.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_shuffle_epi32(_mm256_packs_epi16(lower, upper), 0xD8));
}

}  // namespace
}  // namespace recycle::avxvnni
