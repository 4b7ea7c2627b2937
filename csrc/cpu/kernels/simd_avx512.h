// 16 float lanes in one AVX-512 register. simd_generic.h says what each function means. The results are those of
// simd_avx2.h, bit for bit: the same operations on each lane, the same tree in reduce_add().
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace recycle::avx512 {
namespace {

struct Lanes {
  __m512 v;
};
struct Raw {
  __m512i v;
};

// Rows that gemm() works on together. 32 registers: 12 rows * even and odd sums are 24; quantized, 8 rows * two integer
// sums and the float sum are 24; the weights need the rest.
constexpr int max_rows(bool quantized) { return quantized ? 8 : 12; }
// Attention's tile: heads whose sums it keeps together, and for each head vectors of 16 elements of values (an even
// number). 32 registers: 6 heads * 4 vectors are 24 sums; the loaded values and weights need the rest.
constexpr int max_heads() { return 6; }
constexpr int value_vectors(int) { return 4; }

// Blocks of 16 keys whose scores are computed together, at most kMaxKeyBlocks: 6 heads * even and odd sums * 2 blocks
// are 24 of 32 registers.
constexpr int key_blocks() { return 2; }

inline Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes sub(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes div(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes keep_above(Lanes value, Lanes x, float limit) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_GE_OQ), value.v)};
}
inline Lanes round(Lanes a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Lanes power_of_2(Lanes n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
inline float reduce_add(Lanes a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(Lanes a) { return _mm512_reduce_max_ps(a.v); }

inline __m256i load_256(const std::byte* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Lanes load_bf16(const std::byte* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(p)), 16))};
}
inline Lanes load_f16(const std::byte* p) { return {_mm512_cvtph_ps(load_256(p))}; }
inline Lanes load_int8(const std::byte* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
inline Lanes load_bits(const std::byte* p, int first, int count) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i shifted = _mm_srl_epi16(bytes, _mm_cvtsi32_si128(first));
  const __m128i masked = _mm_and_si128(shifted, _mm_set1_epi8(static_cast<char>((1 << count) - 1)));
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(masked))};
}
inline Raw load_raw(const std::byte* p) { return {_mm512_loadu_si512(p)}; }
inline Lanes bf16_even(Raw raw) { return {_mm512_castsi512_ps(_mm512_slli_epi32(raw.v, 16))}; }
inline Lanes bf16_odd(Raw raw) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(raw.v, upper))};
}

inline Lanes as_floats(Raw raw) { return {_mm512_castsi512_ps(raw.v)}; }
template <int b>
inline Lanes byte_of(Raw raw) {
  const __m512i top = b < 3 ? _mm512_slli_epi32(raw.v, 24 - 8 * b) : raw.v;
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24))};
}
// Interleaves pairs of rows, then pairs of pairs, then moves 128-bit lanes in two steps.
inline void transpose(Raw (&rows)[16]) {
  __m512i fours[16];  // 128-bit lane j of fours[4 i + c] is column 4 j + c of rows 4 i to 4 i + 3
  for (int i = 0; i < 16; i += 4) {
    const __m512i low01 = _mm512_unpacklo_epi32(rows[i].v, rows[i + 1].v);
    const __m512i high01 = _mm512_unpackhi_epi32(rows[i].v, rows[i + 1].v);
    const __m512i low23 = _mm512_unpacklo_epi32(rows[i + 2].v, rows[i + 3].v);
    const __m512i high23 = _mm512_unpackhi_epi32(rows[i + 2].v, rows[i + 3].v);
    fours[i] = _mm512_unpacklo_epi64(low01, low23);
    fours[i + 1] = _mm512_unpackhi_epi64(low01, low23);
    fours[i + 2] = _mm512_unpacklo_epi64(high01, high23);
    fours[i + 3] = _mm512_unpackhi_epi64(high01, high23);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512i even_top = _mm512_shuffle_i32x4(fours[c], fours[c + 4], 0x88);
    const __m512i odd_top = _mm512_shuffle_i32x4(fours[c], fours[c + 4], 0xDD);
    const __m512i even_bottom = _mm512_shuffle_i32x4(fours[c + 8], fours[c + 12], 0x88);
    const __m512i odd_bottom = _mm512_shuffle_i32x4(fours[c + 8], fours[c + 12], 0xDD);
    rows[c].v = _mm512_shuffle_i32x4(even_top, even_bottom, 0x88);
    rows[c + 4].v = _mm512_shuffle_i32x4(odd_top, odd_bottom, 0x88);
    rows[c + 8].v = _mm512_shuffle_i32x4(even_top, even_bottom, 0xDD);
    rows[c + 12].v = _mm512_shuffle_i32x4(odd_top, odd_bottom, 0xDD);
  }
}

struct Ints {
  __m512i v;
};
struct Quads {
  __m512i v;
};

// VNNI multiplies bytes, so an activation is 256 * upper byte + lower byte, both signed. The first sum is over the
// lower bytes, the second over the upper ones.
constexpr int sum_parts(int) { return 2; }
inline Ints zero() { return {_mm512_setzero_si512()}; }
template <int bits>
inline Ints shifted_left(int32_t x) {
  return {_mm512_slli_epi32(_mm512_set1_epi32(x), bits)};
}
inline Ints total(const Ints (&sums)[2]) { return {_mm512_add_epi32(sums[0].v, _mm512_slli_epi32(sums[1].v, 8))}; }
inline Lanes to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
// Bits [first, first + count) of each byte, moved to bits [to, to + count).
template <int first, int count, int to = 0>
inline __m512i bits_of(__m512i words) {
  if constexpr (first > to) words = _mm512_srli_epi16(words, first - to);
  if constexpr (first < to) words = _mm512_slli_epi16(words, to - first);
  if constexpr (count < 8)
    words = _mm512_and_si512(words, _mm512_set1_epi8(static_cast<char>(((1 << count) - 1) << to)));
  return words;
}
template <int first, int count>
inline Quads field(Raw raw) {
  return {bits_of<first, count>(raw.v)};
}
template <int low_bits, int high_bits, int i>
inline Quads joined(Raw low, Raw high) {
  return {_mm512_or_si512(bits_of<i * low_bits, low_bits>(low.v), bits_of<i * high_bits, high_bits, low_bits>(high.v))};
}
inline Raw shifted_right(Raw raw, int count) { return {_mm512_srl_epi16(raw.v, _mm_cvtsi32_si128(count))}; }
template <int first>
inline Quads look_up(const uint8_t (&table)[16], Raw raw) {
  const __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm512_shuffle_epi8(values, bits_of<first, 4>(raw.v))};
}
inline void dot(Ints (&sums)[2], Quads weights, const int32_t* x) {
  sums[0].v = _mm512_dpbusd_epi32(sums[0].v, weights.v, _mm512_set1_epi32(x[0]));
  sums[1].v = _mm512_dpbusd_epi32(sums[1].v, weights.v, _mm512_set1_epi32(x[1]));
}
inline void store_quants(int32_t* p, Lanes a) {
  const __m512i whole = _mm512_cvtps_epi32(a.v);
  const __m128i lower = _mm512_cvtepi32_epi8(whole);
  const __m128i upper = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(lower, upper));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 4), _mm_unpackhi_epi32(lower, upper));
}

}  // namespace
}  // namespace recycle::avx512
