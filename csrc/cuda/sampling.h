// Tokens from logits, by one block of threads: what csrc/cpu/sampling.cpp does, with sums whose order doesn't depend on
// scheduling, so that a seed draws the same token every time.
#pragma once

#include "kernels.h"
#include "recycle/head.h"
#include "recycle/random.h"

namespace recycle::cuda {

// Threads of a block that picks or draws, and the shared memory that takes.
inline constexpr int kDrawThreads = 256;
inline constexpr int kDrawWarps = kDrawThreads / kWarp;
inline constexpr int64_t kDrawBytes = (kDrawThreads + 1) * 8 + 16;

// The token of the best of a row's blocks, to all threads; -1 where a logit wasn't finite.
RECYCLE_DEVICE int pick(const HeadBests& bests, int64_t row) {
  float* values = shared_memory<float>();                   // [warps]
  float* poisons = values + kDrawWarps;                     // [warps]
  int* ids = reinterpret_cast<int*>(poisons + kDrawWarps);  // [warps]
  float best = -INFINITY, poison = 0;
  int id = 0;
  const auto meet = [&](float value, int other) {
    if (value > best || (value == best && other < id)) {
      best = value;
      id = other;
    }
  };
  for (int i = threadIdx.x; i < bests.blocks; i += kDrawThreads) {
    const float value = bests.value[row * bests.blocks + i];
    poison += value != value ? value : 0;
    // A thread's first is taken whatever it is.
    if (i == static_cast<int>(threadIdx.x)) {
      best = value;
      id = bests.id[row * bests.blocks + i];
    } else {
      meet(value, bests.id[row * bests.blocks + i]);
    }
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float value = shuffle_xor(best, mask);
    const int other = shuffle_xor(id, mask);
    poison += shuffle_xor(poison, mask);
    meet(value, other);
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    values[threadIdx.x / kWarp] = best;
    poisons[threadIdx.x / kWarp] = poison;
    ids[threadIdx.x / kWarp] = id;
  }
  __syncthreads();
  best = values[0];
  id = ids[0];
  poison = poisons[0];
  for (int w = 1; w < kDrawWarps; ++w) {
    meet(values[w], ids[w]);
    poison += poisons[w];
  }
  __syncthreads();
  return poison == 0 ? id : -1;
}

// The token at `u` in [0, 1) of the cumulative distribution of probs [n], which needn't sum to 1; to all threads.
// A thread sums up neighbouring tokens; who has the one looked for goes through them again.
RECYCLE_DEVICE int64_t draw(const float* probs, int64_t n, float u) {
  double* before = shared_memory<double>();  // [threads + 1] the sum before each thread's tokens
  auto* found = reinterpret_cast<int*>(before + kDrawThreads + 1);
  const int64_t share = (n + kDrawThreads - 1) / kDrawThreads;
  const int64_t begin = threadIdx.x * share;
  const int64_t end = begin + share < n ? begin + share : n;
  double sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += probs[i];
  __syncthreads();
  before[threadIdx.x + 1] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    before[0] = 0;
    for (int t = 1; t <= kDrawThreads; ++t) before[t] += before[t - 1];
    *found = 0;
  }
  __syncthreads();
  const double target = u * before[kDrawThreads];
  // The last thread with a token at all also catches a target that rounding put past the end.
  const bool has_it = before[threadIdx.x] <= target && target < before[threadIdx.x + 1];
  const bool is_last = sum > 0 && before[threadIdx.x + 1] == before[kDrawThreads];
  if (has_it || (is_last && target >= before[kDrawThreads])) {
    double reached = before[threadIdx.x];
    int64_t last = begin;
    for (int64_t i = begin; i < end; ++i) {
      if (probs[i] <= 0) continue;
      reached += probs[i];
      last = i;
      if (reached > target) break;
    }
    *found = static_cast<int>(last);
  }
  __syncthreads();
  const int64_t token = *found;
  __syncthreads();
  return token;
}

// logits [rows, n] become probabilities in place: temperature, top_k, top_p, as Sampling says. finite [rows]: 0 for
// a row with a logit that is NaN or infinite.
void to_distributions(Launcher& launcher, const Sampling& sampling, int rows, int64_t n,
                      float* logits, int* finite);

}  // namespace recycle::cuda
