// Tokens from logits, by one block of threads a row: what csrc/cpu/sampling.cpp computes, with sums whose order
// doesn't depend on scheduling, so that a seed always gives the same token.
#pragma once

#include "kernels.h"
#include "recycle/random.h"

namespace recycle::cuda {

// Of a block that calls argmax() or sample().
inline constexpr int kSampleThreads = 256;
inline constexpr int kSampleWarps = kSampleThreads / kWarp;
inline constexpr int64_t kSampleSharedBytes = (kSampleThreads + 1) * 8 + 16;

// The token with the largest logit of a row, to all threads; -1 if a logit is nonfinite.
RECYCLE_DEVICE int argmax(const PartialArgmax& partial, int64_t row) {
  auto* warps = shared_memory<Argmax>();  // [warps]
  Argmax best;
  for (int i = threadIdx.x; i < partial.blocks; i += kSampleThreads) {
    const float value = partial.value[row * partial.blocks + i];
    best.nonfinite += value != value ? value : 0;
    best.combine(value, partial.token[row * partial.blocks + i]);
  }
  best.reduce(kWarp);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = best;
  __syncthreads();
  best = warps[0];
  for (int w = 1; w < kSampleWarps; ++w) {
    best.combine(warps[w].value, warps[w].token);
    best.nonfinite += warps[w].nonfinite;
  }
  __syncthreads();
  return best.nonfinite == 0 ? best.token : -1;
}

// The token at `u` in [0, 1) of the cumulative distribution of probs [n], which needn't sum to 1; to all threads.
// Each thread sums up neighbouring tokens; the thread whose range holds the target scans that range.
RECYCLE_DEVICE int64_t sample(const float* probs, int64_t n, float u) {
  double* before = shared_memory<double>();  // [threads + 1] the sum before each thread's range
  auto* found = reinterpret_cast<int*>(before + kSampleThreads + 1);
  const int64_t range = (n + kSampleThreads - 1) / kSampleThreads;
  const int64_t begin = threadIdx.x * range;
  const int64_t end = begin + range < n ? begin + range : n;
  double sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += probs[i];
  __syncthreads();
  before[threadIdx.x + 1] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    before[0] = 0;
    for (int t = 1; t <= kSampleThreads; ++t) before[t] += before[t - 1];
    *found = 0;
  }
  __syncthreads();
  const double target = u * before[kSampleThreads];
  const bool has_target = before[threadIdx.x] <= target && target < before[threadIdx.x + 1];
  // Rounding may put the target past the end: the last thread with a token then has it.
  const bool is_last = sum > 0 && before[threadIdx.x + 1] == before[kSampleThreads];
  if (has_target || (is_last && target >= before[kSampleThreads])) {
    double cumulative = before[threadIdx.x];
    int64_t token = begin;
    for (int64_t i = begin; i < end; ++i) {
      if (probs[i] <= 0) continue;
      cumulative += probs[i];
      token = i;
      if (cumulative > target) break;
    }
    *found = static_cast<int>(token);
  }
  __syncthreads();
  const int64_t token = *found;
  __syncthreads();
  return token;
}

// logits [rows, n] become probabilities in place, as Sampling says. finite [rows]: 0 for a row with a nonfinite
// logit, whose logits stay.
void logits_to_probs(Launcher& launcher, const Sampling& sampling, int n_rows, int64_t n, float* logits, int* finite);

}  // namespace recycle::cuda
