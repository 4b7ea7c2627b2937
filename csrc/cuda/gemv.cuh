// Matrix times a few vectors, from the panels that the CPU reads too (format.h): the frame of every kernel that
// reads weights. What is done with the outputs differs (qkv.cu, project.cu, gate_up.cu, lm_head.cu).
//
//   x [rows, k] float32, through RMSNorm or as it is; W [n, k] packed  ->  16 outputs of each row at a time
//
// Bounded by memory up to 8 rows: at 3.35 TB/s an H100 has some 18 operations for each bfloat16 it reads, and a
// row costs one, widening another.
// A panel of 16 outputs is read by one block from end to end, 16 bytes a thread: a line of 64 bytes has all 16
// outputs for some k, so a quarter of a line goes to 4 outputs, and the x it meets is the same for all four lanes
// of a line. Warps take lines in turns, and ask for the lines of the next turn before they work on those of this
// one. x stands in shared memory, normed once for all panels of a block; where k is too large, a piece of it.
// Sums are kept in float32, in one order that depends on k alone: each thread's lines ascending, then the lines of a
// warp (a tree over the 8 lines of a load), then the warps. Rows never meet, so a row's bits don't depend on how
// many there are.
// Before it waits for the kernel that makes x, a block asks for its first panel and for the norm's weights, into L2.
// Rejected, by count: tensor cores (their tiles have 8 or 16 rows, so that 1 or 2 of them cost what 8 do, and
// widening is cheap enough); x from L1 (a load between the weights' arrival and their use, each time).
#pragma once

#include "intrinsics.cuh"
#include "recycle/model.h"
#include "recycle/numbers.h"
#include "step.h"

namespace recycle::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int kLanesOut = 4;  // outputs a thread sums up
inline constexpr int kLines = 8;     // lines a warp loads at once
inline constexpr int kUnroll =
    4;  // lines of a thread's turn; the next turn's are under way meanwhile
inline constexpr int kMostBlocks = 4;  // a multiprocessor
inline constexpr int kStaged = 16384;  // floats of x in shared memory at most, of all rows
inline constexpr int64_t kMostPrefetch = 64 * 1024;  // bytes
// In the place of a format: several of them, or a rare one, told apart at run time.
inline constexpr int kMixed = -1;

// k of x that are staged together, for R rows: whole turns of all warps, in every format.
template <int R>
constexpr int64_t staged_k() {
  return kStaged / R;
}

// What goes into a product. The row of x that stands for row r is r itself, or row_of[r].
struct Input {
  const float* x = nullptr;  // [., k]
  const int* row_of = nullptr;
  int rows = 0;
  const float* norm = nullptr;  // [k] RMSNorm's weights; null: x as it is
  float eps = 0;

  RECYCLE_DEVICE const float* row(int r, int64_t k) const {
    const int at = r < rows ? r : rows - 1;
    return x + (row_of != nullptr ? row_of[at] : at) * k;
  }
};

// Bytes to floats without the slow conversion: 0x4B000000 has 2^23 as its value and bits to spare.
RECYCLE_DEVICE float small_to_float(uint32_t value) {
  return std::bit_cast<float>(0x4B000000u | value) - 8388608.0f;
}

// One thread's sums over its lines of a panel of each of M matrices, for R rows: acc[m][r][o], outputs
// 4 * (lane % 4) + o. format: that of all matrices, or kMixed.
template <int R, int M, int format>
class Sums {
 public:
  float acc[M][R][kLanesOut];

  RECYCLE_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int o = 0; o < kLanesOut; ++o) acc[m][r][o] = 0;
  }

  // Columns begin .. end of the panels; x [R, stride] holds x from column `begin` on.
  RECYCLE_DEVICE void add(const Format (&formats)[M], const std::byte* const (&panels)[M],
                          int64_t begin, int64_t end, const float* x, int64_t stride) {
    stride_ = stride;
    if constexpr (format == kMixed) {
      add_one<0>(formats[0], panels, begin, end, x);
      if constexpr (M == 2) add_one<1>(formats[1], panels, begin, end, x);
    } else if constexpr (R <= 4) {
      walk<static_cast<Format>(format), 0, M>(panels, begin, end, x);
    } else {
      // 8 rows have no registers for two matrices side by side.
      walk<static_cast<Format>(format), 0, 1>(panels, begin, end, x);
      if constexpr (M == 2) walk<static_cast<Format>(format), 1, 1>(panels, begin, end, x);
    }
  }

  // The sums of all lines of a warp, in every lane of its column.
  RECYCLE_DEVICE void gather() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int o = 0; o < kLanesOut; ++o)
          for (int mask = kWarp / 2; mask >= 4; mask /= 2)
            acc[m][r][o] += shuffle_xor(acc[m][r][o], mask);
  }

 private:
  int64_t stride_;

  template <int m>
  RECYCLE_DEVICE void add_one(Format own, const std::byte* const (&panels)[M], int64_t begin,
                              int64_t end, const float* x) {
    switch (own) {
      case Format::f32:
        return walk<Format::f32, m, 1>(panels, begin, end, x);
      case Format::f16:
        return walk<Format::f16, m, 1>(panels, begin, end, x);
      case Format::bf16:
        return walk<Format::bf16, m, 1>(panels, begin, end, x);
      case Format::q8_0:
        return walk<Format::q8_0, m, 1>(panels, begin, end, x);
      case Format::q4_0:
        return walk<Format::q4_0, m, 1>(panels, begin, end, x);
      case Format::q4_1:
        return walk<Format::q4_1, m, 1>(panels, begin, end, x);
    }
  }

  // k that a line of 64 bytes covers
  template <Format own>
  static constexpr int k_of_line() {
    return own == Format::f32                          ? 1
           : own == Format::f16 || own == Format::bf16 ? 2
           : own == Format::q8_0                       ? 4
                                                       : 8;
  }

  // The part of a line that has outputs 4 * quarter to 4 * quarter + 3.
  template <Format own>
  RECYCLE_DEVICE static uint4 load_line(const std::byte* panel, int64_t line, int quarter) {
    if constexpr (is_quantised(own)) {
      constexpr int64_t lines = kBlock / k_of_line<own>();
      return load_weights(panel + quants_at(own, line / lines) + line % lines * kAlign +
                          quarter * 16);
    } else if constexpr (own == Format::f16) {
      // 16 outputs for one k, then for the next
      const uint2 low = load_weights_8(panel + line * kAlign + quarter * 8);
      const uint2 high = load_weights_8(panel + line * kAlign + kAlign / 2 + quarter * 8);
      return {low.x, low.y, high.x, high.y};
    } else {
      return load_weights(panel + line * kAlign + quarter * 16);
    }
  }

  // Matrices first .. first + N, line by line side by side.
  template <Format own, int first, int N>
  RECYCLE_DEVICE void walk(const std::byte* const (&panels)[M], int64_t begin, int64_t end,
                           const float* x) {
    constexpr int K = k_of_line<own>();
    constexpr int kStep = kWarps * kLines;
    constexpr int U = kUnroll / N;
    const int lane = threadIdx.x % kWarp;
    const int quarter = lane % 4;
    const int64_t last = end / K;
    int64_t line = begin / K + threadIdx.x / kWarp * kLines + lane / 4;
    x -= begin;
    uint4 now[N][U], next[N][U];
    const auto load = [&](uint4(&to)[N][U], int64_t from) {
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t at = from + u * kStep;
#pragma unroll
        for (int m = 0; m < N; ++m)
          if (at < last) to[m][u] = load_line<own>(panels[first + m], at, quarter);
      }
    };
    load(now, line);
    for (; line + (U - 1) * kStep < last; line += U * kStep) {
      load(next, line + U * kStep);
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int m = 0; m < N; ++m)
          add_line<own, first>(m, now[m][u], panels, line + u * kStep, quarter, x);
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int m = 0; m < N; ++m) now[m][u] = next[m][u];
    }
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int m = 0; m < N; ++m)
        if (line + u * kStep < last)
          add_line<own, first>(m, now[m][u], panels, line + u * kStep, quarter, x);
  }

  template <Format own, int first>
  RECYCLE_DEVICE void add_line(int m, uint4 raw, const std::byte* const (&panels)[M], int64_t line,
                               int quarter, const float* x) {
    constexpr int K = k_of_line<own>();
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    const int64_t at = line * K;
    // Quantised: the block's scale and minimum for each of the four outputs.
    float block_scale[kLanesOut], block_minimum[kLanesOut];
    if constexpr (is_quantised(own)) {
      const std::byte* scales =
          panels[first + m] + scales_at(own, at / kBlock) + quarter * kLanesOut * 2;
      four_halves(load_weights_8(scales), block_scale);
      if constexpr (own == Format::q4_1)
        four_halves(load_weights_8(scales + kPanelRows * 2), block_minimum);
    }
    float weights[kLanesOut][K];
#pragma unroll
    for (int o = 0; o < kLanesOut; ++o) {
      if constexpr (own == Format::f32) {
        weights[o][0] = std::bit_cast<float>(words[o]);
      } else if constexpr (own == Format::bf16) {
        weights[o][0] = std::bit_cast<float>(words[o] << 16);
        weights[o][1] = std::bit_cast<float>(words[o] & 0xFFFF0000u);
      } else if constexpr (own == Format::f16) {
        for (int i = 0; i < 2; ++i)
          weights[o][i] = from_half(static_cast<uint16_t>(words[i * 2 + o / 2] >> (o % 2 * 16)));
      } else if constexpr (own == Format::q8_0) {
        for (int i = 0; i < 4; ++i) weights[o][i] = small_to_float(words[o] >> (8 * i) & 255) - 128;
      } else {
        constexpr float zero = own == Format::q4_0 ? 8 : 0;
        for (int i = 0; i < 4; ++i) {
          weights[o][i] = small_to_float(words[o] >> (8 * i) & 15) - zero;
          weights[o][i + 4] = small_to_float(words[o] >> (8 * i + 4) & 15) - zero;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float values[K];
      take(x + r * stride_ + at, values);
      float (&sums)[kLanesOut] = acc[first + m][r];
      if constexpr (!is_quantised(own)) {
#pragma unroll
        for (int o = 0; o < kLanesOut; ++o)
#pragma unroll
          for (int i = 0; i < K; ++i) sums[o] = fmaf(weights[o][i], values[i], sums[o]);
      } else {
        float total = 0;
        if constexpr (own == Format::q4_1)
          for (int i = 0; i < K; ++i) total += values[i];
#pragma unroll
        for (int o = 0; o < kLanesOut; ++o) {
          float sum = 0;
#pragma unroll
          for (int i = 0; i < K; ++i) sum = fmaf(weights[o][i], values[i], sum);
          sums[o] = fmaf(block_scale[o], sum, sums[o]);
          if constexpr (own == Format::q4_1) sums[o] = fmaf(block_minimum[o], total, sums[o]);
        }
      }
    }
  }

  // Neighbours, with as few loads as can be: `from` is a multiple of K.
  template <int K>
  RECYCLE_DEVICE static void take(const float* from, float (&values)[K]) {
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

  RECYCLE_DEVICE static void four_halves(uint2 raw, float (&values)[4]) {
    values[0] = from_half(static_cast<uint16_t>(raw.x));
    values[1] = from_half(static_cast<uint16_t>(raw.x >> 16));
    values[2] = from_half(static_cast<uint16_t>(raw.y));
    values[3] = from_half(static_cast<uint16_t>(raw.y >> 16));
  }
};

template <int R>
constexpr int64_t product_shared_bytes(int matrices, int64_t k) {
  const int64_t staged = k < staged_k<R>() ? k : staged_k<R>();
  return (R * staged + int64_t{matrices} * kWarps * R * kPanelRows + round_up(kWarps * R + R, 4)) *
         4;
}

// The frame: each block takes units of work (one panel of each of the Op's matrices) in turns. The Op has
//   kMatrices, input, k, units
//   format()                         of all its matrices, or kMixed
//   matrix(m, unit), panel(unit)     which panel of which matrix
//   State                            what a thread keeps from unit to unit
//   put(state, row, unit, lane, values[kMatrices])   called for each row and output
//   finish(state, row, lane, in_use) after a row's last unit, by all threads; in_use: there is such a row
template <int R, class Op, int format>
__global__ void __launch_bounds__(kThreads, R <= 2 ? 2 : 1) products(Op op) {
  constexpr int M = Op::kMatrices;
  const int64_t k = op.k;
  if (threadIdx.x < M && blockIdx.x < op.units) {
    const Matrix matrix = op.matrix(threadIdx.x, blockIdx.x);
    const int64_t bytes = panel_bytes(matrix.format, k);
    prefetch(matrix.data + op.panel(blockIdx.x) * bytes,
             bytes < kMostPrefetch ? bytes : kMostPrefetch);
  }
  if (op.input.norm != nullptr)
    for (int64_t i = threadIdx.x * kWarp; i < k; i += kThreads * kWarp)
      prefetch_line(op.input.norm + i);
  let_next_start();
  wait_for_previous();

  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int own_row = threadIdx.x / kPanelRows;
  const int own_lane = threadIdx.x % kPanelRows;
  float* parts = shared_memory<float>();                  // [M, warps, R, 16]
  float* squares = parts + M * kWarps * R * kPanelRows;   // [warps, R]
  float* scales = squares + kWarps * R;                   // [R]
  float* staged = squares + round_up(kWarps * R + R, 4);  // [R, stride]
  const bool all_at_once = k <= staged_k<R>();
  const int64_t stride = all_at_once ? k : staged_k<R>();
  for (int first = 0; first < op.input.rows; first += R) {
    const float* x[R];
    for (int r = 0; r < R; ++r) x[r] = op.input.row(first + r, k);
    if (op.input.norm != nullptr) {
      for (int r = 0; r < R; ++r) {
        float sum = 0;
#pragma unroll 4
        for (int64_t i = threadIdx.x; i < k; i += kThreads) sum = fmaf(x[r][i], x[r][i], sum);
        sum = warp_sum(sum);
        if (lane == 0) squares[warp * R + r] = sum;
      }
      __syncthreads();
      if (threadIdx.x < R) {
        float sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += squares[w * R + threadIdx.x];
        scales[threadIdx.x] = 1 / sqrtf(sum / static_cast<float>(k) + op.input.eps);
      }
      __syncthreads();
    }
    const auto stage = [&](int64_t begin, int64_t end) {
      __syncthreads();
      for (int r = 0; r < R; ++r) {
        const float scale = op.input.norm != nullptr ? scales[r] : 1;
#pragma unroll 4
        for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
          float value = x[r][i] * scale;
          if (op.input.norm != nullptr) value *= op.input.norm[i];
          staged[r * stride + i - begin] = value;
        }
      }
      __syncthreads();
    };
    if (all_at_once) stage(0, k);
    typename Op::State state = {};
    for (int64_t unit = blockIdx.x; unit < op.units; unit += gridDim.x) {
      Format formats[M];
      const std::byte* panels[M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const Matrix matrix = op.matrix(m, unit);
        formats[m] = matrix.format;
        panels[m] = matrix.data + op.panel(unit) * panel_bytes(matrix.format, k);
      }
      Sums<R, M, format> sums;
      sums.clear();
      for (int64_t begin = 0; begin < k; begin += staged_k<R>()) {
        const int64_t end = begin + staged_k<R>() < k ? begin + staged_k<R>() : k;
        if (!all_at_once) stage(begin, end);
        sums.add(formats, panels, begin, end, staged, stride);
      }
      sums.gather();
      if (lane < 4) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int o = 0; o < kLanesOut; ++o)
              parts[((m * kWarps + warp) * R + r) * kPanelRows + lane * kLanesOut + o] =
                  sums.acc[m][r][o];
      }
      __syncthreads();
      if (own_row < R && first + own_row < op.input.rows) {
        float values[M];
        for (int m = 0; m < M; ++m) {
          values[m] = 0;
          for (int w = 0; w < kWarps; ++w)
            values[m] += parts[((m * kWarps + w) * R + own_row) * kPanelRows + own_lane];
        }
        op.put(state, first + own_row, unit, own_lane, values);
      }
      __syncthreads();
    }
    op.finish(state, first + own_row, own_lane, own_row < R && first + own_row < op.input.rows);
    __syncthreads();
  }
}

// The format that matrices have in common.
template <class... Matrices>
int common_format(const Matrix& first, const Matrices&... others) {
  return ((others.format == first.format) && ...) ? static_cast<int>(first.format) : kMixed;
}

// How kernels are started: the stream, what the GPU has, and the first failure.
struct Launcher {
  Stream stream;
  Device device;
  bool ok = true;

  Launcher(const Device& device, void* stream)
      : stream(static_cast<Stream>(stream)), device(device) {}

  // The first kernel waits for all that stands before it in the stream: what that is isn't ours.
  template <class Kernel, class... Arguments>
  void run(Kernel kernel, dim3 grid, int threads, int64_t shared_bytes,
           const Arguments&... arguments) {
    ok = ok && launch(kernel, grid, threads, shared_bytes, device.shared_bytes, stream,
                      device.overlap && !is_first_, arguments...);
    is_first_ = false;
  }

  // Blocks that products() of this many units starts.
  int blocks(int64_t units) const {
    const int64_t most = int64_t{device.multiprocessors} * kMostBlocks;
    return static_cast<int>(units < most ? units : most);
  }

  // One kernel for each format, because what a format needs of registers shouldn't cost the others.
  template <class Op>
  void products(const Op& op) {
    switch (op.format()) {
      case static_cast<int>(Format::bf16):
        return products_of<static_cast<int>(Format::bf16)>(op);
      case static_cast<int>(Format::q8_0):
        return products_of<static_cast<int>(Format::q8_0)>(op);
      case static_cast<int>(Format::q4_0):
        return products_of<static_cast<int>(Format::q4_0)>(op);
      case static_cast<int>(Format::q4_1):
        return products_of<static_cast<int>(Format::q4_1)>(op);
      default:
        return products_of<kMixed>(op);
    }
  }

 private:
  template <int format, class Op>
  void products_of(const Op& op) {
    const auto of = [&]<int R>() {
      run(cuda::products<R, Op, format>, dim3(blocks(op.units)), kThreads,
          product_shared_bytes<R>(Op::kMatrices, op.k), op);
    };
    const int rows = op.input.rows;
    if (rows == 1) return of.template operator()<1>();
    if (rows == 2) return of.template operator()<2>();
    if (rows <= 4) return of.template operator()<4>();
    of.template operator()<8>();
  }

  bool is_first_ = true;
};

}  // namespace recycle::cuda
