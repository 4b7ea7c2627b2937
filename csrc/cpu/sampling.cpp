// Sampling on dense probabilities: logits [n]  ->  probabilities [n]  ->  token. A vocabulary of 49,152 is 196 kB,
// which stays in the L2 cache.
//
// Bounded by the exponentials. Every sum over the vocabulary has several chains of additions; top-k selects from a few
// times k logits, and top-p sorts only the tokens that can be in the nucleus. Tried and rejected: sorting the whole
// vocabulary (3 ms).
#include "sampling.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

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

// Whether no value is NaN or infinite. Sixteen sums, because one chain of additions takes four cycles a value.
bool all_finite(const float* values, int64_t n) {
  float sums[kPanelRows] = {};
  int64_t i = 0;
  for (; i + kPanelRows <= n; i += kPanelRows)
    for (int64_t lane = 0; lane < kPanelRows; ++lane) sums[lane] += values[i + lane] * 0.0f;
  for (; i < n; ++i) sums[0] += values[i] * 0.0f;
  return std::all_of(sums, sums + kPanelRows, [](float sum) { return sum == 0; });
}

// The k-th largest of values [n], 0 < k < n. At least k values are no smaller than the k-th largest of the maxima of some
// blocks, so that only those need to be selected from: some k in place of n. selected: [n], scratch.
float kth_largest(const float* values, int64_t n, int64_t k, float* selected) {
  constexpr int64_t kBlockSize = 64;
  const int64_t blocks = n / kBlockSize;
  float bound = -std::numeric_limits<float>::infinity();
  const auto select = [&](int64_t count) {
    std::nth_element(selected, selected + k - 1, selected + count, std::greater<float>());
    return selected[k - 1];
  };
  if (k <= blocks) {
    for (int64_t b = 0; b < blocks; ++b) selected[b] = kernels().max_value(values + b * kBlockSize, kBlockSize);
    bound = select(blocks);
  }
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i)
    if (values[i] >= bound) selected[count++] = values[i];
  return select(count);
}

// Sums of kDrawBlock probabilities at a time, eight of them side by side.
constexpr int64_t kDrawBlock = 512;
double block_sum(const float* probs, int64_t n) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int64_t lane = 0; lane < 8; ++lane) sums[lane] += static_cast<double>(probs[i + lane]);
  for (; i < n; ++i) sums[0] += static_cast<double>(probs[i]);
  return std::accumulate(sums, sums + 8, 0.0);
}

}  // namespace

bool to_distribution(const Sampling& sampling, const float* logits, int64_t n, float* probs, int32_t* order) {
  const Kernels& isa = kernels();
  if (!all_finite(logits, n)) return false;

  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  const bool cuts = sampling.top_k > 0 && sampling.top_k < n;
  const float min_logit = cuts ? kth_largest(logits, n, sampling.top_k, probs) : kMinusInfinity;
  for (int64_t i = 0; i < n; ++i) probs[i] = logits[i] >= min_logit ? logits[i] : kMinusInfinity;
  const float maximum = isa.max_value(probs, n);
  const float total = isa.exp_sum(probs, n, maximum, 1 / sampling.temperature, probs);
  const float scale = 1 / total;
  for (int64_t i = 0; i < n; ++i) probs[i] *= scale;
  if (sampling.top_p < 1) keep_nucleus(sampling.top_p, probs, n, order);
  return true;
}

int64_t draw(const float* probs, int64_t n, float u) {
  const auto sum_at = [&](int64_t begin) { return block_sum(probs + begin, std::min(kDrawBlock, n - begin)); };
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kDrawBlock) total += sum_at(begin);
  const double target = u * total;
  double sum = 0;
  int64_t begin = 0;  // of the block in which the sum passes the target
  for (; begin + kDrawBlock < n; begin += kDrawBlock) {
    const double next = sum + sum_at(begin);
    if (next > target) break;
    sum = next;
  }
  for (int64_t i = begin; i < n; ++i) {
    if (probs[i] <= 0) continue;
    sum += probs[i];
    if (sum > target) return i;
  }
  // The sums were rounded in another order: the last token that is possible.
  int64_t last = n - 1;
  while (last > 0 && probs[last] <= 0) --last;
  return last;
}

}  // namespace recycle
