// GEMV: a packed matrix times a few rows, with a fused RMSNorm of x and an epilogue of the caller's: the frame of
// every kernel that reads weights (qkv.cu, linear.cu, gate_up.cu, lm_head.cu).
//
//   x [rows, k] float32, W [n, k] packed (format.h)  ->  the epilogue gets W norm(x), 16 outputs of a row at a time
//
// Each block loops over tiles of 16 outputs: one panel of each of the kernel's matrices. One pass over the weights
// computes up to 8 rows. x is staged in shared memory, normed once for all tiles of the block; a large k in parts.
// While the previous kernel still runs, a block prefetches its first panel and the norm's weights into L2.
//
// bfloat16 is bounded by memory up to 8 rows: at 3.35 TB/s an H100 has some 18 operations for each weight it reads; a row
// costs one, and widening one more. Quants of 4 bits are bounded by instructions: for each 512 bytes, of which an H100
// reads one in the time of 142 instructions of a warp, the sm_90a code has 88 in q8_0, 140 in q6_k, 148 in q4_0 and 200
// in q4_k, for one row.
// Rejected, by counting instructions, not measured: tensor cores (1 row costs what 8 do, and widening is cheap
// enough); x from L1 (one more load between the weights' arrival and their use).
#pragma once

#include "kernels.h"
#include "panel_sums.cuh"

namespace recycle::cuda {

inline constexpr int kMaxStagedFloats = 16384;  // of x in shared memory, all rows together
inline constexpr int64_t kMaxPrefetchBytes = 64 * 1024;

// Columns of x that are staged together, for R rows: whole turns of all warps, so that a thread has the same lines
// whether or not a panel is read in parts.
template <int R>
constexpr int64_t staged_k() {
  static_assert(kMaxStagedFloats / R % (kLinesPerBlock * kMaxColumnsPerLine) == 0);
  return kMaxStagedFloats / R;
}

template <int R>
constexpr int64_t gemv_shared_bytes(int matrices, int64_t k) {
  const int64_t staged = k < staged_k<R>() ? k : staged_k<R>();
  return (R * staged + int64_t{matrices} * kGemvWarps * R * kPanelRows + round_up(kGemvWarps * R + R, 4)) * 4;
}

// What the parameters of all GEMV kernels have. A kernel's Params derive from this, and add
//   kMatrices                     matrices whose panels make a tile
//   format()                      of all matrices, or kMixed
//   matrix(m, tile)               matrix m of a tile
//   epilogue(state, row, tile, output, values[kMatrices])   for each row and output 0 .. 15 of a tile
struct GemvParams {
  // What a thread keeps from tile to tile.
  struct State {};

  int64_t k, n_tiles;
  GemvInput input;

  RECYCLE_DEVICE int64_t panel(int64_t tile) const { return tile; }
  // After the last tile, by all threads. is_used: the row exists.
  RECYCLE_DEVICE void finish(const State&, int /*row*/, int /*output*/, bool /*is_used*/) const {}
};

// One block of a GEMV kernel, for up to R rows at a time.
template <int R, class Params, int kFormat>
class GemvBlock {
 public:
  RECYCLE_DEVICE explicit GemvBlock(const Params& params)
      : params_(params),
        k_(params.k),
        all_staged_(params.k <= staged_k<R>()),
        stride_(all_staged_ ? params.k : staged_k<R>()),
        partial_sums_(shared_memory<float>()),
        squares_(partial_sums_ + M * kGemvWarps * R * kPanelRows),
        scales_(squares_ + kGemvWarps * R),
        x_staged_(squares_ + round_up(kGemvWarps * R + R, 4)) {}

  // Only weights: the previous kernel may still write x.
  RECYCLE_DEVICE void prefetch_weights() const {
    if (threadIdx.x < M && blockIdx.x < params_.n_tiles) {
      const Matrix matrix = params_.matrix(threadIdx.x, blockIdx.x);
      const int64_t bytes = panel_bytes(format_of(matrix), k_);
      prefetch(matrix.data + params_.panel(blockIdx.x) * bytes, bytes < kMaxPrefetchBytes ? bytes : kMaxPrefetchBytes);
    }
    if (params_.input.norm != nullptr)
      for (int64_t i = threadIdx.x * kWarp; i < k_; i += kGemvThreads * kWarp) prefetch_line(params_.input.norm + i);
  }

  RECYCLE_DEVICE void run() {
    const int output = threadIdx.x % kPanelRows;
    for (int first = 0; first < params_.input.n_rows; first += R) {
      for (int r = 0; r < R; ++r) x_[r] = params_.input.row(first + r, k_);
      if (params_.input.norm != nullptr) compute_scales();
      if (all_staged_) stage(0, k_);
      const int r = threadIdx.x / kPanelRows;
      const bool is_used = r < R && first + r < params_.input.n_rows;
      typename Params::State state = {};
      for (int64_t tile = blockIdx.x; tile < params_.n_tiles; tile += gridDim.x) {
        sum_tile(tile);
        __syncthreads();
        if (is_used) {
          float values[M];
          for (int m = 0; m < M; ++m) {
            values[m] = 0;
            for (int w = 0; w < kGemvWarps; ++w)
              values[m] += partial_sums_[((m * kGemvWarps + w) * R + r) * kPanelRows + output];
          }
          params_.epilogue(state, first + r, tile, output, values);
        }
        __syncthreads();
      }
      params_.finish(state, first + r, output, is_used);
      __syncthreads();
    }
  }

 private:
  static constexpr int M = Params::kMatrices;

  // A constant where all matrices have one format.
  RECYCLE_DEVICE static Format format_of(const Matrix& matrix) {
    return kFormat == kMixed ? matrix.format : static_cast<Format>(kFormat);
  }

  // scales_[r] = 1 / sqrt(mean(x_r^2) + eps)
  RECYCLE_DEVICE void compute_scales() {
    for (int r = 0; r < R; ++r) {
      float sum = 0;
#pragma unroll 4
      for (int64_t i = threadIdx.x; i < k_; i += kGemvThreads) sum = fmaf(x_[r][i], x_[r][i], sum);
      sum = warp_sum(sum);
      if (threadIdx.x % kWarp == 0) squares_[threadIdx.x / kWarp * R + r] = sum;
    }
    __syncthreads();
    if (threadIdx.x < R) {
      float sum = 0;
      for (int w = 0; w < kGemvWarps; ++w) sum += squares_[w * R + threadIdx.x];
      scales_[threadIdx.x] = 1 / sqrtf(sum / static_cast<float>(k_) + params_.input.eps);
    }
    __syncthreads();
  }

  // Columns [begin, end) of all rows to shared memory, normed.
  RECYCLE_DEVICE void stage(int64_t begin, int64_t end) {
    __syncthreads();
    for (int r = 0; r < R; ++r) {
      const float scale = params_.input.norm != nullptr ? scales_[r] : 1;
#pragma unroll 4
      for (int64_t i = begin + threadIdx.x; i < end; i += kGemvThreads) {
        float value = x_[r][i] * scale;
        if (params_.input.norm != nullptr) value *= params_.input.norm[i];
        x_staged_[r * stride_ + i - begin] = value;
      }
    }
    __syncthreads();
  }

  // Each warp's sums of a tile, to shared memory.
  RECYCLE_DEVICE void sum_tile(int64_t tile) {
    Format formats[M];
    const std::byte* panels[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const Matrix matrix = params_.matrix(m, tile);
      formats[m] = format_of(matrix);
      panels[m] = matrix.data + params_.panel(tile) * panel_bytes(formats[m], k_);
    }
    PanelSums<R, M, kFormat> panel;
    for (int64_t begin = 0; begin < k_; begin += staged_k<R>()) {
      const int64_t end = begin + staged_k<R>() < k_ ? begin + staged_k<R>() : k_;
      if (!all_staged_) stage(begin, end);
      panel.accumulate(formats, panels, begin, end, x_staged_, stride_);
    }
    panel.reduce_warp();
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (lane >= kThreadsPerLine) return;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int o = 0; o < kOutputsPerThread; ++o)
          partial_sums_[((m * kGemvWarps + warp) * R + r) * kPanelRows + lane * kOutputsPerThread + o] =
              panel.sums[m][r][o];
  }

  const Params& params_;
  const int64_t k_;
  const bool all_staged_;
  const int64_t stride_;
  float* const partial_sums_;  // [M, warps, R, 16]
  float* const squares_;       // [warps, R]
  float* const scales_;        // [R]
  float* const x_staged_;      // [R, stride]
  const float* x_[R];
};

template <int R, class Params, int kFormat>
__global__ void __launch_bounds__(kGemvThreads, R <= 2 ? 2 : 1) gemv_kernel(Params params) {
  GemvBlock<R, Params, kFormat> block(params);
  block.prefetch_weights();
  launch_dependents();
  grid_dependency_wait();
  block.run();
}

// The format of all matrices, or kMixed.
template <class... Matrices>
int common_format(const Matrix& first, const Matrices&... others) {
  return ((others.format == first.format) && ...) ? static_cast<int>(first.format) : kMixed;
}

template <int kFormat, class Params>
void launch_gemv_format(Launcher& launcher, const Params& params) {
  const auto launch = [&]<int R>() {
    launcher.run(gemv_kernel<R, Params, kFormat>, dim3(gemv_blocks(launcher.device, params.n_tiles)), kGemvThreads,
                 gemv_shared_bytes<R>(Params::kMatrices, params.k), params);
  };
  const int n_rows = params.input.n_rows;
  // All formats in one kernel take long to compile: two kernels serve all numbers of rows.
  if constexpr (kFormat == kMixed) {
    n_rows <= 2 ? launch.template operator()<2>() : launch.template operator()<8>();
  } else {
    if (n_rows == 1) return launch.template operator()<1>();
    if (n_rows == 2) return launch.template operator()<2>();
    if (n_rows <= 4) return launch.template operator()<4>();
    launch.template operator()<8>();
  }
}

// One kernel for each common format, so that a format's need of registers doesn't limit the others.
template <class Params>
void launch_gemv(Launcher& launcher, const Params& params) {
  switch (params.format()) {
    case static_cast<int>(Format::bf16):
      return launch_gemv_format<static_cast<int>(Format::bf16)>(launcher, params);
    case static_cast<int>(Format::q8_0):
      return launch_gemv_format<static_cast<int>(Format::q8_0)>(launcher, params);
    case static_cast<int>(Format::q4_0):
      return launch_gemv_format<static_cast<int>(Format::q4_0)>(launcher, params);
    case static_cast<int>(Format::q4_1):
      return launch_gemv_format<static_cast<int>(Format::q4_1)>(launcher, params);
    case static_cast<int>(Format::q4_k):
      return launch_gemv_format<static_cast<int>(Format::q4_k)>(launcher, params);
    case static_cast<int>(Format::q6_k):
      return launch_gemv_format<static_cast<int>(Format::q6_k)>(launcher, params);
    default:
      return launch_gemv_format<kMixed>(launcher, params);
  }
}

}  // namespace recycle::cuda
