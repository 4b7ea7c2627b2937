// The inner loop of a GEMV: one block's threads read panels of 16 outputs (format.h) and keep sums for R rows of x.
//
// A panel is read by one block from end to end, 16 bytes a thread. A cache line of 64 bytes has all 16 outputs for
// some k: four threads share the line, each with 4 outputs, and read the same x. A warp reads 8 lines at once; the
// warps take lines in turns, and load the lines of the next iteration before they use those of this one.
//
// The order of additions depends on k alone: the lines of a thread ascending; then the 8 lines of a warp's load, as a
// butterfly; then the warps ascending (gemv.cuh). Rows never mix: the bits of a row don't depend on other rows.
#pragma once

#include "intrinsics.cuh"
#include "recycle/numbers.h"

namespace recycle::cuda {

inline constexpr int kGemvThreads = 256;
inline constexpr int kGemvWarps = kGemvThreads / kWarp;
inline constexpr int kOutputsPerThread = 4;
inline constexpr int kThreadsPerLine = kPanelRows / kOutputsPerThread;
inline constexpr int kLinesPerWarp = kWarp / kThreadsPerLine;
// Cache lines of a thread's iteration, while those of the next iteration are in flight.
inline constexpr int kUnroll = 4;
// Stands for a format: the matrices differ in format, or have a rare one; the kernel dispatches at run time.
inline constexpr int kMixed = -1;

// A small integer to float without the slow conversion: 0x4B000000 is 2^23 as a float, with zeros for low bits.
RECYCLE_DEVICE float small_to_float(uint32_t value) { return std::bit_cast<float>(0x4B000000u | value) - 8388608.0f; }

// A thread's sums for a panel of each of M matrices and R rows. kFormat: the format of all matrices, or kMixed.
template <int R, int M, int kFormat>
class PanelSums {
 public:
  // Outputs 4 * (lane % 4) + o of matrix m and row r.
  float sums[M][R][kOutputsPerThread] = {};

  // Adds columns [begin, end) of the panels; x [R, stride] starts at column `begin`.
  RECYCLE_DEVICE void accumulate(const Format (&formats)[M], const std::byte* const (&panels)[M], int64_t begin,
                                 int64_t end, const float* x, int64_t stride) {
    stride_ = stride;
    if constexpr (kFormat == kMixed) {
      dispatch<0>(formats[0], panels, begin, end, x);
      if constexpr (M == 2) dispatch<1>(formats[1], panels, begin, end, x);
    } else {
      // 8 rows of two matrices side by side would spill registers.
      constexpr int N = R <= 4 ? M : 1;
      accumulate_lines<static_cast<Format>(kFormat), 0, N>(panels, begin, end, x);
      if constexpr (N < M) accumulate_lines<static_cast<Format>(kFormat), 1, 1>(panels, begin, end, x);
    }
  }

  // Sums over the lines of the warp, to all threads.
  RECYCLE_DEVICE void reduce_warp() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int o = 0; o < kOutputsPerThread; ++o)
          for (int mask = kWarp / 2; mask >= kThreadsPerLine; mask /= 2)
            sums[m][r][o] += shuffle_xor(sums[m][r][o], mask);
  }

 private:
  int64_t stride_;

  template <int m>
  RECYCLE_DEVICE void dispatch(Format format, const std::byte* const (&panels)[M], int64_t begin, int64_t end,
                               const float* x) {
    const auto try_formats = [&]<Format... formats>() {
      ((format == formats ? accumulate_lines<formats, m, 1>(panels, begin, end, x) : void()), ...);
    };
    try_formats.template operator()<Format::f32, Format::f16, Format::bf16, Format::q8_0, Format::q4_0, Format::q4_1>();
  }

  // Columns k in a cache line.
  template <Format format>
  static constexpr int k_per_line() {
    return format == Format::f32                             ? 1
           : format == Format::f16 || format == Format::bf16 ? 2
           : format == Format::q8_0                          ? 4
                                                             : 8;
  }

  // The part of a line with outputs 4 * group .. 4 * group + 3.
  template <Format format>
  RECYCLE_DEVICE static uint4 load_line(const std::byte* panel, int64_t line, int group) {
    if constexpr (is_quantized(format)) {
      constexpr int64_t lines = kBlock / k_per_line<format>();
      return load_weights(panel + quants_at(format, line / lines) + line % lines * kAlign + group * 16);
    } else if constexpr (format == Format::f16) {
      // Half a line is 16 outputs for one k.
      const uint2 low = load_weights_8(panel + line * kAlign + group * 8);
      const uint2 high = load_weights_8(panel + line * kAlign + kAlign / 2 + group * 8);
      return {low.x, low.y, high.x, high.y};
    } else {
      return load_weights(panel + line * kAlign + group * 16);
    }
  }

  // Matrices first .. first + N - 1, line by line side by side.
  template <Format format, int first, int N>
  RECYCLE_DEVICE void accumulate_lines(const std::byte* const (&panels)[M], int64_t begin, int64_t end,
                                       const float* x) {
    constexpr int K = k_per_line<format>();
    constexpr int kStep = kGemvWarps * kLinesPerWarp;
    constexpr int U = kUnroll / N;
    const int lane = threadIdx.x % kWarp;
    const int group = lane % kThreadsPerLine;
    const int64_t end_line = end / K;
    int64_t line = begin / K + threadIdx.x / kWarp * kLinesPerWarp + lane / kThreadsPerLine;
    x -= begin;
    uint4 now[N][U], next[N][U];
    const auto load = [&](uint4(&to)[N][U], int64_t from) {
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t at = from + u * kStep;
#pragma unroll
        for (int m = 0; m < N; ++m)
          if (at < end_line) to[m][u] = load_line<format>(panels[first + m], at, group);
      }
    };
    load(now, line);
    for (; line + (U - 1) * kStep < end_line; line += U * kStep) {
      load(next, line + U * kStep);
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int m = 0; m < N; ++m)
          accumulate_line<format>(panels[first + m], now[m][u], line + u * kStep, group, x, sums[first + m]);
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int m = 0; m < N; ++m) now[m][u] = next[m][u];
    }
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int m = 0; m < N; ++m)
        if (line + u * kStep < end_line)
          accumulate_line<format>(panels[first + m], now[m][u], line + u * kStep, group, x, sums[first + m]);
  }

  // raw: this thread's part of line `line`; x starts at column 0.
  template <Format format>
  RECYCLE_DEVICE void accumulate_line(const std::byte* panel, uint4 raw, int64_t line, int group, const float* x,
                                      float (&out)[R][kOutputsPerThread]) {
    constexpr int K = k_per_line<format>();
    const int64_t column = line * K;
    float scales[kOutputsPerThread], minima[kOutputsPerThread];
    if constexpr (is_quantized(format)) {
      const std::byte* at = panel + scales_at(format, column / kBlock) + group * kOutputsPerThread * 2;
      widen_halves(load_weights_8(at), scales);
      if constexpr (format == Format::q4_1) widen_halves(load_weights_8(at + kPanelRows * 2), minima);
    }
    float weights[kOutputsPerThread][K];
    widen<format>(raw, weights);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float values[K];
      load_x(x + r * stride_ + column, values);
      if constexpr (!is_quantized(format)) {
#pragma unroll
        for (int o = 0; o < kOutputsPerThread; ++o)
#pragma unroll
          for (int i = 0; i < K; ++i) out[r][o] = fmaf(weights[o][i], values[i], out[r][o]);
      } else {
        float total = 0;
        if constexpr (format == Format::q4_1)
          for (int i = 0; i < K; ++i) total += values[i];
#pragma unroll
        for (int o = 0; o < kOutputsPerThread; ++o) {
          float sum = 0;
#pragma unroll
          for (int i = 0; i < K; ++i) sum = fmaf(weights[o][i], values[i], sum);
          out[r][o] = fmaf(scales[o], sum, out[r][o]);
          if constexpr (format == Format::q4_1) out[r][o] = fmaf(minima[o], total, out[r][o]);
        }
      }
    }
  }

  // A quantized weight without its scale: quant - zero point.
  template <Format format, int K>
  RECYCLE_DEVICE static void widen(uint4 raw, float (&weights)[kOutputsPerThread][K]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int o = 0; o < kOutputsPerThread; ++o) {
      if constexpr (format == Format::f32) {
        weights[o][0] = std::bit_cast<float>(words[o]);
      } else if constexpr (format == Format::bf16) {
        weights[o][0] = std::bit_cast<float>(words[o] << 16);
        weights[o][1] = std::bit_cast<float>(words[o] & 0xFFFF0000u);
      } else if constexpr (format == Format::f16) {
        for (int i = 0; i < 2; ++i)
          weights[o][i] = from_half(static_cast<uint16_t>(words[i * 2 + o / 2] >> (o % 2 * 16)));
      } else if constexpr (format == Format::q8_0) {
        for (int i = 0; i < 4; ++i) weights[o][i] = small_to_float(words[o] >> (8 * i) & 255) - 128;
      } else {
        constexpr float zero = format == Format::q4_0 ? 8 : 0;
        for (int i = 0; i < 4; ++i) {
          weights[o][i] = small_to_float(words[o] >> (8 * i) & 15) - zero;
          weights[o][i + 4] = small_to_float(words[o] >> (8 * i + 4) & 15) - zero;
        }
      }
    }
  }

  RECYCLE_DEVICE static void widen_halves(uint2 raw, float (&values)[4]) {
    values[0] = from_half(static_cast<uint16_t>(raw.x));
    values[1] = from_half(static_cast<uint16_t>(raw.x >> 16));
    values[2] = from_half(static_cast<uint16_t>(raw.y));
    values[3] = from_half(static_cast<uint16_t>(raw.y >> 16));
  }

  // K neighbours in as few loads as possible; `from` is aligned to K floats, or to 4.
  template <int K>
  RECYCLE_DEVICE static void load_x(const float* from, float (&values)[K]) {
    if constexpr (K == 1) {
      values[0] = *from;
    } else if constexpr (K == 2) {
      const float2 two = *reinterpret_cast<const float2*>(from);
      values[0] = two.x;
      values[1] = two.y;
    } else {
#pragma unroll
      for (int i = 0; i < K; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + i);
        values[i] = four.x;
        values[i + 1] = four.y;
        values[i + 2] = four.z;
        values[i + 3] = four.w;
      }
    }
  }
};

}  // namespace recycle::cuda
