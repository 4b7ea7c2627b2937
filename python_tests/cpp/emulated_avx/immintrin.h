// The instructions of AVX-512 and AVX-VNNI that csrc/cpu/kernels/simd_avx512.h and simd_avxvnni.h use, as loops: their
// kernels can then be tested on a processor that has AVX2 alone. Intel's Intrinsics Guide defines each; the compiler's own declarations are hidden.
#pragma once

#include_next <immintrin.h>

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

namespace emulated {

template <class T>
using Of = std::array<T, 64 / sizeof(T)>;

template <class T, class From>
Of<T> as(From from) {
  static_assert(sizeof(From) == 64);
  return std::bit_cast<Of<T>>(from);
}
template <class T>
__m512i ints(const Of<T>& values) {
  return std::bit_cast<__m512i>(values);
}
inline __m512 floats(const Of<float>& values) { return std::bit_cast<__m512>(values); }

// f(i) for each element.
template <class T, class F>
Of<T> each(F f) {
  Of<T> out;
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<T>(f(i));
  return out;
}
template <class F>
__m512 map(__m512 a, __m512 b, F f) {
  const auto x = as<float>(a), y = as<float>(b);
  return floats(each<float>([&](size_t i) { return f(x[i], y[i]); }));
}
template <class T, class F>
__m512i map(__m512i a, __m512i b, F f) {
  const auto x = as<T>(a), y = as<T>(b);
  return ints(each<T>([&](size_t i) { return f(x[i], y[i]); }));
}
// Element `i` of the 128-bit lane that element `at` of T is in.
template <class T>
constexpr size_t in_lane(size_t at, size_t i) {
  constexpr size_t lane = 16 / sizeof(T);
  return at / lane * lane + i;
}
// The lower (first = 0) or upper (first = 1) halves of the lanes of a and b, alternating.
template <class T>
__m512i unpack(__m512i a, __m512i b, size_t first) {
  const auto x = as<T>(a), y = as<T>(b);
  constexpr size_t lane = 16 / sizeof(T);
  return ints(each<T>([&](size_t i) {
    const size_t from = in_lane<T>(i, first * lane / 2 + i % lane / 2);
    return i % 2 == 0 ? x[from] : y[from];
  }));
}

inline __m512 set1_ps(float x) {
  return floats(each<float>([&](size_t) { return x; }));
}
inline __m512i set1_epi32(int x) {
  return ints(each<int32_t>([&](size_t) { return x; }));
}
inline __m512i set1_epi8(char x) {
  return ints(each<int8_t>([&](size_t) { return x; }));
}
inline __m512i setzero_si512() { return set1_epi32(0); }
inline __m512 loadu_ps(const void* p) {
  Of<float> out;
  std::memcpy(&out, p, 64);
  return floats(out);
}
inline __m512i loadu_si512(const void* p) { return std::bit_cast<__m512i>(loadu_ps(p)); }
inline void storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, 64); }
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto x = as<float>(a), y = as<float>(b), z = as<float>(c);
  return floats(each<float>([&](size_t i) { return __builtin_fmaf(x[i], y[i], z[i]); }));
}
inline __m512 add_ps(__m512 a, __m512 b) {
  return map(a, b, [](float x, float y) { return x + y; });
}
inline __m512 sub_ps(__m512 a, __m512 b) {
  return map(a, b, [](float x, float y) { return x - y; });
}
inline __m512 mul_ps(__m512 a, __m512 b) {
  return map(a, b, [](float x, float y) { return x * y; });
}
inline __m512 div_ps(__m512 a, __m512 b) {
  return map(a, b, [](float x, float y) { return x / y; });
}
inline __m512 max_ps(__m512 a, __m512 b) {
  return map(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline float reduce_max_ps(__m512 a) {
  const auto x = as<float>(a);
  float out = x[0];
  for (const float value : x) out = out > value ? out : value;
  return out;
}
inline __mmask16 cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  const auto x = as<float>(a), y = as<float>(b);
  __mmask16 out = 0;
  for (int i = 0; i < 16; ++i)
    if (predicate == _CMP_GE_OQ && x[i] >= y[i]) out = static_cast<__mmask16>(out | 1 << i);
  return out;
}
inline __m512 maskz_mov_ps(__mmask16 mask, __m512 a) {
  const auto x = as<float>(a);
  return floats(each<float>([&](size_t i) { return mask >> i & 1 ? x[i] : 0; }));
}
inline __m512 roundscale_ps(__m512 a, int) {
  return map(a, a, [](float x, float) { return __builtin_nearbyintf(x); });
}
inline __m256 half_of(__m512 a, size_t upper) {
  std::array<__m256, 2> halves;
  std::memcpy(halves.data(), &a, 64);
  return halves[upper];
}
inline __m512 castsi512_ps(__m512i a) { return std::bit_cast<__m512>(a); }
inline __m512i add_epi32(__m512i a, __m512i b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
inline __m512i and_si512(__m512i a, __m512i b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x & y; });
}
inline __m512i or_si512(__m512i a, __m512i b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x | y; });
}
inline __m512i slli_epi32(__m512i a, unsigned n) {
  return map<uint32_t>(a, a, [&](uint32_t x, uint32_t) { return x << n; });
}
inline __m512i srai_epi32(__m512i a, unsigned n) {
  return map<int32_t>(a, a, [&](int32_t x, int32_t) { return x >> n; });
}
inline __m512i slli_epi16(__m512i a, unsigned n) {
  return map<uint16_t>(a, a, [&](unsigned x, unsigned) { return x << n; });
}
inline __m512i srli_epi16(__m512i a, unsigned n) {
  return map<uint16_t>(a, a, [&](unsigned x, unsigned) { return x >> n; });
}
inline __m512i srl_epi16(__m512i a, __m128i n) { return srli_epi16(a, static_cast<unsigned>(_mm_cvtsi128_si32(n))); }
// Values beyond the integers become the smallest one.
inline __m512i cvtps_epi32(__m512 a) {
  const auto x = as<float>(a);
  return ints(each<int32_t>([&](size_t i) {
    return x[i] >= -0x1p31f && x[i] < 0x1p31f ? static_cast<int32_t>(__builtin_nearbyintf(x[i])) : INT32_MIN;
  }));
}
inline __m512 cvtepi32_ps(__m512i a) {
  const auto x = as<int32_t>(a);
  return floats(each<float>([&](size_t i) { return x[i]; }));
}
template <class T, class From>
__m512i widened(From from) {
  std::array<T, 16> values;
  static_assert(sizeof(values) == sizeof(from));
  std::memcpy(&values, &from, sizeof(values));
  return ints(each<int32_t>([&](size_t i) { return values[i]; }));
}
inline __m512i cvtepu16_epi32(__m256i a) { return widened<uint16_t>(a); }
inline __m512i cvtepi8_epi32(__m128i a) { return widened<int8_t>(a); }
inline __m512i cvtepu8_epi32(__m128i a) { return widened<uint8_t>(a); }
inline __m512 cvtph_ps(__m256i a) {
  const std::array<__m256, 2> halves = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                                        _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
  return std::bit_cast<__m512>(halves);
}
inline __m128i cvtepi32_epi8(__m512i a) {
  const auto x = as<int32_t>(a);
  std::array<int8_t, 16> out;
  for (int i = 0; i < 16; ++i) out[i] = static_cast<int8_t>(x[i]);
  return std::bit_cast<__m128i>(out);
}
inline __m512i broadcast_i32x4(__m128i a) {
  const std::array<__m128i, 4> lanes = {a, a, a, a};
  return std::bit_cast<__m512i>(lanes);
}
inline __m512i shuffle_epi8(__m512i a, __m512i b) {
  const auto x = as<uint8_t>(a), at = as<uint8_t>(b);
  return ints(each<uint8_t>([&](size_t i) { return at[i] & 128 ? 0 : x[in_lane<uint8_t>(i, at[i] & 15)]; }));
}
inline __m512i shuffle_i32x4(__m512i a, __m512i b, unsigned lanes) {
  const auto x = as<uint32_t>(a), y = as<uint32_t>(b);
  return ints(each<uint32_t>([&](size_t i) {
    const size_t from = (lanes >> (i / 4 * 2) & 3) * 4 + i % 4;
    return i < 8 ? x[from] : y[from];
  }));
}
// Four products of an unsigned and a signed byte, without saturation.
inline __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  const auto total = as<int32_t>(sum);
  const auto x = as<uint8_t>(a);
  const auto y = as<int8_t>(b);
  return ints(each<int32_t>([&](size_t i) {
    int32_t out = total[i];
    for (size_t j = 4 * i; j < 4 * i + 4; ++j) out += static_cast<int32_t>(x[j]) * y[j];
    return out;
  }));
}
inline __m256i dpbusd_avx_epi32(__m256i sum, __m256i a, __m256i b) {
  const auto twice = [](__m256i half) {
    const std::array<__m256i, 2> halves = {half, half};
    return std::bit_cast<__m512i>(halves);
  };
  return _mm256_castps_si256(half_of(castsi512_ps(dpbusd_epi32(twice(sum), twice(a), twice(b))), 0));
}

}  // namespace emulated

#define _mm512_set1_ps emulated::set1_ps
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_epi8 emulated::set1_epi8
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_add_ps emulated::add_ps
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_div_ps emulated::div_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#define _mm512_maskz_mov_ps emulated::maskz_mov_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps emulated::roundscale_ps
#define _mm512_castps512_ps256(a) emulated::half_of(a, 0)
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated::half_of
#define _mm512_castsi512_ps emulated::castsi512_ps
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_and_si512 emulated::and_si512
#define _mm512_or_si512 emulated::or_si512
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#undef _mm512_srai_epi32
#define _mm512_srai_epi32 emulated::srai_epi32
#undef _mm512_slli_epi16
#define _mm512_slli_epi16 emulated::slli_epi16
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_srl_epi16 emulated::srl_epi16
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_broadcast_i32x4 emulated::broadcast_i32x4
#define _mm512_shuffle_epi8 emulated::shuffle_epi8
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 emulated::shuffle_i32x4
#define _mm512_unpacklo_epi32(a, b) emulated::unpack<uint32_t>(a, b, 0)
#define _mm512_unpackhi_epi32(a, b) emulated::unpack<uint32_t>(a, b, 1)
#define _mm512_unpacklo_epi64(a, b) emulated::unpack<uint64_t>(a, b, 0)
#define _mm512_unpackhi_epi64(a, b) emulated::unpack<uint64_t>(a, b, 1)
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd_avx_epi32
