// The parts of a step that are ops of their own. What they do is in attention.cu, lm_head.cu and sampling.cu; here
// are the few numbers that a step has at hand and a single call has not.
#include "single_ops.h"

#include "recycle/arena.h"
#include "sampling.h"

namespace recycle::cuda {

namespace {

// ---- attention_decode ---------------------------------------------------------------------------------

struct AttentionWork {
  int* positions;
  AttentionArrays arrays;
  int n_arrived;

  void take(Arena& arena, const AttentionParams& params) {
    const int64_t rows = params.batch * params.n_rows;
    const int64_t heads = params.n_heads;
    positions = arena.take<int>(rows);
    n_arrived = static_cast<int>(params.batch * params.n_kv_heads *
                                 query_tiles(params.n_rows, heads / params.n_kv_heads));
    arrays.arrived = arena.take<unsigned>(n_arrived);
    arrays.weighted = arena.take<float>(kSplits * rows * heads * params.head_dim);
    arrays.total = arena.take<float>(kSplits * rows * heads);
    arrays.maximum = arena.take<float>(kSplits * rows * heads);
  }
};

// A block a sequence.
__global__ void positions_kernel(const int64_t* lengths, int n_rows, int64_t capacity,
                                 int64_t row_size, int* positions, float* out, unsigned* arrived,
                                 int n_arrived) {
  let_next_start();
  wait_for_previous();
  const int64_t length = lengths[blockIdx.x];
  const bool fits = length >= 0 && length <= capacity - n_rows;
  for (int i = threadIdx.x; i < n_rows; i += kThreads)
    positions[blockIdx.x * n_rows + i] = fits ? static_cast<int>(length) + i : -1;
  if (!fits)
    for (int64_t i = threadIdx.x; i < n_rows * row_size; i += kThreads)
      out[blockIdx.x * n_rows * row_size + i] = NAN;
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < n_arrived; i += kThreads) arrived[i] = 0;
}

// ---- recycle_head -------------------------------------------------------------------------------------

struct HeadWork {
  HeadBests bests;
  float* logits;  // [rows, n]
  float* probs;   // [rows, n] sampled only
  int* finite;    // [rows] sampled only

  void take(Arena& arena, const HeadParams& params, const Launcher& launcher) {
    bests.blocks = launcher.blocks(n_panels(params.head.n));
    bests.value = arena.take<float>(params.n_rows * bests.blocks);
    bests.id = arena.take<int>(params.n_rows * bests.blocks);
    logits = arena.take<float>(params.n_rows * params.head.n);
    const bool greedy = params.sampling.greedy();
    probs = arena.take<float>(greedy ? 0 : params.n_rows * params.head.n);
    finite = arena.take<int>(greedy ? 0 : params.n_rows);
  }
};

__global__ void copy_kernel(const float* from, int64_t n, float* to) {
  let_next_start();
  wait_for_previous();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n) to[i] = from[i];
}

// A block a row: its token, and log softmax(logits)[token].
__global__ void __launch_bounds__(kDrawThreads)
    head_result_kernel(HeadParams params, HeadWork work) {
  let_next_start();
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const int64_t n = params.head.n;
  const float* logits = work.logits + row * n;
  int64_t token = -1;
  if (params.sampling.greedy())
    token = pick(work.bests, row);
  else if (work.finite[row] != 0)
    token = draw(work.probs + row * n, n,
                 uniform(static_cast<uint64_t>(params.sampling.seeds[row]),
                         static_cast<uint64_t>(params.positions[row]), recycle::Stream::sample));
  float* parts = shared_memory<float>();  // [warps]
  const auto over_warps = [&](float value, auto f) {
    __syncthreads();
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
    __syncthreads();
    float all = parts[0];
    for (int w = 1; w < kDrawWarps; ++w) all = f(all, parts[w]);
    return all;
  };
  float largest = -INFINITY;
  for (int64_t i = threadIdx.x; i < n; i += kDrawThreads) largest = fmaxf(largest, logits[i]);
  largest = over_warps(warp_max(largest), [](float a, float b) { return fmaxf(a, b); });
  float sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kDrawThreads) sum += expf(logits[i] - largest);
  sum = over_warps(warp_sum(sum), [](float a, float b) { return a + b; });
  if (threadIdx.x != 0) return;
  params.tokens[row] = token;
  params.log_probs[row] = token >= 0 ? logits[token] - largest - logf(sum) : NAN;
}

}  // namespace

int64_t attention_scratch_bytes(const AttentionParams& params) {
  Arena arena(nullptr);
  AttentionWork work;
  work.take(arena, params);
  return arena.used();
}

bool attention_decode(const AttentionParams& params, const Device& device, void* stream) {
  Launcher launcher(device, stream);
  Arena arena(params.scratch);
  AttentionWork work;
  work.take(arena, params);
  // Only read by attention; a step's products write them.
  work.arrays.q = const_cast<float*>(params.q);
  work.arrays.k = const_cast<float*>(params.k);
  work.arrays.v = const_cast<float*>(params.v);
  work.arrays.out = params.out;
  const int batch = static_cast<int>(params.batch);
  const int n_rows = static_cast<int>(params.n_rows);
  launcher.run(positions_kernel, dim3(batch), kThreads, 0, params.lengths, n_rows,
               params.cache.capacity, params.n_heads * params.head_dim, work.positions, params.out,
               work.arrays.arrived, work.n_arrived);
  AttentionCall call;
  call.rows = {batch, n_rows, work.positions};
  call.n_heads = static_cast<int>(params.n_heads);
  call.n_kv_heads = static_cast<int>(params.n_kv_heads);
  call.head_dim = static_cast<int>(params.head_dim);
  call.inv_freq = params.inv_freq;
  call.q_norm = params.q_norm;
  call.k_norm = params.k_norm;
  call.eps = params.eps;
  call.cache = params.cache;
  call.arrays = work.arrays;
  attend(launcher, call);
  return launcher.ok;
}

int64_t head_scratch_bytes(const HeadParams& params, const Device& device) {
  Arena arena(nullptr);
  HeadWork work;
  work.take(arena, params, Launcher(device, nullptr));
  return arena.used();
}

bool recycle_head(const HeadParams& params, const Device& device, void* stream) {
  Launcher launcher(device, stream);
  Arena arena(params.scratch);
  HeadWork work;
  work.take(arena, params, launcher);
  const int rows = static_cast<int>(params.n_rows);
  const int64_t n = params.head.n;
  scan_head(launcher, params.head, {params.x, nullptr, rows, params.norm, params.eps}, work.logits,
            work.bests);
  if (!params.sampling.greedy()) {
    launcher.run(copy_kernel, dim3(static_cast<unsigned>((rows * n + kThreads - 1) / kThreads)),
                 kThreads, 0, work.logits, rows * n, work.probs);
    to_distributions(launcher, params.sampling, rows, n, work.probs, work.finite);
  }
  launcher.run(head_result_kernel, dim3(rows), kDrawThreads, kDrawBytes, params, work);
  return launcher.ok;
}

}  // namespace recycle::cuda
