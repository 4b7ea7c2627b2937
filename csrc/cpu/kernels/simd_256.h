// 16 float lanes in two AVX2 registers, for kernels_avx2.cpp and kernels_avxvnni.cpp. simd_generic.h says what each function
// means.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace recycle::RECYCLE_ISA {
namespace {

struct Lanes {
  __m256 lo, hi;
};
struct Raw {
  __m256i lo, hi;
};

// Attention's tile: heads whose sums it keeps together, and for each head vectors of 16 elements of values (an even
// number). 16 registers: 1 head * 4 vectors, or 2 heads * 2, are 8 registers of sums;
// the loaded values and weights need the rest.
constexpr int max_heads() { return 2; }
constexpr int value_vectors(int heads) { return heads == 1 ? 4 : 2; }

// Blocks of 16 keys whose scores are computed together, at most kMaxKeyBlocks: 2 heads * even and odd sums * 2
// registers are 8; a second block would need 16.
constexpr int key_blocks() { return 1; }

inline Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Lanes sub(Lanes a, Lanes b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Lanes mul(Lanes a, Lanes b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Lanes div(Lanes a, Lanes b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Lanes keep_above(Lanes value, Lanes x, float limit) {
  const __m256 limits = _mm256_set1_ps(limit);
  return {_mm256_and_ps(value.lo, _mm256_cmp_ps(x.lo, limits, _CMP_GE_OQ)),
          _mm256_and_ps(value.hi, _mm256_cmp_ps(x.hi, limits, _CMP_GE_OQ))};
}
inline Lanes round(Lanes a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, nearest), _mm256_round_ps(a.hi, nearest)};
}
inline __m256 power_of_2(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline Lanes power_of_2(Lanes n) { return {power_of_2(n.lo), power_of_2(n.hi)}; }
inline float reduce_add(Lanes a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(Lanes a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline __m128i load_128(const std::byte* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m256i load_256(const std::byte* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Lanes load_bf16(const std::byte* p) {
  const __m256i lo = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16);
  const __m256i hi = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p + 16)), 16);
  return {_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)};
}
inline Lanes load_f16(const std::byte* p) { return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 16))}; }
inline Lanes load_int8(const std::byte* p) {
  const __m128i bytes = load_128(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)))};
}
inline Lanes load_bits(const std::byte* p, int first, int count) {
  const __m128i shifted = _mm_srl_epi16(load_128(p), _mm_cvtsi32_si128(first));
  const __m128i bytes = _mm_and_si128(shifted, _mm_set1_epi8(static_cast<char>((1 << count) - 1)));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes)))};
}
inline Raw load_raw(const std::byte* p) { return {load_256(p), load_256(p + 32)}; }
inline Raw shifted_right(Raw raw, int count) {
  const __m128i bits = _mm_cvtsi32_si128(count);
  return {_mm256_srl_epi16(raw.lo, bits), _mm256_srl_epi16(raw.hi, bits)};
}
inline Lanes bf16_even(Raw raw) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(raw.lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(raw.hi, 16))};
}
inline Lanes bf16_odd(Raw raw) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(raw.lo, upper)), _mm256_castsi256_ps(_mm256_and_si256(raw.hi, upper))};
}

inline Lanes as_floats(Raw raw) { return {_mm256_castsi256_ps(raw.lo), _mm256_castsi256_ps(raw.hi)}; }
template <int b>
inline __m256 byte_of(__m256i words) {
  if constexpr (b < 3) words = _mm256_slli_epi32(words, 24 - 8 * b);
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(words, 24));
}
template <int b>
inline Lanes byte_of(Raw raw) {
  return {byte_of<b>(raw.lo), byte_of<b>(raw.hi)};
}
// Transposes 8 x 8 words: interleaves pairs of rows, then pairs of pairs, then swaps 128-bit halves.
inline void transpose(const __m256i (&rows)[8], __m256i (&columns)[8]) {
  __m256i fours[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256i low01 = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    const __m256i high01 = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    const __m256i low23 = _mm256_unpacklo_epi32(rows[i + 2], rows[i + 3]);
    const __m256i high23 = _mm256_unpackhi_epi32(rows[i + 2], rows[i + 3]);
    fours[i] = _mm256_unpacklo_epi64(low01, low23);
    fours[i + 1] = _mm256_unpackhi_epi64(low01, low23);
    fours[i + 2] = _mm256_unpacklo_epi64(high01, high23);
    fours[i + 3] = _mm256_unpackhi_epi64(high01, high23);
  }
  for (int i = 0; i < 4; ++i) {
    columns[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
    columns[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
  }
}
inline void transpose(Raw (&rows)[16]) {
  __m256i in[4][8], out[4][8];  // 8 x 8 tiles: top left, top right, bottom left, bottom right
  for (int i = 0; i < 8; ++i) {
    in[0][i] = rows[i].lo;
    in[1][i] = rows[i].hi;
    in[2][i] = rows[i + 8].lo;
    in[3][i] = rows[i + 8].hi;
  }
  for (int tile = 0; tile < 4; ++tile) transpose(in[tile], out[tile]);
  for (int i = 0; i < 8; ++i) {
    rows[i] = {out[0][i], out[2][i]};
    rows[i + 8] = {out[1][i], out[3][i]};
  }
}

}  // namespace
}  // namespace recycle::RECYCLE_ISA
