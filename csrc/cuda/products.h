// Matrix times a few vectors, from the panels that the CPU reads too (format.h): the frame of every kernel that
// reads weights. What is done with the outputs differs (qkv.cu, residual.cu, gate_up.cu, head.cu).
//
//   x [rows, k] float32, through RMSNorm or as it is; W [n, k] packed  ->  16 outputs of each row at a time
//
// Bounded by memory up to 8 rows: at 3.35 TB/s an H100 has some 18 operations for each bfloat16 it reads, and a
// row costs one, widening another.
// A panel of 16 outputs is read by one block from end to end, 16 bytes a thread: a line of 64 bytes has all 16
// outputs for some k, so a quarter of a line goes to 4 outputs, and the x it meets is the same for all four lanes
// of a line. Warps take lines in turns. Sums are kept in float32, in one order that depends on k alone:
// each thread's lines ascending, then the lines of a warp (a tree over the 8 lines of a load), then the warps.
// Rows never meet, so a row's bits don't depend on how many there are.
// Before it waits for the kernel that makes x, a block asks for its first panel, into L2.
// Rejected, by count: tensor cores (their tiles have 8 or 16 rows, so that 1 or 2 of them cost what 8 do, and
// widening is cheap enough); x in shared memory (8 rows of 11,008 don't fit; L1 serves 8 bytes of x for 16 of weights).
#pragma once

#include "device.h"
#include "recycle/model.h"
#include "recycle/numbers.h"
#include "step.h"

namespace recycle::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int kLanesOut = 4;    // outputs a thread sums up
inline constexpr int kLines = 8;       // lines a warp loads at once
inline constexpr int kUnroll = 4;      // loads under way a thread
inline constexpr int kMostBlocks = 4;  // a multiprocessor

// What goes into a product. The row of x that stands for row r is r itself, or row_of[r].
struct Input {
  const float* x = nullptr;  // [., k]
  const int* row_of = nullptr;
  int rows = 0;
  const float* norm = nullptr;  // [k] RMSNorm's weight; null: x as it is
  bool has_norm = false;        // an RMSNorm without weights is one too
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

// One thread's sums over its lines of a panel, for R rows: acc[r][o], outputs 4 * (lane % 4) + o.
template <int R>
class Sums {
 public:
  float acc[R][kLanesOut];

  RECYCLE_DEVICE void clear() {
    for (int r = 0; r < R; ++r)
      for (int o = 0; o < kLanesOut; ++o) acc[r][o] = 0;
  }

  // x: the rows; scale: their RMSNorm's factor, where norm isn't null or has_norm.
  RECYCLE_DEVICE void add(Format format, const std::byte* panel, int64_t k,
                          const float* const (&x)[R], const Input& input, const float (&scale)[R]) {
    switch (format) {
      case Format::f32:
        return walk<Format::f32>(panel, k, x, input, scale);
      case Format::f16:
        return walk<Format::f16>(panel, k, x, input, scale);
      case Format::bf16:
        return walk<Format::bf16>(panel, k, x, input, scale);
      case Format::q8_0:
        return walk<Format::q8_0>(panel, k, x, input, scale);
      case Format::q4_0:
        return walk<Format::q4_0>(panel, k, x, input, scale);
      case Format::q4_1:
        return walk<Format::q4_1>(panel, k, x, input, scale);
    }
  }

  // The sums of all lines of a warp, in every lane of its column.
  RECYCLE_DEVICE void gather() {
    for (int r = 0; r < R; ++r)
      for (int o = 0; o < kLanesOut; ++o)
        for (int mask = kWarp / 2; mask >= 4; mask /= 2) acc[r][o] += shuffle_xor(acc[r][o], mask);
  }

 private:
  // k that a line of 64 bytes covers
  template <Format format>
  static constexpr int k_of_line() {
    return format == Format::f32                             ? 1
           : format == Format::f16 || format == Format::bf16 ? 2
           : format == Format::q8_0                          ? 4
                                                             : 8;
  }

  template <Format format>
  RECYCLE_DEVICE static const std::byte* line_at(const std::byte* panel, int64_t line) {
    if constexpr (is_quantised(format)) {
      constexpr int64_t lines = kBlock / k_of_line<format>();
      return panel + quants_at(format, line / lines) + line % lines * kAlign;
    } else {
      return panel + line * kAlign;
    }
  }

  template <Format format>
  RECYCLE_DEVICE void walk(const std::byte* panel, int64_t k, const float* const (&x)[R],
                           const Input& input, const float (&scale)[R]) {
    constexpr int kStep = kWarps * kLines;
    const int lane = threadIdx.x % kWarp;
    const int64_t n_lines = k / k_of_line<format>();
    const int64_t first = threadIdx.x / kWarp * kLines + lane / 4;
    for (int64_t line = first; line < n_lines; line += kStep * kUnroll) {
      uint4 weights[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = line + u * kStep;
        weights[u] = at < n_lines ? load_weights(line_at<format>(panel, at) + lane % 4 * 16)
                                  : uint4{0, 0, 0, 0};
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = line + u * kStep;
        if (at < n_lines) add_line<format>(weights[u], panel, at, lane % 4, x, input, scale);
      }
    }
  }

  // x[r][at .. at + N) as the product takes it.
  template <int N>
  RECYCLE_DEVICE static void take(const float* x, int64_t at, const Input& input,
                                  const float (&norm)[N], float scale, float (&values)[N]) {
    for (int i = 0; i < N; ++i) {
      values[i] = x[at + i];
      if (input.has_norm) {
        values[i] *= scale;
        if (input.norm != nullptr) values[i] *= norm[i];
      }
    }
  }

  template <Format format>
  RECYCLE_DEVICE void add_line(uint4 raw, const std::byte* panel, int64_t line, int quarter,
                               const float* const (&x)[R], const Input& input,
                               const float (&scale)[R]) {
    constexpr int K = k_of_line<format>();
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    const int64_t at = line * K;
    float norm[K];
    for (int i = 0; i < K; ++i) norm[i] = input.norm != nullptr ? input.norm[at + i] : 1;
    // Quantised: the block's scale and minimum for each of the four outputs.
    float block_scale[kLanesOut], block_minimum[kLanesOut];
    if constexpr (is_quantised(format)) {
      const std::byte* scales = panel + scales_at(format, at / kBlock) + quarter * kLanesOut * 2;
      for (int o = 0; o < kLanesOut; ++o) {
        block_scale[o] = half_to_float(reinterpret_cast<const uint16_t*>(scales)[o]);
        block_minimum[o] =
            format == Format::q4_1
                ? half_to_float(reinterpret_cast<const uint16_t*>(scales + kPanelRows * 2)[o])
                : 0;
      }
    }
    float weights[kLanesOut][K];
    for (int o = 0; o < kLanesOut; ++o) {
      if constexpr (format == Format::f32) {
        weights[o][0] = std::bit_cast<float>(words[o]);
      } else if constexpr (format == Format::bf16) {
        weights[o][0] = std::bit_cast<float>(words[o] << 16);
        weights[o][1] = std::bit_cast<float>(words[o] & 0xFFFF0000u);
      } else if constexpr (format == Format::f16) {
        // A line has 16 outputs for one k, then for the next: not the quarter that was loaded.
        const auto* halves = reinterpret_cast<const uint16_t*>(panel + line * kAlign);
        for (int i = 0; i < 2; ++i)
          weights[o][i] = half_to_float(halves[i * kPanelRows + quarter * kLanesOut + o]);
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
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float values[K];
      take<K>(x[r], at, input, norm, scale[r], values);
      if constexpr (!is_quantised(format)) {
        for (int o = 0; o < kLanesOut; ++o)
          for (int i = 0; i < K; ++i) acc[r][o] = fmaf(weights[o][i], values[i], acc[r][o]);
      } else {
        float total = 0;
        if constexpr (format == Format::q4_1)
          for (int i = 0; i < K; ++i) total += values[i];
        for (int o = 0; o < kLanesOut; ++o) {
          float sum = 0;
          for (int i = 0; i < K; ++i) sum = fmaf(weights[o][i], values[i], sum);
          acc[r][o] = fmaf(block_scale[o], sum, acc[r][o]);
          if constexpr (format == Format::q4_1)
            acc[r][o] = fmaf(block_minimum[o], total, acc[r][o]);
        }
      }
    }
  }
};

inline constexpr int64_t product_shared_bytes(int matrices, int rows) {
  return (int64_t{matrices} * kWarps * rows * kPanelRows + kWarps * rows + rows) * 4;
}

// The frame: each block takes units of work (one panel of each of the Op's matrices) in turns. The Op has
//   kMatrices, input, units
//   matrix(m, unit), panel(unit)     which panel of which matrix
//   State                            what a thread keeps from unit to unit
//   put(state, row, unit, lane, values[kMatrices])   called for each row and output
//   finish(state, row, lane, shared) after a row's last unit
template <int R, class Op>
__global__ void __launch_bounds__(kThreads, R <= 2 ? 2 : 1) products(Op op) {
  constexpr int M = Op::kMatrices;
  const int64_t k = op.k;
  if (threadIdx.x < M && blockIdx.x < op.units) {
    const Matrix matrix = op.matrix(threadIdx.x, blockIdx.x);
    const int64_t bytes = panel_bytes(matrix.format, k);
    prefetch(matrix.data + op.panel(blockIdx.x) * bytes, bytes);
  }
  let_next_start();
  wait_for_previous();

  float* parts = shared_memory<float>();                 // [M, warps, R, 16]
  float* squares = parts + M * kWarps * R * kPanelRows;  // [warps, R]
  float* scales = squares + kWarps * R;                  // [R]
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int own_row = threadIdx.x / kPanelRows;
  const int own_lane = threadIdx.x % kPanelRows;
  for (int first = 0; first < op.input.rows; first += R) {
    const float* x[R];
    float scale[R];
    for (int r = 0; r < R; ++r) {
      x[r] = op.input.row(first + r, k);
      scale[r] = 1;
    }
    if (op.input.has_norm) {
      for (int r = 0; r < R; ++r) {
        float sum = 0;
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
      for (int r = 0; r < R; ++r) scale[r] = scales[r];
    }
    typename Op::State state = {};
    for (int64_t unit = blockIdx.x; unit < op.units; unit += gridDim.x) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const Matrix matrix = op.matrix(m, unit);
        Sums<R> sums;
        sums.clear();
        sums.add(matrix.format, matrix.data + op.panel(unit) * panel_bytes(matrix.format, k), k, x,
                 op.input, scale);
        sums.gather();
        if (lane < 4)
          for (int r = 0; r < R; ++r)
            for (int o = 0; o < kLanesOut; ++o)
              parts[((m * kWarps + warp) * R + r) * kPanelRows + lane * kLanesOut + o] =
                  sums.acc[r][o];
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
  }
}

// How kernels are started: the stream, what the GPU has, and the first failure.
struct Launcher {
  Stream stream;
  Device device;
  bool ok = true;

  Launcher(const Device& device, void* stream)
      : stream(static_cast<Stream>(stream)), device(device) {}

  template <class Kernel, class... Arguments>
  void run(Kernel kernel, dim3 grid, int threads, int64_t shared_bytes,
           const Arguments&... arguments) {
    ok = ok && launch(kernel, grid, threads, shared_bytes, stream, device.overlap, arguments...);
  }

  // Blocks that products() of this many units starts.
  int blocks(int64_t units) const {
    const int64_t most = int64_t{device.multiprocessors} * kMostBlocks;
    return static_cast<int>(units < most ? units : most);
  }

  template <class Op>
  void products(const Op& op) {
    const auto of = [&]<int R>() {
      run(cuda::products<R, Op>, dim3(blocks(op.units)), kThreads,
          product_shared_bytes(Op::kMatrices, R), op);
    };
    const int rows = op.input.rows;
    if (rows == 1) return of.template operator()<1>();
    if (rows == 2) return of.template operator()<2>();
    if (rows <= 4) return of.template operator()<4>();
    of.template operator()<8>();
  }
};

}  // namespace recycle::cuda
