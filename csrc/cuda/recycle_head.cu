// The op recycle_head: lm_head.cu, sampling.cu, and one kernel that writes tokens and log-probabilities.
//
//   logits [rows, n], probabilities or a partial argmax -> tokens [rows], log softmax(logits)[token] [rows]
//
// One block a row. Bounded by two passes over the logits, which lie in the L2 cache.
#include "ops.h"

#include "sampling.h"

namespace recycle::cuda {

namespace {

struct Scratch {
  PartialArgmax partial;
  float* logits;  // [rows, n]
  float* probs;   // [rows, n]; sampled only
  int* finite;    // [rows]; sampled only

  void take(Arena& arena, const HeadParams& params, const Device& device) {
    partial.take(arena, device, params.n_rows, params.head);
    logits = arena.take<float>(params.n_rows * params.head.n);
    const bool greedy = params.sampling.greedy();
    probs = arena.take<float>(greedy ? 0 : params.n_rows * params.head.n);
    finite = arena.take<int>(greedy ? 0 : params.n_rows);
  }
};

struct CopyParams {
  const float* from;
  int64_t n;
  float* to;
};

__global__ void copy_kernel(CopyParams params) {
  launch_dependents();
  grid_dependency_wait();
  const int64_t i = int64_t{blockIdx.x} * kSampleThreads + threadIdx.x;
  if (i < params.n) params.to[i] = params.from[i];
}

struct ResultParams {
  HeadParams head;
  Scratch scratch;
};

__global__ void __launch_bounds__(kSampleThreads) result_kernel(ResultParams params) {
  launch_dependents();
  grid_dependency_wait();
  const HeadParams& head = params.head;
  const int64_t row = blockIdx.x;
  const int64_t n = head.head.n;
  const float* logits = params.scratch.logits + row * n;
  int64_t token = -1;
  if (head.sampling.greedy())
    token = argmax(params.scratch.partial, row);
  else if (params.scratch.finite[row] != 0)
    token = sample(params.scratch.probs + row * n, n,
                   uniform(static_cast<uint64_t>(head.sampling.seeds[row]), static_cast<uint64_t>(head.positions[row]),
                           Stream::sample));
  float* warp_values = shared_memory<float>();
  float max = -INFINITY;
  for (int64_t i = threadIdx.x; i < n; i += kSampleThreads) max = fmaxf(max, logits[i]);
  max = block_max(warp_values, kSampleWarps, max);
  float sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kSampleThreads) sum += expf(logits[i] - max);
  sum = block_sum(warp_values, kSampleWarps, sum);
  if (threadIdx.x != 0) return;
  head.tokens[row] = token;
  head.log_probs[row] = token >= 0 ? logits[token] - max - logf(sum) : NAN;
}

}  // namespace

int64_t head_scratch_bytes(const HeadParams& params, const Device& device) {
  Arena arena(nullptr);
  Scratch scratch;
  scratch.take(arena, params, device);
  return arena.used();
}

bool recycle_head(const HeadParams& params, const Device& device, void* stream) {
  Launcher launcher(device, stream);
  Arena arena(params.scratch);
  Scratch scratch;
  scratch.take(arena, params, device);
  const int n_rows = static_cast<int>(params.n_rows);
  const int64_t n = params.head.n, size = n_rows * n;
  lm_head(launcher, params.head, {params.x, nullptr, n_rows, params.norm, params.eps}, scratch.logits, scratch.partial);
  if (!params.sampling.greedy()) {
    launcher.run(copy_kernel, dim3((size + kSampleThreads - 1) / kSampleThreads), kSampleThreads, 0,
                 {scratch.logits, size, scratch.probs});
    logits_to_probs(launcher, params.sampling, n_rows, n, scratch.probs, scratch.finite);
  }
  launcher.run(result_kernel, dim3(n_rows), kSampleThreads, kSampleSharedBytes, {params, scratch});
  return launcher.ok();
}

}  // namespace recycle::cuda
