// Logits to probabilities: temperature, top-k, top-p, renormalised. A block a row.
//
//   logits [rows, n] float32 -> the same array, probabilities
//
// Bounded by a few passes over the row, which lies in the L2 cache (49,152 tokens: 196 kB), each by 1,024 threads.
// Both cuts are found from the top bits of the numbers down, 8 at a time, with a histogram in shared memory: of
// counts for top-k, of probabilities for top-p. Probabilities are added up as integers (in units of 2^-40),
// since the order of atomic additions isn't fixed and those of floats would show it. Rejected: sorting.
#include "sampling.h"

#include "gemv.cuh"

namespace recycle::cuda {

namespace {

constexpr int kRowThreads = 1024;
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int kBins = 256;
constexpr float kUnits = 0x1p40f;

using Mass = unsigned long long;

// Order of floats as order of integers.
RECYCLE_DEVICE uint32_t key_of(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

struct Shared {
  // A weight's bits 0 to 13, 14 to 27 and the rest, added up apart: 32 bits have native atomics, and hold the sums
  // of 2^18 tokens.
  unsigned bins[3][kBins];
  float parts[kRowWarps];
  Mass above;  // counted or summed up above the bin that was chosen
  int bin;
  int counts[kRowThreads + 1];
};

// f over all warps' values, in their order, to all threads.
template <class F>
RECYCLE_DEVICE float over_block(Shared& shared, float warp_value, F f) {
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared.parts[threadIdx.x / kWarp] = warp_value;
  __syncthreads();
  float value = shared.parts[0];
  for (int w = 1; w < kRowWarps; ++w) value = f(value, shared.parts[w]);
  return value;
}

// The largest key such that the keys at or above it weigh `target` or more; *above: the weight of those above it.
template <class Weight>
RECYCLE_DEVICE uint32_t find_cut(Shared& shared, const float* values, int64_t n, Mass target,
                                 Weight weight, Mass* above) {
  uint32_t prefix = 0;
  Mass passed = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 3 * kBins; i += kRowThreads)
      shared.bins[i / kBins][i % kBins] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kRowThreads) {
      const uint32_t key = key_of(values[i]);
      if (shift < 24 && key >> (shift + 8) != prefix) continue;
      const Mass mass = weight(values[i]);
      const uint32_t bin = key >> shift & (kBins - 1);
      const unsigned parts[3] = {static_cast<unsigned>(mass & 0x3FFF),
                                 static_cast<unsigned>(mass >> 14 & 0x3FFF),
                                 static_cast<unsigned>(mass >> 28)};
      for (int part = 0; part < 3; ++part)
        if (parts[part] != 0) atomicAdd(&shared.bins[part][bin], parts[part]);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Mass sum = passed;
      int bin = kBins - 1;
      const auto mass_of = [&](int i) {
        return shared.bins[0][i] + (Mass{shared.bins[1][i]} << 14) +
               (Mass{shared.bins[2][i]} << 28);
      };
      for (; bin > 0; --bin) {
        const Mass mass = mass_of(bin);
        if (sum + mass >= target) break;
        sum += mass;
      }
      shared.bin = bin;
      shared.above = sum;
    }
    __syncthreads();
    prefix = prefix << 8 | static_cast<uint32_t>(shared.bin);
    passed = shared.above;
    __syncthreads();
  }
  *above = passed;
  return prefix;
}

// Keeps the most probable tokens whose sum reaches top_p; of those as probable as the last, the lower ids.
RECYCLE_DEVICE void keep_nucleus(Shared& shared, float* probs, int64_t n, float top_p) {
  const auto mass = [](float p) { return static_cast<Mass>(p * kUnits); };
  const auto target = static_cast<Mass>(static_cast<double>(top_p) * kUnits);
  Mass above;
  const uint32_t cut = find_cut(shared, probs, n, target, mass, &above);
  const float least = std::bit_cast<float>(cut & 0x7FFFFFFFu);  // probabilities aren't negative
  const Mass each = mass(least) > 0 ? mass(least) : 1;
  const Mass missing = target > above ? target - above : 0;
  const auto wanted = static_cast<int64_t>((missing + each - 1) / each);

  // How many as probable as the cut come before each thread's tokens.
  const int64_t share = (n + kRowThreads - 1) / kRowThreads;
  const int64_t begin = threadIdx.x * share;
  const int64_t end = begin + share < n ? begin + share : n;
  int equal = 0;
  for (int64_t i = begin; i < end; ++i) equal += probs[i] == least;
  shared.counts[threadIdx.x + 1] = equal;
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.counts[0] = 0;
    for (int t = 1; t <= kRowThreads; ++t) shared.counts[t] += shared.counts[t - 1];
  }
  __syncthreads();
  int64_t rank = shared.counts[threadIdx.x];
  float sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    const float p = probs[i];
    const bool kept = p > least || (p == least && rank++ < (wanted > 0 ? wanted : 1));
    if (!kept) probs[i] = 0;
    sum += kept ? p : 0;
  }
  const float total = over_block(shared, warp_sum(sum), [](float a, float b) { return a + b; });
  const float scale = 1 / total;
  for (int64_t i = begin; i < end; ++i) probs[i] *= scale;
}

struct Cuts {
  float temperature, top_p;
  int64_t top_k;
};

__global__ void __launch_bounds__(kRowThreads, 1)
    distribution_kernel(Cuts cuts, int64_t n, float* logits, int* finite) {
  let_next_start();
  wait_for_previous();
  Shared& shared = *shared_memory<Shared>();
  float* row = logits + blockIdx.x * n;
  float largest = -INFINITY, poison = 0;
  for (int64_t i = threadIdx.x; i < n; i += kRowThreads) {
    largest = fmaxf(largest, row[i]);
    poison += row[i] * 0.0f;
  }
  const auto add = [](float a, float b) { return a + b; };
  poison = over_block(shared, warp_sum(poison), add);
  largest = over_block(shared, warp_max(largest), [](float a, float b) { return fmaxf(a, b); });
  if (threadIdx.x == 0) finite[blockIdx.x] = poison == 0;
  if (!(poison == 0)) return;

  uint32_t least = 0;
  if (cuts.top_k > 0 && cuts.top_k < n) {
    Mass above;
    least = find_cut(
        shared, row, n, static_cast<Mass>(cuts.top_k), [](float) { return Mass{1}; }, &above);
  }
  const float cold = 1 / cuts.temperature;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kRowThreads) {
    row[i] = key_of(row[i]) >= least ? expf((row[i] - largest) * cold) : 0;
    sum += row[i];
  }
  const float scale = 1 / over_block(shared, warp_sum(sum), add);
  for (int64_t i = threadIdx.x; i < n; i += kRowThreads) row[i] *= scale;
  __syncthreads();
  if (cuts.top_p < 1) keep_nucleus(shared, row, n, cuts.top_p);
}

}  // namespace

void to_distributions(Launcher& launcher, const Sampling& sampling, int rows, int64_t n,
                      float* logits, int* finite) {
  launcher.run(distribution_kernel, dim3(rows), kRowThreads, sizeof(Shared),
               Cuts{sampling.temperature, sampling.top_p, sampling.top_k}, n, logits, finite);
}

}  // namespace recycle::cuda
