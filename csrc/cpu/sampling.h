// From logits to probabilities to a token.
#pragma once

#include <cstdint>

#include "recycle/head.h"

namespace recycle {

// Turns logits [n] into probabilities [n]: temperature, top_k, top_p, renormalized. order: [n], scratch. False if a
// logit is nonfinite.
bool to_distribution(const Sampling& sampling, const float* logits, int64_t n, float* probs, int32_t* order);

// Inverse transform sampling: the first token whose cumulative probability exceeds u, which is in [0, 1).
int64_t draw(const float* probs, int64_t n, float u);

}  // namespace recycle
