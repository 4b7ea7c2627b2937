// The inner loop of a GEMV: one block's threads read panels of 16 outputs (format.h) and keep sums for R rows of x.
//
// A panel is read by one block from end to end, 16 bytes a thread. A cache line of 64 bytes has all 16 outputs for
// some k: four threads share the line, each with 4 outputs, and read the same x. A warp reads 8 lines at once (and the
// lines of upper bits that belong to them); the warps take lines in turns, and load the lines of the next iteration
// before they use those of this one.
//
// The order of additions depends on k alone: the lines of a thread ascending; then the 8 lines of a warp's load, as a
// butterfly; then the warps ascending (gemv.cuh). Rows never mix: the bits of a row don't depend on other rows.
#pragma once

#include <utility>

#include "panel_line.cuh"

namespace recycle::cuda {

inline constexpr int kGemvThreads = 256;
inline constexpr int kGemvWarps = kGemvThreads / kWarp;
inline constexpr int kLinesPerWarp = kWarp / kThreadsPerLine;
inline constexpr int kLinesPerBlock = kGemvWarps * kLinesPerWarp;
// Loads of 16 bytes of a thread's iteration, while those of the next iteration are in flight.
inline constexpr int kUnroll = 4;
// Stands for a format: the matrices differ in format, or have a rare one; the kernel dispatches at run time.
inline constexpr int kMixed = -1;

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
    const auto try_formats = [&]<int... f>(std::integer_sequence<int, f...>) {
      ((static_cast<int>(format) == f ? accumulate_lines<static_cast<Format>(f), m, 1>(panels, begin, end, x) : void()),
       ...);
    };
    try_formats(std::make_integer_sequence<int, kFormats>());
  }

  // Matrices first .. first + N - 1, line by line side by side.
  template <Format format, int first, int N>
  RECYCLE_DEVICE void accumulate_lines(const std::byte* const (&panels)[M], int64_t begin, int64_t end,
                                       const float* x) {
    using Line = PanelLine<format>;
    constexpr int K = Line::kColumns;
    // Lines of a matrix in an iteration: fewer where a kernel has eight rows, or would spill registers. One where a kernel
    // has all formats, which take ptxas minutes otherwise.
    constexpr int kLines = kFormat == kMixed ? 1 : kUnroll / (R == 8 ? 2 : N);
    constexpr bool kHalf = Line::kHasUpper || (R == 2 && Line::kQ.has_minimum() && (N == 2 || Line::kQ.is_block_256()));
    constexpr int U = kHalf && kLines > 1 ? kLines / 2 : kLines;
    const int group = threadIdx.x % kThreadsPerLine;
    // Unsigned: divisions by constants are shifts.
    const auto end_line = static_cast<uint32_t>(end / K);
    uint32_t line = static_cast<uint32_t>(begin / K) + threadIdx.x / kThreadsPerLine;
    x -= begin;
    Line now[N][U], next[N][U];
    const auto load = [&](Line(&to)[N][U], uint32_t from) {
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const uint32_t at = from + u * kLinesPerBlock;
#pragma unroll
        for (int m = 0; m < N; ++m)
          if (at < end_line) to[m][u].load(panels[first + m], at, group);
      }
    };
    // A register that is loaded under a condition counts as in use before: without this, those of all formats at once.
    if constexpr (kFormat == kMixed)
      for (int u = 0; u < U; ++u) now[0][u] = next[0][u] = {};
    load(now, line);
    for (; line + (U - 1) * kLinesPerBlock < end_line; line += U * kLinesPerBlock) {
      load(next, line + U * kLinesPerBlock);
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int m = 0; m < N; ++m)
          accumulate_line(panels[first + m], now[m][u], line + u * kLinesPerBlock, group, x, sums[first + m]);
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int m = 0; m < N; ++m) now[m][u] = next[m][u];
    }
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int m = 0; m < N; ++m)
        if (line + u * kLinesPerBlock < end_line)
          accumulate_line(panels[first + m], now[m][u], line + u * kLinesPerBlock, group, x, sums[first + m]);
  }

  // x starts at column 0.
  template <Format format>
  RECYCLE_DEVICE void accumulate_line(const std::byte* panel, const PanelLine<format>& part, uint32_t line, int group,
                                      const float* x, float (&out)[R][kOutputsPerThread]) {
    constexpr int K = PanelLine<format>::kColumns;
    x += line * K;
    if constexpr (is_quantized(format)) {
      accumulate_quants(panel, part, line, group, x, out);
    } else {
      float weights[kOutputsPerThread][K];
      part.widen(weights);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        float values[K];
        load_x(x + r * stride_, values);
#pragma unroll
        for (int o = 0; o < kOutputsPerThread; ++o)
#pragma unroll
          for (int i = 0; i < K; ++i) out[r][o] = fmaf(weights[o][i], values[i], out[r][o]);
      }
    }
  }

  // Four columns of all rows at a time, so that few weights wait in registers. x starts at the line's first column.
  template <Format format>
  RECYCLE_DEVICE void accumulate_quants(const std::byte* panel, const PanelLine<format>& part, uint32_t line, int group,
                                        const float* x, float (&out)[R][kOutputsPerThread]) {
    constexpr bool has_minimum = PanelLine<format>::kQ.has_minimum();
    float line_sums[R][kOutputsPerThread] = {}, x_sums[R] = {};
#pragma unroll
    for (int quad = 0; quad < PanelLine<format>::kColumns / 4; ++quad) {
      float weights[kOutputsPerThread][4];
      part.widen_quad(line, quad, weights);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        float values[4];
        load_x(x + r * stride_ + quad * 4, values);
#pragma unroll
        for (int o = 0; o < kOutputsPerThread; ++o)
#pragma unroll
          for (int i = 0; i < 4; ++i) line_sums[r][o] = fmaf(weights[o][i], values[i], line_sums[r][o]);
        if constexpr (has_minimum)
#pragma unroll
          for (int i = 0; i < 4; ++i) x_sums[r] += values[i];
      }
    }
    float scales[kOutputsPerThread], minima[kOutputsPerThread];
    PanelLine<format>::load_scales(panel, line, group, scales, minima);
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int o = 0; o < kOutputsPerThread; ++o) {
        out[r][o] = fmaf(scales[o], line_sums[r][o], out[r][o]);
        if constexpr (has_minimum) out[r][o] = fmaf(minima[o], x_sums[r], out[r][o]);
      }
  }

  // K neighbours in one load; `from` is aligned to K floats.
  template <int K>
  RECYCLE_DEVICE static void load_x(const float* from, float (&values)[K]) {
    if constexpr (K == 1) {
      values[0] = *from;
    } else if constexpr (K == 2) {
      const float2 two = *reinterpret_cast<const float2*>(from);
      values[0] = two.x;
      values[1] = two.y;
    } else {
      const float4 four = *reinterpret_cast<const float4*>(from);
      values[0] = four.x;
      values[1] = four.y;
      values[2] = four.z;
      values[3] = four.w;
    }
  }
};

}  // namespace recycle::cuda
