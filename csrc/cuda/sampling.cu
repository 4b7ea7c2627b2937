// Logits to probabilities: temperature, top-k, top-p, renormalized. One block computes a row.
//
//   logits [rows, n] float32 -> the same array, probabilities
//
// Bounded by a few passes of 1,024 threads over the row, which lies in the L2 cache (49,152 tokens: 196 kB). Top-k
// and top-p are radix selections: 8 bits at a time from the top, with a histogram in shared memory, of counts for
// top-k and of probabilities for top-p. Probabilities are summed as fixed-point integers (2^-40), because the order
// of atomic additions varies, and sums of floats would vary with the order.
// Rejected, by counting passes: sorting the row.
#include "sampling.h"

namespace recycle::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBins = 256;
constexpr float kFixedPointOne = 0x1p40f;

using Mass = unsigned long long;  // a count, or a probability in fixed point

// Maps floats to integers with the same order.
RECYCLE_DEVICE uint32_t sort_key(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

struct Shared {
  // Bits 0 to 13, 14 to 27 and the rest of masses, summed apart: 32 bits have native atomics, and hold the sums of
  // kMaxSampledTokens.
  unsigned bins[3][kBins];
  float warp_values[kWarps];
  Mass above;  // mass above the selected bin
  int bin;
  int counts[kThreads + 1];
};

// The largest key such that the values with this key or a larger one have mass `target` or more.
// *above: the mass of the values with a larger key.
template <class MassOf>
RECYCLE_DEVICE uint32_t radix_select(Shared& shared, const float* values, int64_t n, Mass target, MassOf mass_of,
                                     Mass* above) {
  uint32_t prefix = 0;
  *above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 3 * kBins; i += kThreads) shared.bins[i / kBins][i % kBins] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t key = sort_key(values[i]);
      if (shift < 24 && key >> (shift + 8) != prefix) continue;
      const Mass mass = mass_of(values[i]);
      const uint32_t bin = key >> shift & (kBins - 1);
      const unsigned parts[3] = {static_cast<unsigned>(mass & 0x3FFF), static_cast<unsigned>(mass >> 14 & 0x3FFF),
                                 static_cast<unsigned>(mass >> 28)};
      for (int part = 0; part < 3; ++part)
        if (parts[part] != 0) atomicAdd(&shared.bins[part][bin], parts[part]);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Mass sum = *above;
      int bin = kBins - 1;
      for (; bin > 0; --bin) {
        const Mass mass = shared.bins[0][bin] + (Mass{shared.bins[1][bin]} << 14) + (Mass{shared.bins[2][bin]} << 28);
        if (sum + mass >= target) break;
        sum += mass;
      }
      shared.bin = bin;
      shared.above = sum;
    }
    __syncthreads();
    prefix = prefix << 8 | static_cast<uint32_t>(shared.bin);
    *above = shared.above;
    __syncthreads();
  }
  return prefix;
}

// Keeps the most probable tokens whose sum reaches top_p; of tokens as probable as the last one, the lower ids.
RECYCLE_DEVICE void apply_top_p(Shared& shared, float* probs, int64_t n, float top_p) {
  const auto mass = [](float p) { return static_cast<Mass>(p * kFixedPointOne); };
  const auto target = static_cast<Mass>(static_cast<double>(top_p) * kFixedPointOne);
  Mass above;
  const uint32_t key = radix_select(shared, probs, n, target, mass, &above);
  const float threshold = std::bit_cast<float>(key & 0x7FFFFFFFu);  // probabilities aren't negative
  const Mass each = mass(threshold) > 0 ? mass(threshold) : 1;
  const Mass missing = target > above ? target - above : 0;
  const auto n_ties = static_cast<int64_t>((missing + each - 1) / each);
  const int64_t kept_ties = n_ties > 0 ? n_ties : 1;

  // The rank of a tie: the number of ties with lower ids.
  const int64_t range = (n + kThreads - 1) / kThreads;
  const int64_t begin = threadIdx.x * range;
  const int64_t end = begin + range < n ? begin + range : n;
  int ties = 0;
  for (int64_t i = begin; i < end; ++i) ties += probs[i] == threshold;
  shared.counts[threadIdx.x + 1] = ties;
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.counts[0] = 0;
    for (int t = 1; t <= kThreads; ++t) shared.counts[t] += shared.counts[t - 1];
  }
  __syncthreads();
  int64_t rank = shared.counts[threadIdx.x];
  float sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    const float p = probs[i];
    const bool is_kept = p > threshold || (p == threshold && rank++ < kept_ties);
    if (!is_kept) probs[i] = 0;
    sum += is_kept ? p : 0;
  }
  const float scale = 1 / block_sum(shared.warp_values, kWarps, sum);
  for (int64_t i = begin; i < end; ++i) probs[i] *= scale;
}

struct ProbsParams {
  float temperature, top_p;
  int64_t top_k;
  int64_t n;
  float* logits;  // [rows, n]
  int* finite;    // [rows]
};

__global__ void __launch_bounds__(kThreads, 1) probs_kernel(ProbsParams params) {
  launch_dependents();
  grid_dependency_wait();
  Shared& shared = *shared_memory<Shared>();
  const int64_t n = params.n;
  float* row = params.logits + blockIdx.x * n;
  float max = -INFINITY, nonfinite = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    max = fmaxf(max, row[i]);
    nonfinite += row[i] * 0.0f;
  }
  nonfinite = block_sum(shared.warp_values, kWarps, nonfinite);
  max = block_max(shared.warp_values, kWarps, max);
  const bool is_finite = nonfinite == 0;
  if (threadIdx.x == 0) params.finite[blockIdx.x] = is_finite;
  if (!is_finite) return;

  uint32_t threshold = 0;
  Mass above;
  if (params.top_k > 0 && params.top_k < n)
    threshold = radix_select(shared, row, n, static_cast<Mass>(params.top_k), [](float) { return Mass{1}; }, &above);
  const float inv_temperature = 1 / params.temperature;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    row[i] = sort_key(row[i]) >= threshold ? expf((row[i] - max) * inv_temperature) : 0;
    sum += row[i];
  }
  const float scale = 1 / block_sum(shared.warp_values, kWarps, sum);
  for (int64_t i = threadIdx.x; i < n; i += kThreads) row[i] *= scale;
  __syncthreads();
  if (params.top_p < 1) apply_top_p(shared, row, n, params.top_p);
}

}  // namespace

void logits_to_probs(Launcher& launcher, const Sampling& sampling, int n_rows, int64_t n, float* logits, int* finite) {
  launcher.run(probs_kernel, dim3(n_rows), kThreads, sizeof(Shared),
               {sampling.temperature, sampling.top_p, sampling.top_k, n, logits, finite});
}

}  // namespace recycle::cuda
