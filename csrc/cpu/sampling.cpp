// Sampling on dense probabilities: logits [n]  ->  probabilities [n]  ->  token. A vocabulary of 49,152 is 196 kB,
// which stays in the L2 cache.
//
// Bounded by the exponentials (vectorised) and by the selection of top-k. Top-p sorts only the tokens that can be in
// the nucleus. Tried and rejected: sorting the whole vocabulary (3 ms).
#include "sampling.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

#include "kernels.h"

namespace recycle {

namespace {

// Nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751): keeps the most probable tokens whose sum reaches top_p.
// Among equals the lower id comes first.
void keep_nucleus(float top_p, float* probs, int64_t n, int32_t* order) {
  // All tokens at or below the threshold weigh at most 1 - top_p together, so the others reach top_p.
  const float threshold = (1 - top_p) / static_cast<float>(n);
  int64_t candidates = 0;
  for (int64_t i = 0; i < n; ++i)
    if (probs[i] > threshold) order[candidates++] = static_cast<int32_t>(i);
  std::sort(order, order + candidates,
            [probs](int32_t a, int32_t b) { return probs[a] != probs[b] ? probs[a] > probs[b] : a < b; });
  double sum = 0;
  int64_t size = 0;  // of the nucleus
  while (size < candidates && (size == 0 || sum < top_p)) sum += probs[order[size++]];
  std::sort(order, order + size);
  const auto scale = static_cast<float>(1 / sum);
  int64_t next = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool in_nucleus = next < size && order[next] == i;
    probs[i] = in_nucleus ? probs[i] * scale : 0;
    next += in_nucleus;
  }
}

}  // namespace

bool to_distribution(const Sampling& sampling, const float* logits, int64_t n, float* probs, int32_t* order) {
  const Kernels& isa = kernels();
  float nonfinite = 0;
  for (int64_t i = 0; i < n; ++i) nonfinite += logits[i] * 0.0f;
  if (!(nonfinite == 0)) return false;

  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  float min_logit = kMinusInfinity;
  if (sampling.top_k > 0 && sampling.top_k < n) {
    std::memcpy(probs, logits, n * sizeof(float));
    std::nth_element(probs, probs + sampling.top_k - 1, probs + n, std::greater<float>());
    min_logit = probs[sampling.top_k - 1];
  }
  for (int64_t i = 0; i < n; ++i) probs[i] = logits[i] >= min_logit ? logits[i] : kMinusInfinity;
  const float maximum = isa.max_value(probs, n);
  const float total = isa.exp_sum(probs, n, maximum, 1 / sampling.temperature, probs);
  const float scale = 1 / total;
  for (int64_t i = 0; i < n; ++i) probs[i] *= scale;
  if (sampling.top_p < 1) keep_nucleus(sampling.top_p, probs, n, order);
  return true;
}

int64_t draw(const float* probs, int64_t n, float u) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += probs[i];
  const double target = u * total;
  double sum = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (probs[i] <= 0) continue;
    sum += probs[i];
    last = i;
    if (sum > target) return i;
  }
  return last;
}

}  // namespace recycle
