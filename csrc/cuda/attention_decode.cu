// The op attention_decode: attention.cu, and before it one kernel that checks the lengths and writes the positions,
// which in a decode step select.cu writes.
//
//   lengths [batch] -> positions [batch, n_rows]
//
// One block a sequence. Bounded by latency.
#include "ops.h"

#include "kernels.h"

namespace recycle::cuda {

namespace {

constexpr int kThreads = 256;

struct PositionsParams {
  const int64_t* lengths;
  int n_rows;  // of a sequence
  int64_t capacity, row_size;
  int* positions;         // [batch, n_rows]
  float* out;             // [batch, n_rows, row_size]
  unsigned* blocks_done;  // [n_counters]
  int n_counters;
};

__global__ void positions_kernel(PositionsParams params) {
  launch_dependents();
  grid_dependency_wait();
  const int64_t length = params.lengths[blockIdx.x];
  const int n_rows = params.n_rows;
  const bool fits = length >= 0 && length <= params.capacity - n_rows;
  for (int i = threadIdx.x; i < n_rows; i += kThreads)
    params.positions[blockIdx.x * n_rows + i] = fits ? static_cast<int>(length) + i : -1;
  const int64_t size = n_rows * params.row_size;
  if (!fits)
    for (int64_t i = threadIdx.x; i < size; i += kThreads) params.out[blockIdx.x * size + i] = NAN;
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < params.n_counters; i += kThreads) params.blocks_done[i] = 0;
}

struct Scratch {
  int* positions;
  int n_counters;
  AttentionBuffers buffers;

  void take(Arena& arena, const AttentionParams& params) {
    const int64_t rows = params.batch * params.n_rows;
    positions = arena.take<int>(rows);
    n_counters = static_cast<int>(params.batch * params.n_kv_heads *
                                  query_tiles(params.n_rows, params.n_heads / params.n_kv_heads));
    buffers.take_splits(arena, rows, params.n_heads * params.head_dim, params.n_heads, n_counters);
  }
};

}  // namespace

int64_t attention_scratch_bytes(const AttentionParams& params) {
  Arena arena(nullptr);
  Scratch scratch;
  scratch.take(arena, params);
  return arena.used();
}

bool attention_decode(const AttentionParams& params, const Device& device, void* stream) {
  Launcher launcher(device, stream);
  Arena arena(params.scratch);
  Scratch scratch;
  scratch.take(arena, params);
  const int batch = static_cast<int>(params.batch);
  const int n_rows = static_cast<int>(params.n_rows);
  launcher.run(positions_kernel, dim3(batch), kThreads, 0,
               {params.lengths, n_rows, params.cache.capacity, params.n_heads * params.head_dim, scratch.positions,
                params.out, scratch.buffers.blocks_done, scratch.n_counters});
  AttentionKernelParams kernel;
  kernel.rows = {batch, n_rows, scratch.positions};
  kernel.n_heads = static_cast<int>(params.n_heads);
  kernel.n_kv_heads = static_cast<int>(params.n_kv_heads);
  kernel.head_dim = static_cast<int>(params.head_dim);
  kernel.inv_freq = params.inv_freq;
  kernel.q_norm = params.q_norm;
  kernel.k_norm = params.k_norm;
  kernel.eps = params.eps;
  kernel.cache = params.cache;
  kernel.buffers = scratch.buffers;
  kernel.buffers.q = params.q;
  kernel.buffers.k = params.k;
  kernel.buffers.v = params.v;
  kernel.buffers.out = params.out;
  attention(launcher, kernel);
  return launcher.ok();
}

}  // namespace recycle::cuda
